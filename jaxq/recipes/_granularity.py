"""Granularities, which define the elements of a tensor that share a scale.

Each granularity divides a tensor into equal blocks. The tensor is then reshaped, without moving
data, to `[n0 / b0, b0, n1 / b1, b1, …]`, in which every second axis lies within a block. Whole
tensors, channels, tokens, 1-D blocks on any axis and tiles are therefore one case, and none needs a
transpose.

A granularity refers to a tensor's own axes: blocks and vectors lie along the last one. `along`
instead reads it relative to the axis that a product contracts, and returns the granularity on the
tensor's own axes.

To add a granularity, write a frozen dataclass with the methods `block` and `along` and list it in
`Granularity`.
"""

import dataclasses
from typing import TypeAlias

from jaxq._base.arguments import described, flags, is_integer
from jaxq._base.shapes import holds, is_symbolic

__all__ = ["Granularity", "PerBlock", "PerChannel", "PerTensor", "PerToken"]


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    Example:
      >>> PerTensor().block((4, 64))
      (4, 64)
    """

    @property
    def label(self) -> str:
        """The granularity in the names of recipes."""
        return "tensor"

    @property
    def on_last_axes(self) -> "PerTensor":
        """The granularity itself, which has no axes."""
        return self

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the length of a block on each axis."""
        return shape

    def along(self, axis: int, ndim: int) -> "PerTensor":
        """Returns the granularity itself, which has no direction."""
        del axis, ndim
        return self


@dataclasses.dataclass(frozen=True, repr=False)
class PerChannel:
    """One scale for each index along the given axes.

    Attributes:
      axes: the axes along which each index has its own scale; negative axes count from the end. For
        a weight `[inputs, outputs]`, `(-1,)` gives one scale per output.

    Raises:
      ValueError: when used, if the tensor lacks an axis or an axis is named twice.
      TypeError: if a field has another type.

    Example:
      >>> PerChannel(-1).block((4, 64))
      (4, 1)
    """

    axes: int | tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", _integers("PerChannel", "axes", self.axes))

    def __repr__(self) -> str:
        return f"PerChannel({'' if self.axes == (-1,) else _text(self.axes)})"

    @property
    def label(self) -> str:
        """The granularity in the names of recipes, which leave out the axes."""
        return "channel"

    @property
    def on_last_axes(self) -> "PerChannel":
        """The granularity with the same number of axes, counted from the last one."""
        return PerChannel(tuple(range(-len(_tuple(self.axes)), 0)))

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the length of a block on each axis."""
        channel_axes = _axes(self, _tuple(self.axes), len(shape))
        return tuple(1 if axis in channel_axes else n for axis, n in enumerate(shape))

    def along(self, axis: int, ndim: int) -> "PerChannel":
        """Returns the granularity with its axes counted among those other than `axis`.

        Args:
          axis: the contracted axis of a tensor.
          ndim: the number of axes of the tensor.

        Raises:
          ValueError: if the tensor lacks one of the axes.

        Example:
          >>> PerChannel(-1).along(-1, 2)  # One scale per output of a weight [outputs, inputs].
          PerChannel(-2)
        """
        others, axes = _others(self, axis, ndim), _tuple(self.axes)
        if not all(-len(others) <= a < len(others) for a in axes):
            raise ValueError(
                f"{self}: `axes` must index the axes other than the contracted axis {axis}; a "
                f"tensor of {ndim} axes has {len(others)}. Use PerToken() or PerTensor()."
            )
        return PerChannel(tuple(others[a] for a in axes))


@dataclasses.dataclass(frozen=True)
class PerToken:
    """One scale for each vector along the last axis: per token, if that axis holds the features.

    Raises:
      ValueError: when used on a scalar.

    Example:
      >>> PerToken().block((4, 64))
      (1, 64)
    """

    @property
    def label(self) -> str:
        """The granularity in the names of recipes."""
        return "token"

    @property
    def on_last_axes(self) -> "PerToken":
        """The granularity itself, which is on the last axis."""
        return self

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the length of a block on each axis."""
        _axes(self, (-1,), len(shape))
        return (*(1 for _ in shape[1:]), shape[-1])

    def along(self, axis: int, ndim: int) -> "PerToken | PerChannel":
        """Returns the granularity with one scale for each vector along `axis`.

        Args:
          axis: the contracted axis of a tensor.
          ndim: the number of axes of the tensor.

        Raises:
          ValueError: if the tensor lacks the axis.
        """
        others = _others(self, axis, ndim)
        return self if axis in (-1, ndim - 1) else PerChannel(others)


