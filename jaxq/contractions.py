"""Contractions: which axis of which tensor plays which part in a product.

Every axis has a label, a number, and axes with one label run together. In a product of two operands
an axis is a *batch* axis if both operands and the result have its label, a *free* axis if its
operand and the result have it, and else a *contracted* one. The three products of training are one
contraction read in three directions: the result's cotangent takes the place of an operand.

So each operand of each product is, for every index of its batch axes, a matrix `[free, contract]`,
several axes of one part counting as one, the last running fastest. A quantizer's granularity means
that matrix, whatever the tensor's own order, and `placed` says what it is on the tensor's axes:
nothing is transposed.
"""

import dataclasses
import string
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jax import lax

from jaxq.blocks import Granularity, PerBlock, PerChannel, PerTensor, PerToken

__all__ = ["Axes", "Contraction", "block_along", "of_conv", "of_dot", "of_einsum", "placed"]


class Axes(NamedTuple):
    """An operand's axes by the part that they play, each in the order of the labels."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contract: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The labels of two operands and of their product."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def dlhs(self) -> "Contraction":
        """The product for the gradient of `lhs`: of the cotangent and `rhs`."""
        return Contraction(self.out, self.rhs, self.lhs)

    @property
    def drhs(self) -> "Contraction":
        """The product for the gradient of `rhs`: of the cotangent and `lhs`."""
        return Contraction(self.out, self.lhs, self.rhs)

    @property
    def axes(self) -> tuple[Axes, Axes]:
        """The axes of both operands."""
        return self._axes(self.lhs, self.rhs), self._axes(self.rhs, self.lhs)

    @property
    def shared(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The contracted axes that both operands have, in one order for both."""
        labels = sorted((set(self.lhs) & set(self.rhs)) - set(self.out))
        return (
            tuple(self.lhs.index(label) for label in labels),
            tuple(self.rhs.index(label) for label in labels),
        )

    def _axes(self, own: tuple[int, ...], other: tuple[int, ...]) -> Axes:
        def having(condition: Callable[[int], bool]) -> tuple[int, ...]:
            return tuple(own.index(label) for label in sorted(own) if condition(label))

        return Axes(
            having(lambda label: label in self.out and label in other),
            having(lambda label: label in self.out and label not in other),
            having(lambda label: label not in self.out),
        )


