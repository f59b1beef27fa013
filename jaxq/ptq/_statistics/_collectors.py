"""Products in the form of matrix products, and collectors of the statistics of their inputs.

For each index of its batch axes, a product whose weight can be solved is a matrix product of tokens
`[tokens, inputs]` and a weight `[inputs, outputs]`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq.models import CONVERSIONS, LOOK_UP, VIEWS, Node, Product, axes_of
from jaxq.products import Axes
from jaxq.ptq._statistics._statistics import (
    Statistics,
    collect,
    collect_groups,
    drift_of,
    empty_statistics,
)

__all__ = ["Collector", "MatrixForm", "MatrixLayout", "matrix_form", "shared_inputs"]

# The operations that input scales and rotations add; a Hadamard transform is a program of `jit`.
_INPUT_CHANGES = ("broadcast_in_dim", "mul", "jit")


@dataclasses.dataclass(frozen=True)
class _Patches:
    """The windows of a convolution, as arguments of `lax.conv_general_dilated_patches`."""

    filter_shape: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: Any


@dataclasses.dataclass(frozen=True)
class Collector:
    """The observer of a product's input. Hashable.

    Attributes:
      where: the description of the product, for errors.
      axes: the batch, free and contracted axes of the operand.
      batch: the lengths of its batch axes.
      inputs: the length of the contraction.
      hessian: True to collect the Hessian.
      grouped: True for a ragged product, whose tokens belong to groups.
      patches: the windows of a convolution, or None.
    """

    where: str
    axes: Axes
    batch: tuple[int, ...]
    inputs: int
    hessian: bool = True
    grouped: bool = False
    patches: _Patches | None = None

    def empty(self) -> Statistics:
        """Returns the statistics of no tokens."""
        return empty_statistics(self.batch, self.inputs, self.hessian)

    def merge(self, first: Statistics, second: Statistics) -> Statistics:
        """Returns the statistics of both sets of tokens together."""
        return first.merge(second)

    def measure(
        self, x: jax.Array, others: Sequence[jax.Array], mask: jax.Array | None
    ) -> Statistics:
        """Returns the statistics of one operand.

        Args:
          x: the operand.
          others: the other operands of the product; a ragged product has its group sizes first.
          mask: a boolean array with one element per token, False for padding; None uses all tokens.

        Raises:
          ValueError: if the mask does not fit the operand.
        """
        tokens = self.tokens(x, mask)
        if self.grouped:
            return collect_groups(tokens, others[0], self.hessian)
        mask = None if mask is None else mask.reshape(-1)
        return collect(tokens, mask, hessian=self.hessian)

    def tokens(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Returns an operand as tokens `[batch, tokens, inputs]`, or `[tokens, inputs]` if grouped.

        Raises:
          ValueError: if a mask does not fit the operand.
        """
        if self.patches is not None:
            x = lax.conv_general_dilated_patches(
                x.astype(jnp.float32),
                **{f.name: getattr(self.patches, f.name) for f in dataclasses.fields(self.patches)},
                precision=lax.Precision.HIGHEST,
            )
        batch, free, contract = self.axes
        x = x.transpose((*batch, *free, *contract))
        lengths = x.shape[len(batch) : len(batch) + len(free)]
        if mask is not None:
            self.check_mask("ptq.observe", mask.shape, lengths)
        if self.grouped:
            return x.reshape(-1, self.inputs)
        return x.reshape((*self.batch, math.prod(lengths), self.inputs))

    def drift(self, x: jax.Array, reference: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Returns the sum of `(y - x) x^T` over the tokens of an operand.

        Args:
          x: the operand.
          reference: the operand y of the model with float weights.
          mask: as in `measure`.
        """
        pair = [self.tokens(operand, mask).astype(jnp.float32) for operand in (x, reference)]
        if mask is not None:
            is_token = mask.reshape(-1)[:, None]
            pair = [jnp.where(is_token, tokens, np.float32(0)) for tokens in pair]
        return drift_of(*pair)

    def check_mask(self, owner: str, mask: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        """Raises a ValueError unless a mask of this shape has one element per token.

        Args:
          owner: the name of the calling function.
          mask: the shape of the mask.
          lengths: the lengths of the free axes of the operand.
        """
        size = math.prod(mask)
        fits = lengths == mask or lengths == (size,)
        if self.grouped or self.patches is not None or self.batch or not fits:
            raise ValueError(
                f"{owner}: `mask` must have one element per token of every product, got the shape "
                f"{mask}, but the tokens of {self.where} have the shape {self.batch + lengths}. "
                "Exclude the product by a rule with the recipe None, or pass data without padding."
            )

    def shared(self) -> "Collector":
        """Returns the collector without `where`, so that products with the same input are equal."""
        return dataclasses.replace(self, where="")


class MatrixForm(NamedTuple):
    """The form of a product as a matrix product of tokens and a weight.

    Attributes:
      axes: the batch, free and contracted axes of the weight.
      collector: the observer of the other operand.
      swapped: True if the weight is the first operand.
    """

    axes: Axes
    collector: Collector
    swapped: bool


class MatrixLayout(NamedTuple):
    """The conversion between a weight and matrices `[matrices, inputs, outputs]`.

    Attributes:
      axes: the batch, free and contracted axes of the weight.
      shape: the shape of the weight.
    """

    axes: Axes
    shape: tuple[int, ...]

    @property
    def axis_order(self) -> tuple[int, ...]:
        """The axes in the order of batch, inputs and outputs."""
        return (*self.axes.batch, *self.axes.contract, *self.axes.free)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of matrices, inputs and outputs."""
        batch, free, contract = (math.prod(self.shape[a] for a in axes) for axes in self.axes)
        return batch, contract, free

    def matrices(self, x: jax.Array) -> jax.Array:
        """Converts a weight to matrices."""
        return x.transpose(self.axis_order).reshape(self.sizes)

    def weight(self, x: jax.Array) -> jax.Array:
        """Converts matrices back to the weight."""
        inverse = sorted(range(len(self.axis_order)), key=self.axis_order.__getitem__)
        return x.reshape([self.shape[axis] for axis in self.axis_order]).transpose(inverse)

    def flatten_batches(self, statistics: Statistics) -> Statistics:
        """Returns statistics with their batch axes flattened into one axis, `[matrices]`."""
        split = len(self.axes.batch)
        return jax.tree.map(lambda x: x.reshape((self.sizes[0], *x.shape[split:])), statistics)


def matrix_form(product: Product, operand: int, hessian: bool = True) -> MatrixForm | str:
    """Returns the form of a product as a matrix product, or the reason why it has no Hessian.

    Args:
      product: the product.
      operand: the index of its weight.
      hessian: as in `Collector`.
    """
    if product.operation == LOOK_UP:
        return "a look-up copies values without a product, so the nearest ones are best"
    other = 1 - operand
    if product.origins[other] is not None:
        return "its other operand is a weight too"
    shape = product.operands[operand].shape
    if product.operation == "conv_general_dilated":
        return _convolution(product, operand, hessian)
    weight_axes, axes = axes_of(product)[operand], axes_of(product)[other]
    grouped = product.operation == "ragged_dot_general"
    has_one_group_axis = len(weight_axes.batch) == 1 and not axes.batch
    if grouped and (operand == 0 or not has_one_group_axis or len(weight_axes.contract) != 1):
        return "a ragged product of this form is not supported"
    collector = Collector(
        where=product.where,
        axes=axes,
        batch=tuple(shape[axis] for axis in weight_axes.batch),
        inputs=math.prod(shape[axis] for axis in weight_axes.contract),
        hessian=hessian,
        grouped=grouped,
    )
    return MatrixForm(weight_axes, collector, operand == 0)


def _convolution(product: Product, operand: int, hessian: bool) -> MatrixForm | str:
    params, kernel = product.params, product.operands[1].shape
    if operand == 0:
        return "its weight is the image of a convolution"
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return "grouped convolutions are not supported"
    numbers = params["dimension_numbers"]
    window = tuple(kernel[axis] for axis in numbers.rhs_spec[2:])
    patches = _Patches(
        window,
        tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        numbers,
    )
    # The channel axis of the patches enumerates (input channel, window position).
    batch, channel, *spatial = numbers.out_spec
    collector = Collector(
        where=product.where,
        axes=Axes((), (batch, *spatial), (channel,)),
        batch=(),
        inputs=kernel[numbers.rhs_spec[1]] * math.prod(window),
        hessian=hessian,
        patches=patches,
    )
    return MatrixForm(Axes((), numbers.rhs_spec[:1], numbers.rhs_spec[1:]), collector, False)


def shared_inputs(node: Node, matrices: Mapping[int, MatrixForm]) -> dict[int, int]:
    """Returns the number of the first product that reads the same input, for each product.

    Inputs are the same if they come from one array of the program by equal conversions, reshapes,
    multiplications and rotations, including those inside `jit` and `checkpoint`.

    Args:
      node: the program.
      matrices: the products, by their numbers.
    """
    result: dict[int, int] = {}
    first: dict[Any, int] = {}
    identities: dict[Any, Any] = {}  # An object for each distinct value.

    def walk(node: Node, operands: Sequence[Any]) -> list[Any]:
        body = compat.body(node.jaxpr)
        known = dict(zip(body.invars, operands, strict=True))

        def value(variable: Any) -> Any:
            if compat.is_literal(variable):
                return "literal", str(variable)
            return known.setdefault(variable, object())

        for i, eqn in enumerate(body.eqns):
            product = node.products.get(i)
            if product is not None and product.number in matrices:
                matrix = matrices[product.number]
                inputs = [value(eqn.invars[int(matrix.swapped)]), *map(value, eqn.invars[2:])]
                key = (*inputs, matrix.collector.shared(), product.stacked)
                result[product.number] = first.setdefault(key, product.number)
            elif i in node.inner:
                around = (
                    eqn.primitive.name in compat.WRAPPED_CALLS and eqn.primitive.name != "shard_map"
                )
                for inside in node.inner[i]:
                    count = len(compat.body(inside.jaxpr).invars)
                    fresh = [object() for _ in range(count)]
                    results = walk(inside, list(map(value, eqn.invars)) if around else fresh)
                    if around:
                        known.update(zip(eqn.outvars, results, strict=True))
            elif eqn.primitive.name in (*VIEWS, *CONVERSIONS, *_INPUT_CHANGES):
                # The text of a closed jaxpr does not show the values of its constants.
                consts = getattr(eqn.params.get("jaxpr"), "consts", ())
                name = eqn.primitive.name, str(eqn.params), *map(id, consts)
                for k, variable in enumerate(eqn.outvars):
                    key = (k, name, *map(value, eqn.invars))
                    known[variable] = identities.setdefault(key, object())
        return [value(variable) for variable in body.outvars]

    walk(node, [object() for _ in compat.body(node.jaxpr).invars])
    return result
