"""Codebooks: any list of levels."""

import dataclasses
import functools
from typing import Literal

import numpy as np

from jaxq.formats.derived import Derived, require

__all__ = ["CodebookFormat"]


@dataclasses.dataclass(frozen=True)
class CodebookFormat(Derived):
    """Any table of at most 256 levels: code i stands for `levels[i]`.

    Attributes:
      name: as in `FloatFormat`.
      levels: the value of each code, in code order; they need not be sorted. They are held as
        float32 numbers, which is what every known table prints. Of codes with equal values the
        first is the one that encoding gives.
      ties: where a value goes that is exactly half way between two levels: `"down"` (the lower)
        or `"up"`. Both "nearest" roundings use it.

    Raises:
      ValueError: fewer than two distinct levels, more than 256, or levels that are not finite.

    Example:
      >>> CodebookFormat("ternary", (-1.0, 0.0, 1.0)).bits
      2
    """

    name: str
    levels: tuple[float, ...]
    ties: Literal["down", "up"] = "down"

    def __post_init__(self) -> None:
        check = functools.partial(require, "CodebookFormat", self.name)
        check(2 <= len(self.levels) <= 256, "`levels` must hold 2 to 256 values", len(self.levels))
        levels = np.asarray(self.levels, np.float32)
        check(bool(np.isfinite(levels).all()), "`levels` must be finite", self.levels)
        check(len(np.unique(levels)) >= 2, "`levels` must differ", self.levels)
        subnormal = (levels != 0) & (np.abs(levels) < np.finfo(np.float32).tiny)
        check(not subnormal.any(), "`levels` must not be float32 subnormals", self.levels)
        check(self.ties in ("down", "up"), "`ties` must be 'down' or 'up'", self.ties)
        object.__setattr__(self, "levels", tuple(float(v) + 0.0 for v in levels))

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def signed(self) -> bool:
        """Whether some level is negative."""
        return min(self.levels) < 0

    @property
    def _values(self) -> np.ndarray:
        return np.unique(np.asarray(self.levels, np.float64))

    @property
    def smallest_normal(self) -> float:
        """The same as `tiny`."""
        return self.tiny
