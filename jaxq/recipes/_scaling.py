"""The base class of scaling records, which define how scales are computed and stored.

To add a scaling, write a frozen dataclass that derives from `Scaling`, override the attributes and
methods in which it differs, and list it in `SCALINGS` (`_scalings.py`).
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import flags, numbers_of
from jaxq._base.cutting import Cut
from jaxq._jax.arithmetic import materialize
from jaxq.formats import FloatFormat, Format, IntFormat, get_format
from jaxq.numerics import BinaryGrid, cast, code_dtype
from jaxq.recipes._arithmetic import times, to_scale_format
from jaxq.recipes._calibrators import get_calibrator
from jaxq.recipes._ranges import Calibrator, Range
from jaxq.recipes._scale_rules import to_max
from jaxq.recipes._texts import text_of

__all__ = ["Scales", "Scaling", "StoredScales", "limits"]


class StoredScales(NamedTuple):
    """The scales of a tensor as a `Quantized` stores them, before they are encoded.

    Attributes:
      scale: the scales on the grid of their format, relative to any second level.
      second: the arrays of a second level, with which `Scaling.restore` computes the scales; ()
        without one.
      minimum: the minima on the grid of the scale format, with which `Scaling.restore_minimum`
        computes the minima; None without minima.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> stored = StoredScales(jnp.array([2.0]), (jnp.float32(0.5),))
      >>> jaxq.get_recipe("nvfp4").scaling.restore(stored).tolist()
      [1.0]
    """

    scale: jax.Array
    second: tuple[jax.Array, ...] = ()
    minimum: jax.Array | None = None


class Scales(NamedTuple):
    """The scales and ranges of the blocks of a tensor, in the layout of `Cut.align_scales`.

    Attributes:
      divisor: the divisor of the elements.
      step: the multiplier of the grid values: the scale that the stored arrays give.
      storage: the stored arrays.
      low: the low end of the range that the scales cover.
      high: the high end.
      zero_point: the integer to which 0 maps, as a float; None unless `Scaling.zero_point` is
        `"integer"`.
      minimum: the stored minimum, which is added to the scaled grid values; None unless
        `Scaling.zero_point` is `"minimum"`.
      origin: the minimum that is subtracted before the division: the stored one, or the one that
        was computed in float32. None without a minimum.
      grid_values: the grid values that a search has chosen together with the scales, in the layout
        of `Cut.split`; None if elements are rounded to the nearest ones.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> ends = jnp.array([-14.0]), jnp.array([14.0])
      >>> jaxq.recipes.Symmetric().scales(ends, jaxq.get_recipe("int4_tensor").element).step
      Array([2.], dtype=float32)
    """

    divisor: jax.Array
    step: jax.Array
    storage: StoredScales
    low: jax.Array
    high: jax.Array
    zero_point: jax.Array | None = None
    minimum: jax.Array | None = None
    origin: jax.Array | None = None
    grid_values: jax.Array | None = None

    @property
    def offset(self) -> jax.Array | None:
        """The zero point or the stored minimum, whichever the scaling has."""
        return self.minimum if self.zero_point is None else self.zero_point


class Scaling:
    """The base class of scaling records, which define how scales are computed and stored.

    A scaling maps the range of a block to a scale s and defines the values y that the grid values q
    of the element format represent: y = s q; or y = s (q - z), with an integer zero point z; or
    y = s q + m, with a minimum m. The defaults below describe symmetric scales, y = s q, that map
    the largest magnitude to the largest grid value and are rounded to a narrower format.

    Attributes:
      zero_point: None, `"integer"` or `"minimum"`: the number stored for each block besides the
        scale.
      second_level: None if the scale of a block depends on that block only; `"tensor"` if the
        scales are relative to one scale of the tensor; `"blocks"` if runs of scales are quantized
        together.
      range: the calibrator, or its name in `jaxq.recipes.CALIBRATORS`.
      scale_format: the format of the stored scales; a record once the scaling is constructed.
      stored: True if the elements are divided by the scale as stored, False if by the float32 scale
        before it is rounded.
      reciprocal: True if the elements are multiplied by the rounded reciprocal of the scale instead
        of divided by the scale.
      search: the factors of the range that each block tries; () for none.
      takes_grids: True if a `jaxq.numerics.BinaryGrid`, whose widths may be traced, can be the
        element format.
      searches_elements: True if `of_elements` finds the scales by a search over the elements, and
        `scales` is not supported.
      blocks_per_run: the number of consecutive blocks whose scales share a second scale and whole
        bytes; 1 if each scale has bytes of its own.
      is_local: True if the scales of a run of blocks depend on no element of another run.
      largest_scale: the largest finite scale; infinity with a second level of float32 numbers.

    Example:
      >>> import jaxq
      >>> isinstance(jaxq.get_recipe("mxfp4").scaling, Scaling)
      True
    """

    takes_grids: ClassVar[bool] = False
    searches_elements: ClassVar[bool] = False
    zero_point: ClassVar[Literal["integer", "minimum"] | None] = None
    second_level: ClassVar[Literal["tensor", "blocks"] | None] = None
    range: str | Calibrator = "absmax"
    scale_format: str | Format = "float32"
    stored: bool = True
    reciprocal: bool = False
    search: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        record: Any = self  # Every scaling is a dataclass, though this class is not.
        names = {field.name for field in dataclasses.fields(record)}
        if "scale_format" in names:
            object.__setattr__(self, "scale_format", get_format(self.scale_format))
        if "search" in names:
            requirement, remedy = "a tuple of positive numbers", "Use () for no search."
            search = numbers_of(
                type(self).__name__, "search", self.search, requirement, lambda f: f > 0, remedy
            )
            object.__setattr__(self, "search", search)
        remedy = "Omit it for the default."
        given = {name: getattr(self, name) for name in ("stored", "reciprocal") if name in names}
        flags(type(self).__name__, remedy, **given)
        two_sided = self.calibrator.two_sided or not self.two_sided
        requirement = "`range` must be a calibrator that measures both extremes"
        self.require(two_sided, requirement, self.range, "Use range='absmax'.")
        self.check_scale_format(get_format(self.scale_format))

    def __repr__(self) -> str:
        return text_of(self)

    def require(self, ok: bool, requirement: str, got: object, remedy: str) -> None:
        """Raises a ValueError with the requirement, what was got and a remedy, unless `ok`."""
        if not ok:
            raise ValueError(f"{type(self).__name__}: {requirement}, got {got!r}. {remedy}")

    def check_scale_format(self, scale_format: Format) -> None:
        """Raises ValueError if this scaling cannot store scales in `scale_format`."""
        self.require(
            isinstance(scale_format, FloatFormat)
            and scale_format.nan is not None
            and scale_format.max <= 2.0**128,
            "`scale_format` must be a float format with a NaN within float32's range",
            scale_format.name,
            "Use 'float32', 'bfloat16' or 'float16'.",
        )

    def check(self, fmt: Format) -> None:
        """Raises ValueError unless the scaling supports an element format."""
        if isinstance(fmt, BinaryGrid):
            fits = self.takes_grids and BinaryGrid in self.calibrator.formats
            requirement = "with this scaling and this `range`, `format` must have fixed widths"
            self.require(
                fits, requirement, fmt.name, "Use Symmetric() or MX() with range='absmax'."
            )
            return
        self.require(
            fmt.max > 0,
            "needs an element format with a positive `max`",
            fmt.name,
            "Use, for example, 'int8'.",
        )
        self.require(
            isinstance(fmt, self.calibrator.formats),
            f"range={self.range!r} needs an element format with evenly spaced levels",
            fmt.name,
            "Use an integer format, or range='absmax'.",
        )

    @property
    def calibrator(self) -> Calibrator:
        """The calibrator as a record."""
        return get_calibrator(self.range)

    @property
    def two_sided(self) -> bool:
        """True if ranges have two sides, False if only magnitudes count."""
        return self.zero_point is not None

    @property
    def blocks_per_run(self) -> int:
        """The number of consecutive blocks whose scales are packed together."""
        return 1

    @property
    def is_local(self) -> bool:
        """True if the scales of a run of blocks depend on no element of another run."""
        return self.second_level is None or self.blocks_per_run > 1

    @property
    def largest_scale(self) -> float:
        """The largest finite scale; infinity with a second level, whose products have no bound."""
        return math.inf if self.second_level else get_format(self.scale_format).max

    @property
    def takes_scales(self) -> bool:
        """True if scales passed by the user, one per block, can replace the computed ones."""
        return self.stored and not self.search and self.second_level is None

    def takes_importance(self, fmt: Format) -> bool:
        """Returns whether `of_elements` searches by an importance, given the element format."""
        del fmt
        return False

    def check_cut(self, cut: Cut) -> None:
        """Raises ValueError unless the scaling supports a division into blocks."""
        del cut

    def element(self, fmt: Format) -> Format:
        """Returns the format of the grid values; symmetric scalings exclude the lowest integer."""
        return narrowed(fmt)

    def unrounded(self, amax: jax.Array, fmt: Format) -> jax.Array:
        """Returns the float32 scales for the largest magnitudes of blocks."""
        return to_max(amax, fmt)

    def store(self, scale: jax.Array, amax: jax.Array) -> StoredScales:
        """Returns float32 scales as they are stored.

        Args:
          scale: the float32 scales.
          amax: the magnitudes from which they were computed. A block of zeros gets the scale 0, and
            no other block does.
        """
        scale_format = get_format(self.scale_format)
        if self.stored:
            return StoredScales(materialize(to_scale_format(scale, amax, scale_format)))
        return StoredScales(materialize(cast(scale, scale_format)))

    def restore(self, stored: StoredScales) -> jax.Array:
        """Reconstructs float32 block scales from the stored ones."""
        return stored.scale

    def restore_minimum(self, stored: StoredScales) -> jax.Array | None:
        """Returns the minima that are added to the scaled grid values; None without minima."""
        return stored.minimum

    def of_elements(
        self, x: jax.Array, cut: Cut, fmt: Format, importance: jax.Array | None
    ) -> Scales:
        """Returns scales that a search over the elements of a split float32 tensor finds.

        Only for scalings with `searches_elements`, or with an importance that they take.

        Args:
          x: the tensor in the layout of `Cut.split`.
          cut: its division into blocks.
          fmt: the format of the grid values.
          importance: the weights of the elements' squared errors, in the layout of `Cut.split`;
            None for those of the search itself.
        """
        raise NotImplementedError

    def scales(self, ends: Range, fmt: Format, factor: jax.Array | None = None) -> Scales:
        """Returns the scales for a range.

        Args:
          ends: the low and the high end of the range of each block.
          fmt: the format of the grid values, as `element` returns it.
          factor: a factor by which the ends are multiplied; None leaves them unchanged.
        """
        amax = ends[1] if factor is None else ends[1] * factor
        scale = self.unrounded(amax, fmt)
        stored = self.store(scale, amax)
        step = self.restore(stored)
        divisor = step if self.stored else materialize(scale)
        return Scales(divisor, step, stored, *symmetric_range(amax, fmt))

    def given(self, scale: jax.Array, offset: jax.Array | None, fmt: Format) -> Scales:
        """Returns given scales, rounded to their format, with the range that they cover.

        Args:
          scale: float32 scales in the layout of `Cut.align_scales`.
          offset: the zero points or minima that belong to them; None for a symmetric scaling.
          fmt: the format of the grid values.
        """
        del offset
        step = self.rounded(scale)
        low, high = (
            times(jnp.broadcast_to(end, step.shape), step, get_format(self.scale_format))
            for end in limits(fmt)
        )
        return Scales(step, step, StoredScales(step), low, high)

    def rounded(self, scale: jax.Array) -> jax.Array:
        """Returns given scales rounded to the scale format."""
        return materialize(to_scale_format(scale, scale, get_format(self.scale_format)))

    def take(self, second: tuple[jax.Array, ...], indices: np.ndarray) -> tuple[jax.Array, ...]:
        """Returns the second-level arrays for some scales, given their flattened positions."""
        del indices
        return second

    def tensor_scale(self, second: tuple[jax.Array, ...]) -> jax.Array | None:
        """Returns the tensor's second-level scale, or None."""
        del second
        return None

    def nbytes(self, blocks: int, fmt: Format) -> int:
        """Returns the bytes that scales and zero points take for a number of blocks."""
        del fmt
        return blocks * code_dtype(get_format(self.scale_format)).itemsize


def narrowed(fmt: Format) -> Format:
    """Returns a format without the lowest value, if it is a signed integer format."""
    if isinstance(fmt, BinaryGrid):  # Grids of signed floats are symmetric already.
        return dataclasses.replace(fmt, lowest=fmt.max) if fmt.signed else fmt
    if isinstance(fmt, IntFormat) and fmt.signed:
        return dataclasses.replace(fmt, narrow=True)
    return fmt


def symmetric_range(amax: jax.Array, fmt: Format) -> Range:
    """Returns the range of a symmetric scaling, which begins at 0 for an unsigned format."""
    high = jnp.abs(amax)
    signed = fmt.signed if isinstance(fmt, BinaryGrid) else fmt.min < 0
    return -high if signed else jnp.zeros_like(high), high


def limits(fmt: Format) -> tuple[Any, Any]:
    """Returns the lowest and largest values of a format; infinite if they exceed float32."""
    if isinstance(fmt, BinaryGrid):
        return fmt.min, fmt.max
    with np.errstate(over="ignore"):
        return np.float32(fmt.min), np.float32(fmt.max)
