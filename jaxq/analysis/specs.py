"""What every function here takes for a quantizer; where a format's grid ends, and how fine it is.

A format, or its name, is a cast without a scale here, as in `jaxq.chain`; a preset's name or a
`Quantizer` is `jaxq.fake_quant`.
"""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq import catalog, presets
from jaxq.bits import Layout
from jaxq.casting import floats
from jaxq.catalog import get_format
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat
from jaxq.presets import get_quantizer
from jaxq.recipes import Quantizer

__all__ = ["Ends", "Spec", "checked", "ends", "meaning", "significant_bits", "spacing_exponent"]

Spec: TypeAlias = str | Format | Quantizer

_FLOAT32 = Layout.of(np.dtype(np.float32))


def meaning(spec: Spec) -> Format | Quantizer:
    """The format that a plain cast is to, or the recipe."""
    if isinstance(spec, Quantizer | Format):
        return spec
    if isinstance(spec, str) and spec in catalog.ALL and spec not in presets.ALL:
        return get_format(spec)
    return get_quantizer(spec)


def checked(name: str, x: jax.typing.ArrayLike, spec: Spec) -> tuple[jax.Array, Any]:
    """The two arguments that every function begins with: an array, and what `meaning` gives."""
    x = floats(name, x)
    if x.dtype == jnp.float64:
        raise TypeError(
            f"{name}: `x` must be float16, bfloat16 or float32, got float64. "
            "Convert it first: x.astype(jnp.float32)."
        )
    return x, meaning(spec)


class Ends(NamedTuple):
    """Where rounding to nearest leaves a grid, and where it gives 0.

    Numbers above `high` and below `low` are clipped. Of the others those from -`negative` to
    `positive` become 0; both are -1 where no number but 0 itself does.
    """

    low: np.float32 | jax.Array
    high: np.float32 | jax.Array
    negative: np.float32 | jax.Array
    positive: np.float32 | jax.Array


@functools.cache
def ends(fmt: Format) -> Ends:
    """The ends of a format's grid: half a step beyond its lowest and its largest value.

    A number at that very place is clipped if its tie goes outwards. In an unsigned float format
    with a NaN, which negative numbers become, all of these are clipped.
    """
    listed = fmt.bits <= 16
    outward, values, steps = False, np.zeros(2), (0.0, 0.0)
    if isinstance(fmt, FloatFormat):
        odd = fmt.max_code % 2 if fmt.mantissa_bits or fmt.parity == "code" else 1
        outward = odd == 1
    if listed:
        values = fmt.values
        steps = values[1] - values[0], values[-1] - values[-2]
    if isinstance(fmt, FloatFormat):  # Above a power of two the next step is wider.
        wide = math.ldexp(1.0, fmt.emax - fmt.mantissa_bits)
        steps = wide if fmt.signed else values[1] - values[0], wide
    lost = isinstance(fmt, FloatFormat) and not fmt.signed and fmt.nan is not None
    low = 0.0 if lost else fmt.min - steps[0] / 2
    high = fmt.max + steps[1] / 2
    bounds = [_within(end, outward) for end in (low, high)]
    flush = (-1.0, -1.0)
    if not isinstance(fmt, TaperedFormat) and listed and bool(np.any(values == 0)):
        zero = int(np.flatnonzero(values == 0)[0])
        near = [
            -values[zero - 1] if zero else -2 * low,
            values[zero + 1] if zero + 1 < len(values) else 2 * high,
        ]
        flush = (near[0] / 2, near[1] / 2)
        if isinstance(fmt, CodebookFormat):  # A tie goes one way, whatever the sign.
            out = 0 if fmt.ties == "down" else 1
            if (zero > 0, zero + 1 < len(values))[out]:  # Nothing ties beyond the ends.
                inner = float(np.nextafter(np.float32(flush[out]), np.float32(0)))
                flush = (inner, flush[1]) if out == 0 else (flush[0], inner)
    elif not listed:
        flush = (fmt.tiny / 2,) * 2
    return Ends(bounds[0], bounds[1], np.float32(flush[0]), np.float32(flush[1]))


def _within(end: float, outward: bool) -> np.float32:
    """The last float32 that is not clipped: the end, or its neighbour if ties go outwards."""
    largest = float(np.finfo(np.float32).max)
    near = np.float32(min(max(end, -largest), largest))
    clips = outward and float(near) == end and end != 0
    return np.nextafter(near, np.float32(0)) if clips else near


def spacing_exponent(x: jax.Array, fmt: Format) -> jax.Array:
    """The k of the spacing 2^k between a format's values around each number; int32.

    For floats and integers exact; of codebooks, posits and takums the power of two at or below the
    distance between the two values around it.
    """
    if isinstance(fmt, IntFormat):
        return jnp.full(x.shape, -fmt.fraction_bits, jnp.int32)
    if isinstance(fmt, FloatFormat):
        magnitude = _FLOAT32.bits(x) & _FLOAT32.magnitude_mask
        exponent = (magnitude >> np.int32(23)) - np.int32(127)
        low, high = (np.int32(max(min(e, 127), -127)) for e in (fmt.emin, fmt.emax))
        return lax.clamp(low, exponent, high) - np.int32(fmt.mantissa_bits)
    values = fmt.values
    steps = np.frexp(np.diff(values))[1].astype(np.int32) - 1
    steps = np.clip(steps, -126, 127).astype(np.int32)
    with np.errstate(over="ignore"):
        inner = np.clip(values, -3e38, 3e38).astype(np.float32)[1:-1]
    return jnp.asarray(steps)[jnp.searchsorted(jnp.asarray(inner), x, side="right")]


def significant_bits(fmt: Format) -> float:
    """How precise a format is where it is most precise: log2(1 + max v / (v' - v)).

    Here v' is the value that follows v > 0. A float with m bits of mantissa has m + 1, an integer
    nearly as many as bits.

    Example:
      >>> significant_bits(get_format("bfloat16")), significant_bits(get_format("nf4"))
      (8.0, 2.2...)
    """
    if isinstance(fmt, FloatFormat):
        return fmt.mantissa_bits + 1.0
    sides = (values[values > 0] for values in (fmt.values, -fmt.values[::-1]))
    ratios = [np.max(side[:-1] / np.diff(side), initial=0) for side in sides]
    return float(np.log2(1 + max(ratios)))
