"""The weights of products as views of the leaves from which they are computed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from jaxq.ptq._calibration_runs._frames import Frame
from jaxq.ptq._calibration_runs._leaves import LeafKey
from jaxq.ptq._calibration_runs._stacked_weights import align_levels
from jaxq.quantizers import Levels

__all__ = ["TracedWeight", "WeightView", "trace_weight"]


class WeightView(NamedTuple):
    """The weight of a product as a view of leaves, with functions to move arrays between them.

    Attributes:
      keys: the leaves.
      x: the values of the weight, float32.
      levels: the levels of its elements.
      nearest: the nearest grid values.
      grid_values: the chosen grid values of the leaves.
      move: a function that moves arrays of the leaves' shapes to an array of the weight's shape.
      transpose: the transpose of `move`.
      counts: the number of times that each element of the leaves occurs in the weight.
    """

    keys: tuple[LeafKey, ...]
    x: jax.Array
    levels: Levels
    nearest: jax.Array
    grid_values: Sequence[jax.Array]
    move: Callable[..., jax.Array]
    transpose: Callable[[jax.Array], Sequence[jax.Array]]
    counts: Sequence[jax.Array]

    def move_back(
        self, x: jax.Array, others: Sequence[jax.typing.ArrayLike]
    ) -> dict[LeafKey, jax.Array]:
        """Moves an array of the weight's shape to arrays of the leaves' shapes.

        Args:
          x: the array.
          others: the values of elements that do not occur in the weight, one array per leaf.
        """
        parts = zip(self.keys, self.counts, self.transpose(x), others, strict=True)
        return {key: jnp.where(count > 0, new, other) for key, count, new, other in parts}


class TracedWeight(NamedTuple):
    """The result of `trace_weight`.

    Attributes:
      view: the weight, or None if it is not solved.
      reason: the reason why it is not solved, or "".
    """

    view: WeightView | None
    reason: str = ""


def trace_weight(frame: Frame, variable: Any) -> TracedWeight:
    """Returns the weight that is the value of a variable, or the reason why it is not solved."""
    if variable not in frame.fixed:
        return TracedWeight(None, "its weight changes in a loop")
    keys = frame.leaves_of(variable)
    if not keys:
        return TracedWeight(None, "its weight is not a view of a leaf")
    view = _weight_view(frame, variable, keys)
    if any(bool(jnp.max(count) > 1) for count in view.counts):
        return TracedWeight(None, "an element occurs several times in its weight")
    return TracedWeight(view)


def _weight_view(frame: Frame, variable: Any, keys: tuple[LeafKey, ...]) -> WeightView:
    states = [frame.leaves.state(key) for key in keys]
    values = [state.x for state in states]

    def move(*arrays: jax.Array) -> jax.Array:
        result = frame.move(variable, dict(zip(keys, arrays, strict=True)))
        assert result is not None, "the variable is a view of these leaves"
        return result

    x, nearest = move(*values), move(*(state.nearest for state in states))
    levels = jax.tree.map(move, *align_levels([state.levels for state in states]))
    if isinstance(frame.sources.get(variable), LeafKey):
        transpose, counts = _as_list, [jnp.ones(())]
    else:
        transpose = jax.vjp(move, *values)[1]
        counts = transpose(jnp.ones_like(x))
    return WeightView(
        keys=keys,
        x=x,
        levels=levels,
        nearest=nearest,
        grid_values=[state.grid_values for state in states],
        move=move,
        transpose=transpose,
        counts=counts,
    )


def _as_list(x: jax.Array) -> list[jax.Array]:
    """Returns an array as the only element of a list: the transpose for a weight that is a leaf."""
    return [x]
