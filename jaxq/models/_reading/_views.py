"""Origins of values followed through the operations of a program.

To support another operation that preserves views, add a function to `VIEWS`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from jax import numpy as jnp

from jaxq.models._reading._origins import Digit, Digits, Origin, Piece, size_of

__all__ = ["CONVERSIONS", "JOINS", "VIEWS", "computed_origin", "through"]


def through(eqn: Any, origins: Sequence[Origin | None]) -> list[Origin | None]:
    """Returns the origins of an equation's results, given those of its operands."""
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return list(origins)
    # The other operands of a slice are its start indices.
    sources = origins[:1] if name in ("dynamic_slice", "gather") else origins
    views = [origin for origin in sources if origin is not None and not origin.computed]
    results = VIEWS[name](eqn, views) if name in VIEWS and len(views) == len(sources) else None
    if results is None:
        results = [computed_origin(eqn, sources if name == "dynamic_slice" else origins)]
        results *= len(eqn.outvars)
    return results


def computed_origin(eqn: Any, origins: Sequence[Origin | None]) -> Origin | None:
    """Returns the origin of an equation's result; None if an operand is data."""
    known = [origin for origin in origins if origin is not None]
    if len(known) != len(origins) or not eqn.outvars:
        return None
    shape, is_view = eqn.outvars[0].aval.shape, eqn.primitive.name in VIEWS
    pieces = [
        piece.opaque
        for variable, origin in zip(eqn.invars, known, strict=False)
        if is_view or _is_base(variable.aval.shape, shape, origin)
        for piece in origin.pieces
    ]
    return Origin(
        tuple(dict.fromkeys(pieces)),
        True,
        tuple(dict.fromkeys(source for origin in known for source in origin.leaves.items())),
        frozenset().union(*(origin.products for origin in known)),
        tuple(dict.fromkeys(depth for origin in known for depth in origin.scans)),
    )


def _is_base(shape: tuple, out: tuple, origin: Origin) -> bool:
    """Returns whether an operand has the result's shape and is not broadcast (a bias is)."""
    repeats = (
        digit.axis is None for piece in origin.pieces for axis in piece.axes or () for digit in axis
    )
    return shape == out and len(out) >= 2 and not any(repeats)


