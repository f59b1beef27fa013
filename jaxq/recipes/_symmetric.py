"""Symmetric scalings, y = s q: one scale per block, in a float format or a power of two."""

import dataclasses
import functools
from typing import ClassVar

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.cutting import Cut
from jaxq._ggml.weighted import without_minimum
from jaxq._jax.arithmetic import materialize
from jaxq.formats import FloatFormat, Format, IntFormat
from jaxq.recipes._arithmetic import E8M0
from jaxq.recipes._columns import Columns, searched
from jaxq.recipes._ranges import Calibrator, Extremum
from jaxq.recipes._scale_rules import MX_RULES, SCALE_RULES, to_min
from jaxq.recipes._scaling import Scales, Scaling, narrowed

__all__ = ["MX", "SignedScale", "Symmetric"]


@dataclasses.dataclass(frozen=True, repr=False)
class Symmetric(Scaling):
    """One scale per block, y = s q.

    Signed integers use only the codes -max to max, whether scales are computed or given: int8
    covers -127 to 127, so that negating a tensor negates its codes. Only `rule="half"`, which is
    defined with the lowest code, uses it.

    Attributes:
      range: the calibrator, which chooses the magnitude of a block that the grid covers, or its
        name in `jaxq.recipes.CALIBRATORS`. `"absmax"`, the default, covers all values.
      rule: the rule that computes a scale from that magnitude, a name in
        `jaxq.recipes.SCALE_RULES`. `"max"`, the default, maps the magnitude to the format's largest
        value; for posits and takums, and for floats whose `max` exceeds float32, to `scaled_max`
        (see `jaxq.TaperedFormat` and `jaxq.FloatFormat`). `"half"` maps it to half a step beyond
        the largest integer.
      scale_format: the format of the scales, a float format with a NaN; float32 by default. For
        float8_e8m0fnu use `MX`.
      stored: True, the default, divides the elements by the scale as stored, which is never below
        the smallest positive value of its format. False divides them by the float32 scale before it
        is rounded, as GGUF does; the stored scale is a copy, which may be 0 or infinite.
      reciprocal: True multiplies by the rounded reciprocal of the scale; False, the default,
        divides.
      search: factors of the range that each block tries; the factor with the least squared error is
        used (the first on ties). Default: (), no search.

    Raises:
      ValueError: if a name is unknown, or a value is not supported.

    Example:
      >>> import jaxq
      >>> jaxq.Recipe("int4", jaxq.PerBlock(32), Symmetric(scale_format="float16")).nbytes((64,))
      36
    """

    range: str | Calibrator = "absmax"
    rule: str = "max"
    scale_format: str | Format = "float32"
    stored: bool = True
    reciprocal: bool = False
    search: tuple[float, ...] = ()

    takes_grids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = f"Use MX({self.rule!r})." if self.rule in MX_RULES else "Use 'max'."
        names, known = ", ".join(SCALE_RULES), self.rule in SCALE_RULES
        self.require(known, f"`rule` must be one of {names}", self.rule, remedy)

    def check_scale_format(self, scale_format: Format) -> None:
        """Raises ValueError if this scaling cannot store scales in `scale_format`."""
        super().check_scale_format(scale_format)
        name, fits = scale_format.name, scale_format != E8M0
        self.require(fits, "`scale_format` must have a significand", name, "Use MX().")

    def check(self, fmt: Format) -> None:
        """Raises ValueError unless the scaling supports an element format."""
        super().check(fmt)
        fits = isinstance(fmt, SCALE_RULES[self.rule].formats)
        self.require(
            fits, f"rule={self.rule!r} needs an integer format", fmt.name, "Use rule='max'."
        )

    def element(self, fmt: Format) -> Format:
        """Returns the format of the grid values; without the lowest integer, unless rule="half"."""
        return fmt if SCALE_RULES[self.rule].lowest else narrowed(fmt)

    def unrounded(self, amax: jax.Array, fmt: Format) -> jax.Array:
        """Returns the float32 scales for the largest magnitudes of blocks."""
        return SCALE_RULES[self.rule].scale(amax, fmt)


