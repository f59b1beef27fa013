"""Storage of weights in the form that their products need, with recipes on the leaves' axes.

A product's recipe gives its granularity for the matrix `[free, contract]`; only the model shows
which axis of a leaf is which. Weights are therefore packed according to the products in the model.

A leaf is stored if its blocks are those of the products that multiply it: the products then see
bitwise the same values as if the leaf were quantized on the fly. A leaf whose blocks would be cut,
or span several leaves, stays unpacked, and its products quantize it on the fly.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxq.models._assigning._assignments import Assigned, WeightToQuantize, axes_of, weight_of
from jaxq.models._reading import Digit, Origin, Piece, Product
from jaxq.products import is_stochastic, placed
from jaxq.quantizers import Quantized, quantize
from jaxq.recipes import Granularity, PerBlock, PerChannel, PerTensor, Recipe

__all__ = ["Storage", "Storages", "storages", "widest"]

_KEPT_DTYPES = ("float16", "bfloat16", "float32")  # Dtypes that a stored leaf keeps.


class Storage(NamedTuple):
    """The stored form of a leaf.

    Attributes:
      leading: the number of leading axes of a stack, each of whose elements is quantized
        separately.
      recipe: the recipe, on the other axes.
      block: the lengths of a block on these axes.
      steps: the conversions between the leaf and its products.
      dtype: the dtype in which products use the leaf, the widest if they differ.
    """

    leading: int
    recipe: Recipe
    block: tuple[int, ...]
    steps: tuple[Any, ...]
    dtype: Any

    def convert(self, x: jax.Array) -> jax.Array:
        """Returns the values of the leaf that its products see."""
        for step in self.steps:
            x = _apply_step(x, step)
        return x.astype(self.dtype)

    def quantize(self, x: jax.Array) -> Quantized:
        """Returns the leaf packed, with the values that its products see."""
        dtype = x.dtype if x.dtype in _KEPT_DTYPES else self.dtype

        def function(x: jax.Array) -> Quantized:
            return quantize(x, self.recipe)

        for _ in range(self.leading):
            function = jax.vmap(function)
        return dataclasses.replace(function(self.convert(x)), dtype=jnp.dtype(dtype))

    def differing(self, q: Quantized) -> list[str]:
        """Returns the fields other than `granularity` in which a stored leaf's recipe differs."""
        recipe_here, recipe_there = (_anywhere(recipe) for recipe in (self.recipe, q.recipe))
        names = [field.name for field in dataclasses.fields(Recipe)]
        return [name for name in names if getattr(recipe_here, name) != getattr(recipe_there, name)]

    def blocks_differ(self, q: Quantized) -> bool:
        """Returns whether a stored leaf is divided into other blocks than these."""
        return self.block != q.block or self.leading != q.ndim - len(q.block)


class Storages(NamedTuple):
    """The leaves of a model that are stored, and the reasons why others are not.

    Attributes:
      leaves: the stored forms of leaves, by their argument indices.
      reasons: the reasons why weights are not stored, by the numbers of their products.
    """

    leaves: Mapping[int, Storage]
    reasons: Mapping[int, str]

    def dtype(self, leaf: int, default: Any) -> Any:
        """Returns the dtype in which products use a leaf; a default if none quantizes it."""
        return jnp.dtype(self.leaves[leaf].dtype if leaf in self.leaves else default)


def storages(products: Sequence[Product], chosen: Sequence[Assigned | None]) -> Storages:
    """Returns the stored forms of quantized weights, and the reasons for those not stored."""
    demands_of: dict[int, list[tuple[int, _Demand]]] = {}
    weights: dict[int, Origin] = {}
    reasons: dict[int, str] = {}
    for product, assigned in zip(products, chosen, strict=True):
        weight = None if assigned is None else weight_of(product, assigned)
        if weight is None:
            continue
        weights[product.number] = weight.origin
        recipe = None if assigned is None else assigned.recipe
        if recipe is not None and recipe.hadamard is not None:
            reasons[product.number] = "its product quantizes its Hadamard transform"
            continue
        try:
            for piece, demand in _demands(product, weight):
                demands_of.setdefault(piece.leaf, []).append((product.number, demand))
        except _CannotStoreError as error:
            reasons[product.number] = str(error)
    for demands in demands_of.values():
        conflict = _conflict([demand for _, demand in demands])
        if conflict:
            names = " and ".join({products[number].name: None for number, _ in demands})
            reasons |= {number: f"{names} need {conflict}" for number, _ in demands}
    _propagate(weights, reasons)
    unstored = {leaf for number in reasons for leaf in weights[number].leaves.values()}
    return Storages(
        {
            leaf: _storage([demand for _, demand in demands])
            for leaf, demands in demands_of.items()
            if leaf not in unstored
        },
        reasons,
    )


