"""Quantizers: tensors by a recipe, stored, and the same arithmetic without storing.

    x -> blocks -> range -> scale -> x / scale -> snap to the grid -> (codes ->) value * scale

`quantize` keeps codes and scales; `fake_quant` goes through without codes, bit for bit the same.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding

from jaxq.attaching import Scaling, Snap, attach, passed, wants_neighbours
from jaxq.bits import where
from jaxq.blocks import Cut
from jaxq.casting import as_dtype, encode, floats, widen
from jaxq.catalog import get_format
from jaxq.codecs import pack
from jaxq.formats import Format
from jaxq.gradients import get_gradient
from jaxq.meshes import as_first, automatic, spec_of
from jaxq.presets import get_quantizer
from jaxq.quantized import WHOLE_BYTES, Quantized
from jaxq.recipes import Quantizer
from jaxq.sealed import sealed
from jaxq.sharding import quantized_sharding
from jaxq.snapping import (
    Scales,
    codes,
    given_scales,
    interval,
    limits,
    measured,
    numbers,
    restored,
)

__all__ = [
    "check_plain_scales",
    "fake_quant",
    "has_plain_scales",
    "neighbours",
    "quantize",
]

_FLOAT32 = get_format("float32")

_Given = tuple[jax.Array, jax.Array | None] | None  # Scales and zero points.


def fake_quant(
    x: jax.typing.ArrayLike,
    recipe: "str | Format | Quantizer",
    *,
    scale: jax.typing.ArrayLike | None = None,
    zero_point: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Quantizes and dequantizes, differentiably: what `dequantize(quantize(x))` gives, to the bit.

    Args:
      x: float16, bfloat16 or float32 of any shape. Scales are computed in float32 from each.
      recipe: a `Quantizer`, a preset's name, or a format or its name, which means absmax scaling
        per tensor.
      scale: float32 scales to use instead of those that x itself would get, as
        `jaxq.calibration.finalize` gives them: one a block, or an array that broadcasts to that.
        They are rounded to the recipe's `scale_format`, and differentiate as `jaxq.gradients` says,
        so that they can be learned; `jax.lax.stop_gradient` makes them constants.
      zero_point: the zero points beside them, where the recipe has any; integer ones are rounded to
        the integers of the format.
      key: a key of `jax.random` for a stochastic recipe, and only then.

    Returns:
      An array of x's shape and dtype. A block (the elements of one scale) that holds a NaN or an
      infinity is all NaN, and no other is (with `DoubleScale`, all that share a second scale); an
      all-zero block is zeros; an empty tensor is empty. With scales that are given, infinities
      saturate, and a NaN becomes what `jaxq.cast` makes of it.

    Raises:
      TypeError: x is of another dtype.
      ValueError: an unknown recipe, an axis that x lacks, a block's length that does not divide
        one, scales that do not fit, or a key missing or not needed.

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
    array, recipe = _checked("fake_quant", x, recipe)
    given = _given("fake_quant", array.shape, recipe, scale, zero_point)
    return _fake_quant(array, given, key, recipe)


def neighbours(
    x: jax.typing.ArrayLike,
    recipe: "str | Format | Quantizer",
    *,
    scale: jax.typing.ArrayLike | None = None,
    zero_point: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The two values between which each number lies, of those that `fake_quant` could give it.

    Args:
      x: as in `fake_quant`.
      recipe: as in `fake_quant`. Whatever its rounding.
      scale: as in `fake_quant`; `scale=1.0` makes it the grid of the format itself.
      zero_point: as in `fake_quant`.

    Returns:
      `below` and `above`, arrays of x's shape and dtype, without a gradient; below <= x < above up
      to a scale's rounding, and for a number beyond the ends of the grid the last two. A number
      that is kept apart has itself twice, and so do the zeros of a block of zeros. (Posits and
      takums round nothing but 0 to 0: between 0 and the least positive one there is no interval.)

    Raises:
      TypeError: as in `fake_quant`.
      ValueError: as in `fake_quant`.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> below, above = jaxq.neighbours(jnp.array([0.3, -1.0, 7.0]), "float4_e2m1fn", scale=1.0)
      >>> below.tolist(), above.tolist()
      ([0.0, -1.0, 4.0], [0.5, -0.5, 6.0])
    """
    array, recipe = _checked("neighbours", x, recipe)
    given = _given("neighbours", array.shape, recipe, scale, zero_point)
    recipe = dataclasses.replace(recipe, rounding="nearest_even")  # It needs no key.
    return _neighbours(lax.stop_gradient(array), lax.stop_gradient(given), recipe)


