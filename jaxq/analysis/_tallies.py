"""Sums over a tensor and its quantization error that merge over batches, layers and devices.

Counts are two float32 numbers, high · 65536 + low, so that their sums stay exact. Sums of values
are divided by a power of two near the largest magnitude, which is kept as their exponent. The
smallest magnitude is kept as bits that grow as it shrinks, so that 0 is neutral for a maximum.
"""

import functools
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import Layout, where
from jaxq.analysis._arguments import Ends, ends
from jaxq.analysis._diagnostics import in_a_recipe
from jaxq.analysis._sums import largest_magnitude, over_all
from jaxq.formats import Format, get_format
from jaxq.numerics import cast, encode
from jaxq.products import Scaled, Tally
from jaxq.quantizers import fake_quant, quantize
from jaxq.quantizers.calibration import Calibrated
from jaxq.recipes import Recipe

__all__ = ["EXPONENTS", "Quantization", "difference_of", "errors_of", "finished", "tensor_of"]

_FLOAT32 = Layout.of(np.dtype(np.float32))
_ZERO, _ONE, _NONE = np.float32(0), np.float32(1), np.int32(0)
_HALF = 16
EXPONENTS = range(-127, 128)
"""The exponents of a histogram; -127 stands for all subnormal numbers."""


class Quantization(NamedTuple):
    """A tensor before and after quantization by a recipe.

    Attributes:
      value: the tensor.
      quantized: the tensor after quantization.
      recipe: the recipe on the tensor's own axes, or a format.
      scales: the scales that were given, or None.
    """

    value: jax.Array
    quantized: jax.Array
    recipe: Recipe | Format
    scales: Calibrated | None = None

    @classmethod
    def of(cls, x: jax.Array, recipe: Recipe | Format) -> "Quantization":
        """Returns the quantization of a tensor to nearest, with scales from the tensor."""
        y = fake_quant(x, recipe) if isinstance(recipe, Recipe) else cast(x, recipe)
        return cls(x, y, recipe)


# One trace per shape and recipe instead of one per tensor of a model.
@functools.partial(jax.jit, static_argnames="histogram")
def tensor_of(x: jax.Array, histogram: bool = False) -> Tally:
    """Returns the sums of a tensor: counts, extremes, sum and sum of squares.

    Args:
      x: the tensor.
      histogram: True to count the exponents of its elements.
    """
    x = x.astype(jnp.float32)
    bits = _FLOAT32.bits(x) & _FLOAT32.magnitude_mask
    finite, zero = bits < _FLOAT32.inf, bits == 0
    small = where(finite & ~zero, _FLOAT32.inf - bits, _NONE)
    counts = [v.astype(jnp.int32) for v in (zero, ~finite)]
    top, small, zeros, lost = over_all(
        [largest_magnitude(x, _FLOAT32), small, *counts], [lax.max, lax.max, lax.add, lax.add]
    )
    unit = _exponent(top)
    scaled = where(finite, x * _inverse(unit), _ZERO)
    total, squares = over_all([scaled, scaled * scaled], [lax.add, lax.add])
    added = {"zeros": _count(zeros), "nonfinite": _count(lost), "count": _count_of(x.size)}
    if histogram:
        place = where(finite & ~zero, bits >> np.int32(23), np.int32(len(EXPONENTS)))
        added["exponents"] = (
            jnp.zeros(len(EXPONENTS), jnp.int32).at[place.reshape(-1)].add(1, mode="drop")
        ).astype(jnp.float32)
    largest = {"amax": _FLOAT32.floats(top), "small": _FLOAT32.floats(small)}
    sums = {"sum": _scaled(total, unit), "squares": _scaled(squares, unit + unit)}
    return Tally(added, largest, sums)


def errors_of(q: Quantization, asked: Collection[str]) -> Tally:
    """Returns the sums of a quantization error over the elements that are finite before and after.

    Args:
      q: the quantization.
      asked: the names of the statistics that need them.
    """
    return _errors(q.value, q.quantized, q.scales, q.recipe, frozenset(asked))