def of_dot(dimension_numbers: Any, lhs_ndim: int, rhs_ndim: int) -> Contraction:
    """The contraction of a `lax.dot_general`, what it contracts in the order it is given in."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs, rhs = ([-1] * ndim for ndim in (lhs_ndim, rhs_ndim))
    label = 0
    for lhs_axis, rhs_axis in zip(lhs_batch, rhs_batch, strict=True):
        lhs[lhs_axis] = rhs[rhs_axis] = label
        label += 1
    out = list(range(label))
    contracted = [(lhs, axis) for axis in lhs_contract] + [(rhs, axis) for axis in rhs_contract]
    for labels, axis in contracted:
        labels[axis] = -2
    for labels in (lhs, rhs):
        for axis, taken in enumerate(labels):
            if taken == -1:
                labels[axis] = label
                out.append(label)
                label += 1
    for i, (lhs_axis, rhs_axis) in enumerate(zip(lhs_contract, rhs_contract, strict=True)):
        lhs[lhs_axis] = rhs[rhs_axis] = label + i
    return Contraction(tuple(lhs), tuple(rhs), tuple(out))


def of_einsum(subscripts: str, lhs_ndim: int, rhs_ndim: int) -> Contraction:
    """The contraction of an einsum of two operands, its labels in the order they appear in.

    Raises:
      ValueError: the subscripts are not those of two operands of these numbers of axes, or name an
        axis twice in one.
    """
    text = subscripts.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(
            f"einsum: a recipe needs exactly two operands, got {len(terms)} in {subscripts!r}. "
            "Write a longer product as several."
        )
    # What an ellipsis stands for is numbered from the last axis backwards, in capitals of its own.
    spare = [c for c in string.ascii_uppercase + string.ascii_lowercase if c not in text]
    hidden = [
        n - len(term.replace("...", ""))
        for n, term in zip((lhs_ndim, rhs_ndim), terms, strict=True)
    ]
    widest = spare[: max(hidden)] if "..." in text else []
    lhs, rhs = (
        term.replace("...", "".join(widest[len(widest) - count :]) if "..." in term else "")
        for term, count in zip(terms, hidden, strict=True)
    )
    if arrow:
        out = output.replace("...", "".join(widest))
    else:  # As in NumPy: what occurs once, in the order of the alphabet.
        once = sorted(c for c in {*lhs, *rhs} - {*widest} if (lhs + rhs).count(c) == 1)
        out = "".join([*widest, *once])
    for name, term, ndim in (("lhs", lhs, lhs_ndim), ("rhs", rhs, rhs_ndim)):
        if len(term) != ndim or len({*term}) != ndim:
            raise ValueError(
                f"einsum: {subscripts!r} must name each of the {ndim} axes of `{name}` once. With "
                "a recipe no axis may be named twice; take the diagonal first."
            )
    numbers = {label: i for i, label in enumerate(dict.fromkeys(lhs + rhs))}
    lhs, rhs, out = (tuple(numbers[label] for label in term) for term in (lhs, rhs, out))
    return Contraction(lhs, rhs, out)


def of_conv(numbers: lax.ConvDimensionNumbers) -> Contraction:
    """The contraction of a convolution.

    The window's axes meet each other in no simple way and count as contracted, the slowest ones;
    channels run fastest, and in the gradient of the kernel the batch does.
    """
    count = len(numbers.lhs_spec) - 2
    channel, feature, batch = range(3 * count, 3 * count + 3)

    def labels(spec: Sequence[int], names: Sequence[int]) -> tuple[int, ...]:
        return tuple(names[spec.index(axis)] for axis in range(count + 2))

    lhs, rhs, out = (range(i * count, (i + 1) * count) for i in range(3))
    return Contraction(
        labels(numbers.lhs_spec, (batch, channel, *lhs)),
        labels(numbers.rhs_spec, (feature, channel, *rhs)),
        labels(numbers.out_spec, (batch, feature, *out)),
    )


def placed(granularity: Granularity, shape: tuple[int, ...], axes: Axes) -> Granularity:
    """A granularity of an operand as one of the tensor's own axes.

    - `PerTensor`: one scale for the whole operand, its batch included.
    - `PerToken`: one for every index of the batch and free axes: a vector along the contraction.
    - `PerChannel(axes)`: the axes are counted among the free ones; one scale for every index of
      those and of the batch. (-1 is the last free axis: the output of a weight.)
    - `PerBlock(size)`: blocks along the contraction. `PerBlock((rows, size))`: tiles of free by
      contracted axes. An axis of 0 or -2 means the free ones, 1 or -1 the contracted ones.

    Raises:
      ValueError: the operand lacks the axes, or a block does not fit.
    """
    if isinstance(granularity, PerTensor):
        return granularity
    if not axes.contract:
        raise ValueError(
            f"{granularity}: no axis of a tensor of shape {shape} is contracted, so that every "
            "element would have a scale of its own. Use PerTensor()."
        )
    return _PLACED[type(granularity)](granularity, shape, axes)


def _token(granularity: PerToken, shape: tuple[int, ...], axes: Axes) -> Granularity:
    del granularity, shape
    return PerChannel(axes.batch + axes.free)


def _channel(granularity: PerChannel, shape: tuple[int, ...], axes: Axes) -> Granularity:
    count = len(axes.free)
    wanted = granularity.axes if isinstance(granularity.axes, tuple) else (granularity.axes,)
    for axis in wanted:
        if not -count <= axis < count:
            raise ValueError(
                f"{granularity}: counts the free axes, of which a tensor of shape {shape} has "
                f"{count} here. Use PerToken() for one scale a vector along the contraction."
            )
    return PerChannel(axes.batch + tuple(sorted({axes.free[axis] for axis in wanted})))


def _block(granularity: PerBlock, shape: tuple[int, ...], axes: Axes) -> Granularity:
    sizes: dict[int, int] = {}
    assert isinstance(granularity.sizes, tuple)
    assert isinstance(granularity.axes, tuple)
    for size, axis in zip(granularity.sizes, granularity.axes, strict=True):
        if axis not in (-2, -1, 0, 1):
            raise ValueError(
                f"{granularity}: an operand counts as a matrix [free, contract], whose axes are 0 "
                f"(or -2) and 1 (or -1), got axis {axis}."
            )
        part = axes.contract if axis % 2 else axes.free
        if granularity.pad and part:
            sizes[part[-1]] = size
        else:
            sizes |= block_along(size, part, shape, str(granularity))
    return PerBlock(tuple(sizes.values()), tuple(sizes), pad=granularity.pad)


_PLACED: MappingProxyType[type, Callable[..., Granularity]] = MappingProxyType(
    {PerToken: _token, PerChannel: _channel, PerBlock: _block}
)


def block_along(
    size: int, axes: tuple[int, ...], shape: tuple[int, ...], owner: str
) -> dict[int, int]:
    """The length on each axis of a block along several axes that count as one.

    Raises:
      ValueError: the axes do not divide into such blocks.
    """
    sizes, rest = {}, size
    for axis in reversed(axes):
        n = shape[axis]
        sizes[axis] = rest if n % rest == 0 else n if rest % n == 0 else 0
        if not sizes[axis]:
            break
        rest //= sizes[axis]
    if rest > 1 or not axes:
        lengths = " x ".join(str(shape[axis]) for axis in axes) or "no axis"
        raise ValueError(
            f"{owner}: blocks of {size} must divide what they lie along, which is {lengths} of a "
            f"tensor of shape {shape}. Choose a size that does, or pad the tensor."
        )
    return dict(reversed(sizes.items()))
