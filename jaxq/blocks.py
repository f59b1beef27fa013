"""Granularity: which elements of a tensor share a scale.

Each one cuts a tensor into equal blocks. The tensor is then seen as `[n0 / b0, b0, n1 / b1, b1, …]`
by a reshape that moves nothing, in which every second axis lies within a block. So a whole tensor,
channels, tokens, 1-D blocks on any axis and tiles are one case, and none needs a transpose.

To add one: a frozen dataclass with `block`, listed in `Granularity`.
"""

import dataclasses
import itertools
from typing import TypeAlias

import jax
import numpy as np
from jax import lax

__all__ = ["Cut", "Granularity", "PerBlock", "PerChannel", "PerTensor", "PerToken"]


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The length of a block on each axis."""
        return shape


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for every index along the given axes.

    Attributes:
      axes: the axes that keep scales of their own, negative ones counted from the end. For a
        weight `[inputs, outputs]`, `(-1,)` gives one scale an output.

    Raises:
      ValueError: when used: an axis that the tensor lacks, or one named twice.
    """

    axes: int | tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", _tuple(self.axes))

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The length of a block on each axis."""
        kept = _axes(self, _tuple(self.axes), len(shape))
        return tuple(1 if axis in kept else n for axis, n in enumerate(shape))


@dataclasses.dataclass(frozen=True)
class PerToken:
    """One scale for every vector along the last axis: a token's, where that axis has the features.

    Raises:
      ValueError: when used on a scalar.
    """

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The length of a block on each axis."""
        _axes(self, (-1,), len(shape))
        return (*(1 for _ in shape[1:]), shape[-1])


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """One scale for every block of given sizes: groups of weights on an axis, or tiles on several.

    Attributes:
      sizes: the block's length on each of the axes: `32`, or `(128, 128)` for tiles.
      axes: which axes are cut, negative ones counted from the end; None means the last ones. On all
        others a block has length 1.
      pad: what happens where a size does not divide an axis. False: an error. True: the last block
        is shorter; it is filled up with zeros that change no scale and are cut off again.

    Raises:
      ValueError: sizes below 1, sizes and axes that differ in number; when used: an axis that the
        tensor lacks, or a size that does not divide one.

    Example:
      >>> PerBlock(32).block((4, 64)), PerBlock((16, 16)).block((8, 64, 64))
      ((1, 32), (1, 16, 16))
    """

    sizes: int | tuple[int, ...]
    axes: int | tuple[int, ...] | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        sizes = _tuple(self.sizes)
        axes = tuple(range(-len(sizes), 0)) if self.axes is None else _tuple(self.axes)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "axes", axes)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"PerBlock: `sizes` must be at least 1, got {sizes}.")
        if len(sizes) != len(axes):
            raise ValueError(f"PerBlock: one axis a size, got sizes {sizes} and axes {axes}.")

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The length of a block on each axis."""
        axes = _axes(self, _tuple(self.axes or ()), len(shape))
        sizes = dict(zip(axes, _tuple(self.sizes), strict=True))
        for axis, size in sizes.items():
            if shape[axis] % size and not self.pad:
                raise ValueError(
                    f"{self}: {size} does not divide axis {axis} of a tensor of shape {shape}. "
                    "Choose a size that does, or pad=True for a shorter last block."
                )
        # A block is no longer than its axis.
        return tuple(min(sizes.get(axis, 1), max(n, 1)) for axis, n in enumerate(shape))


Granularity: TypeAlias = PerTensor | PerChannel | PerToken | PerBlock


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _axes(owner: Granularity, axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Axes counted from the front, checked against a tensor's."""
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{owner}: axis {axis} needs a tensor of at least "
                f"{axis + 1 if axis >= 0 else -axis} axes, got {ndim}. Use PerTensor() for tensors "
                "without channels."
            )
    found = tuple(axis % ndim for axis in axes)
    if len(set(found)) != len(found):
        raise ValueError(
            f"{owner}: the axes must be distinct in a tensor of {ndim} axes. Name each once."
        )
    return found


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor's shape and the length of a block on each axis."""

    shape: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many blocks each axis has; the shape of the scales."""
        return tuple(
            1 if n == b else -(-n // b) for n, b in zip(self.shape, self.block, strict=True)
        )

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a split tensor that lie within a block."""
        return tuple(range(1, 2 * len(self.shape), 2))

    @property
    def sizes(self) -> np.ndarray:
        """How many of the tensor's elements each block has, in the form that `spread` gives."""
        sizes = np.ones((), np.float32)
        for n, b, count in zip(self.shape, self.block, self.counts, strict=True):
            lengths = np.minimum(b, n - b * np.arange(count, dtype=np.float32))
            sizes = sizes[..., None, None] * lengths[:, None]
        return sizes

    @property
    def inside(self) -> np.ndarray | None:
        """Which of a split tensor's elements are the tensor's own, to broadcast; None for all."""
        inside, whole = np.ones((), bool), True
        for n, b, count in zip(self.shape, self.block, self.counts, strict=True):
            own = (np.arange(count * b) < n).reshape(count, b)
            inside = inside[..., None, None] & (own if count * b > n else np.ones((1, 1), bool))
            whole = whole and count * b == n
        return None if whole else inside

    def split(self, x: jax.Array) -> jax.Array:
        """The tensor as `[n0 / b0, b0, n1 / b1, b1, …]`, the last block of an axis filled up."""
        pairs = list(zip(self.counts, self.block, strict=True))
        padding = [(0, c * b - n, 0) for n, (c, b) in zip(self.shape, pairs, strict=True)]
        if any(high for _, high, _ in padding):
            x = lax.pad(x, np.zeros((), x.dtype), padding)
        return x.reshape(tuple(itertools.chain(*pairs)))

    def merge(self, y: jax.Array) -> jax.Array:
        """A split tensor as it was."""
        whole = tuple(c * b for c, b in zip(self.counts, self.block, strict=True))
        y = y.reshape(whole)
        return y if whole == self.shape else lax.slice(y, [0] * len(whole), self.shape)

    def spread(self, scale: jax.Array) -> jax.Array:
        """Scales of shape `counts`, made to broadcast against a split tensor."""
        return scale.reshape(tuple(itertools.chain(*((c, 1) for c in self.counts))))
