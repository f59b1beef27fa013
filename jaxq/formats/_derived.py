"""The base class of all formats, with the properties derived from a format's values."""

import functools
import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jaxq._base.arguments import described, integer

__all__ = ["Derived", "require", "set_integers"]

_ENUMERABLE_BITS = 16  # Formats wider than this have too many values to list.


def require(owner: str, name: str, ok: bool, requirement: str, got: object) -> None:
    """Raises a ValueError that names the class, the format and the requirement, unless `ok`."""
    if not ok:
        raise ValueError(f"{owner} {name!r:.40}: {requirement}, got {got!r:.40}.")


def set_integers(fmt: "Derived", names: Sequence[str], remedy: str) -> None:
    """Replaces fields of a format by Python integers; raises a TypeError for other values."""
    owner = type(fmt).__name__
    if not isinstance(fmt.name, str):
        raise TypeError(
            f"{owner}: `name` must be a string, got {described(fmt.name)}. Write, for example, "
            f"{owner}('mine', ...)."
        )
    for name in names:
        value = getattr(fmt, name)
        object.__setattr__(fmt, name, integer(f"{owner} {fmt.name!r:.40}", name, value, remedy))


class Derived:
    """The properties that every format derives from its values and its width."""

    name: str
    bits: int

    @property
    def num_values(self) -> int:
        """The number of distinct finite values, not counting NaN, infinities or a second zero."""
        return len(self.values)

    @property
    def values(self) -> np.ndarray:
        """All distinct finite values in ascending order, as a float64 array.

        Raises:
          ValueError: if the format has more than 16 bits.
        """
        require(
            type(self).__name__,
            self.name,
            self.bits <= _ENUMERABLE_BITS,
            f"`values` needs a format of at most {_ENUMERABLE_BITS} bits",
            f"{self.bits} bits",
        )
        return _listed(self).copy()

    @property
    def _values(self) -> np.ndarray:
        raise NotImplementedError

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float(self.values[-1])

    @property
    def min(self) -> float:
        """The lowest finite value, which is negative for signed formats."""
        return float(self.values[0])

    @property
    def min_positive(self) -> float:
        """The smallest positive value (the smallest subnormal if the format has subnormals)."""
        return float(self.values[self.values > 0][0])

    @property
    def scaled_max(self) -> float:
        """The value to which quantizers scale the amax of a block."""
        return self.max

    @property
    def eps(self) -> float:
        """The distance from 1 to the next larger value, or NaN if 1 is not below the maximum."""
        above = self.values[self.values > 1]
        has_one = bool(np.any(self.values == 1)) and len(above) > 0
        return float(above[0] - 1) if has_one else math.nan

    @property
    def dynamic_range_db(self) -> float:
        """The ratio of the largest to the smallest positive value in dB."""
        return 20 * (math.log10(self.max) - math.log10(self.min_positive))

    @property
    def decimal_digits(self) -> float:
        """The precision at 1 in decimal digits, -log10(eps), or NaN if `eps` is NaN."""
        return 0.0 - math.log10(self.eps)

    @property
    def dtype(self) -> np.dtype | None:
        """The NumPy or ml_dtypes dtype with exactly these values, or None."""
        return _dtypes().get(self.name)


@functools.cache
def _listed(fmt: Derived) -> np.ndarray:
    """Returns the values of a format, cached: a 16-bit format takes tens of milliseconds."""
    return fmt._values


@functools.cache
def _dtypes() -> dict[str, np.dtype]:
    """Returns the NumPy and ml_dtypes dtypes that can correspond to a format, by name."""
    named = {n: np.dtype(n) for n in ("float16", "float32", "int8", "uint8", "int16", "uint16")}
    for name in ml_dtypes.__all__:
        scalar_type = getattr(ml_dtypes, name)
        if isinstance(scalar_type, type) and issubclass(scalar_type, np.generic):
            named[name] = np.dtype(scalar_type)
    return named
