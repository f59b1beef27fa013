"""Collection of the statistics of the inputs of all products of a model (`observe`)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import numpy as jnp

from jaxq._jax.serialization import pytree
from jaxq.models import (
    Assigned,
    ModelPlan,
    ProductInputs,
    Rules,
    as_array,
    build_program,
    plan,
    run_program,
    unassigned,
    weight_of,
)
from jaxq.ptq._statistics._collectors import MatrixForm, matrix_form, shared_inputs
from jaxq.ptq._statistics._statistics import Statistics

__all__ = ["ObservedInputs", "Targets", "find_targets", "observe"]


@pytree(static=("inputs",))
@dataclasses.dataclass(frozen=True)
class ObservedInputs(Mapping):
    """A mapping from product names to the statistics of their inputs. A pytree.

    Attributes:
      statistics: the statistics of each distinct input, under the name of the first product that
        reads it. Products in a scan over layers have a leading axis with one entry per layer.
      inputs: a pair for each product: its name, and its input's key in `statistics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> statistics = {"q": ptq.collect(jnp.array([[1.0, -3.0]]))}
      >>> seen = ptq.ObservedInputs(statistics, (("q", "q"), ("k", "q")))
      >>> [*seen], seen["k"].amax.tolist()
      (['q', 'k'], [1.0, 3.0])
    """

    statistics: Mapping[str, Statistics]
    inputs: tuple[tuple[str, str], ...]

    def __getitem__(self, name: str) -> Statistics:
        return self.statistics[dict(self.inputs)[name]]

    def __iter__(self) -> Any:
        return iter(dict(self.inputs))

    def __len__(self) -> int:
        return len(self.inputs)

    def merge(self, other: "ObservedInputs") -> "ObservedInputs":
        """Returns the statistics of both data sets together. Associative up to rounding errors.

        Raises:
          ValueError: if `other` comes from another model or other rules.
        """
        if self.inputs != other.inputs:
            names = ", ".join([*other][:3])
            raise ValueError(
                "ObservedInputs.merge: `other` must have the products of this state, got "
                f"{names}, ... Merge only states of one function and one set of rules."
            )
        return ObservedInputs(
            {
                name: statistics.merge(other.statistics[name])
                for name, statistics in self.statistics.items()
            },
            self.inputs,
        )

    def gather(self, axis_name: str) -> "ObservedInputs":
        """Merges the statistics of all devices along an axis of `jax.shard_map` or `jax.vmap`."""
        gathered = {
            name: statistics.gather(axis_name) for name, statistics in self.statistics.items()
        }
        return ObservedInputs(gathered, self.inputs)

    @property
    def unseen(self) -> tuple[str, ...]:
        """The names of products with a matrix that received no tokens. Requires concrete arrays."""
        return tuple(name for name in self if bool(jnp.any(self[name].tokens == 0)))


@dataclasses.dataclass(frozen=True)
class Targets:
    """The products of a model whose inputs are observed.

    Attributes:
      matrices: the products with a weight to quantize, by number.
      reasons: the reasons why other products with such a weight have no Hessian, by number.
      first: the number of the first product with the same input, by the number of each product.
    """

    matrices: Mapping[int, MatrixForm]
    reasons: Mapping[int, str]
    first: Mapping[int, int]

    def observing(self, chosen: Assigned, number: int) -> Assigned:
        """Returns an assignment that observes a product's input if it is the first to read it."""
        matrix = self.matrices.get(number)
        if matrix is None or self.first[number] != number:
            return chosen
        return dataclasses.replace(
            chosen, swapped=matrix.swapped, observers=(matrix.collector, None)
        )


def find_targets(planned: ModelPlan, hessian: bool = True) -> Targets:
    """Returns the products of a planned model whose weights the rules quantize."""
    matrices, reasons = {}, {}
    for product, assigned in zip(planned.products, planned.chosen, strict=True):
        weight = None if assigned is None else weight_of(product, assigned)
        if weight is None:
            continue
        matrix = matrix_form(product, weight.operand, hessian)
        if isinstance(matrix, str):
            reasons[product.number] = matrix
        else:
            matrices[product.number] = matrix
    return Targets(matrices, reasons, shared_inputs(planned.node, matrices))


def observe(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    argnums: int | Sequence[int] = 0,
    hessian: bool = True,
    mask: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Transforms a function to also return the statistics of the inputs of its products.

    The function is not quantized. A product is observed if the rules quantize its weight.
    Products that read the same array, such as those of queries, keys and values, share one entry.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`; the recipes are ignored, only the choice of weights matters.
      argnums: as in `jaxq.quantize_fn`.
      hessian: True (the default) to collect the sums of `x x^T`, which only solvers need.
      mask: a function of the arguments of `fn` that returns a boolean array, False for padding. Its
        shape must be that of the tokens of every observed product, such as `[batch, sequence]`, or
        that shape flattened. None (the default) uses all tokens.

    Returns:
      A function `(*args) -> (result of fn, ObservedInputs)`. Each layer of a scan over layers has
      its own statistics. The iterations of all other loops, and the devices of a `shard_map`, are
      merged.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`; if no product can be observed; or if the mask does not
        fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> model = lambda params, x: (x @ params["q"], x @ params["k"])
      >>> params = {"q": jnp.eye(2), "k": jnp.eye(2)}
      >>> y, seen = ptq.observe(model, "int8_channel")(params, jnp.array([[1.0, 2.0]]))
      >>> [*seen], len(seen.statistics), seen["k"].hessian.tolist()
      (['q', 'k'], 1, [[1.0, 2.0], [2.0, 4.0]])
    """

    @functools.wraps(fn, updated=())
    def observed(*args: Any, **kwargs: Any) -> Any:
        planned = plan("ptq.observe", fn, rules, argnums, args, kwargs)
        targets = find_targets(planned, hessian)
        if not targets.matrices:
            reason = next(iter(targets.reasons.values()), "no rule matches a weight")
            raise ValueError(
                "ptq.observe: `rules` must quantize the weight of at least one product, but "
                f"quantize none: {reason}. Add a rule for a kernel."
            )
        chosen = [
            targets.observing(unassigned(product), product.number)
            if product.number in targets.matrices
            else None
            for product in planned.products
        ]
        padding = None if mask is None else jnp.asarray(mask(*args, **kwargs))
        extra = ProductInputs.empty(padding)
        runnable = build_program(planned.node, chosen, bool(planned.packed))
        arrays = [planned.packed.get(i, x) for i, x in enumerate(planned.traced.arrays)]
        results, states = run_program(runnable, extra, arrays, observing=True)
        names = [product.name for product in planned.products]
        seen = {names[n]: states[names[n]][0] for n in targets.matrices if targets.first[n] == n}
        inputs = tuple((names[n], names[targets.first[n]]) for n in targets.matrices)
        return planned.traced.rebuild(list(map(as_array, results))), ObservedInputs(seen, inputs)

    return observed
