"""Sums over a tensor and its quantization error that merge over batches, layers and devices.

Sums of values are divided by a power of two near the largest magnitude, which is stored as their
exponent. The smallest magnitude is stored as bits that grow as it shrinks, so that 0 is neutral
for a maximum. `_finishing.py` computes the statistics from the sums.
"""

import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from jaxq._base.bits import FloatLayout, where
from jaxq._jax.meshes import automatic
from jaxq.analysis._arguments import rounding_limits
from jaxq.analysis._diagnostics import scaled_limits
from jaxq.analysis._sums import fold, largest_magnitude, over_rows
from jaxq.formats import Format, get_format
from jaxq.numerics import cast, encode
from jaxq.products import Scaled, Tally, Tensor
from jaxq.quantizers import quantize, simulate
from jaxq.recipes import Recipe, Scales

__all__ = ["EXPONENTS", "Sums", "difference_of", "errors_of", "quantized", "sums_of"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))
_ZERO, _NONE = np.float32(0), np.int32(0)
EXPONENTS = range(-127, 128)
"""The exponents of a histogram; -127 stands for all subnormal numbers."""


class Sums(NamedTuple):
    """The sums of a tensor's elements, and of its quantization error."""

    tensor: Tally
    errors: Tally


def quantized(x: jax.Array, recipe: Recipe | Format) -> Tensor:
    """Returns a tensor quantized to nearest, with scales from the tensor, or cast to a format."""
    if isinstance(recipe, Format):
        return Tensor(x, cast(x, recipe), recipe)
    simulated = simulate(x, recipe)
    return Tensor(x, simulated.values, recipe, simulated.scales)


def sums_of(tensor: Tensor, asked: Collection[str], errors: bool) -> Sums:
    """Returns the sums of a tensor and of its quantization error, in two passes over it.

    Args:
      tensor: the tensor.
      asked: the names of the requested statistics; sums that none of them needs are left out.
      errors: True to compute the sums of the error, too.
    """
    return _sums(tensor, frozenset(asked), True, errors)


def errors_of(tensor: Tensor, asked: Collection[str]) -> Tally:
    """Returns the sums of a quantization error over the elements that are finite before and after.

    Args:
      tensor: the tensor.
      asked: the names of the requested statistics; sums that none of them needs are left out.
    """
    return _sums(tensor, frozenset(asked), False, True).errors


def difference_of(x: jax.Array, y: jax.Array) -> Tally:
    """Returns the sums of the differences of two tensors where both are finite."""
    return _sums(Tensor(x, y), frozenset({"cosine", "bias"}), False, True).errors


class _Folded(NamedTuple):
    """A tensor in the shape in which it is reduced.

    Attributes:
      x: the tensor.
      y: the tensor after quantization, or None.
      clipped: the mask of clipped elements, or None.
      padding: the number of zeros at the end.
    """

    x: jax.Array
    y: jax.Array | None
    clipped: jax.Array | None
    padding: int


def _replicated(mesh: Any, result: Any, *arguments: Any) -> Any:
    """Returns the sharding of sums on a mesh with explicit axes."""
    del mesh, result, arguments
    return PartitionSpec()


# One trace per shape and recipe instead of one per tensor of a model.
@functools.partial(jax.jit, static_argnames=("asked", "of_tensor", "errors"))
@automatic(_replicated)
def _sums(tensor: Tensor, asked: frozenset[str], of_tensor: bool, errors: bool) -> Sums:
    """Returns the sums of the elements if `of_tensor` is true, and of the error if `errors` is."""
    wide, y, clipped = tensor.value.astype(jnp.float32), None, None
    if errors:
        y = fold(tensor.quantized.astype(jnp.float32))
        if tensor.recipe is not None and "clipped" in asked:
            clipped = fold(_clipped(wide, tensor.scales, tensor.recipe))
    folded = _Folded(fold(wide), y, clipped, fold(wide).size - wide.size)
    tops, counts = _extremes(folded, asked, of_tensor)
    sums = _totals(folded, tops, asked, of_tensor)
    size, first, second = jnp.full(1, wide.size, jnp.int32), Tally.empty(), Tally.empty()
    lost = counts.pop("nonfinite")
    if of_tensor:
        histogram = {"exponents": _exponents(wide)} if "exponents" in asked else {}
        first = Tally(
            {"count": size, "nonfinite": lost, "zeros": counts.pop("zeros")},
            histogram,
            {"amax": tops["all"], "small": tops["small"]},
            {name: sums.pop(name) for name in ("sum", "squares")},
        )
    if errors:
        counts["lost"] = size - lost - counts["compared"]
        second = Tally(counts, {}, {}, sums)
        if tensor.recipe is not None:
            second = second.join(_of_recipe(tensor, asked))
    return Sums(first, second)