@dataclasses.dataclass(frozen=True, repr=False)
class PerBlock:
    """One scale for each block of given sizes: groups of weights on one axis, or tiles on several.

    Attributes:
      sizes: the block length on each of `axes`: `32`, or `(128, 128)` for tiles.
      axes: the axes that are divided into blocks; negative axes count from the end. None means the
        last axes. A block has length 1 on all other axes.
      pad: the behavior if a size does not divide its axis. False raises an error. True makes the
        last block shorter: it is padded with zeros, which change no scale and are removed again.

    Raises:
      ValueError: if a size is below 1, or sizes and axes differ in number; when used, if the tensor
        lacks an axis or a size does not divide its axis.
      TypeError: if a field has another type.

    Example:
      >>> PerBlock(32).block((4, 64)), PerBlock((16, 16)).block((8, 64, 64))
      ((1, 32), (1, 16, 16))
    """

    sizes: int | tuple[int, ...]
    axes: int | tuple[int, ...] | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        flags("PerBlock", "Omit it for the default.", pad=self.pad)
        sizes, axes = _integers("PerBlock", "sizes", self.sizes), self.axes
        axes = tuple(range(-len(sizes), 0)) if axes is None else _integers("PerBlock", "axes", axes)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "axes", axes)
        if not sizes or min(sizes) < 1:
            raise ValueError(
                f"PerBlock: `sizes` must be at least 1, got {sizes}. Use PerBlock(32), for example."
            )
        if len(sizes) != len(axes):
            raise ValueError(
                f"PerBlock: `axes` must have one axis per size, got sizes {sizes}, axes {axes}. "
                "Omit `axes` for the last axes."
            )

    def __repr__(self) -> str:
        axes = "" if self == self.on_last_axes else f", axes={_text(self.axes)}"
        return f"PerBlock({_text(self.sizes)}{axes}{', pad=True' if self.pad else ''})"

    @property
    def label(self) -> str:
        """The granularity in the names of recipes, which leave out the axes."""
        sizes = _tuple(self.sizes)
        return f"g{sizes[0]}" if len(sizes) == 1 else f"tile{'x'.join(map(str, sizes))}"

    @property
    def on_last_axes(self) -> "PerBlock":
        """The granularity with the same sizes on the last axes."""
        return dataclasses.replace(self, axes=None)

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the length of a block on each axis."""
        axes = _axes(self, _tuple(self.axes or ()), len(shape))
        sizes = dict(zip(axes, _tuple(self.sizes), strict=True))
        for axis, size in sizes.items():
            divides = holds(lambda n=shape[axis], size=size: n % size == 0)
            if is_symbolic(shape[axis]) and not divides:
                raise ValueError(
                    f"{self}: {size} must divide the symbolic axis {axis} of a tensor of shape "
                    f"{shape}. Export it with the length '{size}*n', or use a granularity that "
                    "does not cut this axis, such as PerToken()."
                )
            if not divides and not self.pad:
                raise ValueError(
                    f"{self}: {size} does not divide axis {axis} of a tensor of shape {shape}. "
                    "Choose a size that does, or pad=True for a shorter last block."
                )
        # A block must not be longer than its axis.
        lengths = (1 if is_symbolic(n) else max(n, 1) for n in shape)
        return tuple(
            sizes.get(axis, 1) if is_symbolic(shape[axis]) else min(sizes.get(axis, 1), n)
            for axis, n in enumerate(lengths)
        )

    def along(self, axis: int, ndim: int) -> "PerBlock":
        """Returns the granularity with the last of its axes at `axis`.

        Args:
          axis: the contracted axis of a tensor, along which blocks lie. The rows of a tile lie
            along the last of the other axes.
          ndim: the number of axes of the tensor.

        Raises:
          ValueError: if the tensor lacks one of the axes, or there are more than two.

        Example:
          >>> PerBlock(32).along(-2, 2)
          PerBlock(32, axes=-2)
        """
        others = _others(self, axis, ndim)
        matrix = {-2: others[-1:], -1: (axis if axis < 0 else axis - ndim,)}
        from_end = [a if a < 0 else a - 2 for a in _tuple(self.axes or ())]
        axes = [a for name in from_end for a in matrix.get(name, ())]
        if len(axes) < len(from_end) or len({*axes}) < len(axes):
            raise ValueError(
                f"{self}: with a contracted axis, `axes` must be 1 (or -1), which means that axis, "
                f"or 0 (or -2), the last other one; got {ndim} axes. Use PerBlock(size)."
            )
        sizes = dict(sorted(zip(axes, _tuple(self.sizes), strict=True)))
        return dataclasses.replace(self, sizes=tuple(sizes.values()), axes=tuple(sizes))


Granularity: TypeAlias = PerTensor | PerChannel | PerToken | PerBlock


def _text(numbers: int | tuple[int, ...] | None) -> str:
    """Returns a tuple as text; a tuple with one number as that number."""
    return str(numbers[0] if isinstance(numbers, tuple) and len(numbers) == 1 else numbers)


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _integers(owner: str, argument: str, value: int | tuple[int, ...]) -> tuple[int, ...]:
    """Returns an integer or a sequence of integers as a tuple."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(map(is_integer, numbers)):
        raise TypeError(
            f"{owner}: `{argument}` must be an integer or a tuple of integers, got "
            f"{described(value)}. Write, for example, {owner}({-1 if argument == 'axes' else 32})."
        )
    return tuple(map(int, numbers))


def _others(owner: Granularity, axis: int, ndim: int) -> tuple[int, ...]:
    """Returns all axes but one, counted from the end, after checking that the tensor has it."""
    (contracted,) = _axes(owner, (axis,), ndim)
    return tuple(other - ndim for other in range(ndim) if other != contracted)


def _axes(owner: Granularity, axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Returns the axes as nonnegative indices, after checking that the tensor has them."""
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{owner}: axis {axis} needs a tensor of at least "
                f"{axis + 1 if axis >= 0 else -axis} axes, got {ndim}. Use PerTensor() for tensors "
                "without channels."
            )
    indices = tuple(axis % ndim for axis in axes)
    if len(set(indices)) != len(indices):
        raise ValueError(
            f"{owner}: the axes of a tensor of {ndim} axes must be distinct, got {axes}. Name each "
            "once."
        )
    return indices
