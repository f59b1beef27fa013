"""The interface of calibrators, and those that choose the range of a block by its extremes.

A calibrator measures a tensor, merges two measurements, and computes a range from a measurement.
`merge` is associative, and merging with `nothing` changes nothing, so that batches, devices and
steps can be combined in any grouping (for `EMA`, in their order). A quantizer that is given no
scales measures the tensor itself.

Ranges are pairs (low, high) in the layout of `Cut.align_scales`. Recipes with a zero point use a
*two-sided* range; for other recipes the range is (-high, high), and only magnitudes count.

To add a calibrator, write a frozen dataclass like those below and list it in `CALIBRATORS`. Those
by moments are in `_moments.py`, those by histograms in `_histograms.py`.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import number
from jaxq._base.bits import FloatLayout, where
from jaxq._base.cutting import Cut
from jaxq._jax.arithmetic import divide, rounded
from jaxq._jax.serialization import named_tuple
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat
from jaxq.numerics import BinaryGrid
from jaxq.recipes._arithmetic import absmax, extrema, extremum, finite

__all__ = ["ALL_FORMATS", "EMA", "AbsMax", "Calibrator", "Extremum", "Range", "filled"]

Range = tuple[jax.Array, jax.Array]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))
ALL_FORMATS = (BinaryGrid, CodebookFormat, FloatFormat, IntFormat, TaperedFormat)


class Calibrator(Protocol):
    """The interface of a calibrator. A state is any pytree of arrays.

    Attributes:
      formats: the classes of element formats that the calibrator supports.
      two_sided: True if the calibrator supports two-sided ranges.
    """

    formats: ClassVar[tuple[type, ...]]
    two_sided: ClassVar[bool]

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Any:
        """Returns the state of one split float32 tensor."""
        ...

    def nothing(self, cut: Cut, two_sided: bool) -> Any:
        """Returns the state before any data."""
        ...

    def merge(self, first: Any, second: Any) -> Any:
        """Returns the state of both data sets together."""
        ...

    def finalize(self, state: Any, fmt: Format, two_sided: bool) -> Range:
        """Returns the range for a format; NaN after a NaN or an infinity, 0 without data."""
        ...


def filled(cut: Cut, value: Any, *more: int) -> jax.Array:
    """Returns one value per block, in the layout of `Cut.align_scales` with trailing axes added."""
    shape = tuple(n for count in cut.counts for n in (count, 1))
    return jnp.full((*shape, *more), value)


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The full range: the largest magnitude, or the lowest and the largest value (min-max).

    Example:
      >>> import jaxq
      >>> jaxq.recipes.get_calibrator("absmax")
      AbsMax()
    """

    formats: ClassVar = ALL_FORMATS
    two_sided: ClassVar = True

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Range:
        """Returns the range of a tensor."""
        if two_sided:
            return extrema(x, cut)
        high = absmax(x, cut)
        return -high, high

    def nothing(self, cut: Cut, two_sided: bool) -> Range:
        """Returns the empty range, (inf, -inf) if it is two-sided, else 0."""
        end = np.float32(np.inf if two_sided else 0)
        return filled(cut, end), filled(cut, -end)

    def merge(self, first: Range, second: Range) -> Range:
        """Returns the range that covers both ranges; NaN if either is NaN."""
        low, high = lax.min(first[0], second[0]), lax.max(first[1], second[1])
        bad = jnp.isnan(first[1]) | jnp.isnan(second[1])
        return where(bad, np.float32(np.nan), low), where(bad, np.float32(np.nan), high)

    def finalize(self, state: Range, fmt: Format, two_sided: bool) -> Range:
        """Returns the range; 0 if there was no data."""
        del fmt
        if not two_sided:
            return state
        low, high = (where(jnp.isinf(end), np.float32(0), end) for end in state)
        return low, high


@dataclasses.dataclass(frozen=True)
class Extremum:
    """The value of largest magnitude with its sign, which only `SignedScale` supports."""

    formats: ClassVar = (IntFormat,)
    two_sided: ClassVar = False

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Range:
        """Returns the value as the upper end of a range."""
        del two_sided
        end = extremum(x, cut)
        return -end, end

    def nothing(self, cut: Cut, two_sided: bool) -> Range:
        """Returns a range of 0."""
        del two_sided
        return filled(cut, np.float32(0)), filled(cut, np.float32(0))

    def merge(self, first: Range, second: Range) -> Range:
        """Returns the range with the larger magnitude; the first on ties."""
        bits = [_FLOAT32.bits(end) & _FLOAT32.magnitude_mask for _, end in (first, second)]
        end = where(bits[1] > bits[0], second[1], first[1])
        return -end, end

    def finalize(self, state: Range, fmt: Format, two_sided: bool) -> Range:
        """Returns the value as the upper end of a range."""
        del fmt, two_sided
        return state


@named_tuple
class Averages(NamedTuple):
    """Decaying sums of ranges, and the sum of their weights.

    The weight that earlier data retain is 1 - weight. It is not stored instead, because near 1 it
    would leave few digits for the weight.
    """

    weight: jax.Array
    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class EMA:
    """A moving average of `AbsMax` over updates, bias-corrected as in Adam.

    When two states are merged, the second is the later one.

    Attributes:
      decay: the weight that the average keeps at each update, in [0, 1).

    Raises:
      ValueError: if `decay` is out of range.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("int8", scaling=jaxq.recipes.Symmetric(range=EMA(0.9))).scaling
      Symmetric(range=EMA(decay=0.9))
    """

    decay: float = 0.99

    formats: ClassVar = ALL_FORMATS
    two_sided: ClassVar = True

    def __post_init__(self) -> None:
        remedy = "Use 0.99, for example."
        number("EMA", "decay", self.decay, "a number in [0, 1)", lambda d: 0 <= d < 1, remedy)

    def measure(self, x: jax.Array, cut: Cut, two_sided: bool) -> Averages:
        """Returns a tensor's range times 1 - decay, its weight in the moving average."""
        ends = AbsMax().measure(x, cut, two_sided)
        weight = np.float32(1 - self.decay)
        low, high = (rounded(end * weight) for end in ends)
        return Averages(jnp.full_like(high, weight), low, high)

    def nothing(self, cut: Cut, two_sided: bool) -> Averages:
        """Returns sums of 0."""
        del two_sided
        zero = filled(cut, np.float32(0))
        return Averages(zero, zero, zero)

    def merge(self, first: Averages, second: Averages) -> Averages:
        """Returns the first state, decayed by the updates of the second, plus the second."""
        left = np.float32(1) - second.weight
        return Averages(*(rounded(a * left) + b for a, b in zip(first, second, strict=True)))

    def finalize(self, state: Averages, fmt: Format, two_sided: bool) -> Range:
        """Returns the bias-corrected averages."""
        del fmt, two_sided
        weight = where(state.weight > 0, state.weight, np.float32(1))
        # `finite` works on bits, so it also stops XLA on CPU from merging this division with the
        # next one.
        return finite(divide(state.low, weight)), finite(divide(state.high, weight))
