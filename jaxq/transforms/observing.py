"""Calibration over data: what a model's activations cover, and static scales from it.

_, state = jaxq.observe(fn, rules)(params, batch)       for each batch
state = state.merge(other)                              over batches, devices, hosts
static = jaxq.freeze(rules, state)
y = jaxq.quantize_fn(fn, static)(params, batch)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxq import calibration
from jaxq.calibration import Calibrated
from jaxq.recipes import Quantizer
from jaxq.transforms.functions import run_planned
from jaxq.transforms.planning import plan
from jaxq.transforms.rules import Frozen, Rules, as_rules

__all__ = ["Observed", "freeze", "observe"]

Quantizers = tuple[Quantizer | None, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["states"], meta_fields=["quantizers"]
)
@dataclasses.dataclass(frozen=True)
class Observed:
    """States of calibration of a model's products: a pytree.

    Attributes:
      states: by the products' names, the states of both operands, None for those that need none.
        Products in a scan over layers have a leading axis, one state a layer.
      quantizers: by the products' names, the quantizers that the states are for.
    """

    states: Mapping[str, tuple[Any, ...]]
    quantizers: tuple[tuple[str, Quantizers, int], ...]

    def merge(self, later: "Observed") -> "Observed":
        """The states of all that both have seen. Associative.

        Raises:
          ValueError: the other one is of another model or other rules.
        """
        if self.quantizers != later.quantizers:
            raise ValueError(
                "Observed.merge: both must be of one function and one set of rules, got products "
                f"{', '.join(self.states)} and {', '.join(later.states)}."
            )
        states = self._map(calibration.merge, self.states, later.states)
        return Observed(states, self.quantizers)

    def gather(self, axis_name: str) -> "Observed":
        """The states of all devices along an axis of `jax.shard_map` or `jax.vmap`, merged."""
        states = self._map(
            lambda state, recipe: calibration.gather(state, recipe, axis_name), self.states
        )
        return Observed(states, self.quantizers)

    def finalize(self) -> dict[str, tuple[Calibrated | None, ...]]:
        """Scales, and zero points, of the operands that have states."""
        return self._map(calibration.finalize, self.states)

    def _map(self, function: Callable[..., Any], *states: Mapping[str, Any]) -> dict[str, Any]:
        result = {}
        for name, quantizers, leading in self.quantizers:
            parts = []
            for i, quantizer in enumerate(quantizers):
                if quantizer is None:
                    parts.append(None)
                    continue
                own = functools.partial(_called, function, quantizer)
                for _ in range(leading):
                    own = jax.vmap(own)
                parts.append(own(*(one[name][i] for one in states)))
            result[name] = tuple(parts)
        return result


def _called(function: Callable[..., Any], quantizer: Quantizer, *states: Any) -> Any:
    return function(*states, quantizer)


def observe(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    argnums: int | Sequence[int] = 0,
    key: jax.Array | None = None,
) -> Callable[..., Any]:
    """A quantized function that also says what range its activations cover.

    What is observed are the operands that are no weights and whose quantizer has one scale a
    tensor: the only ones for which a scale can be known in advance. Finer granularities, such as a
    scale a token, take theirs from the data in every call, and so do weights.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: likewise; the `range` of a quantizer is its calibrator.
      argnums: as in `jaxq.quantize_fn`.
      key: likewise.

    Returns:
      `(*args) -> (what jaxq.quantize_fn gives, Observed)`. Products of layers that are stacked for
      a scan have states of their own. The turns of any other loop share one, so do layers that a
      `fori_loop` picks from stacked weights by their number, and the devices of a `shard_map`,
      each of which counts as a batch.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: likewise; or no operand can be observed.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> params, rules = {"w": jnp.eye(2)}, [("w", jaxq.DotRecipe("int8_tensor", "int8_channel"))]
      >>> y, state = jaxq.observe(model, rules)(params, jnp.array([[1.0, -2.54]]))
      >>> static = jaxq.freeze(rules, state)
      >>> jaxq.quantize_fn(model, static)(params, jnp.array([[0.021, 9.0]]))
      Array([[0.02, 2.54]], dtype=float32)
    """

    @functools.wraps(fn, updated=())
    def observed(*args: Any, **kwargs: Any) -> Any:
        planned = plan("observe", fn, rules, argnums, args, kwargs)
        calibrated = [a for a in planned.chosen if a is not None and any(a.calibrated)]
        if not calibrated:
            raise ValueError(
                "observe: no activation has one scale a tensor, so there is nothing to calibrate. "
                "Use a recipe such as jaxq.DotRecipe('int8_tensor', 'int8_channel')."
            )
        results, states = run_planned("observe", planned, key, observing=True)
        quantizers = tuple(
            (a.name, tuple(known and known[1] for known in a.calibrated), len(a.stacked))
            for a in calibrated
        )
        states = {a.name: states[a.name] for a in calibrated}
        return planned.traced.rebuild(results), Observed(states, quantizers)

    return observed


def freeze(rules: Rules, state: Observed) -> Frozen:
    """Rules whose products have the scales that were observed.

    Args:
      rules: what `jaxq.observe` had.
      state: what it gave, merged over all data.

    Returns:
      Rules for `jaxq.quantize_fn`: a pytree, so that they can be arguments of a jitted function.
    """
    return Frozen(as_rules("freeze", rules), state.finalize())
