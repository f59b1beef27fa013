"""What every kind of format derives from its own values, and the text of its errors."""

import functools
import math

import ml_dtypes
import numpy as np

__all__ = ["Derived", "require"]

_ENUMERABLE_BITS = 16  # Formats wider than this have too many values to list.


def require(owner: str, name: str, ok: bool, requirement: str, got: object) -> None:
    """Raises the one error text of formats: who, what must hold, what was got."""
    if not ok:
        raise ValueError(f"{owner} {name!r}: {requirement}, got {got!r}.")


class Derived:
    """What every format derives from its own `values`, `bits`, `max`, `min` and `tiny`."""

    name: str
    bits: int

    @property
    def num_values(self) -> int:
        """Number of distinct finite values; NaN, infinities and a second zero do not count."""
        return len(self.values)

    @property
    def values(self) -> np.ndarray:
        """All distinct finite values, ascending, as float64.

        Raises:
          ValueError: the format has more than 16 bits.
        """
        require(
            type(self).__name__,
            self.name,
            self.bits <= _ENUMERABLE_BITS,
            f"`values` lists formats of at most {_ENUMERABLE_BITS} bits",
            f"{self.bits} bits",
        )
        return self._values

    @property
    def _values(self) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} lists no values.")

    @property
    def max(self) -> float:
        """Largest finite value."""
        return float(self.values[-1])

    @property
    def min(self) -> float:
        """Lowest finite value: negative for a signed format."""
        return float(self.values[0])

    @property
    def tiny(self) -> float:
        """Smallest positive value (the smallest subnormal where the format has them)."""
        return float(self.values[self.values > 0][0])

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger value; NaN where 1 is not below the maximum."""
        above = self.values[self.values > 1]
        has_one = bool(np.any(self.values == 1)) and len(above) > 0
        return float(above[0] - 1) if has_one else math.nan

    @property
    def dynamic_range_db(self) -> float:
        """20 log10(max / tiny): the span from the largest to the smallest positive value, in dB."""
        return 20 * (math.log10(self.max) - math.log10(self.tiny))

    @property
    def decimal_digits(self) -> float:
        """Decimal digits that the relative spacing at 1 carries, -log10(eps); NaN without eps."""
        return 0.0 - math.log10(self.eps)

    @property
    def dtype(self) -> np.dtype | None:
        """The NumPy or ml_dtypes dtype with exactly these values, or None."""
        return _dtypes().get(self.name)


@functools.cache
def _dtypes() -> dict[str, np.dtype]:
    """Every floating or integer dtype of NumPy and ml_dtypes that a format can equal, by name."""
    named = {n: np.dtype(n) for n in ("float16", "float32", "int8", "uint8", "int16", "uint16")}
    for name in ml_dtypes.__all__:
        kind = getattr(ml_dtypes, name)
        if isinstance(kind, type) and issubclass(kind, np.generic):
            named[name] = np.dtype(kind)
    return named
