"""Quantization by a recipe, and its simulation in floating point.

    x -> blocks -> range -> scale -> x / scale -> snap to the grid -> (codes ->) value * scale

`quantize` stores codes and scales; `fake_quant` computes the same values without codes, bit for
bit.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding

from jaxq._base.cutting import Cut
from jaxq._base.shapes import is_symbolic
from jaxq._jax.meshes import as_first, automatic, spec_of
from jaxq._jax.opaque import opaque
from jaxq.formats import Format
from jaxq.gradients import GivenScales, Snap, attach, get_gradient, passed, wants_neighbors
from jaxq.numerics import BinaryGrid, converted, pack, widen
from jaxq.quantizers._arguments import (
    ErrorWeights,
    Given,
    checked,
    given_scales,
    importance_of,
    key_of,
)
from jaxq.quantizers._parts import Parts, join_parts, parts_of
from jaxq.quantizers._quantized import WHOLE_BYTES, Quantized, encoded
from jaxq.quantizers._sharding import quantized_sharding
from jaxq.quantizers._simulation import Values, quantized_values, scales_of
from jaxq.quantizers._snapping import codes
from jaxq.recipes import Recipe

__all__ = ["fake_quant", "neighbors", "quantize"]


def fake_quant(
    x: jax.typing.ArrayLike,
    recipe: str | Recipe,
    *,
    scale: jax.typing.ArrayLike | None = None,
    zero_point: jax.typing.ArrayLike | None = None,
    importance: jax.typing.ArrayLike | None = None,
    axis: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Quantizes and dequantizes differentiably; bitwise equal to `dequantize(quantize(x))`.

    Args:
      x: a float16, bfloat16 or float32 array of any shape. Scales are computed in float32 for each
        of these dtypes.
      recipe: a `Recipe`, or a name in `jaxq.recipes.RECIPES`. Its format may be a `BinaryGrid`
        with traced widths, so that `jax.vmap` simulates many formats in one compiled program; the
        results equal those of the formats bit for bit.
      scale: float32 scales to use instead of computed ones, such as those of
        `jaxq.calibration.finalize`: one per block, or an array that broadcasts to that. They are
        rounded to the scale format. Their gradients are defined in `jaxq.gradients`, so
        that they can be learned; `jax.lax.stop_gradient` makes them constants.
      zero_point: zero points to use with `scale`, required if the recipe has zero points. Integer
        zero points are rounded to the integers of the format.
      importance: the weights of squared errors in GGUF's search for the scales of a recipe with
        `SuperBlocks`, `SignedScale` or `ScaleAndMin`, as in an importance matrix of llama.cpp: the
        mean squares of the inputs that meet the weights, float32 `[n]` along the axis of the
        blocks, or an array that broadcasts to `x`. Not differentiable. An error for other recipes
        and those of 4-bit floats, which do not search. Default: None.
      axis: the axis of `x` that products contract, as in `jaxq.quantize_tree`: -2 for a kernel
        `[inputs, outputs]`, -1 for a weight `[outputs, inputs]`; the granularity is read relative
        to it. None (the default) reads it on the axes of `x` as it stands: blocks and the vectors
        of `PerToken` lie along the last axis, as in the MX and GGUF formats, and `PerChannel`
        counts all axes.
      key: a `jax.random` key, required for a stochastic recipe and an error for any other.

    Returns:
      An array of x's shape and dtype. A block (the elements that share a scale) that holds a NaN or
      an infinity becomes all NaN and does not affect other blocks (with `DoubleQuant` and
      `SuperBlocks`, all blocks that share its second scale become NaN). An all-zero block stays
      zero, and an empty tensor stays empty. Finite input never gives an infinity or a NaN, unless a
      scale is infinite: results beyond the dtype become its largest value. With given scales,
      infinities saturate like large finite values, and any NaN is converted as a positive one is by
      `jaxq.cast`. On CPU, float32 subnormals (below 2^-126) count as zero, in the input and in the
      result.

    Raises:
      TypeError: if x has another dtype.
      ValueError: if the recipe is unknown, `x` lacks an axis, a block length does not divide its
        axis, the scales do not fit, or the key is missing or not needed.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> w = jnp.array([[0.11, -0.52], [0.7, 0.25]])
      >>> jaxq.fake_quant(w, "int4_channel")
      Array([[ 0.1       , -0.52      ],
             [ 0.7       ,  0.22285712]], dtype=float32)
      >>> jax.grad(lambda w: jaxq.fake_quant(w, "int4_channel").sum())(w)
      Array([[1., 1.],
             [1., 1.]], dtype=float32)
    """
    array, recipe = checked("fake_quant", x, recipe, axis, grids=True)
    given = _given("fake_quant", array.shape, recipe, _Arguments(scale, zero_point, importance))
    return _fake_quant(array, given, key_of("fake_quant", recipe, key), *parts_of(recipe))


