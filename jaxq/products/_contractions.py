"""Contractions: the roles of the operands' axes in a product.

Every axis has an integer label, and axes with the same label share an index, as in an einsum. In a
product of two operands, an axis is a *batch* axis if both operands and the result have its label, a
*free* axis if its operand and the result have it, and a *contracted* axis otherwise. The three
products of training are one contraction in three directions: the result's cotangent takes the place
of an operand.

A ragged product (`lax.ragged_dot`) also has a *group* axis, with one matrix for each group of rows
of the ragged axis. It counts as a batch axis of every tensor that has it, so each group's matrix
has its own scales. The ragged axis is an ordinary axis: scales and blocks along it span the whole
array and ignore group boundaries.

For every index of its batch axes, each operand of each product is therefore a matrix
`[free, contract]`, in which several axes with the same role count as one, the last varying fastest.
A quantizer's granularity refers to that matrix, whatever the tensor's own order of axes. `placed`
translates the granularity to the tensor's axes, so no tensor is transposed.
"""

import dataclasses
import string
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jax import lax

from jaxq._base.arguments import described
from jaxq._base.shapes import is_symbolic
from jaxq.recipes import Granularity, PerBlock, PerChannel, PerTensor, PerToken

__all__ = [
    "Axes",
    "Contraction",
    "block_along",
    "of_conv",
    "of_dot",
    "of_einsum",
    "of_ragged_dot",
    "placed",
]


class Axes(NamedTuple):
    """The axes of an operand by role, each in the order of the labels."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contract: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The labels of two operands and of their product.

    Attributes:
      lhs: labels of the first operand's axes.
      rhs: labels of the second operand's axes.
      out: labels of the result's axes.
      group: the label of the group axis of a ragged product, or None.
      ragged: the label of the axis that is divided into groups, or None.
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    group: int | None = None
    ragged: int | None = None

    @property
    def dlhs(self) -> "Contraction":
        """The product of the cotangent and `rhs`, which gives the gradient of `lhs`."""
        return dataclasses.replace(self, lhs=self.out, out=self.lhs)

    @property
    def drhs(self) -> "Contraction":
        """The product of the cotangent and `lhs`, which gives the gradient of `rhs`."""
        return dataclasses.replace(self, lhs=self.out, rhs=self.lhs, out=self.rhs)

    @property
    def swapped(self) -> "Contraction":
        """The same product with its operands in the other order."""
        return dataclasses.replace(self, lhs=self.rhs, rhs=self.lhs)

    @property
    def contracts_ragged(self) -> bool:
        """True if the sum runs over the ragged axis, within each group."""
        return self.ragged is not None and self.ragged not in self.out

    @property
    def axes(self) -> tuple[Axes, Axes]:
        """The axes of both operands by role."""
        return self._axes(self.lhs, self.rhs), self._axes(self.rhs, self.lhs)

    @property
    def shared(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The contracted axes that both operands have, in the same order for both."""
        labels = sorted((set(self.lhs) & set(self.rhs)) - set(self.out))
        return (
            tuple(self.lhs.index(label) for label in labels),
            tuple(self.rhs.index(label) for label in labels),
        )

    def _axes(self, labels: tuple[int, ...], other: tuple[int, ...]) -> Axes:
        def having(condition: Callable[[int], bool]) -> tuple[int, ...]:
            return tuple(labels.index(label) for label in sorted(labels) if condition(label))

        return Axes(
            having(lambda label: label == self.group or (label in self.out and label in other)),
            having(lambda label: label != self.group and label in self.out and label not in other),
            having(lambda label: label != self.group and label not in self.out),
        )


def of_dot(
    dimension_numbers: Any, lhs_ndim: int, rhs_ndim: int, *, owner: str = "dot_general"
) -> Contraction:
    """Returns the contraction of a `lax.dot_general`, with contracted axes in the given order."""
    try:
        return _of_dot(dimension_numbers, lhs_ndim, rhs_ndim)
    except (IndexError, TypeError, ValueError):
        raise ValueError(
            f"{owner}: `dimension_numbers` must name axes of operands with "
            f"{lhs_ndim} and {rhs_ndim} axes, got {dimension_numbers!r:.80}. Write ((contracted of "
            "lhs, contracted of rhs), (batch of lhs, batch of rhs))."
        ) from None


