"""The bits of floats as integers, and the bit layout of the dtype in which kernels work.

Kernels work in float32, or in float64 for float64 input; `FloatLayout` describes the differences.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

__all__ = ["FloatLayout", "extended_bits", "where"]


class FloatLayout(NamedTuple):
    """The bit layout of a working dtype."""

    float_type: type[np.floating]
    int_type: type[np.signedinteger]
    mantissa_bits: int
    bias: int

    @classmethod
    def of(cls, dtype: np.dtype) -> "FloatLayout":
        """Returns the layout of float64 if `dtype` is float64, else of float32."""
        if dtype == np.float64:
            return cls(np.float64, np.int64, 52, 1023)
        return cls(np.float32, np.int32, 23, 127)

    @property
    def sign(self) -> np.signedinteger:
        """The mask of the sign bit."""
        return np.iinfo(self.int_type).min * self.int_type(1)

    @property
    def magnitude_mask(self) -> np.signedinteger:
        """The mask of all bits except the sign."""
        return ~self.sign

    @property
    def inf(self) -> np.signedinteger:
        """The bits of +inf."""
        return self.field(self.bias + 1)

    @property
    def nan(self) -> np.signedinteger:
        """The bits of the quiet NaN without payload."""
        return self.inf | self.int_type(1 << (self.mantissa_bits - 1))

    @property
    def least_exponent(self) -> int:
        """The exponent of the smallest subnormal."""
        return 1 - self.bias - self.mantissa_bits

    def field(self, exponent: Any) -> Any:
        """Returns an exponent, biased and shifted to the position of the exponent field."""
        return self.shifted(exponent + self.bias)

    def shifted(self, exponent: Any) -> Any:
        """Returns a difference of exponents, shifted to the position of the exponent field."""
        if isinstance(exponent, int):
            return self.int_type(exponent << self.mantissa_bits)
        return exponent.astype(self.int_type) << self.mantissa_bits

    def constant(self, value: Any) -> Any:
        """Converts a number to the working dtype; numbers out of range become infinite."""
        if isinstance(value, jax.Array):
            return value.astype(self.float_type)
        with np.errstate(over="ignore"):
            return self.float_type(value)

    def bits(self, x: Any) -> Any:
        """Reinterprets floats as integers."""
        if isinstance(x, np.floating):
            return x.view(self.int_type)
        return lax.bitcast_convert_type(x, self.int_type)

    def floats(self, bits: Any) -> Any:
        """Reinterprets integers as floats."""
        if isinstance(bits, np.integer):
            return bits.view(self.float_type)
        return lax.bitcast_convert_type(bits, self.float_type)


def extended_bits(magnitude: jax.Array, layout: FloatLayout) -> jax.Array:
    """Returns the normalized bits of a magnitude: subnormals get an exponent field below 1."""
    # The bits of a subnormal number, read as an integer, are its multiple of the smallest one.
    lead = layout.bits(magnitude.astype(layout.float_type))
    lead = lead + layout.shifted(layout.least_exponent)
    return lax.select(magnitude < layout.shifted(1), lead, magnitude)


def where(condition: jax.Array, a: Any, b: Any) -> jax.Array:
    """Selects like `jnp.where`, for operands of one dtype and with fewer equations."""
    shape = jnp.shape(condition)
    a, b = (v if jnp.shape(v) == shape else lax.broadcast(jnp.asarray(v), shape) for v in (a, b))
    return lax.select(condition, a, b)