@dataclasses.dataclass(frozen=True, repr=False)
class MX(Scaling):
    """A power of two per block, stored in float8_e8m0fnu, as in the MX formats.

    Attributes:
      rule: the rule that computes the power of two from the largest magnitude of a block, a name in
        `jaxq.recipes.MX_RULES`. `"floor"`, the default, is OCP's rule, 2^(floor(log2 amax) - emax).
        `"ceil"` is 2^(ceil(log2 amax) - emax). `"even"` is `"floor"` for amax rounded half up to
        the precision of the elements. `"rceil"`, the rule of NVIDIA's conversions, rounds amax /
        max up to a power of two. `"max"`, which some call RNE, rounds it to the nearest one.
      range: the calibrator, as in `Symmetric`.
      search: the factors of the range that each block tries, as in `Symmetric`.

    Raises:
      ValueError: if a name is unknown, or a value is not supported.

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0 (2023).

    Example:
      >>> import jaxq
      >>> mxfp4 = jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(32), MX())
      >>> mxfp4 == jaxq.get_recipe("mxfp4")
      True
    """

    rule: str = "floor"
    range: str | Calibrator = "absmax"
    search: tuple[float, ...] = ()

    scale_format = E8M0
    takes_grids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.rule in MX_RULES
        self.require(
            known, f"`rule` must be one of {', '.join(MX_RULES)}", self.rule, "Use 'floor'."
        )

    def check(self, fmt: Format) -> None:
        """Raises ValueError unless the scaling supports an element format."""
        super().check(fmt)
        fits = isinstance(fmt, MX_RULES[self.rule].formats)
        self.require(
            fits,
            f"rule={self.rule!r} needs an integer or float format",
            fmt.name,
            "Use another rule, such as 'max'.",
        )

    def unrounded(self, amax: jax.Array, fmt: Format) -> jax.Array:
        """Returns the float32 scales for the largest magnitudes of blocks."""
        return MX_RULES[self.rule].scale(amax, fmt)


@dataclasses.dataclass(frozen=True, repr=False)
class SignedScale(Scaling):
    """A scale that maps the value of largest magnitude to the lowest integer: GGUF's Q4_0 and Q5_0.

    The scale is negative if that value is positive, so that the lowest code is always used. The
    elements are multiplied by the rounded reciprocal of the scale. Given an importance, ggml's
    search chooses the scales and, as in `SuperBlocks`, the codes.

    Attributes:
      scale_format: the format of the scales, as in `Symmetric`; float16 by default.
      stored: as in `Symmetric`, but False by default, as in GGUF.
      search: the factors of the range that each block tries, as in `Symmetric`.

    Raises:
      ValueError: if a name is unknown, or a value is not supported.

    References:
      ggml's quantize_row_q4_0_ref.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> recipe = jaxq.Recipe("int4", jaxq.PerBlock(4), SignedScale())
      >>> q = jaxq.quantize(jnp.array([1.0, 8.0, -2.0, 3.0]), recipe)
      >>> q.scales.tolist(), q.dequantize().tolist()
      ([-1.0], [1.0, 8.0, -2.0, 3.0])
    """

    scale_format: str | Format = "float16"
    stored: bool = False
    search: tuple[float, ...] = ()

    range = Extremum()
    reciprocal = True

    def check_scale_format(self, scale_format: Format) -> None:
        """Raises ValueError if this scaling cannot store scales in `scale_format`."""
        super().check_scale_format(scale_format)
        signed = isinstance(scale_format, FloatFormat) and scale_format.signed
        self.require(signed, "`scale_format` must have a sign", scale_format.name, "Use 'float16'.")

    def check(self, fmt: Format) -> None:
        """Raises ValueError unless the scaling supports an element format."""
        super().check(fmt)
        self.require(
            fmt.min < 0,
            "needs a signed format such as 'int4'",
            fmt.name,
            "Use it, or Affine() for unsigned integers.",
        )

    def element(self, fmt: Format) -> Format:
        """Returns the format of the grid values, which is the element format itself."""
        return fmt

    def takes_importance(self, fmt: Format) -> bool:
        """Returns whether ggml's search supports the format and there is no other search."""
        return isinstance(fmt, IntFormat) and fmt.fraction_bits == 0 and not self.search

    def of_elements(
        self, x: jax.Array, cut: Cut, fmt: Format, importance: jax.Array | None
    ) -> Scales:
        """Returns the scales that ggml finds with an importance; see `Scaling.of_elements`."""
        columns, search = Columns.of(cut), functools.partial(without_minimum, limit=-int(fmt.min))
        result = searched(search, columns, x, importance, rows=True)
        scale = columns.parts(result.d[:, None])
        stored = self.store(scale, scale)
        step = self.restore(stored)
        divisor = step if self.stored else materialize(scale)
        high = jnp.abs(step) * np.float32(-fmt.min)
        grid_values = columns.elements(result.codes.astype(jnp.float32), x.shape)
        return Scales(divisor, step, stored, -high, high, grid_values=grid_values)

    def unrounded(self, amax: jax.Array, fmt: Format) -> jax.Array:
        """Returns the float32 scales for the signed extremes of blocks."""
        return to_min(amax, fmt)
