"""Plots of a recipe's effect on the numbers and the channels of a tensor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.analysis._arguments import FormatOrRecipe
from jaxq.analysis._chains import chain
from jaxq.analysis._metrics import compare
from jaxq.analysis._sqnr import label
from jaxq.analysis.plots._look import (
    BLUE,
    COLORS,
    GRAY,
    MARKERS,
    MINUS,
    ORANGE,
    array,
    as_list,
    frame,
    new,
    picture,
    spaced_indices,
)
from jaxq.numerics import decode
from jaxq.quantizers import quantize
from jaxq.recipes import PerChannel, Recipe, get_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxq._base.cutting import Cut
    from jaxq.quantizers import Quantized

__all__ = ["channel_errors", "quantized_values"]

_POINTS = 4000  # The most points in a scatter plot; more would not make it clearer.


@picture
def quantized_values(
    x: jax.typing.ArrayLike,
    recipe: str | Recipe = "int4_tensor",
    *,
    key: jax.Array | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws the effect of a recipe on a tensor: before and after, errors, and levels over the data.

    The left panel plots the dequantized against the original values. The middle panel shows the
    distribution of the errors. The right panel shows the distribution of the numbers and the levels
    of the format; numbers are in units of their own scales, so that one plot shows all blocks.

    Args:
      x: a finite float16, bfloat16 or float32 tensor of any shape.
      recipe: the recipe, as in `jaxq.quantize`.
      key: a key of `jax.random`, for stochastic rounding.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure with three axes.

    Raises:
      TypeError: if x has another dtype.
      ValueError: if x is empty or not finite, or the recipe does not fit.

    Example:
      >>> import numpy as np
      >>> figure = quantized_values(np.linspace(-1, 1, 64, dtype=np.float32), "int2_g64")
      >>> len(figure.axes)
      3
    """
    data, recipe_record = array("quantized_values", x), get_recipe(recipe)
    stored = quantize(data, recipe_record, key=key)
    y = np.asarray(stored.dequantize())
    errors = compare(data, y)
    figure = new(10, 3.6, size, title)
    left, middle, right = (frame(axes) for axes in figure.subplots(1, 3))
    before, after = data.ravel(), y.ravel()
    some = spaced_indices(before.size, _POINTS)
    ends = [float(before.min()), float(before.max())]
    left.plot(ends, ends, color=GRAY, linewidth=1, linestyle="--", label="no error")
    style = {"color": BLUE, "markersize": 2.5, "alpha": 0.6, "label": "quantized"}
    left.plot(before[some], after[some], ".", rasterized=True, **style)
    left.set_xlabel("original value")
    left.set_ylabel("dequantized value")
    left.legend(loc="upper left", markerscale=3)
    left.set_title(
        f"{label(recipe)}: {recipe_record.bits_per_weight(data.shape):.4g} bits per number"
    )
    middle.hist(after - before, bins=61, color=ORANGE, alpha=0.75)
    middle.set_xlabel(f"error: dequantized {MINUS} original")
    middle.set_ylabel("numbers")
    middle.set_title(f"SQNR {float(errors.sqnr_db):.1f} dB, largest {float(errors.max_error):.3g}")
    middle.locator_params(axis="x", nbins=5)
    _levels(right, data, stored, y)
    return figure


def _levels(axes: "Axes", data: np.ndarray, stored: "Quantized", y: np.ndarray) -> None:
    """Draws the numbers in units of their scales, and the format's levels."""
    fmt, cut = stored.recipe.element, stored.cut
    step = np.asarray(
        cut.merge(jnp.broadcast_to(cut.align_scales(stored.scales), _split(cut, data)))
    )
    codes = np.asarray(decode(stored.unpack(), fmt))
    with np.errstate(divide="ignore", invalid="ignore"):
        units = codes + np.where(step > 0, (data - y) / step, 0)
    low, high = min(float(codes.min()), 0.0), float(codes.max())
    units = units[(units >= 2 * low - 1) & (units <= 2 * high + 1)]
    axes.hist(units.ravel(), bins=61, color=BLUE, alpha=0.45, label="numbers / scale")
    axes.set_xlabel("value, in units of its scale")
    axes.set_ylabel("numbers")
    axes.locator_params(axis="x", nbins=6)
    values = fmt.values if fmt.bits <= 8 else np.zeros(0)
    top = axes.get_ylim()[1]
    if len(values):
        axes.vlines(values, 0, -0.06 * top, color=ORANGE, linewidth=1, label=f"{fmt.name} levels")
    if 0 < len(values) <= 32:
        axes.vlines(values, 0, top, color=ORANGE, linewidth=0.8, alpha=0.6)
    axes.set_ylim(-0.06 * top, top * 1.22)
    axes.legend(loc="upper center", ncols=2)
    used = len(np.unique(codes))
    axes.set_title(f"{used} of {fmt.num_values} levels used")


def _split(cut: "Cut", data: np.ndarray) -> tuple[int, ...]:
    """Returns the shape of a tensor split into blocks."""
    return jax.eval_shape(cut.split, jnp.asarray(data)).shape


@picture
def channel_errors(
    x: jax.typing.ArrayLike,
    recipes: Sequence[FormatOrRecipe] = ("int8_tensor", "int8_channel"),
    *,
    axis: int = -1,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Plots the SQNR of every channel, with one scale for all and with one scale for each.

    Channels are sorted by their power. With one scale per tensor, the channels of low power, on the
    left, have a low ratio, because the strong channels determine the scale.

    Args:
      x: a finite float16, bfloat16 or float32 tensor with at least one axis.
      recipes: recipes or formats, as the steps of `jaxq.analysis.chain`.
      axis: the axis of the channels. Default: -1.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      TypeError: if x has another dtype.
      ValueError: if x is empty or not finite, or a recipe or the axis does not fit.

    Example:
      >>> import numpy as np
      >>> x = np.float32([[1, 10, 100], [0.7, -6, 50]])
      >>> figure = channel_errors(x)
      >>> len(figure.axes[0].get_lines())
      4
    """
    data = array("channel_errors", x, ndim=1)
    per = PerChannel((axis,))
    chosen = as_list("channel_errors", "recipes", recipes)
    results = [chain(data, [spec])[0] for spec in chosen]
    comparisons = [compare(data, y, per=per) for y in results]
    order = np.argsort(np.asarray(comparisons[0].power).ravel(), kind="stable")
    places = np.arange(len(order))
    figure = new(9, 4.6, size, title)
    axes = frame(figure.add_subplot())
    many = len(order) > 150
    for i, (spec, errors) in enumerate(zip(chosen, comparisons, strict=True)):
        db = np.asarray(errors.sqnr_db, np.float64).ravel()[order]
        db = np.where(np.isfinite(db), db, np.nan)
        color = COLORS[i % len(COLORS)]
        style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 2.5 if many else 4.5}
        whole = float(compare(data, results[i]).sqnr_db)
        axes.axhline(whole, color=color, linewidth=1, linestyle=(0, (4, 3)))
        name = f"{label(spec)} (all together {whole:.1f} dB)"
        axes.plot(places, db, linestyle="", color=color, label=name, **style)
    axes.set_xlabel(f"channels along axis {axis}, from the weakest to the strongest")
    axes.set_ylabel("SQNR of the channel, dB")
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure
