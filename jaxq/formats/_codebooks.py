"""Codebook formats, defined by a list of levels."""

import dataclasses
import functools
from typing import Literal

import numpy as np

from jaxq._base.arguments import choice, described
from jaxq.formats._derived import Derived, require, set_integers

__all__ = ["CodebookFormat"]


@dataclasses.dataclass(frozen=True)
class CodebookFormat(Derived):
    """A table of at most 256 levels, in which code i represents `levels[i]`.

    Attributes:
      name: the name, as in `FloatFormat`.
      levels: the value of each code, in code order; they need not be sorted. They are stored as
        float32 values, the precision in which all known tables are published. If several codes
        have the same value, encoding returns the first one.
      ties: the direction in which a value exactly half way between two levels is rounded:
        `"down"` (the lower level) or `"up"`. Both "nearest" rounding modes use it.

    Raises:
      ValueError: if there are fewer than two distinct levels or more than 256 levels, or if a level
        is not finite or is a float32 subnormal.
      TypeError: if a field has another type.

    Example:
      >>> CodebookFormat("ternary", (-1.0, 0.0, 1.0)).bits
      2
    """

    name: str
    levels: tuple[float, ...]
    ties: Literal["down", "up"] = "down"

    def __post_init__(self) -> None:
        check = functools.partial(require, "CodebookFormat", self.name)
        set_integers(self, (), "")
        try:
            levels = np.asarray(self.levels, np.float32)
        except (TypeError, ValueError):
            levels = None
        if levels is None or levels.ndim != 1:
            raise TypeError(
                f"CodebookFormat {self.name!r:.40}: `levels` must be a sequence of numbers, got "
                f"{described(self.levels)}. Pass a tuple of floats."
            )
        check(2 <= len(levels) <= 256, "`levels` must hold 2 to 256 values", len(levels))
        finite = np.isfinite(levels)
        check(bool(finite.all()), "`levels` must be finite", levels[~finite].tolist()[:3])
        check(
            len(np.unique(levels)) >= 2,
            "`levels` must hold two different values",
            levels[:1].tolist(),
        )
        subnormal = (levels != 0) & (np.abs(levels) < np.finfo(np.float32).tiny)
        check(
            not subnormal.any(),
            "`levels` must not be float32 subnormals",
            levels[subnormal].tolist()[:3],
        )
        choice(
            f"CodebookFormat {self.name!r:.40}", "ties", self.ties, ("down", "up"), "Use 'down'."
        )
        object.__setattr__(self, "levels", tuple(float(v) + 0.0 for v in levels))

    @property
    def bits(self) -> int:
        """The width of a code in bits."""
        return (len(self.levels) - 1).bit_length()

    @property
    def signed(self) -> bool:
        """True if any level is negative."""
        return min(self.levels) < 0

    @property
    def _values(self) -> np.ndarray:
        return np.unique(np.asarray(self.levels, np.float64))

    @property
    def smallest_normal(self) -> float:
        """The smallest positive level, equal to `min_positive`."""
        return self.min_positive