def quantize(
    x: jax.typing.ArrayLike,
    recipe: "str | Format | Quantizer",
    *,
    scale: jax.typing.ArrayLike | None = None,
    zero_point: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
) -> Quantized:
    """Quantizes a tensor to codes and scales.

    Args:
      x: as in `fake_quant`.
      recipe: as in `fake_quant`.
      scale: as in `fake_quant`.
      zero_point: as in `fake_quant`.
      key: as in `fake_quant`.

    Returns:
      A `Quantized`. It has no gradient; train through `fake_quant`.

    Raises:
      TypeError: as in `fake_quant`.
      ValueError: as in `fake_quant`.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> q = jaxq.quantize(jnp.array([0.5, -1.0, 2.54]), "int8_tensor")
      >>> q.codes, float(q.scale[0])
      (Array([ 25, 206, 127], dtype=uint8), 0.019999999552965164)
    """
    array, recipe = _checked("quantize", x, recipe)
    given = _given("quantize", array.shape, recipe, scale, zero_point)
    return _quantize(lax.stop_gradient(array), lax.stop_gradient(given), key, recipe)


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(as_first)
def _fake_quant(x: jax.Array, given: _Given, key: jax.Array | None, recipe: Quantizer) -> jax.Array:
    estimator = get_gradient(recipe.gradient)
    snap, scaling = _snapped(x, given, key, recipe, wants_neighbours(estimator))
    return recipe.cut(x.shape).merge(attach(estimator, snap, scaling))


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(as_first)
def _neighbours(x: jax.Array, given: _Given, recipe: Quantizer) -> tuple[jax.Array, jax.Array]:
    cut = recipe.cut(x.shape)
    snap, _ = _snapped(x, given, None, recipe, True)
    return cut.merge(snap.below), cut.merge(snap.above)


def _snapped(
    x: jax.Array, given: _Given, key: jax.Array | None, recipe: Quantizer, around: bool
) -> tuple[Snap, Scaling | None]:
    """A split tensor and what it is snapped to, with its neighbours if they are asked for.

    Only the tensor itself, and the scales that were given, are differentiable.
    """
    cut = recipe.cut(x.shape)
    function = functools.partial(_values, recipe=recipe, around=around)
    ends, pair, values, scales, apart = sealed(function, *lax.stop_gradient((x, given)), key)
    scaling = None
    if given is not None:
        scaling = _scaling(given, values, apart, scales, recipe, cut)
        pair = map(scaling.moved, pair)
    return Snap(cut.split(x), *ends, *pair), scaling


def _values(
    x: jax.Array, given: _Given, key: jax.Array | None, recipe: Quantizer, around: bool
) -> tuple:
    """A split tensor's values, low and high; neighbours; what they are made of."""
    cut, held = recipe.cut(x.shape), x
    outliers, apart = (), None
    if recipe.outliers is not None:
        held, outliers = recipe.outliers.take(held)
    held = widen(cut.split(held))
    scales = _scales(held, given, key, recipe, cut)
    values = numbers(held, scales, key, recipe)
    y = restored(values, scales.step, scales.zero_point, recipe)
    pair = interval(held, scales, recipe) if around else ()
    low, high = scales.low, scales.high
    if recipe.outliers is not None:  # Whatever is kept apart is not clipped.
        y = cut.split(recipe.outliers.put(cut.merge(y), outliers))
        apart = cut.split(recipe.outliers.mask(x.shape, outliers))
        low, high = (
            where(apart, np.float32(none), jnp.broadcast_to(end, apart.shape))
            for none, end in ((-np.inf, low), (np.inf, high))
        )
        pair = tuple(where(apart, y, v) for v in pair)
    y, low, high, *pair = (as_dtype(a, x.dtype) for a in (y, low, high, *pair))
    return (y, low, high), pair, values, scales, apart


def _scaling(
    given: tuple[jax.Array, jax.Array | None],
    values: jax.Array,
    apart: jax.Array | None,
    scales: Scales,
    recipe: Quantizer,
    cut: Cut,
) -> Scaling:
    """Scales that were given, rounded as they are used, and differentiable."""

    def through(used: jax.Array, source: jax.Array) -> jax.Array:
        return passed(used, cut.spread(jnp.broadcast_to(source, cut.counts)))

    zero_point = None
    if scales.zero_point is not None and given[1] is not None:
        zero_point = through(scales.zero_point, given[1])
    pair = (zero_point, None) if recipe.zero_point == "integer" else (None, zero_point)
    largest = limits(recipe.element)[1]
    scaling = Scaling(through(scales.step, given[0]), *pair, values, cut.sizes, largest)
    # What is kept apart does not depend on them.
    return scaling if apart is None else scaling.constant_where(apart)