def _taken(digits: Digits, start: int, size: int) -> Digits | None:
    """Returns the digits of a range of an axis; None if digits cannot describe it."""
    if size == 1:
        return ()
    if size == size_of(digits):
        return digits
    first, *rest = digits
    inner = size_of(tuple(rest))
    if start // inner == (start + size - 1) // inner:
        return _taken(tuple(rest), start % inner, size)
    if start % inner or size % inner:
        return None
    return (first.take(start // inner, size // inner), *rest)


def _regrouped(digits: Digits, shape: Sequence[int]) -> list[Digits] | None:
    """Regroups row-major digits by the axes of another shape; None if an axis cuts a digit."""
    remaining, result = list(digits), []
    for n in reversed(shape):
        axis_digits: Digits = ()
        while n > 1:
            digit = remaining.pop()
            if n % digit.size:
                pair = digit.split(n) if digit.size % n == 0 else None
                if pair is None:
                    return None
                remaining.append(pair[0])
                digit = pair[1]
            axis_digits, n = (digit, *axis_digits), n // digit.size
        result.append(axis_digits)
    return result[::-1]


def _same(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    del eqn
    return [origins[0]]


def _convert(eqn: Any, origins: list[Origin]) -> list[Origin | None] | None:
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(after, jnp.floating):
        are_integers = all(jnp.issubdtype(dtype, jnp.integer) for dtype in (before, after))
        return [origins[0].opaque] if are_integers else None

    def converted(piece: Piece) -> Piece:
        if _holds(after, piece.dtype):
            return piece
        return dataclasses.replace(piece, steps=(*piece.steps, after), dtype=after)

    return [origins[0].map_pieces(converted)]


def _holds(dtype: Any, other: Any) -> bool:
    """Returns whether a floating dtype has all values of another dtype."""
    if not jnp.issubdtype(other, jnp.floating):
        return False
    wide, narrow = jnp.finfo(dtype), jnp.finfo(other)
    return (
        wide.nmant >= narrow.nmant
        and wide.maxexp >= narrow.maxexp
        and float(wide.smallest_subnormal) <= float(narrow.smallest_subnormal)
    )


def _reduce_precision(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    step = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    return [origins[0].map_pieces(lambda p: dataclasses.replace(p, steps=(*p.steps, step)))]


def _transpose(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    order = eqn.params["permutation"]
    return [origins[0].map_pieces(lambda piece: _with_axes(piece, order))]


def _parts(piece: Piece) -> tuple[tuple[Digits, ...], tuple[int, ...]]:
    assert piece.axes is not None
    return piece.axes, piece.at


def _with_axes(piece: Piece, order: Sequence[int]) -> Piece:
    """Returns a piece with some of its axes in a given order; omitted axes have length 1."""
    axes, at = _parts(piece)
    return piece.moved([axes[i] for i in order], [at[i] for i in order])


def _without(origin: Origin, removed: Sequence[int]) -> Origin:
    """Returns a view without some of its axes, all of length 1."""
    return origin.map_pieces(
        lambda piece: _with_axes(piece, [i for i in range(len(piece.at)) if i not in removed])
    )


def _squeeze(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    return [_without(origins[0], eqn.params["dimensions"])]


def _broadcast(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    where = {to: axis for axis, to in enumerate(eqn.params["broadcast_dimensions"])}

    def repeated(piece: Piece) -> Piece:
        axes, at = _parts(piece)
        digits = [
            axes[where[i]] if i in where and before[where[i]] == n else (Digit(None, n, n),)
            for i, n in enumerate(after)
        ]
        return piece.moved(digits, [at[where[i]] if i in where else 0 for i in range(len(after))])

    return [origins[0].map_pieces(repeated)]


def _reshape(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params["dimensions"] is not None or 0 in before:
        return [origins[0].opaque]
    groups = _groups(before, after)

    def reshaped(piece: Piece) -> Piece:
        axes: list[Digits] = []
        at: list[int] = []
        for ins, outs in groups:
            part = _of_group(piece, before, ins, [after[i] for i in outs])
            if part is None:
                return piece.opaque
            axes += part[0]
            at += part[1]
        return piece.moved(axes, at)

    return [origins[0].map_pieces(reshaped)]


def _groups(before: tuple, after: tuple) -> list[tuple[list[int], list[int]]]:
    """Returns the shortest runs of axes of two shapes that hold the same elements."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        ins, outs = [], []
        while not (ins or outs) or math.prod(before[k] for k in ins) != math.prod(
            after[k] for k in outs
        ):
            few = math.prod(before[k] for k in ins) <= math.prod(after[k] for k in outs)
            if j == len(after) or (few and i < len(before)):
                ins.append(i)
                i += 1
            else:
                outs.append(j)
                j += 1
        groups.append((ins, outs))
    return groups


def _of_group(
    piece: Piece, before: tuple, ins: list[int], after: list[int]
) -> tuple[list[Digits], list[int]] | None:
    """Returns the axes of a piece in one group of a reshape, and its start along each axis."""
    axes, at = _parts(piece)
    box, after = [size_of(axes[i]) for i in ins], list(after)
    begin = [0] * len(after)
    long = [k for k, i in enumerate(ins) if before[i] > 1]
    cut = [k for k in long if box[k] != before[ins[k]]]
    if cut:
        # Pieces of a leaf may be cut along the first axis longer than 1 only. In the result they
        # are then cut along its first such axis, if the cuts are multiples of its inner size.
        if cut != long[:1]:
            return None
        first = next(k for k, n in enumerate(after) if n > 1)
        inner = math.prod(after[first + 1 :])
        rest = math.prod(box[cut[0] + 1 :])
        start, size = at[ins[cut[0]]] * rest, box[cut[0]] * rest
        if start % inner or size % inner:
            return None
        begin[first], after[first] = start // inner, size // inner
    digits = _regrouped(tuple(d for i in ins for d in axes[i]), after)
    return None if digits is None else (digits, begin)


def _reverse(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    shape, reversed_axes = eqn.invars[0].aval.shape, eqn.params["dimensions"]

    def flip(piece: Piece) -> Piece:
        axes, at = _parts(piece)
        digits = [
            tuple(dataclasses.replace(d, flipped=not d.flipped) for d in axis)
            if i in reversed_axes
            else axis
            for i, axis in enumerate(axes)
        ]
        begin = [
            n - start - size if i in reversed_axes else start
            for i, (n, start, size) in enumerate(zip(shape, at, piece.box, strict=True))
        ]
        return piece.moved(digits, begin)

    return [origins[0].map_pieces(flip)]


def _cut(
    origin: Origin, starts: Sequence[int | None], sizes: Sequence[int], shape: tuple
) -> Origin:
    """Returns a box of a view; a start of None is known only when the program runs."""

    def cut(piece: Piece) -> Piece | None:
        axes, at = _parts(piece)
        result: list[Digits | None] = []
        begin, copies = [], piece.copies
        for digits, low, start, size, n in zip(axes, at, starts, sizes, shape, strict=True):
            length = size_of(digits)
            if size == n:
                result.append(digits)
                begin.append(low)
            elif start is None:
                result.append(() if size == 1 else None)
                begin.append(0)
                copies *= length
            else:
                first, last = max(start, low), min(start + size, low + length)
                if first >= last:
                    return None  # The box does not intersect this piece.
                result.append(_taken(digits, first - low, last - first))
                begin.append(first - start)
        return dataclasses.replace(piece.moved(result, begin), copies=copies)

    return origin.map_pieces(cut)


def _slice(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    shape, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if any(step != 1 for step in eqn.params["strides"] or ()) or 0 in after:
        return [origins[0].opaque]
    return [_cut(origins[0], eqn.params["start_indices"], after, shape)]


def _dynamic_slice(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    shape, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [_cut(origins[0], [None] * len(after), after, shape)]


def _gather(eqn: Any, origins: list[Origin]) -> list[Origin | None] | None:
    """Returns a gather at one index as a slice; a gather at several indices is no view."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    after = eqn.outvars[0].aval.shape
    if numbers.operand_batching_dims or len(after) != len(numbers.offset_dims):
        return None
    cut = _cut(origins[0], [None] * len(sizes), sizes, eqn.invars[0].aval.shape)
    return [_without(cut, numbers.collapsed_slice_dims)]


def _split(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    shape, axis = eqn.invars[0].aval.shape, eqn.params["axis"]
    results: list[Origin | None] = []
    starts = [0] * len(shape)
    for variable in eqn.outvars:
        results.append(_cut(origins[0], tuple(starts), variable.aval.shape, shape))
        starts[axis] += variable.aval.shape[axis]
    return results


def _concatenate(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    axis = eqn.params["dimension"]
    return [_side_by_side(origins, [v.aval.shape[axis] for v in eqn.invars], axis)]


def _stack(eqn: Any, origins: list[Origin]) -> list[Origin | None]:
    axis = eqn.params["axis"]

    def with_axis(piece: Piece) -> Piece:
        axes, at = _parts(piece)
        return piece.moved((*axes[:axis], (), *axes[axis:]), (*at[:axis], 0, *at[axis:]))

    return [
        _side_by_side(
            [origin.map_pieces(with_axis) for origin in origins], [1] * len(origins), axis
        )
    ]


def _side_by_side(origins: Sequence[Origin], lengths: Sequence[int], axis: int) -> Origin:
    """Joins views along an axis."""
    pieces, before = [], 0
    for origin, length in zip(origins, lengths, strict=True):

        def later(piece: Piece, before: int = before) -> Piece:
            at = tuple(n + before * (i == axis) for i, n in enumerate(piece.at))
            return dataclasses.replace(piece, at=at)

        pieces += origin.map_pieces(later).pieces
        before += length
    scans = dict.fromkeys(depth for origin in origins for depth in origin.scans)
    return Origin(tuple(pieces), scans=tuple(scans))


JOINS = MappingProxyType({"concatenate": _concatenate, "stack": _stack})


CONVERSIONS = MappingProxyType(
    {"convert_element_type": _convert, "reduce_precision": _reduce_precision}
)


VIEWS: MappingProxyType[str, Callable[..., list[Origin | None] | None]] = MappingProxyType(
    {
        **JOINS,
        **CONVERSIONS,
        "broadcast_in_dim": _broadcast,
        "copy": _same,
        "dynamic_slice": _dynamic_slice,
        "gather": _gather,
        "pvary": _same,
        "reshape": _reshape,
        "reshard": _same,
        "rev": _reverse,
        "sharding_constraint": _same,
        "slice": _slice,
        "split": _split,
        "squeeze": _squeeze,
        "stop_gradient": _same,
        "transpose": _transpose,
    }
)
