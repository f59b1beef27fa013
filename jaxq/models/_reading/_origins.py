"""The origin of a value in a program: the parameters of which it is a view or a function.

A view shows elements of parameters as they are: transposed, reshaped, sliced, split, concatenated,
stacked, repeated, or converted to another dtype. Each `Piece` of a view is a box that holds
elements of one leaf. A value computed only from parameters and constants is not a view; its pieces
are those of the leaves that enter it element by element, as `w` in `w + a @ b`.

`_views` follows origins through the operations of a program.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["CONSTANT", "Digit", "Digits", "Origin", "Piece", "of_leaf", "size_of"]


@dataclasses.dataclass(frozen=True)
class Digit:
    """A digit of the index along one axis of a leaf, and the range of its values in a view.

    The index of a leaf's axis of length 12 that is reshaped to (3, 4) has two digits: of 3 values
    with the stride 4, and of 4 values with the stride 1.

    Attributes:
      axis: the leaf's axis, or None where the view repeats its elements.
      size: the number of values in the view.
      of: the number of values of the digit in the leaf.
      stride: the distance between neighbors along the leaf's axis.
      start: the first value in the view.
      flipped: True if the view shows the values in reverse.
    """

    axis: int | None
    size: int
    of: int
    stride: int = 1
    start: int = 0
    flipped: bool = False

    def split(self, size: int) -> "tuple[Digit, Digit] | None":
        """Splits the digit in two, the second with `size` values; None if its range prevents it."""
        if self.size % size or self.start % size or self.of % size:
            return None
        major_fields = {"stride": self.stride * size, "start": self.start // size}
        first = dataclasses.replace(
            self, size=self.size // size, of=self.of // size, **major_fields
        )
        return first, dataclasses.replace(self, size=size, of=size, start=0)

    def take(self, start: int, size: int) -> "Digit":
        """Returns the digit restricted to `size` values of the view, from `start` on."""
        start = self.size - start - size if self.flipped else start
        return dataclasses.replace(self, size=size, start=self.start + start)


Digits = tuple[Digit, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of a view that holds elements of one leaf.

    Attributes:
      path: the leaf's path.
      leaf: the leaf's index among the arguments' leaves.
      shape: the leaf's shape.
      axes: the digits that the index along each axis of the box consists of, the major one first,
        without digits of one value. None if no such digits describe the box.
      at: the box's first index along each axis of the view.
      steps: the conversions that may have changed values: dtypes, and the exponent and mantissa
        bits of `reduce_precision`.
      dtype: a dtype that represents the values: that of the leaf or of the last step.
      copies: the number of such boxes over all iterations of the scans.
    """

    path: str
    leaf: int
    shape: tuple[int, ...]
    axes: tuple[Digits, ...] | None
    at: tuple[int, ...]
    steps: tuple[Any, ...]
    dtype: Any
    copies: int = 1

    @property
    def box(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(map(size_of, self.axes or ()))

    @property
    def opaque(self) -> "Piece":
        """The piece with unknown digits."""
        return dataclasses.replace(self, axes=None, at=())

    def moved(self, axes: Sequence[Digits | None] | None, at: Sequence[int] = ()) -> "Piece":
        """Returns the piece with its digits replaced; it is opaque if any digit is None."""
        if axes is None or any(digits is None for digits in axes):
            return self.opaque
        # A digit with only one value is a fixed index.
        nontrivial = tuple(
            tuple(d for d in digits if d.size > 1) for digits in axes if digits is not None
        )
        return dataclasses.replace(self, axes=nontrivial, at=tuple(at) or (0,) * len(nontrivial))


@dataclasses.dataclass(frozen=True)
class Origin:
    """The parameters that a value comes from.

    Attributes:
      pieces: the boxes of a view; for a computed value, the pieces of the leaves from which it is
        computed element by element. In a scan over stacked layers, those of all iterations.
      computed: True if the value is not a view. Without sources it is a constant.
      sources: the paths and indices of all leaves that a computed value depends on.
      products: the products that a computed value depends on, by their numbers.
      scans: the depths of the scans in which the value differs between iterations.
    """

    pieces: tuple[Piece, ...] = ()
    computed: bool = False
    sources: tuple[tuple[str, int], ...] = ()
    products: frozenset[int] = frozenset()
    scans: tuple[int, ...] = ()

    @property
    def leaves(self) -> dict[str, int]:
        """All leaves that the value depends on, by their paths, those of the pieces first."""
        return {piece.path: piece.leaf for piece in self.pieces} | dict(self.sources)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the pieces."""
        return tuple(dict.fromkeys(piece.path for piece in self.pieces))

    @property
    def name(self) -> str:
        """The paths joined into one name, as reports show it."""
        return f"computed({', '.join(self.leaves)})" if self.computed else _join_paths(self.paths)

    @property
    def opaque(self) -> "Origin":
        """The origin, with opaque pieces."""
        return dataclasses.replace(self, pieces=tuple(piece.opaque for piece in self.pieces))

    def map_pieces(self, function: Callable[[Piece], Piece | None]) -> "Origin":
        """Returns the view with a function applied to all transparent pieces."""
        pieces = (piece if piece.axes is None else function(piece) for piece in self.pieces)
        return dataclasses.replace(self, pieces=tuple(p for p in pieces if p is not None))

    def rows(self, depth: int) -> "Origin":
        """Returns one row of the view, as an iteration of a scan over its rows receives it."""

        def row(piece: Piece) -> Piece:
            assert piece.axes is not None
            copies = piece.copies * size_of(piece.axes[0])
            return dataclasses.replace(piece.moved(piece.axes[1:], piece.at[1:]), copies=copies)

        return dataclasses.replace(self.map_pieces(row), scans=(*self.scans, depth))


CONSTANT = Origin(computed=True)


def of_leaf(path: str, leaf: int, shape: tuple[int, ...], dtype: Any) -> Origin:
    """Returns the view of a whole leaf."""
    axes = tuple((Digit(axis, n, n),) if n != 1 else () for axis, n in enumerate(shape))
    return Origin((Piece(path, leaf, shape, axes, (0,) * len(shape), (), dtype),))


def _join_paths(paths: Sequence[str]) -> str:
    """Joins paths into one, with common parts written once: `cell/{hf,hi}/kernel`."""
    if len(paths) < 2:
        return "".join(paths)
    parts = [path.split("/") for path in paths]
    shortest = min(map(len, parts)) - 1
    prefix_length = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    remaining = shortest - prefix_length
    suffix_length = next(
        (i for i in range(remaining) if len({p[-1 - i] for p in parts}) > 1), remaining
    )
    middle = ",".join("/".join(p[prefix_length : len(p) - suffix_length]) for p in parts)
    first = parts[0]
    return "/".join([*first[:prefix_length], f"{{{middle}}}", *first[len(first) - suffix_length :]])


def size_of(digits: Digits) -> int:
    return math.prod(digit.size for digit in digits)
