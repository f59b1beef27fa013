"""Affine scalings, which map a range that is not centered at 0 to all integers of a format."""

import dataclasses
import functools

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import where
from jaxq._base.cutting import Cut
from jaxq._ggml.weighted import with_minimum
from jaxq._jax.arithmetic import materialize
from jaxq.formats import Format, IntFormat, get_format
from jaxq.numerics import cast, code_dtype
from jaxq.recipes._arithmetic import E8M0, span, times, zero_point_of
from jaxq.recipes._columns import Columns, searched
from jaxq.recipes._ranges import AbsMax, Calibrator, Range
from jaxq.recipes._scaling import Scales, Scaling, StoredScales, limits

__all__ = ["Affine", "ScaleAndMin"]


class _TwoSided(Scaling):
    """The base class of scalings with a zero point or a minimum, for integer formats."""

    def check(self, fmt: Format) -> None:
        """Raises ValueError unless the scaling supports an element format."""
        is_integer = isinstance(fmt, IntFormat) and fmt.fraction_bits == 0
        requirement = "needs an integer format such as 'uint8'"
        self.require(is_integer, requirement, fmt.name, "Use it, or Symmetric().")
        super().check(fmt)

    def element(self, fmt: Format) -> Format:
        """Returns the format of the grid values, which is the element format itself."""
        return fmt


@dataclasses.dataclass(frozen=True, repr=False)
class Affine(_TwoSided):
    """A scale and an integer zero point per block, y = s (q - z).

    The range is widened to include 0 and mapped to all integers of the element format, so that 0 is
    represented exactly, by q = z.

    Attributes:
      range: the calibrator, which chooses the low and the high end of the range of a block, or its
        name in `jaxq.recipes.CALIBRATORS`. `"absmax"`, the default, covers the lowest and the
        largest value (min-max).
      scale_format: the format of the scales, a float format with a NaN; float32 by default.
      reciprocal: True multiplies by the rounded reciprocal of the scale; False, the default,
        divides.
      search: the factors of the range that each block tries, as in `Symmetric`.

    Raises:
      ValueError: if a name is unknown, or a value is not supported.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> q = jaxq.quantize(jnp.array([-0.5, 0.0, 2.05]), jaxq.Recipe("uint8", scaling=Affine()))
      >>> q.codes, q.zero_point
      (Array([  0,  50, 255], dtype=uint8), Array([50], dtype=uint8))
    """

    range: str | Calibrator = "absmax"
    scale_format: str | Format = "float32"
    reciprocal: bool = False
    search: tuple[float, ...] = ()

    zero_point = "integer"

    def scales(self, ends: Range, fmt: Format, factor: jax.Array | None = None) -> Scales:
        """Returns the scales for a range; see `Scaling.scales`."""
        assert isinstance(fmt, IntFormat)  # `check` has checked it.
        zero = np.float32(0)  # Comparisons with NaN are false, so that NaN ends stay NaN.
        low, high = where(ends[0] > zero, zero, ends[0]), where(ends[1] < zero, zero, ends[1])
        if factor is not None:
            low, high = low * factor, high * factor
        stored = self.store(span(low, high, fmt), lax.max(high, -low))
        step = self.restore(stored)
        zero_point = zero_point_of(low, step, fmt, get_format(self.scale_format))
        return Scales(step, step, stored, low, high, zero_point=materialize(zero_point))

    def given(self, scale: jax.Array, offset: jax.Array | None, fmt: Format) -> Scales:
        """Returns given scales and zero points, both rounded, with the range that they cover."""
        assert offset is not None
        scale_format, step = get_format(self.scale_format), self.rounded(scale)
        low, high = limits(fmt)
        zero_point = lax.round(offset, lax.RoundingMethod.TO_NEAREST_EVEN)
        zero_point = materialize(lax.clamp(low, zero_point, high))
        low, high = (
            times(jnp.broadcast_to(end - zero_point, step.shape), step, scale_format)
            for end in (low, high)
        )
        return Scales(step, step, StoredScales(step), low, high, zero_point=zero_point)

    def nbytes(self, blocks: int, fmt: Format) -> int:
        """Returns the bytes that scales and zero points take for a number of blocks."""
        return super().nbytes(blocks, fmt) + blocks * code_dtype(fmt).itemsize