def neighbors(
    x: jax.typing.ArrayLike,
    recipe: str | Recipe,
    *,
    scale: jax.typing.ArrayLike | None = None,
    zero_point: jax.typing.ArrayLike | None = None,
    axis: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the two values of `fake_quant`'s grid that enclose each element.

    Args:
      x: as in `fake_quant`.
      recipe: as in `fake_quant`; its rounding mode is ignored.
      scale: as in `fake_quant`; `scale=1.0` selects the grid of the recipe's `element`.
      zero_point: as in `fake_quant`.
      axis: as in `fake_quant`.

    Returns:
      `below` and `above`, arrays of x's shape and dtype, without a gradient. Up to the rounding of
      the scale, below <= x < above; for an element beyond the grid they are the last two values of
      the grid. Both equal the element if it is an outlier or lies in an all-zero block. (Posits and
      takums round only 0 to 0, so there is no interval between 0 and the smallest positive value.)

    Raises:
      TypeError: as in `fake_quant`.
      ValueError: as in `fake_quant`.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> recipe = jaxq.Recipe("float4_e2m1fn")
      >>> below, above = jaxq.neighbors(jnp.array([0.3, -1.0, 7.0]), recipe, scale=1.0)
      >>> below.tolist(), above.tolist()
      ([0.0, -1.0, 4.0], [0.5, -0.5, 6.0])
    """
    array, recipe = checked("neighbors", x, recipe, axis, grids=True)
    given = given_scales("neighbors", array.shape, recipe, scale, zero_point)
    return _neighbors(
        lax.stop_gradient(array), lax.stop_gradient(given), *parts_of(recipe.to_nearest())
    )


def quantize(
    x: jax.typing.ArrayLike,
    recipe: str | Recipe,
    *,
    scale: jax.typing.ArrayLike | None = None,
    zero_point: jax.typing.ArrayLike | None = None,
    importance: jax.typing.ArrayLike | None = None,
    axis: int | None = None,
    key: jax.Array | None = None,
) -> Quantized:
    """Quantizes a tensor to codes and scales.

    Args:
      x: as in `fake_quant`.
      recipe: as in `fake_quant`.
      scale: as in `fake_quant`.
      zero_point: as in `fake_quant`.
      importance: as in `fake_quant`.
      axis: as in `fake_quant`.
      key: as in `fake_quant`.

    Returns:
      A `Quantized`, which has no gradient; use `fake_quant` for training. NaNs and infinities
      are treated exactly as in `fake_quant`.

    Raises:
      TypeError: as in `fake_quant`.
      ValueError: as in `fake_quant`.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> q = jaxq.quantize(jnp.array([0.5, -1.0, 2.54]), "int8_tensor")
      >>> q.codes, float(q.scale[0])
      (Array([ 25, 206, 127], dtype=uint8), 0.019999999552965164)
    """
    array, recipe = checked("quantize", x, recipe, axis)
    if array.ndim and is_symbolic(array.shape[-1]):
        raise ValueError(
            f"quantize: the last axis of `x`, along which {recipe.element.name} codes are packed, "
            f"must have a known length, got the symbolic shape {array.shape}. Export it with a "
            "fixed length, or move another axis to the end."
        )
    given = _given("quantize", array.shape, recipe, _Arguments(scale, zero_point, importance))
    key = key_of("quantize", recipe, key)
    return _quantize(lax.stop_gradient(array), lax.stop_gradient(given), key, recipe)


class _Arguments(NamedTuple):
    """The arguments `scale`, `zero_point` and `importance`."""

    scale: jax.typing.ArrayLike | None
    zero_point: jax.typing.ArrayLike | None
    importance: jax.typing.ArrayLike | None


def _given(
    name: str, shape: tuple[int, ...], recipe: Recipe, arguments: _Arguments
) -> Given | ErrorWeights | None:
    """Checks and returns given scales or a given importance."""
    given = given_scales(name, shape, recipe, arguments.scale, arguments.zero_point)
    if arguments.importance is None:
        return given
    return lax.stop_gradient(importance_of(name, shape, recipe, arguments.importance))


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(as_first)
def _fake_quant(
    x: jax.Array,
    given: Given | ErrorWeights | None,
    key: jax.Array | None,
    grid: BinaryGrid | None,
    recipe: Recipe,
) -> jax.Array:
    estimator = get_gradient(recipe.gradient)
    snapped = _snap_tensor(x, given, key, Parts(grid, recipe), wants_neighbors(estimator))
    return recipe.cut(x.shape).merge(attach(estimator, *snapped))


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(as_first)
def _neighbors(
    x: jax.Array, given: Given | None, grid: BinaryGrid | None, recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
    cut = recipe.cut(x.shape)
    snap = _snap_tensor(x, given, None, Parts(grid, recipe), True).snap
    below, above = (converted(v, x.dtype, overflow="propagate") for v in (snap.below, snap.above))
    return cut.merge(below), cut.merge(above)


class _SnappedTensor(NamedTuple):
    """A snap, the given scales with respect to which it is differentiable, and its result."""

    snap: Snap
    scales: GivenScales | None
    y: jax.Array


def _snap_tensor(
    x: jax.Array,
    given: Given | ErrorWeights | None,
    key: jax.Array | None,
    parts: Parts,
    around: bool,
) -> _SnappedTensor:
    """Returns a split tensor with its quantized values, and with its neighbors if `around` is True.

    Only the tensor itself and given scales are differentiable.
    """
    cut = parts.recipe.cut(x.shape)
    function = functools.partial(quantized_values, recipe=parts.recipe, around=around)
    constants = lax.stop_gradient((x, given, parts.grid))
    values: Values = opaque(function, *constants, key)
    y, wide, low, high, below, above = values[:6]
    scales = None
    if isinstance(given, Given):
        scales = _given_scales(given, values, join_parts(*parts), cut)
        if below is not None and above is not None:
            below, above = scales.moved(below), scales.moved(above)
    snap = Snap(cut.split(x).astype(wide.dtype), wide, low, high, below, above)
    return _SnappedTensor(snap, scales, y)


def _given_scales(given: Given, values: Values, recipe: Recipe, cut: Cut) -> GivenScales:
    """Returns the given scales in differentiable form, rounded as they are used."""
    scales = values.scales

    def through(used: jax.Array | None, source: jax.Array | None) -> jax.Array | None:
        if used is None or source is None:
            return None
        return passed(used, cut.align_scales(jnp.broadcast_to(source, cut.counts)))

    scale = through(scales.step, given.scale)
    assert scale is not None
    largest: Any = recipe.element.scaled_max  # An array for a `BinaryGrid`.
    result = GivenScales(
        scale=scale,
        zero_point=through(scales.zero_point, given.zero_point),
        minimum=through(scales.minimum, given.zero_point),
        grid_values=values.grid_values,
        count=cut.sizes,
        largest=largest if isinstance(largest, jax.Array) else np.float32(largest),
    )
    # Outliers do not depend on the scales.
    return result if values.is_outlier is None else result.constant_where(values.is_outlier)


def _of_parts(mesh: Any, result: Quantized, x: jax.Array, *others: Any) -> Any:
    """Returns the sharding of `quantize`'s result on a mesh with explicit axes."""
    del others
    return quantized_sharding(result, NamedSharding(mesh, spec_of(x)))


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(_of_parts)
def _quantize(
    x: jax.Array, given: Given | ErrorWeights | None, key: jax.Array | None, recipe: Recipe
) -> Quantized:
    cut, fmt, outliers = recipe.cut(x.shape), recipe.element, ()
    if recipe.outliers is not None:
        x, outliers = recipe.outliers.take(x)
    split = widen(cut.split(x))
    scales = scales_of(split, given, key, recipe, cut)
    packed = cut.merge(codes(split, scales, key, recipe))
    packed = packed if x.ndim else packed[None]
    if fmt.bits not in WHOLE_BYTES:
        packed = pack(packed, fmt.bits)
    storage, zero_point = scales.storage, None
    if scales.zero_point is not None:
        zero_point = scales.zero_point.reshape(cut.counts).astype(_integer_dtype(fmt))
    elif scales.minimum is not None:
        minimum = scales.minimum if storage.minimum is None else storage.minimum
        zero_point = encoded(minimum.reshape(cut.counts), cut, recipe)
    return Quantized(
        codes=packed,
        scale=encoded(storage.scale.reshape(cut.counts), cut, recipe),
        second=storage.second,
        zero_point=zero_point,
        outliers=outliers,
        recipe=recipe,
        dtype=x.dtype,
        block=tuple(None if is_symbolic(n) else n for n in cut.block),
        length=x.shape[-1] if x.ndim else None,
    )


def _integer_dtype(fmt: Format) -> np.dtype:
    """Returns the smallest integer dtype that holds the integers of a format."""
    return np.dtype(f"{'int' if fmt.min < 0 else 'uint'}{8 if fmt.bits <= 8 else 16}")
