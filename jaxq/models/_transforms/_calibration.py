"""Calibration over data: the ranges of a model's activations, and static scales from them.

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

from jaxq._base.records import state_repr
from jaxq._jax.serialization import pytree
from jaxq.models._assigning import Observable, Observer
from jaxq.models._rules import Frozen, Rules, as_rules
from jaxq.models._transforms._planning import plan
from jaxq.models._transforms._quantize import run_planned
from jaxq.quantizers import calibration
from jaxq.quantizers.calibration import Calibrated
from jaxq.recipes import Recipe, records

__all__ = ["Observed", "freeze", "observe"]

_Recipes = tuple[Recipe | None, ...]


@pytree(static=("recipes",), kinds=records)
@dataclasses.dataclass(frozen=True)
class Observed:
    """The calibration states of a model's products. A pytree.

    Attributes:
      states: a mapping from product names to the states of both operands, None for an operand that
        needs no calibration. Products in a scan over layers have a leading axis, one state per
        layer.
      recipes: the product names, the recipes of both operands, and the number of leading axes.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> rules = jaxq.ProductRecipe("int8_tensor", "int8_channel")
      >>> _, state = jaxq.observe(model, rules)({"w": jnp.eye(2)}, jnp.array([[1.0, -2.54]]))
      >>> state.merge(state).finalize()["w"][0].scale.tolist()
      [[0.019999999552965164]]
    """

    states: Mapping[str, tuple[Any, ...]]
    recipes: tuple[tuple[str, _Recipes, int], ...]

    def __repr__(self) -> str:
        return state_repr(self, self.states)

    def merge(self, later: "Observed") -> "Observed":
        """Merges the observations of two states. Associative.

        Raises:
          ValueError: if `later` belongs to another model or other rules.
        """
        if self.recipes != later.recipes:
            raise ValueError(
                "Observed.merge: `later` must have the products and recipes of this state, got "
                f"{_first_names(later.states)}, not {_first_names(self.states)}. Merge only "
                "states of one function and one set of rules."
            )
        states = self._map(calibration.merge, self.states, later.states)
        return Observed(states, self.recipes)

    def gather(self, axis_name: str) -> "Observed":
        """Merges the states of all devices along an axis of `jax.shard_map` or `jax.vmap`."""
        states = self._map(
            lambda state, recipe: calibration.gather(state, recipe, axis_name), self.states
        )
        return Observed(states, self.recipes)

    def finalize(self) -> dict[str, tuple[Calibrated | None, ...]]:
        """Returns the scales and zero points of the operands that have states."""
        return self._map(calibration.finalize, self.states)

    def _map(self, function: Callable[..., Any], *states: Mapping[str, Any]) -> dict[str, Any]:
        result = {}
        for name, recipes, leading in self.recipes:
            parts = []
            for i, recipe in enumerate(recipes):
                if recipe is None:
                    parts.append(None)
                    continue
                mapped = functools.partial(_apply_with_recipe, function, recipe)
                for _ in range(leading):
                    mapped = jax.vmap(mapped)
                parts.append(mapped(*(state[name][i] for state in states)))
            result[name] = tuple(parts)
        return result


def _apply_with_recipe(function: Callable[..., Any], recipe: Recipe, *states: Any) -> Any:
    return function(*states, recipe)


def _recipe(observer: Observer | None) -> Recipe | None:
    return observer.recipe if isinstance(observer, Observable) else None


def _first_names(states: Mapping[str, Any]) -> str:
    """Returns the names of the first products of a state."""
    return ", ".join([*states][:3]) + (", ..." if len(states) > 3 else "")


def observe(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    argnums: int | Sequence[int] = 0,
    key: jax.Array | None = None,
) -> Callable[..., Any]:
    """Returns a quantized function that also returns the ranges of its activations.

    The observed operands are those that are not weights and whose recipe has one scale per
    tensor, because only their scales can be known in advance. Finer granularities, such as one
    scale per token, compute scales from the data in every call, and so do weights.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`; the `range` of a recipe is its calibrator.
      argnums: as in `jaxq.quantize_fn`.
      key: as in `jaxq.quantize_fn`.

    Returns:
      `(*args) -> (result of jaxq.quantize_fn, Observed)`. Each layer of a stack that is scanned
      has its own state. The iterations of any other loop share one state. So do layers that a
      `fori_loop` indexes in stacked weights, and the devices of a `shard_map`, each of which counts
      as a batch.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`; or if no operand can be observed.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> params = {"w": jnp.eye(2)}
      >>> rules = jaxq.ProductRecipe("int8_tensor", "int8_channel")
      >>> y, state = jaxq.observe(model, rules)(params, jnp.array([[1.0, -2.54]]))
      >>> static = jaxq.freeze(rules, state)
      >>> jaxq.quantize_fn(model, static)(params, jnp.array([[0.021, 9.0]]))
      Array([[0.02, 2.54]], dtype=float32)
    """

    @functools.wraps(fn, updated=())
    def observed(*args: Any, **kwargs: Any) -> Any:
        planned = plan("observe", fn, rules, argnums, args, kwargs)
        calibrated = [a for a in planned.chosen if a is not None and any(a.observers)]
        if not calibrated:
            raise ValueError(
                "observe: `rules` must give some activation a recipe with one scale per tensor, "
                "got none. Use, for example, jaxq.ProductRecipe('int8_tensor', 'int8_channel')."
            )
        results, states = run_planned("observe", planned, key, observing=True)
        recipes = tuple(
            (a.name, tuple(map(_recipe, a.observers)), len(a.stacked)) for a in calibrated
        )
        states = {a.name: states[a.name] for a in calibrated}
        return planned.traced.rebuild(results), Observed(states, recipes)

    return observed


def freeze(rules: Rules, state: Observed) -> Frozen:
    """Returns rules with static scales from calibration.

    Args:
      rules: the rules that were passed to `jaxq.observe`.
      state: the state that it returned, merged over all data.

    Returns:
      Rules for `jaxq.quantize_fn`: a pytree, so that they can be arguments of a jitted function.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> params, rules = {"w": jnp.eye(2)}, jaxq.ProductRecipe("int8_tensor", "int8_channel")
      >>> _, state = jaxq.observe(model, rules)(params, jnp.array([[1.0, -2.54]]))
      >>> [*freeze(rules, state).scales]
      ['w']
    """
    return Frozen(as_rules("freeze", rules), state.finalize())