def _of_parts(mesh: Any, result: Quantized, x: jax.Array, *others: Any) -> Any:
    """The layout of what `quantize` gives on a mesh with explicit axes."""
    del others
    return quantized_sharding(result, NamedSharding(mesh, spec_of(x)))


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(_of_parts)
def _quantize(x: jax.Array, given: _Given, key: jax.Array | None, recipe: Quantizer) -> Quantized:
    cut, fmt, outliers = recipe.cut(x.shape), recipe.element, ()
    if recipe.outliers is not None:
        x, outliers = recipe.outliers.take(x)
    split = widen(cut.split(x))
    scales = _scales(split, given, key, recipe, cut)
    packed = cut.merge(codes(split, scales, key, recipe))
    packed = packed if x.ndim else packed[None]
    if fmt.bits not in WHOLE_BYTES:
        packed = pack(packed, fmt.bits)
    zero_point = scales.zero_point
    scale = _encoded(scales.stored.reshape(cut.counts), recipe)
    if zero_point is not None:
        zero_point = zero_point.reshape(cut.counts)
        whole = recipe.zero_point == "integer"
        zero_point = (
            zero_point.astype(_integer_dtype(fmt)) if whole else _encoded(zero_point, recipe)
        )
    length = x.shape[-1] if x.ndim else None
    arrays = (packed, scale, scales.second, zero_point, outliers)
    return Quantized(*arrays, recipe, x.dtype, cut.block, length)


def _scales(
    x: jax.Array, given: _Given, key: jax.Array | None, recipe: Quantizer, cut: Cut
) -> Scales:
    """A split tensor's scales: those that were given, which broadcast over blocks, or its own."""
    if given is None:
        return measured(x, key, recipe, cut)
    scale, zero_point = (
        None if a is None else cut.spread(jnp.broadcast_to(a, cut.counts)) for a in given
    )
    assert scale is not None
    return given_scales(scale, zero_point, recipe)


def _encoded(scales: jax.Array, recipe: Quantizer) -> jax.Array:
    """Scales on the grid of their format as it holds them: float32 as it is, others as codes."""
    return scales if recipe.held == _FLOAT32 else encode(scales, recipe.held)


def _integer_dtype(fmt: Format) -> np.dtype:
    """The smallest integer dtype that holds the integers of a format."""
    return np.dtype(f"{'int' if fmt.min < 0 else 'uint'}{8 if fmt.bits <= 8 else 16}")


def has_plain_scales(recipe: Quantizer) -> bool:
    """Whether scales from outside can stand for those that a recipe makes."""
    return recipe.second_level is None and not recipe.search and recipe.stored_scale


def check_plain_scales(name: str, recipe: Quantizer) -> None:
    """Raises ValueError where scales from outside cannot stand for those of a recipe."""
    if not has_plain_scales(recipe):
        raise ValueError(
            f"{name}: scales that are given must be plain numbers, one a block; a recipe with a "
            "second level, a search or stored_scale=False makes its own from the tensor, got "
            f"{recipe}. Leave them out, or use a recipe without these."
        )


def _given(
    name: str,
    shape: tuple[int, ...],
    recipe: Quantizer,
    scale: jax.typing.ArrayLike | None,
    zero_point: jax.typing.ArrayLike | None,
) -> _Given:
    """Scales and zero points that were given, checked."""
    if scale is None:
        if zero_point is not None:
            raise ValueError(f"{name}: `zero_point` needs `scale` beside it, got none.")
        return None
    check_plain_scales(name, recipe)
    if (zero_point is None) != (recipe.zero_point is None):
        raise ValueError(
            f"{name}: a recipe with zero_point={recipe.zero_point!r} needs `zero_point` "
            f"{'left out' if recipe.zero_point is None else 'beside `scale`'}."
        )
    counts = recipe.cut(shape).counts
    result = []
    for label, value in (("scale", scale), ("zero_point", zero_point)):
        if value is None:
            result.append(None)
            continue
        array = jnp.asarray(value, jnp.float32)
        missing = len(counts) - array.ndim
        fits = missing >= 0 and all(
            n in (1, m) for n, m in zip(array.shape, counts[missing:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name}: `{label}` must broadcast to one number a block, shape {counts}, got "
                f"{array.shape}."
            )
        result.append(array.reshape((1,) * missing + array.shape))
    return result[0], result[1]


def _checked(
    name: str, x: jax.typing.ArrayLike, recipe: str | Format | Quantizer
) -> tuple[jax.Array, Quantizer]:
    recipe = get_quantizer(recipe)
    array = floats(name, x)
    if array.dtype == jnp.float64:
        raise TypeError(
            f"{name}: `x` must be float16, bfloat16 or float32, as scales are float32, got "
            "float64. Convert it first: x.astype(jnp.float32)."
        )
    return array, recipe
