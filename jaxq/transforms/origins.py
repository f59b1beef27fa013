"""Where a value of a program comes from: the leaf of the parameters that it is a view of.

A view shows the elements of a leaf, all or some, each as it is, in another order or dtype. What is
computed from a leaf, even by adding zero, is no view of it.

To add an operation that keeps a view: a line in `_VIEWS`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

__all__ = ["Origin", "slice_of", "through"]


@dataclasses.dataclass(frozen=True)
class Origin:
    """A leaf, and which of its axes each axis of a view of it is.

    Attributes:
      path: the leaf's path.
      leaf: the leaf's place among the arguments' leaves.
      shape: the leaf's shape.
      turns: the scans, by their depth, that have another slice of the leaf at every turn.
      axes: for each axis of the view the axis of the leaf that it is, or None where the view
        repeats; None in all if an axis of the view is a part of one of the leaf, or several. An
        axis of the leaf that is missing has one index in the view.
    """

    path: str
    leaf: int
    shape: tuple[int, ...]
    axes: tuple[int | None, ...] | None
    turns: tuple[int, ...] = ()

    def at(self, axes: Sequence[int | None] | None) -> "Origin":
        """The view whose axes are axes of this one."""
        if self.axes is None or axes is None:
            return dataclasses.replace(self, axes=None)
        own = self.axes
        moved = tuple(None if axis is None else own[axis] for axis in axes)
        return dataclasses.replace(self, axes=moved)


def slice_of(origin: Origin | None, depth: int) -> Origin | None:
    """The view at one index of its first axis, another at every turn of a scan."""
    if origin is None:
        return None
    axes = None if origin.axes is None else range(1, len(origin.axes))
    return dataclasses.replace(origin.at(axes), turns=(*origin.turns, depth))


def through(eqn: Any, origins: Sequence[Origin | None]) -> list[Origin | None]:
    """The origins of an equation's results, from those of its operands."""
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return list(origins)
    if name not in _VIEWS or origins[0] is None:
        return [None] * len(eqn.outvars)
    origin, before = origins[0], eqn.invars[0].aval.shape
    axes = _VIEWS[name](eqn.params, before, eqn.outvars[0].aval.shape)
    return [origin.at(axes)]


def _same(params: Any, before: tuple, after: tuple) -> Sequence[int | None]:
    del params, after
    return range(len(before))


def _transpose(params: Any, before: tuple, after: tuple) -> Sequence[int | None]:
    del before, after
    return params["permutation"]


def _squeeze(params: Any, before: tuple, after: tuple) -> Sequence[int | None]:
    del after
    return [axis for axis in range(len(before)) if axis not in params["dimensions"]]


def _broadcast(params: Any, before: tuple, after: tuple) -> Sequence[int | None]:
    axes: list[int | None] = [None] * len(after)
    for axis, to in enumerate(params["broadcast_dimensions"]):
        axes[to] = axis if before[axis] == after[to] else None
    return axes


def _reshape(params: Any, before: tuple, after: tuple) -> Sequence[int | None] | None:
    del params
    long = [axis for axis, n in enumerate(before) if n != 1]
    if [n for n in before if n != 1] != [n for n in after if n != 1]:
        return None
    left = iter(long)
    return [None if n == 1 else next(left) for n in after]


def _slice(params: Any, before: tuple, after: tuple) -> Sequence[int | None] | None:
    del params
    if any(m not in (1, n) for n, m in zip(before, after, strict=True)):
        return None
    return [axis if m == n else None for axis, (n, m) in enumerate(zip(before, after, strict=True))]


def _gather(params: Any, before: tuple, after: tuple) -> Sequence[int | None] | None:
    """A gather at one place is a slice; one at many is a look-up, and no view."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if numbers.operand_batching_dims or len(after) != len(numbers.offset_dims):
        return None
    axes = _slice({}, before, sizes)
    if axes is None:
        return None
    return [axis for i, axis in enumerate(axes) if i not in numbers.collapsed_slice_dims]


_VIEWS: MappingProxyType[str, Callable[..., Sequence[int | None] | None]] = MappingProxyType(
    {
        "broadcast_in_dim": _broadcast,
        "convert_element_type": _same,
        "copy": _same,
        "dynamic_slice": _slice,
        "gather": _gather,
        "pvary": _same,
        "reduce_precision": _same,
        "reshape": _reshape,
        "reshard": _same,
        "rev": _same,
        "sharding_constraint": _same,
        "slice": _slice,
        "squeeze": _squeeze,
        "stop_gradient": _same,
        "transpose": _transpose,
    }
)