def _propagate(weights: Mapping[int, Origin], reasons: dict[int, str]) -> None:
    """Adds the reasons for weights that are not stored because another product prevents it."""
    while True:
        unstored = {leaf: n for n in reasons for leaf in weights[n].leaves.values()}
        affected = {
            number: f"{path!r} is not stored: {reasons[unstored[leaf]]}"
            for number, origin in weights.items()
            for path, leaf in origin.leaves.items()
            if number not in reasons and leaf in unstored
        }
        if not affected:
            return
        reasons |= affected


class _CannotStoreError(ValueError):
    """The reason why a weight cannot be stored."""


@dataclasses.dataclass(frozen=True)
class _Demand:
    """The blocks, recipe and conversions that a product requires of a leaf."""

    leading: int
    recipe: Recipe
    block: tuple[int, ...]
    steps: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: Any


def _conflict(demands: Sequence[_Demand]) -> str:
    """Returns the conflict between the requirements of a leaf's products, or ""."""
    blocks, steps = {d.block for d in demands}, {d.steps for d in demands}
    if len(blocks) > 1:
        return "different blocks"
    if len(steps) > 1:
        return "different conversions of it"
    # Blocks have length 1 along stacked axes, so `leading` matters only for shared scales.
    requirements = {
        (d.leading if _shares(d.recipe) else None, _anywhere(d.recipe)) for d in demands
    }
    return "different recipes" if len(requirements) > 1 else ""


def _storage(demands: Sequence[_Demand]) -> Storage:
    first, leading = demands[0], min(demand.leading for demand in demands)
    block, shape = first.block[leading:], first.shape[leading:]
    recipe = dataclasses.replace(first.recipe, granularity=_granularity(block, shape))
    dtype = widest([demand.dtype for demand in demands])
    return Storage(leading, recipe, block, first.steps, dtype)


def widest(dtypes: Sequence[Any]) -> Any:
    """Returns a dtype that represents all values of the dtypes in which weights are quantized."""
    return dtypes[0] if len(set(dtypes)) == 1 else jnp.dtype(jnp.float32)


def _anywhere(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, granularity=PerTensor())


def _shares(recipe: Recipe) -> bool:
    """Returns whether all blocks share a second-level scale or outliers."""
    return not recipe.scaling.is_local or recipe.outliers is not None


def _granularity(block: tuple[int, ...], shape: tuple[int, ...]) -> Granularity:
    if block == shape:
        return PerTensor()
    # Axes are counted from the end, as in the recipes of `jaxq.quantize_tree`.
    pairs = list(enumerate(zip(block, shape, strict=True), -len(shape)))
    if all(b in (1, n) for _, (b, n) in pairs):
        return PerChannel(tuple(axis for axis, (b, n) in pairs if b < n))
    sizes = {axis: b for axis, (b, _) in pairs if b > 1}
    pad = any(n % b for _, (b, n) in pairs)
    return PerBlock(tuple(sizes.values()), tuple(sizes), pad=pad)


def _demands(product: Product, weight: WeightToQuantize) -> list[tuple[Piece, _Demand]]:
    """Returns the requirements of a product for the leaves of its weight."""
    origin = weight.origin
    if origin.computed:
        raise _CannotStoreError(f"computed from {', '.join(origin.leaves)}")
    operand, axes = product.operands[weight.operand], axes_of(product)[weight.operand]
    result = []
    for whole, recipe in zip(origin.pieces, weight.recipes, strict=True):
        if recipe is None:
            continue
        piece, shape = whole, operand.shape
        if weight.experts is not None:
            piece, shape = weight.experts.alone(piece, shape)
        if is_stochastic(recipe):
            raise _CannotStoreError("its recipe draws new random bits in every call")
        block = placed(recipe.granularity, shape, axes).block(shape)
        if 0 in block:
            raise _CannotStoreError("it is empty")
        on_leaf = _on_leaf(piece, shape, block, recipe.scaling.blocks_per_run)
        leading = _leading(piece)
        if _shares(recipe):
            _check_whole(piece, shape, recipe, leading)
        demand = _Demand(
            leading=leading,
            recipe=recipe,
            block=on_leaf,
            steps=piece.steps,
            shape=piece.shape,
            dtype=operand.dtype,
        )
        result.append((piece, demand))
    return result