@functools.partial(jax.jit, static_argnames=("recipe", "asked"))
def _errors(
    value: jax.Array,
    quantized: jax.Array,
    scales: Calibrated | None,
    recipe: Recipe | Format,
    asked: frozenset[str],
) -> Tally:
    q = Quantization(value, quantized, recipe, scales)
    x, y = value.astype(jnp.float32), quantized.astype(jnp.float32)
    finite, masks = jnp.isfinite(x), {}
    if "clipped" in asked:
        end = _ends(q)
        masks["clipped"] = ((x > end.high) | (x < end.low)) & finite
    if "flushed" in asked:
        zero, none = ((_FLOAT32.bits(v) & _FLOAT32.magnitude_mask) == 0 for v in (x, y))
        masks["flushed"] = none & ~zero & finite
    tally = difference_of(x, y, asked, masks)
    added: dict[str, jax.Array] = {}
    largest: dict[str, jax.Array] = {}
    if "block_range_bits" in asked:
        largest["block_range"] = _block_range(q.value, q.recipe)
    if "codes_used" in asked:
        added["codes"] = _codes(q)
    if isinstance(q.recipe, Recipe) and any(name.startswith("scale_") for name in asked):
        own = _scales(q)
        added |= own.added
        largest |= own.largest
    return tally.join(Tally(added, largest, {}))