# XLA on CPU (JAX 0.10 and 0.12) stores every array that both passes compute. So that they share
# only x and y, the first one computes on bits, and takes the error with the opposite sign.


def _extremes(
    folded: _Folded, asked: Collection[str], of_tensor: bool
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the extreme magnitudes as integer bits, and the counts of elements, both by name.

    The smallest nonzero magnitude, "small", is given as the bits of infinity minus its bits, so
    that all extremes are maxima.
    """
    x, y, clipped, padding = folded
    bits, none = _magnitude(x), jnp.zeros(x.shape, jnp.int32)
    finite, zero = bits < _FLOAT32.inf, bits == 0
    tops, masks = {}, {"nonfinite": ~finite}
    if of_tensor:
        tops["all"] = lax.select(finite, bits, none)
        tops["small"] = lax.select(finite & ~zero, _FLOAT32.inf - bits, none)
        masks["zeros"] = zero
    if y is not None:
        after = _magnitude(y)
        compared, error = finite & (after < _FLOAT32.inf), _magnitude(x - y)
        tops["x"] = lax.select(compared, bits, none)
        tops["error"] = lax.select(compared & (error < _FLOAT32.inf), error, none)
        if "cosine" in asked:
            tops["y"] = lax.select(compared, after, none)
        masks["compared"] = compared
        if clipped is not None:
            masks["clipped"] = clipped & finite
        if "flushed" in asked:
            masks["flushed"] = (after == 0) & ~zero & finite
    arrays = [*tops.values(), *(mask.astype(jnp.int32) for mask in masks.values())]
    combine = [lax.max] * len(tops) + [lax.add] * len(masks)
    results = over_rows(arrays, combine)
    results = over_rows([part[None] for part in results], combine)
    extremes, counts = results[: len(tops)], dict(zip(masks, results[len(tops) :], strict=True))
    if padding:
        counts |= {n: counts[n] - np.int32(padding) for n in ("zeros", "compared") if n in counts}
    return dict(zip(tops, extremes, strict=True)), counts


def _totals(
    folded: _Folded, tops: dict[str, jax.Array], asked: Collection[str], of_tensor: bool
) -> dict[str, Scaled]:
    """Returns the sums of values in units of their extremes."""
    x, y = folded.x, folded.y
    zeros, units = jnp.zeros(x.shape, jnp.float32), _inverse(jnp.concatenate([*tops.values()]))
    unit = {name: units[i : i + 1] for i, name in enumerate(tops)}

    def scaled(name: str, value: jax.Array, counted: jax.Array) -> jax.Array:
        factor = lax.broadcast_in_dim(unit[name], x.shape, (0,))
        return lax.select(counted, value * factor, zeros)

    values, pairs, finite = {}, {}, lax.is_finite(x)
    if of_tensor:
        values["all"] = scaled("all", x, finite)
        pairs |= {"sum": ("all",), "squares": ("all", "all")}
    if y is not None:
        compared = finite & lax.is_finite(y)
        values |= {"x": scaled("x", x, compared), "error": scaled("error", y - x, compared)}
        pairs |= {"signal": ("x", "x"), "noise": ("error", "error")}
        if "bias" in asked:
            pairs["drift"] = ("error",)
        if "cosine" in asked:
            values["y"] = scaled("y", y, compared)
            pairs |= {"energy": ("y", "y"), "inner": ("x", "y")}
    # In the order of a row, which is sorted by name, so that XLA does not have to reorder the sums.
    pairs = dict(sorted(pairs.items()))
    terms = [
        math.prod([values[part] for part in parts[1:]], start=values[parts[0]])
        for parts in pairs.values()
    ]
    totals = over_rows(terms, [lax.add] * len(terms))
    first = _exponent(jnp.concatenate([tops[parts[0]] for parts in pairs.values()]))
    one = jnp.full(1, 127 << 23, jnp.int32)
    second = [tops[parts[1]] if len(parts) > 1 else one for parts in pairs.values()]
    exponents = first + _exponent(jnp.concatenate(second))
    return {
        name: Scaled(total, exponents[i : i + 1])
        for i, (name, total) in enumerate(zip(pairs, totals, strict=True))
    }


def _magnitude(x: jax.Array) -> jax.Array:
    return _FLOAT32.bits(x) & _FLOAT32.magnitude_mask


def _exponent(top: jax.Array) -> jax.Array:
    """Returns the exponent of a magnitude given by its bits, from -126 to 126."""
    return lax.clamp(np.int32(-126), (top >> np.int32(23)) - np.int32(127), np.int32(126))


def _inverse(top: jax.Array) -> jax.Array:
    """Returns the power of two that divides by the unit of a magnitude given by its bits."""
    return _FLOAT32.floats((np.int32(127) - _exponent(top)) << np.int32(23))


def _exponents(x: jax.Array) -> jax.Array:
    """Returns the number of elements with each exponent."""
    bits = _magnitude(x)
    place = where(
        (bits > 0) & (bits < _FLOAT32.inf), bits >> np.int32(23), np.int32(len(EXPONENTS))
    )
    zeros = jnp.zeros(len(EXPONENTS), jnp.int32)
    return zeros.at[place.reshape(-1)].add(1, mode="drop").astype(jnp.float32)


def _clipped(x: jax.Array, scales: Scales | None, recipe: Recipe | Format) -> jax.Array:
    """Returns the mask of the elements beyond the limits of the grid."""
    if isinstance(recipe, Format):
        limits = rounding_limits(recipe)
    else:
        assert scales is not None
        limits = scaled_limits(x.shape, scales, recipe)
        if recipe.outliers is not None:  # Outliers are not clipped.
            x, _ = recipe.outliers.take(x)
    return (x > limits.high) | (x < limits.low)


def _of_recipe(q: Tensor, asked: Collection[str]) -> Tally:
    """Returns the sums and extremes that depend on a recipe's blocks, codes and scales."""
    assert q.recipe is not None
    ranges, codes = {}, {}
    if "block_range_bits" in asked:
        ranges["block_range"] = _FLOAT32.bits(_block_range(q.value, q.recipe))[None]
    if "codes_used" in asked:
        codes["codes"] = _codes(q)
    tally = Tally({}, codes, ranges, {})
    if isinstance(q.recipe, Recipe) and any(name.startswith("scale_") for name in asked):
        tally = tally.join(_scales(q))
    return tally


def _block_range(x: jax.Array, recipe: Recipe | Format) -> jax.Array:
    """Returns the largest logarithm to base 2 of the amax over the smallest value of a block."""
    bits = _magnitude(x.astype(jnp.float32))
    bits = where(bits < _FLOAT32.inf, bits, _NONE)
    small = where(bits > 0, _FLOAT32.inf - bits, _NONE)
    if isinstance(recipe, Recipe):
        cut = recipe.cut(x.shape)
        tops, smalls = (jnp.max(cut.split(v), axis=cut.axes) for v in (bits, small))
    else:
        tops, smalls = jnp.max(bits), jnp.max(small)
    top, least = _FLOAT32.floats(tops), _FLOAT32.floats(_FLOAT32.inf - smalls)
    return jnp.max(where(tops > 0, jnp.log2(top) - jnp.log2(least), _ZERO))


def _codes(q: Tensor) -> jax.Array:
    """Returns the number of elements with each code of the format."""
    if isinstance(q.recipe, Format):
        codes, bits = encode(q.value.astype(jnp.float32), q.recipe), q.recipe.bits
    else:
        assert q.recipe is not None
        given_scales: dict[str, Any] = {} if q.given is None else q.given._asdict()
        codes = quantize(q.value, q.recipe.to_nearest(), **given_scales).unpack()
        bits = q.recipe.element.bits
    places = codes.astype(jnp.int32).reshape(-1)
    return jnp.zeros(2**bits, jnp.int32).at[places].add(1).astype(jnp.float32)


def _scales(q: Tensor) -> Tally:
    """Returns the extremes of the scales and the number at an end of their format."""
    assert isinstance(q.recipe, Recipe)
    assert q.scales is not None
    fmt = get_format(q.recipe.scale_format)
    scales, stored = jnp.abs(q.scales.step), jnp.abs(q.scales.storage.scale)
    bits = _magnitude(scales)
    at_end = (stored >= np.float32(min(fmt.max, 3e38))) | (stored <= np.float32(fmt.min_positive))
    small = where((bits > 0) & (bits < _FLOAT32.inf), _FLOAT32.inf - bits, _NONE)
    arrays = [largest_magnitude(scales, _FLOAT32), small, at_end.astype(jnp.int32)]
    shape = np.broadcast_shapes(scales.shape, stored.shape)
    arrays = [fold(jnp.broadcast_to(array, shape)) for array in arrays]
    top, small, count = over_rows(arrays, [lax.max, lax.max, lax.add])
    largest = {"scale_amax": jnp.max(top)[None], "scale_small": jnp.max(small)[None]}
    counts = {
        "scales": jnp.full(1, math.prod(shape), jnp.int32),
        "scale_ends": jnp.sum(count)[None],
    }
    return Tally(counts, {}, largest, {})
