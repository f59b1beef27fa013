"""Rounding modes, which select one of the two grid neighbors of a value.

A mode is a function `(units, negative, random) -> rounded`:

- `units`: the exact magnitude in units of the grid's local spacing, a non-negative float array.
  Whole numbers are grid values, and even numbers are even codes.
- `negative`: a boolean array, true where the value itself is negative.
- `random`: None, or an unsigned integer array of random bits for modes that need them.
- `rounded`: whole numbers in the dtype of `units`, either `floor(units)` or `floor(units) + 1`.

To add a mode, write the function and list it in `ROUNDINGS`.
"""

import dataclasses
from typing import Literal, Protocol

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import choice, integer
from jaxq._base.registry import Registry

__all__ = ["ROUNDINGS", "HalfUp", "Overflow", "Rounding", "Stochastic", "get_rounding"]

# Described in `jaxq.cast`. "SatFinite" is the P3109 name of "saturate".
Overflow = Literal["saturate", "propagate", "SatFinite", "SatPropagate", "SatNone"] | None


class Rounding(Protocol):
    """The signature of rounding modes, including user-defined ones."""

    def __call__(
        self, units: jax.Array, negative: jax.Array, random: jax.Array | None
    ) -> jax.Array:
        """Rounds `units` to whole numbers."""
        ...