def difference_of(
    x: jax.Array,
    y: jax.Array,
    asked: Collection[str] = ("cosine", "bias"),
    masks: Mapping[str, jax.Array] = MappingProxyType({}),
) -> Tally:
    """Returns the sums of the differences of two tensors where both are finite.

    Args:
      x: the original tensor.
      y: its approximation.
      asked: the names of the statistics that need them.
      masks: masks whose elements are counted too, by name.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    kept = jnp.isfinite(x) & jnp.isfinite(y)
    named = {"kept": kept, "lost": jnp.isfinite(x) & ~kept, **masks}
    x, y = where(kept, x, _ZERO), where(kept, y, _ZERO)
    values = {"x": x, "error": y - x, **({"y": y} if "cosine" in asked else {})}
    first = [largest_magnitude(v, _FLOAT32) for v in values.values()]
    first += [mask.astype(jnp.int32) for mask in named.values()]
    tops = over_all(first, [lax.max] * len(values) + [lax.add] * len(named))
    units = {name: _exponent(top) for name, top in zip(values, tops, strict=False)}
    scaled = {name: v * _inverse(units[name]) for name, v in values.items()}
    # The products to add, each with the exponent of its unit.
    pairs = {"signal": ("x", "x"), "noise": ("error", "error")}
    if "cosine" in asked:
        pairs |= {"energy": ("y", "y"), "inner": ("x", "y")}
    terms = {n: (scaled[a] * scaled[b], units[a] + units[b]) for n, (a, b) in pairs.items()}
    if "bias" in asked:
        terms["drift"] = scaled["error"], units["error"]
    totals = over_all([term for term, _ in terms.values()], [lax.add] * len(terms))
    sums = {
        name: _scaled(total, unit)
        for (name, (_, unit)), total in zip(terms.items(), totals, strict=True)
    }
    counts = dict(zip(named, map(_count, tops[len(values) :]), strict=True))
    return Tally(counts, {}, sums)


def finished(tally: Tally) -> dict[str, jax.Array]:
    """Returns the statistics of a tally by name; the leading axes of its numbers are kept."""
    found = {}
    for prefix, own in tally.split().items():
        named = {**_of_tensor(own), **_of_errors(own), **_of_scales(own)}
        found |= {f"{prefix}/{name}": x for name, x in named.items()}
    return found


def _of_tensor(own: Tally) -> dict[str, jax.Array]:
    if "count" not in own.added:
        return {}
    count, lost = _number(own.added["count"]), _number(own.added["nonfinite"])
    finite = count - lost
    amax, small = own.largest["amax"], _decoded(own.largest["small"])
    found = {
        "amax": _known(amax, count),
        "smallest": _known(small, amax),
        "rms": _root_mean(own.scaled["squares"], finite),
        "mean": _mean(own.scaled["sum"], finite),
        "zeros": _share(_number(own.added["zeros"]), finite),
        "nonfinite": _share(lost, count),
        "range_bits": _known(jnp.log2(amax) - jnp.log2(small), amax),
    }
    if "exponents" in own.added:
        found["exponents"] = own.added["exponents"]
    return found


def _of_errors(own: Tally) -> dict[str, jax.Array]:
    if "kept" not in own.added:
        return {}
    kept, lost = _number(own.added["kept"]), _number(own.added["lost"])
    signal, noise = own.scaled["signal"], own.scaled["noise"]
    octaves = (signal.exponent - noise.exponent) * np.float32(10 * np.log10(2))
    ratio = jnp.log10(where(noise.value > 0, signal.value / noise.value, _ONE))
    decibels = where(noise.value > 0, octaves + np.float32(10) * ratio, np.float32(np.inf))
    found = {
        "sqnr_db": _known(decibels, kept),
        "mse": _mean(noise, kept),
        "lost": _share(lost, kept + lost),
    }
    if "drift" in own.scaled:
        found["bias"] = _mean(own.scaled["drift"], kept)
    if "inner" in own.scaled:
        found["cosine"] = _known(_cosine(signal, own.scaled["energy"], own.scaled["inner"]), kept)
    for name in ("clipped", "flushed"):
        if name in own.added:
            found[name] = _share(_number(own.added[name]), kept + lost)
    if "block_range" in own.largest:
        found["block_range_bits"] = _known(own.largest["block_range"], kept)
    if "codes" in own.added:
        used = (own.added["codes"] > 0).astype(jnp.float32)
        found["codes_used"] = _known(used.mean(-1), kept)
    return found


def _cosine(signal: Scaled, energy: Scaled, inner: Scaled) -> jax.Array:
    norms = jnp.sqrt(signal.value) * jnp.sqrt(energy.value)
    shift = inner.exponent - (signal.exponent + energy.exponent) / np.float32(2)
    cosine = inner.value / where(norms > 0, norms, _ONE) * jnp.exp2(shift)
    same = where((signal.value == 0) & (energy.value == 0), _ONE, _ZERO)
    return where(norms > 0, lax.clamp(-_ONE, cosine, _ONE), same)


def _of_scales(own: Tally) -> dict[str, jax.Array]:
    if "scales" not in own.added:
        return {}
    count = _number(own.added["scales"])
    amax, small = own.largest["scale_amax"], _decoded(own.largest["scale_small"])
    return {
        "scale_amax": _known(amax, count),
        "scale_smallest": _known(small, amax),
        "scale_range_bits": _known(jnp.log2(amax) - jnp.log2(small), amax),
        "scale_ends": _share(_number(own.added["scale_ends"]), count),
    }


def _exponent(top: jax.Array) -> jax.Array:
    """Returns the exponent of a magnitude given by its bits, from -126 to 126."""
    return lax.clamp(np.int32(-126), (top >> np.int32(23)) - np.int32(127), np.int32(126))


def _inverse(exponent: jax.Array) -> jax.Array:
    return _FLOAT32.floats((np.int32(127) - exponent) << np.int32(23))


def _scaled(value: jax.Array, exponent: jax.Array) -> Scaled:
    return Scaled(value, where(value != 0, exponent, _NONE).astype(jnp.float32))


def _count_of(size: int) -> jax.Array:
    return jnp.asarray(np.array(divmod(size, 2**_HALF), np.float32))


def _count(n: jax.Array) -> jax.Array:
    high, low = n >> np.int32(_HALF), n & np.int32(2**_HALF - 1)
    return jnp.stack([high, low]).astype(jnp.float32)


def _number(count: jax.Array) -> jax.Array:
    return count[..., 0] * np.float32(2**_HALF) + count[..., 1]


def _decoded(small: jax.Array) -> jax.Array:
    return _FLOAT32.floats(_FLOAT32.inf - _FLOAT32.bits(small))


def _known(value: jax.Array, count: jax.Array) -> jax.Array:
    return where(count > 0, value, np.float32(np.nan))


def _share(part: jax.Array, count: jax.Array) -> jax.Array:
    return _known(part / where(count > 0, count, _ONE), count)


def _mean(total: Scaled, count: jax.Array) -> jax.Array:
    value = total.value / where(count > 0, count, _ONE)
    half = jnp.floor(total.exponent / np.float32(2))
    return _known(value * jnp.exp2(half) * jnp.exp2(total.exponent - half), count)


def _root_mean(total: Scaled, count: jax.Array) -> jax.Array:
    value = jnp.sqrt(total.value / where(count > 0, count, _ONE))
    return _known(value * jnp.exp2(total.exponent / np.float32(2)), count)


def _ends(q: Quantization) -> Ends:
    """Returns the ends of the grid of each element."""
    if isinstance(q.recipe, Format):
        return ends(q.recipe)
    scale, zero = (None, None) if q.scales is None else (q.scales.scale, q.scales.zero_point)
    return in_a_recipe(q.value, scale, q.recipe, zero)


def _block_range(x: jax.Array, recipe: Recipe | Format) -> jax.Array:
    """Returns the largest logarithm to base 2 of the amax over the smallest value of a block."""
    bits = _FLOAT32.bits(x.astype(jnp.float32)) & _FLOAT32.magnitude_mask
    bits = where(bits < _FLOAT32.inf, bits, _NONE)
    small = where(bits > 0, _FLOAT32.inf - bits, _NONE)
    if isinstance(recipe, Recipe):
        cut = recipe.cut(x.shape)
        tops, smalls = (jnp.max(cut.split(v), axis=cut.axes) for v in (bits, small))
    else:
        tops, smalls = jnp.max(bits), jnp.max(small)
    top, least = _FLOAT32.floats(tops), _FLOAT32.floats(_FLOAT32.inf - smalls)
    return jnp.max(where(tops > 0, jnp.log2(top) - jnp.log2(least), _ZERO))


def _codes(q: Quantization) -> jax.Array:
    """Returns the number of elements with each code of the format."""
    if isinstance(q.recipe, Format):
        codes, bits = encode(q.value.astype(jnp.float32), q.recipe), q.recipe.bits
    else:
        given = {} if q.scales is None else q.scales._asdict()
        codes = quantize(q.value, q.recipe.to_nearest(), **given).unpack()
        bits = q.recipe.element.bits
    places = codes.astype(jnp.int32).reshape(-1)
    return jnp.zeros(2**bits, jnp.int32).at[places].add(1).astype(jnp.float32)


def _scales(q: Quantization) -> Tally:
    """Returns the extremes of the scales and the number at an end of their format."""
    assert isinstance(q.recipe, Recipe)
    if q.scales is not None:
        scales = jnp.abs(q.scales.scale)
    else:
        scales = jnp.abs(quantize(q.value, q.recipe.to_nearest()).scales)
    bits = _FLOAT32.bits(scales) & _FLOAT32.magnitude_mask
    fmt = get_format(q.recipe.scale_format)
    at_end = (scales >= np.float32(min(fmt.max, 3e38))) | (scales <= np.float32(fmt.min_positive))
    top, small, count = over_all(
        [
            largest_magnitude(scales, _FLOAT32),
            where((bits > 0) & (bits < _FLOAT32.inf), _FLOAT32.inf - bits, _NONE),
            at_end.astype(jnp.int32),
        ],
        [lax.max, lax.max, lax.add],
    )
    added = {"scales": _count_of(scales.size), "scale_ends": _count(count)}
    largest = {"scale_amax": _FLOAT32.floats(top), "scale_small": _FLOAT32.floats(small)}
    return Tally(added, largest, {})
