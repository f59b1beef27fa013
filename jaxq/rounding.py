"""Rounding modes: how a value between two neighbours of a grid picks one of them.

A mode is a function `(units, negative, random) -> rounded`:

- `units`: the magnitude in units of the grid's local spacing, a float array >= 0, exact. Whole
  numbers are grid values, and an even number is an even code.
- `negative`: a boolean array, true where the value itself is below zero.
- `random`: None, or an unsigned integer array of random bits for a mode that asks for them.
- `rounded`: whole numbers, in the dtype of `units`: `floor(units)` or that plus one.

To add one: write the function and list it in `ALL`.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal, Protocol

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["ALL", "HalfUp", "Overflow", "Rounding", "Stochastic", "get_rounding"]

Overflow = Literal["saturate", "propagate"] | None  # As `jaxq.cast` describes it.


class Rounding(Protocol):
    """What a rounding mode, the user's own included, looks like."""

    def __call__(
        self, units: jax.Array, negative: jax.Array, random: jax.Array | None
    ) -> jax.Array:
        """Rounds `units` to whole numbers."""
        ...


def nearest_even(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """To the nearest; half way, to the even code."""
    del negative, random
    return lax.round(units, lax.RoundingMethod.TO_NEAREST_EVEN)


def nearest_away(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """To the nearest; half way, away from zero."""
    del negative, random
    return lax.round(units, lax.RoundingMethod.AWAY_FROM_ZERO)


def toward_zero(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """To the neighbour of smaller magnitude."""
    del negative, random
    return lax.floor(units)


def up(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """To the larger neighbour, toward +infinity."""
    del random
    return lax.select(negative, lax.floor(units), lax.ceil(units))


def down(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """To the lower neighbour, toward -infinity."""
    del random
    return lax.select(negative, lax.ceil(units), lax.floor(units))


def to_odd(units: jax.Array, negative: jax.Array, random: jax.Array | None) -> jax.Array:
    """To the neighbour whose code is odd, unless the value is on the grid."""
    del negative, random
    even = lax.floor(units * 0.5) * 2.0  # The even whole number at or below.
    return lax.select(units == even, even, even + 1.0)


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Away from zero with a probability equal to the fraction, seen through N random bits.

    With the fraction v in [0, 1) and a random integer r in [0, 2^N), the magnitude rounds up when

    - rule `"A"`: floor(v 2^N) + r >= 2^N
    - rule `"B"`: floor(v 2^(N + 1)) + 2 r + 1 >= 2^(N + 1)
    - rule `"C"`: rne(v 2^N) + r >= 2^N, with rne rounding half to even

    All three have the expectation v exactly when v is a multiple of 2^-N; beyond that, A is biased
    down by less than 2^-N, B and C by at most 2^-(N + 1) either way. The default, N = 23, is exact
    for every float32 in the normal range of any format.

    Attributes:
      bits: N, 1 to 23.
      rule: `"A"`, `"B"` or `"C"`.

    Raises:
      ValueError: N or the rule is not one of these.

    References:
      IEEE SA P3109 Working Group, interim report 3, section on stochastic rounding.
    """

    bits: int = 23
    rule: Literal["A", "B", "C"] = "A"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 23:
            raise ValueError(f"Stochastic rounding: `bits` must be 1 to 23, got {self.bits}.")
        if self.rule not in ("A", "B", "C"):
            raise ValueError(
                f"Stochastic rounding: `rule` must be 'A', 'B' or 'C', got {self.rule!r}."
            )

    @property
    def random_dtype(self) -> jnp.dtype:
        """The smallest unsigned dtype that holds the random bits of an element."""
        width = 8 if self.bits <= 8 else 16 if self.bits <= 16 else 32
        return jnp.dtype(f"uint{width}")

    def __call__(
        self, units: jax.Array, negative: jax.Array, random: jax.Array | None
    ) -> jax.Array:
        """Rounds with `random`, whose low `bits` bits are used."""
        del negative
        assert random is not None, "cast draws or checks the random bits"
        mask = 2**self.bits - 1
        r = (random & jnp.asarray(mask, random.dtype)).astype(units.dtype)
        whole = lax.floor(units)
        # Every step is exact: a fraction has at most the significand's bits, a sum at most 25.
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
    """To the nearest; half way, up: floor(v + offset + 1/2) - offset, as GGUF has it.

    The sum is rounded to the working precision, as theirs is, so that a number just below the
    middle may go up too.

    Attributes:
      offset: what makes the numbers positive there, 0 or more: 8 for Q4_0, 16 for Q5_0.

    Raises:
      ValueError: `offset` is negative.
    """

    offset: int = 0

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise ValueError(f"HalfUp: `offset` must be at least 0, got {self.offset}.")

    def __call__(
        self, units: jax.Array, negative: jax.Array, random: jax.Array | None
    ) -> jax.Array:
        """Rounds as if with the sign."""
        del random
        value = lax.select(negative, -units, units)
        return jnp.abs(lax.floor(value + (self.offset + 0.5)) - float(self.offset))


ALL: MappingProxyType[str, Rounding] = MappingProxyType(
    {
        "nearest_even": nearest_even,
        "nearest_away": nearest_away,
        "toward_zero": toward_zero,
        "up": up,
        "down": down,
        "to_odd": to_odd,
        "stochastic": Stochastic(),
    }
)


def pins(rounding: Rounding) -> tuple[bool, bool]:
    """Whether the mode stops a finite overflow at the maximum: (positive side, negative side).

    IEEE 754 section 7.4: a mode directed inward never carries a finite value to infinity.
    """
    inward_positive = rounding in (toward_zero, down)
    inward_negative = rounding in (toward_zero, up)
    return inward_positive, inward_negative


def get_rounding(spec: str | Rounding) -> Rounding:
    """The rounding mode that a name or a function stands for.

    Args:
      spec: a name in `jaxq.rounding.ALL`, or a function with the signature of `Rounding`.

    Returns:
      The function.

    Raises:
      ValueError: no mode has that name.
      TypeError: the argument is neither.
    """
    if isinstance(spec, str):
        if spec not in ALL:
            raise ValueError(f"No rounding mode is named {spec!r}. Known: {', '.join(ALL)}.")
        return ALL[spec]
    if not callable(spec):
        raise TypeError(f"`rounding` must be a name or a function, got {type(spec).__name__}.")
    return spec