def nearest_even(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """Rounds to the nearest neighbor, ties to the even code."""
    del negative, random
    return lax.round(units, lax.RoundingMethod.TO_NEAREST_EVEN)


def nearest_away(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """Rounds to the nearest neighbor, ties away from zero."""
    del negative, random
    return lax.round(units, lax.RoundingMethod.AWAY_FROM_ZERO)


def toward_zero(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """Rounds to the neighbor of smaller magnitude."""
    del negative, random
    return lax.floor(units)


def up(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """Rounds to the larger neighbor, toward +infinity."""
    del random
    return lax.select(negative, lax.floor(units), lax.ceil(units))


def down(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """Rounds to the lower neighbor, toward -infinity."""
    del random
    return lax.select(negative, lax.ceil(units), lax.floor(units))


def to_odd(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """Rounds to the neighbor with an odd code, unless the value is on the grid.

    Finite values become infinite only if the code of infinity is odd, as in the signed formats of
    P3109, and never become NaN. In IEEE 754 formats they stop at the largest value, whose code is
    odd.
    """
    del negative, random
    even = lax.floor(units * 0.5) * 2.0  # The largest even number at or below `units`.
    return lax.select(units == even, even, even + 1.0)


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Stochastic rounding with N random bits: up with a probability equal to the fraction.

    The bits of a key are those of `jax.random.bits` (`_jax.draws` computes them).

    With the fraction v in [0, 1) and a random integer r in [0, 2^N), the magnitude is rounded up if

    - rule `"A"`: floor(v 2^N) + r >= 2^N
    - rule `"B"`: floor(v 2^(N + 1)) + 2 r + 1 >= 2^(N + 1)
    - rule `"C"`: rne(v 2^N) + r >= 2^N, with rne rounding half to even

    If v is a multiple of 2^-N, all three have the exact expectation v. Otherwise A is biased down
    by less than 2^-N, and B and C by at most 2^-(N + 1) in either direction. The default, N = 23,
    is exact for every float32 in the normal range of any format.

    Attributes:
      bits: the number N of random bits, 1 to 23; 23 by default.
      rule: the rounding rule, `"A"` (the default), `"B"` or `"C"`.

    Raises:
      ValueError: if `bits` or `rule` is not one of these.
      TypeError: if a field has another type.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> mode = jaxq.Stochastic(bits=8)
      >>> y = jaxq.cast(jnp.full(1000, 0.25), "int4", rounding=mode, key=jax.random.key(0))
      >>> round(float(y.mean()), 1) in (0.2, 0.3)
      True

    References:
      IEEE SA P3109 Working Group, interim report 3, section on stochastic rounding.
    """

    bits: int = 23
    rule: Literal["A", "B", "C"] = "A"

    def __post_init__(self) -> None:
        integer("Stochastic", "bits", self.bits, "Use 23.", least=1, most=23)
        choice("Stochastic", "rule", self.rule, ("A", "B", "C"), "Use 'A', the default.")

    @property
    def random_dtype(self) -> jnp.dtype:
        """The smallest unsigned dtype that holds the random bits of an element."""
        width = 8 if self.bits <= 8 else 16 if self.bits <= 16 else 32
        return jnp.dtype(f"uint{width}")

    def __call__(
        self, units: jax.Array, negative: jax.Array, random: jax.Array | None
    ) -> jax.Array:
        """Rounds stochastically with the low `bits` bits of `random`."""
        del negative
        assert random is not None, "cast draws or checks the random bits"
        mask = 2**self.bits - 1
        r = (random & jnp.asarray(mask, random.dtype)).astype(units.dtype)
        whole = lax.floor(units)
        # Every step is exact: fractions have no more bits than the significand, sums at most 25.
        fraction = (units - whole) * 2.0**self.bits
        if self.rule == "A":
            up_by_one = lax.floor(fraction) + r >= 2.0**self.bits
        elif self.rule == "B":
            up_by_one = lax.floor(fraction * 2.0) + (2.0 * r + 1.0) >= 2.0 ** (self.bits + 1)
        else:
            to_even = lax.round(fraction, lax.RoundingMethod.TO_NEAREST_EVEN)
            up_by_one = to_even + r >= 2.0**self.bits
        return whole + up_by_one.astype(units.dtype)


@dataclasses.dataclass(frozen=True)
class HalfUp:
    """Rounding to nearest, ties up: floor(v + offset + 1/2) - offset, as in GGUF.

    As in GGUF, the sum is rounded to the working precision, so that a value just below the midpoint
    may also round up.

    Attributes:
      offset: the non-negative number added to make the values positive, such as 8 for Q4_0 and 16
        for Q5_0; 0 by default.

    Raises:
      ValueError: if `offset` is negative.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> jaxq.cast(jnp.array([-1.5, 0.5, 1.5]), "int4", rounding=HalfUp(8)).tolist()
      [-1.0, 1.0, 2.0]
    """

    offset: int = 0

    def __post_init__(self) -> None:
        integer("HalfUp", "offset", self.offset, "Use 0 to add none.", least=0, most=2**23)

    def __call__(
        self, units: jax.Array, negative: jax.Array, random: jax.Array | None
    ) -> jax.Array:
        """Rounds the signed value and returns its magnitude."""
        del random
        value = lax.select(negative, -units, units)
        return jnp.abs(lax.floor(value + (self.offset + 0.5)) - float(self.offset))


ROUNDINGS: Registry[Rounding] = Registry(
    "rounding mode",
    {
        "nearest_even": nearest_even,
        "nearest_away": nearest_away,
        "toward_zero": toward_zero,
        "up": up,
        "down": down,
        "to_odd": to_odd,
        "stochastic": Stochastic(),
    },
    {
        "rne": "nearest_even",
        "nearest": "nearest_even",
        "even": "nearest_even",
        "round_half_even": "nearest_even",
        "rna": "nearest_away",
        "rtz": "toward_zero",
        "truncate": "toward_zero",
        "trunc": "toward_zero",
        "floor": "down",
        "ceil": "up",
        "odd": "to_odd",
        "sr": "stochastic",
    },
)


def is_directed(rounding: Rounding) -> bool:
    """Returns whether a mode may depend on the sign, or round a tiny magnitude to 1 unit."""
    undirected = rounding in (nearest_even, nearest_away, toward_zero)
    return not undirected and not isinstance(rounding, Stochastic)


def saturating_signs(rounding: Rounding) -> tuple[bool, bool]:
    """Returns whether finite values beyond the range saturate: a flag for each sign.

    By IEEE 754, section 7.4, a mode directed inward never rounds a finite value to infinity.

    Returns:
      The flags for positive and for negative values.
    """
    inward_positive = rounding in (toward_zero, down)
    inward_negative = rounding in (toward_zero, up)
    return inward_positive, inward_negative


def get_rounding(rounding: str | Rounding) -> Rounding:
    """Returns the rounding mode with a name, or the function that is passed.

    Args:
      rounding: a name in `jaxq.numerics.ROUNDINGS`, or a function with the signature of `Rounding`.

    Returns:
      The function.

    Raises:
      ValueError: if no rounding mode has that name.
      TypeError: if the argument is neither a name nor a function.

    Example:
      >>> get_rounding("stochastic")
      Stochastic(bits=23, rule='A')
    """
    return ROUNDINGS.resolve(rounding, "rounding")
