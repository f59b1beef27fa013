"""Floats as the integers that their bits are: the layout of the dtype that kernels work in.

The work is done on float32, or on float64 for a float64 input: `Layout` holds what differs.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

__all__ = ["Layout", "extended_bits", "where"]


class Layout(NamedTuple):
    """The bit layout of a working dtype."""

    float_type: type[np.floating]
    int_type: type[np.signedinteger]
    mantissa_bits: int
    bias: int

    @classmethod
    def of(cls, dtype: np.dtype) -> "Layout":
        """The layout of float32 or float64."""
        if dtype == np.float64:
            return cls(np.float64, np.int64, 52, 1023)
        return cls(np.float32, np.int32, 23, 127)

    @property
    def sign(self) -> np.signedinteger:
        """The sign bit alone."""
        return np.iinfo(self.int_type).min * self.int_type(1)

    @property
    def magnitude_mask(self) -> np.signedinteger:
        """All bits but the sign."""
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
        """The exponent of the least subnormal."""
        return 1 - self.bias - self.mantissa_bits

    def field(self, exponent: Any) -> Any:
        """An exponent, biased and shifted into the place of the exponent field."""
        return self.shifted(exponent + self.bias)

    def shifted(self, exponent: Any) -> Any:
        """A difference of exponents, shifted into the place of the exponent field."""
        if isinstance(exponent, int):
            return self.int_type(exponent << self.mantissa_bits)
        return exponent.astype(self.int_type) << self.mantissa_bits

    def constant(self, value: Any) -> Any:
        """A number in the working dtype; infinite where it lies beyond."""
        if isinstance(value, jax.Array):
            return value.astype(self.float_type)
        with np.errstate(over="ignore"):
            return self.float_type(value)

    def bits(self, x: Any) -> Any:
        """The bits of floats."""
        if isinstance(x, np.floating):
            return x.view(self.int_type)
        return lax.bitcast_convert_type(x, self.int_type)

    def floats(self, bits: Any) -> Any:
        """The floats of bits."""
        if isinstance(bits, np.integer):
            return bits.view(self.float_type)
        return lax.bitcast_convert_type(bits, self.float_type)


def extended_bits(magnitude: jax.Array, layout: Layout) -> jax.Array:
    """Bits of a magnitude with a full significand, the exponent field below 0 if need be."""
    # The bits of a subnormal are its value in units of the least one.
    lead = layout.bits(magnitude.astype(layout.float_type))
    lead = lead + layout.shifted(layout.least_exponent)
    return lax.select(magnitude < layout.shifted(1), lead, magnitude)


def where(condition: jax.Array, a: Any, b: Any) -> jax.Array:
    """`jnp.where` for operands of one dtype, as one equation where the shapes agree."""
    shape = jnp.shape(condition)
    a, b = (v if jnp.shape(v) == shape else lax.broadcast(jnp.asarray(v), shape) for v in (a, b))
    return lax.select(condition, a, b)