@dataclasses.dataclass(frozen=True, repr=False)
class ScaleAndMin(_TwoSided):
    """A scale and a minimum per block, y = s q + m: GGUF's Q4_1 and Q5_1.

    The minimum is the low end of the range, stored in the scale format. 0 need not be represented
    exactly. Given an importance, ggml's search chooses scales, minima and, as in `SuperBlocks`, the
    codes.

    Attributes:
      range: the calibrator, as in `Affine`.
      scale_format: the format of the scales and minima, a float format with a NaN whose products
        with the elements are float32 numbers; float16 by default.
      stored: True computes the codes from the scale and the minimum as stored; False, the default,
        from the float32 ones before they are rounded, as GGUF does.
      reciprocal: True, the default, multiplies by the rounded reciprocal of the scale; False
        divides.
      search: the factors of the range that each block tries, as in `Symmetric`.

    Raises:
      ValueError: if a name is unknown, or a value is not supported.

    References:
      ggml's quantize_row_q4_1_ref.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> recipe = jaxq.Recipe("uint4", jaxq.PerBlock(4), ScaleAndMin())
      >>> jaxq.fake_quant(jnp.array([1.0, 2.0, 4.0, 16.0]), recipe).tolist()
      [1.0, 2.0, 4.0, 16.0]
    """

    range: str | Calibrator = "absmax"
    scale_format: str | Format = "float16"
    stored: bool = False
    reciprocal: bool = True
    search: tuple[float, ...] = ()

    zero_point = "minimum"

    def check(self, fmt: Format) -> None:
        """Raises ValueError unless the scaling supports an element format."""
        super().check(fmt)
        self.require(
            fmt.min >= 0,
            "needs an unsigned integer format such as 'uint4'",
            fmt.name,
            f"Use {'u' + fmt.name!r}.",
        )
        scale_format = get_format(self.scale_format)
        digits = getattr(scale_format, "mantissa_bits", 23) + 1
        self.require(
            digits + fmt.bits <= 24 and scale_format != E8M0,
            "needs a `scale_format` whose products with the elements are exact in float32",
            scale_format.name,
            "Use 'float16'.",
        )

    def scales(self, ends: Range, fmt: Format, factor: jax.Array | None = None) -> Scales:
        """Returns the scales for a range; see `Scaling.scales`."""
        assert isinstance(fmt, IntFormat)  # `check` has checked it.
        low, high = ends if factor is None else (ends[0] * factor, ends[1] * factor)
        scale = span(low, high, fmt)
        stored = self.store(scale, lax.max(high, -low))
        step = self.restore(stored)
        minimum = materialize(cast(low, get_format(self.scale_format)))
        divisor, origin = (step, minimum) if self.stored else (materialize(scale), low)
        return Scales(divisor, step, stored, low, high, minimum=minimum, origin=origin)

    def takes_importance(self, fmt: Format) -> bool:
        """Returns whether there is no other search and no other range."""
        del fmt
        return not self.search and self.calibrator == AbsMax()

    def of_elements(
        self, x: jax.Array, cut: Cut, fmt: Format, importance: jax.Array | None
    ) -> Scales:
        """Returns the scales that ggml finds with an importance; see `Scaling.of_elements`."""
        columns, search = Columns.of(cut), functools.partial(with_minimum, limit=int(fmt.max))
        result = searched(search, columns, x, importance, rows=True)
        assert result.m is not None
        scale, low = columns.parts(result.d[:, None]), columns.parts(-result.m[:, None])
        stored = self.store(scale, scale)
        step = self.restore(stored)
        minimum = materialize(cast(low, get_format(self.scale_format)))
        divisor, origin = (step, minimum) if self.stored else (materialize(scale), low)
        high = minimum + step * np.float32(fmt.max)
        return Scales(
            divisor=divisor,
            step=step,
            storage=stored,
            low=minimum,
            high=high,
            minimum=minimum,
            origin=origin,
            grid_values=columns.elements(result.codes.astype(jnp.float32), x.shape),
        )

    def given(self, scale: jax.Array, offset: jax.Array | None, fmt: Format) -> Scales:
        """Returns given scales and minima, both rounded, with the range that they cover."""
        assert offset is not None
        scales = super().given(scale, None, fmt)
        minimum = materialize(cast(offset, get_format(self.scale_format)))
        low, high = scales.low + minimum, scales.high + minimum
        return scales._replace(low=low, high=high, minimum=minimum, origin=minimum)

    def nbytes(self, blocks: int, fmt: Format) -> int:
        """Returns the bytes that scales and minima take for a number of blocks."""
        return 2 * super().nbytes(blocks, fmt)
