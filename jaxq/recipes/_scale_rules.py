"""Scale rules, which compute the scale of a block from its largest magnitude.

To add a rule, write a function like those below and list it in `SCALE_RULES`, or in `MX_RULES` if
its scales are powers of two.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, extended_bits, where
from jaxq._base.registry import Registry
from jaxq._jax.arithmetic import divide
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat
from jaxq.numerics import BinaryGrid
from jaxq.recipes._arithmetic import signed_as

__all__ = ["MX_RULES", "SCALE_RULES", "ScaleRule", "to_max", "to_min"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))


class ScaleRule(NamedTuple):
    """A rule that computes the scale of a block.

    Attributes:
      scale: a function of the largest magnitudes of blocks, a float32 array, and of the element
        format; returns the float32 scales.
      formats: the classes of element formats that the rule supports.
      lowest: True if the rule is defined with the lowest integer of a signed format, which other
        symmetric recipes exclude.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> SCALE_RULES["max"].scale(jnp.float32(14), jaxq.get_format("int4"))
      Array(2., dtype=float32)
    """

    scale: Callable[[jax.Array, Format], jax.Array]
    formats: tuple[type, ...] = (BinaryGrid, CodebookFormat, FloatFormat, IntFormat, TaperedFormat)
    lowest: bool = False


def to_max(amax: jax.Array, fmt: Format) -> jax.Array:
    """Returns amax / scaled_max, which maps the largest magnitude to the format's `scaled_max`."""
    return divide(amax, jnp.float32(fmt.scaled_max))


def to_min(amax: jax.Array, fmt: Format) -> jax.Array:
    """Returns amax / min, which maps a signed extremum to the format's lowest value.

    As in ggml, the scale of a block of zeros is -0, whatever their signs are.
    """
    bits = _FLOAT32.bits(amax)
    extremum = _FLOAT32.floats(where(bits == _FLOAT32.sign, np.int32(0), bits))
    return signed_as(divide(jnp.abs(amax), jnp.float32(-fmt.min)), -extremum)


def half(amax: jax.Array, fmt: Format) -> jax.Array:
    """Returns amax / (max + 1/2), half a step beyond the largest integer, as torchao does."""
    assert isinstance(fmt, IntFormat)  # `Scaling.check` has checked it.
    return divide(amax, jnp.float32(fmt.max + math.ldexp(0.5, -fmt.fraction_bits)))


def floor(amax: jax.Array, fmt: Format) -> jax.Array:
    """Returns 2^(floor(log2 amax) - emax), the rule of OCP's Microscaling Formats (MX) 1.0."""
    return _power_of_two(amax, _emax(fmt), 0)


def ceil(amax: jax.Array, fmt: Format) -> jax.Array:
    """Returns 2^(ceil(log2 amax) - emax)."""
    return _power_of_two(amax, _emax(fmt), 2**23 - 1)


def even(amax: jax.Array, fmt: Format) -> jax.Array:
    """Returns the scale of `floor` for amax rounded half up to the precision of the elements."""
    assert isinstance(fmt, FloatFormat | IntFormat)  # `Scaling.check` has checked it.
    floating = isinstance(fmt, FloatFormat)
    digits = fmt.mantissa_bits if floating else fmt.max_int.bit_length() - 1
    return _power_of_two(amax, _emax(fmt), 1 << (23 - digits) >> 1)


def rceil(amax: jax.Array, fmt: Format) -> jax.Array:
    """Returns amax * fl(1 / scaled_max) rounded up to a power of two, as by NVIDIA."""
    # Small products are scaled up to avoid subnormals.
    lift = where(amax < np.float32(2.0**-60), np.int32(60), np.int32(0))
    if isinstance(fmt, BinaryGrid):
        inverse = divide(jnp.float32(1), jnp.float32(fmt.scaled_max))
    else:
        inverse = np.float32(1 / fmt.scaled_max)
    product = amax * _FLOAT32.floats(_FLOAT32.field(lift)) * inverse
    return _power_of_two(product, lift, 2**23 - 1)


def _emax(fmt: Format) -> int | jax.Array:
    """Returns the exponent of the value that the largest magnitude maps to."""
    if isinstance(fmt, BinaryGrid):
        return (extended_bits(_FLOAT32.bits(fmt.scaled_max), _FLOAT32) >> 23) - _FLOAT32.bias
    return math.frexp(fmt.scaled_max)[1] - 1


def _power_of_two(amax: jax.Array, emax: int | jax.Array, carry: int) -> jax.Array:
    """Returns 2^(e - emax) within float8_e8m0fnu; e is the exponent of amax's bits plus carry."""
    magnitude = _FLOAT32.bits(amax)
    exponent = (extended_bits(magnitude, _FLOAT32) + np.int32(carry)) >> np.int32(23)
    exponent = lax.clamp(np.int32(0), exponent - emax, np.int32(254))
    bits = where(exponent == 0, np.int32(1 << 22), exponent << np.int32(23))
    return _FLOAT32.floats(where(magnitude > _FLOAT32.inf, _FLOAT32.nan, bits))


SCALE_RULES: Registry[ScaleRule] = Registry(
    "scale rule",
    {
        "max": ScaleRule(to_max),
        "half": ScaleRule(half, (IntFormat,), lowest=True),
    },
    {"absmax": "max", "amax": "max"},
)
MX_RULES: Registry[ScaleRule] = Registry(
    "scale rule of MX",
    {
        "floor": ScaleRule(floor),
        "ceil": ScaleRule(ceil),
        "even": ScaleRule(even, (FloatFormat, IntFormat)),
        "rceil": ScaleRule(rceil),
        "max": ScaleRule(to_max),
    },
    {"rne": "max"},
)