def _on_leaf(
    piece: Piece, shape: tuple[int, ...], block: tuple[int, ...], run: int
) -> tuple[int, ...]:
    """Converts the blocks of an operand, of which `run` are stored together, to those of a leaf."""
    if piece.axes is None:
        raise _CannotStoreError(f"{piece.path!r} is not multiplied in whole blocks of its axes")
    if run > 1:
        runs = _on_leaf(piece, shape, tuple(b * run if b > 1 else b for b in block), 1)
        if sorted(runs)[:-1] != [1] * (len(runs) - 1):
            raise _CannotStoreError(
                f"super-blocks cross axes of {piece.path!r} that a reshape merges"
            )
        return tuple(b // run if b > 1 else b for b in runs)
    lengths: list[tuple[Digit, int]] = []
    for digits, n, length, at, size in zip(
        piece.axes, shape, block, piece.at, piece.box, strict=True
    ):
        if at % length or (size % length and at + size != n):
            raise _CannotStoreError(f"{piece.path!r} shares a scale with other weights")
        lengths += _of_digits(piece.path, digits, min(length, size))
    return tuple(
        _of_axis(piece.path, n, [pair for pair in lengths if pair[0].axis == axis])
        for axis, n in enumerate(piece.shape)
    )


def _of_digits(path: str, digits: Sequence[Digit], length: int) -> list[tuple[Digit, int]]:
    """Converts the blocks of an axis to blocks of each of its digits."""
    if len(digits) == 1:
        return [(digits[0], length)]
    result, rest = [], length
    for digit in reversed(digits):
        part = math.gcd(rest, digit.size)
        if part not in (rest, digit.size):
            fitting = length // rest * (part if part > 1 else digit.size)
            raise _CannotStoreError(
                f"blocks of {length} cross the boundaries of axes of {path!r} that a reshape "
                f"merges, and blocks of {fitting} do not"
            )
        result.append((digit, part))
        rest //= part
    if rest > 1:
        raise _CannotStoreError(
            f"blocks of {length} extend beyond the axes of {path!r} that a reshape merges"
        )
    return result


def _of_axis(path: str, n: int, digits: Sequence[tuple[Digit, int]]) -> int:
    """Returns the length of a block on a leaf's axis from the blocks of its digits."""
    length, expected, is_open = 1, 1, True
    for digit, part in sorted(digits, key=lambda pair: pair[0].stride):
        is_open = is_open and digit.stride == expected
        end = digit.start + digit.size
        is_partial = digit.size % part and (end != digit.of or digit.flipped)
        if part > 1 and (
            not is_open or digit.start % part or is_partial or (digit.of % part and digit.of != n)
        ):
            raise _CannotStoreError(f"its blocks do not coincide with blocks of {path!r}")
        length *= part
        is_open = is_open and part == digit.of
        expected = digit.stride * digit.of
    return length


def _leading(piece: Piece) -> int:
    """Returns the number of a leaf's leading axes along which the operand has one index."""
    assert piece.axes is not None
    shown = {digit.axis for digits in piece.axes for digit in digits}
    count = 0
    for axis, n in enumerate(piece.shape):
        if axis in shown:
            break
        count = axis + 1 if n > 1 else count
    return count


def _check_whole(piece: Piece, shape: tuple[int, ...], recipe: Recipe, leading: int) -> None:
    """Checks that the operand has all blocks of the leaf that share a scale or outliers."""
    assert piece.axes is not None
    digits = [digit for axis in piece.axes for digit in axis]
    leaf_digits = [digit for digit in digits if digit.axis is not None]
    whole = piece.box == shape and math.prod(d.size for d in leaf_digits) == math.prod(
        piece.shape[leading:]
    )
    if not whole:
        raise _CannotStoreError(f"{piece.path!r} is not multiplied whole, as its recipe needs")
    outliers = recipe.outliers
    if outliers is not None and len(leaf_digits) < len(digits):
        raise _CannotStoreError(f"{piece.path!r} is repeated, which outliers do not support")
    # The mean and deviation of `sigma` are float sums, whose last bit depends on the order.
    is_ordered = outliers is not None and outliers.sigma is not None
    if recipe.scaling.second_level == "blocks" or is_ordered:
        order = [(d.axis, -d.stride) for d in leaf_digits]
        if (
            len(leaf_digits) < len(digits)
            or order != sorted(order)
            or any(d.flipped for d in leaf_digits)
        ):
            raise _CannotStoreError(
                f"{piece.path!r} is multiplied with its axes in another order; contract its own "
                "axes by jnp.einsum, or store it in that order"
            )


def _apply_step(x: jax.Array, step: Any) -> jax.Array:
    """Applies one conversion of the model to a leaf."""
    if isinstance(step, tuple):
        return lax.reduce_precision(x, *step)
    if jnp.issubdtype(x.dtype, jnp.floating):
        # XLA may drop a conversion to a narrower dtype if one back to the wider dtype follows.
        info = jnp.finfo(step)
        if info.nmant < jnp.finfo(x.dtype).nmant:
            x = lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(step)