def _of_dot(dimension_numbers: Any, lhs_ndim: int, rhs_ndim: int) -> Contraction:
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


def of_ragged_dot(
    numbers: lax.RaggedDotDimensionNumbers,
    lhs_ndim: int,
    rhs_ndim: int,
    *,
    owner: str = "ragged_dot_general",
) -> Contraction:
    """Returns the contraction of a `lax.ragged_dot_general` in any of its three modes."""
    if not isinstance(numbers, lax.RaggedDotDimensionNumbers):
        raise TypeError(
            f"{owner}: `ragged_dot_dimension_numbers` must be a "
            f"jax.lax.RaggedDotDimensionNumbers, got {described(numbers)}. Make one."
        )
    dot = of_dot(numbers.dot_dimension_numbers, lhs_ndim, rhs_ndim, owner=owner)
    ragged = dot.lhs[numbers.lhs_ragged_dimensions[0]]
    if numbers.rhs_group_dimensions:
        group = dot.rhs[numbers.rhs_group_dimensions[0]]
        out = tuple(label for label in dot.out if label != group)
        return dataclasses.replace(dot, out=out, group=group, ragged=ragged)
    if ragged not in dot.out:
        group = lhs_ndim + rhs_ndim  # A label that no axis has.
        return dataclasses.replace(dot, out=(group, *dot.out), group=group, ragged=ragged)
    return dot  # A ragged batch axis: `lax` ignores the group sizes.


def of_einsum(subscripts: str, lhs_ndim: int, rhs_ndim: int) -> Contraction:
    """Returns the contraction of an einsum, whose labels are numbered in order of appearance.

    Raises:
      ValueError: if the subscripts do not describe two operands with these numbers of axes, or name
        an axis of an operand twice.
    """
    text = subscripts.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(
            f"einsum: with a recipe there must be exactly two operands, got {len(terms)} in "
            f"{subscripts!r}. Split a longer product into several."
        )
    # The axes of an ellipsis get unused letters, aligned at the last axis as in broadcasting.
    unused_letters = [c for c in string.ascii_uppercase + string.ascii_lowercase if c not in text]
    ellipsis_ndims = [
        n - len(term.replace("...", ""))
        for n, term in zip((lhs_ndim, rhs_ndim), terms, strict=True)
    ]
    ellipsis_labels = unused_letters[: max(ellipsis_ndims)] if "..." in text else []
    lhs, rhs = (
        term.replace(
            "...", "".join(ellipsis_labels[len(ellipsis_labels) - count :]) if "..." in term else ""
        )
        for term, count in zip(terms, ellipsis_ndims, strict=True)
    )
    if arrow:
        out = output.replace("...", "".join(ellipsis_labels))
    else:  # As in NumPy: the labels that occur once, in alphabetical order.
        once = sorted(c for c in {*lhs, *rhs} - {*ellipsis_labels} if (lhs + rhs).count(c) == 1)
        out = "".join([*ellipsis_labels, *once])
    for name, term, ndim in (("lhs", lhs, lhs_ndim), ("rhs", rhs, rhs_ndim)):
        if len(term) != ndim or len({*term}) != ndim:
            raise ValueError(
                f"einsum: {subscripts!r} must name each of the {ndim} axes of `{name}` once. With "
                "a recipe no axis may be named twice; take the diagonal first."
            )
    if not {*out} <= {*lhs, *rhs} or len({*out}) != len(out):
        raise ValueError(
            f"einsum: the result in {subscripts!r} must name each of its axes once, and only axes "
            f"of the operands, got {output!r}. Correct the text after '->'."
        )
    label_numbers = {label: i for i, label in enumerate(dict.fromkeys(lhs + rhs))}
    lhs, rhs, out = (tuple(label_numbers[label] for label in term) for term in (lhs, rhs, out))
    return Contraction(lhs, rhs, out)


