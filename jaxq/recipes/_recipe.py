"""The frozen record that describes how a tensor is quantized."""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any, get_args

import jax
from jax import numpy as jnp

from jaxq._base.arguments import integer, shape_of
from jaxq._base.cutting import Cut
from jaxq._base.shapes import is_symbolic
from jaxq._jax.serialization import from_json, to_json
from jaxq.formats import Format, get_format
from jaxq.gradients import ESTIMATORS, Gradient, get_gradient
from jaxq.numerics import BinaryGrid, HalfUp, Rounding, Stochastic, get_rounding
from jaxq.recipes._calibrators import CALIBRATORS
from jaxq.recipes._granularity import Granularity, PerTensor
from jaxq.recipes._outliers import Outliers
from jaxq.recipes._scaling import Scaling
from jaxq.recipes._scalings import SCALINGS
from jaxq.recipes._symmetric import Symmetric
from jaxq.recipes._texts import text_of

__all__ = ["Recipe", "records"]


@dataclasses.dataclass(frozen=True, repr=False)
class Recipe:
    """A description of how a tensor is quantized: frozen, hashable, and static under `jax.jit`.

    Attributes:
      format: the element format, as accepted by `jaxq.get_format`, or a `BinaryGrid`, whose widths
        may be traced. A format is stored as a record. Only `fake_quant` and `neighbors` take a
        recipe with a `BinaryGrid`, which is not hashable while its widths are traced.
      granularity: the granularity, which defines the elements that share a scale; `PerTensor()` by
        default.
      scaling: the record that says how scales are computed and stored: `Symmetric` (the default),
        `Affine`, `MX`, `TwoLevel` (NVFP4), `DoubleQuant` (QLoRA), or one of GGUF's: `SignedScale`,
        `ScaleAndMin` and `SuperBlocks`.
      outliers: the elements to store separately in a wider format, or None (the default).
      rounding: a rounding mode or its name in `jaxq.numerics.ROUNDINGS`; `"nearest_even"` by
        default. With `"stochastic"`, functions that take the recipe need a key.
      gradient: a gradient estimator of `jaxq.gradients` or its name; `"straight_through"` by
        default.

    Quantizing a result again changes nothing if all these conditions hold:

    - The range is the absmax. Rounding changes a mean.
    - The grid is symmetric around 0. Otherwise, the largest value may be off the grid, as in
      dynamic8 or in an unsigned format that is given negative values.
    - There is no zero point. With one, the scale is rounded from a difference, which varies in the
      last bits.
    - The elements are divided by the stored scale. Another scale leaves the largest value off the
      grid.
    - There is no search over several factors.
    - There are no outliers.

    Raises:
      ValueError: if a name is unknown, or the scaling does not support the format; the message says
        which.

    Example:
      >>> from jaxq.recipes import PerBlock, Symmetric
      >>> recipe = Recipe("int4", PerBlock(128), Symmetric(scale_format="float16"))
      >>> recipe.bits_per_weight((64, 256))
      4.125
      >>> import jax, jaxq, jax.numpy as jnp
      >>> x = jnp.array([3.2, -7.0])
      >>> simulate = lambda bits: jaxq.fake_quant(x, Recipe(jaxq.int_grid(bits)))
      >>> jax.vmap(simulate)(jnp.array([2, 4]))
      Array([[ 0., -7.],
             [ 3., -7.]], dtype=float32)
      >>> Recipe.from_json(recipe.to_json()) == recipe
      True
    """

    format: str | Format | BinaryGrid
    granularity: Granularity = PerTensor()
    scaling: Scaling = Symmetric()
    outliers: Outliers | None = None
    rounding: str | Rounding = "nearest_even"
    gradient: str | Gradient = "straight_through"

    def __post_init__(self) -> None:
        fmt: Any = self.format
        if isinstance(fmt, BinaryGrid):
            shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(fmt)}
            if shapes != {()}:
                raise ValueError(
                    "Recipe: the widths of `format`, a BinaryGrid, must be scalars, got shapes "
                    f"{shapes}. Use jax.vmap over the widths."
                )
        else:
            fmt = get_format(fmt)
        object.__setattr__(self, "format", fmt)
        get_rounding(self.rounding)
        get_gradient(self.gradient)
        for name, record_type, examples in (
            ("granularity", Granularity, "PerTensor() or PerChannel(axes)"),
            ("scaling", Scaling, "Symmetric() or Affine()"),
            ("outliers", Outliers | None, "Outliers(0.01), or None"),
        ):
            value = getattr(self, name)
            if not isinstance(value, record_type):
                raise ValueError(
                    f"Recipe: `{name}` must be a record of jaxq.recipes, such as {examples}, got "
                    f"{value!r:.80}."
                )
        self.scaling.check(typing.cast(Format, fmt))

    def __repr__(self) -> str:
        return text_of(self)

    @property
    def element(self) -> Format:
        """The format of the grid values; symmetric recipes exclude the lowest signed integer."""
        if isinstance(self.format, BinaryGrid):  # The steps of `fake_quant` take it as a format.
            return self.scaling.element(typing.cast(Format, self.format))
        return self.scaling.element(get_format(self.format))

    @property
    def scale_format(self) -> Format:
        """The format of the stored scales."""
        return get_format(self.scaling.scale_format)

    def along(self, axis: int, ndim: int) -> "Recipe":
        """Returns the recipe with its granularity read relative to a contracted axis.

        `PerBlock(n)` means blocks along the contraction, `PerBlock((rows, n))` tiles,
        `PerToken()` one scale per vector along the contraction, and `PerChannel(-1)` one scale per
        index of the last other axis, as in `jaxq.SingleProduct`.

        Args:
          axis: the axis of a tensor that products contract: -2 for a kernel `[inputs, outputs]`, -1
            for a weight `[outputs, inputs]`.
          ndim: the number of axes of the tensor.

        Returns:
          A recipe whose granularity refers to the tensor's own axes.

        Raises:
          ValueError: if the tensor lacks an axis that the granularity needs.

        Example:
          >>> from jaxq.recipes import PerBlock
          >>> Recipe("int4", PerBlock(32)).along(-2, 2).granularity.block((64, 8))
          (32, 1)
        """
        remedy = "Use -1 for a weight [outputs, inputs], or -2 for a kernel [inputs, outputs]."
        axis = integer("Recipe.along", "axis", axis, remedy)
        with self._named():
            return dataclasses.replace(self, granularity=self.granularity.along(axis, ndim))

    def to_nearest(self) -> "Recipe":
        """Returns the recipe with rounding to nearest even, which needs no key."""
        return dataclasses.replace(self, rounding="nearest_even")

    def cut(self, shape: tuple[int, ...]) -> Cut:
        """Returns the division of a tensor into blocks.

        Raises:
          ValueError: if the recipe does not fit the shape, or needs the length of a symbolic axis.
        """
        if not any(is_symbolic(n) for n in shape):
            cut = Cut(shape, self.granularity.block(shape))
            self.scaling.check_cut(cut)
            return cut
        with self._named():
            cut = Cut(shape, self.granularity.block(shape))
            self.scaling.check_cut(cut)
            for name, missing in (
                ("outliers", self.outliers is not None),
                ("search", bool(self.scaling.search) and is_symbolic(cut.block[-1])),
            ):
                if missing:
                    raise ValueError(
                        f"`{name}` needs tensors of a known size, got the symbolic shape {shape}. "
                        f"Export one function for each size, or leave `{name}` out."
                    )
        return cut

    def measure(self, x: jax.Array, cut: Cut) -> Any:
        """Returns the state of the recipe's calibrator for one split float32 tensor.

        Raises:
          ValueError: if the state would be too large.
        """
        with self._named():
            return self.scaling.calibrator.measure(x, cut, self.scaling.two_sided)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Prefixes the messages of ValueErrors with the recipe's element format."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"Recipe of {self.element.name}: {error}") from error

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Returns the bytes that `jaxq.quantize` stores for a tensor of a shape, with scales."""
        shape = shape_of("Recipe.nbytes", shape)
        size, blocks = math.prod(shape), math.prod(self.cut(shape).counts)
        row = shape[-1] if shape else 1
        # Each row of codes is packed separately.
        total = math.prod(shape[:-1]) * -(-row * self.element.bits // 8)
        total += self.scaling.nbytes(blocks, self.element)
        if self.outliers is not None:
            total += self.outliers.bits(size) // 8
        return total

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Returns `nbytes` of a tensor of a shape, in bits per element."""
        size = math.prod(shape_of("Recipe.bits_per_weight", shape))
        return 8 * self.nbytes(shape) / size if size else math.nan

    def to_json(self) -> str:
        """Returns the recipe as JSON text, from which `from_json` makes an equal recipe.

        Raises:
          TypeError: if the rounding or the gradient is a user-defined function.
        """
        return to_json("Recipe.to_json", self, records())

    @staticmethod
    def from_json(text: str) -> "Recipe":
        """Returns the recipe that `to_json` wrote.

        Raises:
          ValueError: if the text does not describe a recipe.
        """
        return from_json("Recipe.from_json", text, records(), Recipe, "a recipe")


def records() -> dict[str, type]:
    """Returns the frozen records that a recipe may hold, by name."""
    record_types = [*get_args(Granularity), *get_args(Format), *SCALINGS]
    record_types += [type(calibrator) for calibrator in CALIBRATORS.values()]
    record_types += [type(g) for g in ESTIMATORS.values() if dataclasses.is_dataclass(g)]
    record_types += [Stochastic, HalfUp, Outliers, Recipe]
    return {record_type.__name__: record_type for record_type in record_types}