def of_conv(numbers: lax.ConvDimensionNumbers) -> Contraction:
    """Returns the contraction of a convolution.

    The window axes have different labels in the operands and in the result, so they count as
    contracted. Among the contracted axes they vary slowest; channels vary fastest, or the batch in
    the gradient of the kernel.
    """
    window_ndim = len(numbers.lhs_spec) - 2
    channel, feature, batch = range(3 * window_ndim, 3 * window_ndim + 3)

    def labels(spec: Sequence[int], names: Sequence[int]) -> tuple[int, ...]:
        return tuple(names[spec.index(axis)] for axis in range(window_ndim + 2))

    lhs, rhs, out = (range(i * window_ndim, (i + 1) * window_ndim) for i in range(3))
    return Contraction(
        labels(numbers.lhs_spec, (batch, channel, *lhs)),
        labels(numbers.rhs_spec, (feature, channel, *rhs)),
        labels(numbers.out_spec, (batch, feature, *out)),
    )


def placed(granularity: Granularity, shape: tuple[int, ...], axes: Axes) -> Granularity:
    """Translates a granularity of the matrix `[free, contract]` to the tensor's own axes.

    - `PerTensor`: one scale for the whole operand, including its batch axes.
    - `PerToken`: one scale per index of the batch and free axes, that is, per vector along the
      contraction.
    - `PerChannel(axes)`: one scale per index of the given free axes and of the batch axes. Axes are
      counted among the free ones; -1 is the last free axis, the output of a weight.
    - `PerBlock(size)`: blocks along the contraction. `PerBlock((rows, size))`: tiles of free by
      contracted axes. Axis 0 or -2 means the free axes, 1 or -1 the contracted axes.

    Raises:
      ValueError: if the operand lacks the axes, or a block does not fit.
    """
    if isinstance(granularity, PerTensor):
        return granularity
    if not axes.contract:
        raise ValueError(
            f"{granularity}: no axis of a tensor of shape {shape} is contracted, so every "
            "element would have a scale of its own. Use PerTensor()."
        )
    return _PLACED[type(granularity)](granularity, shape, axes)


def _token(granularity: PerToken, shape: tuple[int, ...], axes: Axes) -> Granularity:
    del granularity, shape
    return PerChannel(axes.batch + axes.free)


def _channel(granularity: PerChannel, shape: tuple[int, ...], axes: Axes) -> Granularity:
    free_ndim = len(axes.free)
    channel_axes = granularity.axes if isinstance(granularity.axes, tuple) else (granularity.axes,)
    for axis in channel_axes:
        if not -free_ndim <= axis < free_ndim:
            raise ValueError(
                f"{granularity}: `axes` must index the free axes; a tensor of shape {shape} has "
                f"{free_ndim} here. Use PerToken() for one scale per vector along the contraction."
            )
    return PerChannel(axes.batch + tuple(sorted({axes.free[axis] for axis in channel_axes})))


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
        merged_axes = axes.contract if axis % 2 else axes.free
        if granularity.pad and merged_axes:
            sizes[merged_axes[-1]] = size
        else:
            sizes |= block_along(size, merged_axes, shape, str(granularity))
    return PerBlock(tuple(sizes.values()), tuple(sizes), pad=granularity.pad)


_PLACED: MappingProxyType[type, Callable[..., Granularity]] = MappingProxyType(
    {PerToken: _token, PerChannel: _channel, PerBlock: _block}
)


def block_along(
    size: int, axes: tuple[int, ...], shape: tuple[int, ...], owner: str
) -> dict[int, int]:
    """Returns the length on each axis of a block along several axes that count as one.

    Raises:
      ValueError: if the axes do not divide into such blocks.
    """
    sizes, remaining = {}, size
    for axis in reversed(axes):
        length = shape[axis]
        sizes[axis] = (
            remaining if length % remaining == 0 else length if remaining % length == 0 else 0
        )
        if not sizes[axis]:
            break
        remaining //= sizes[axis]
    if remaining > 1 or not axes:
        lengths = " x ".join(str(shape[axis]) for axis in axes) or "no"
        remedy = "Choose a size that does, or pad the tensor."
        if any(is_symbolic(shape[axis]) for axis in axes):
            remedy = f"Export it with a symbolic length such as '{size}*n'."
        raise ValueError(
            f"{owner}: blocks of {size} must divide the axes along which they lie, which have "
            f"{lengths} elements in a tensor of shape {shape}. {remedy}"
        )
    return dict(reversed(sizes.items()))
