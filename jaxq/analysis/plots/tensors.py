"""What a recipe does to the numbers of a tensor, and to its channels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.analysis.metrics import compare
from jaxq.analysis.plots.look import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    MINUS,
    ORANGE,
    array,
    frame,
    listed,
    new,
    picture,
    thinned,
)
from jaxq.analysis.specs import Spec
from jaxq.analysis.sqnr import label
from jaxq.blocks import PerChannel
from jaxq.chains import chain
from jaxq.codecs import decode
from jaxq.formats import Format
from jaxq.presets import get_quantizer
from jaxq.quantizers import quantize
from jaxq.recipes import Quantizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxq.blocks import Cut
    from jaxq.quantized import Quantized

__all__ = ["channel_errors", "quantized_values"]

_POINTS = 4000  # Of a scatter; more make it no clearer.


@picture
def quantized_values(
    x: jax.typing.ArrayLike,
    recipe: str | Format | Quantizer = "int4_tensor",
    *,
    key: jax.Array | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """What a recipe does to a tensor: before and after, the errors, the levels over the data.

    On the left every point is a number; in the middle is the distribution of its error; on the
    right that of the numbers in units of their own scales, with the levels of the format, so that
    one picture shows all blocks.

    Args:
      x: finite float16, bfloat16 or float32 of any shape.
      recipe: as `jaxq.quantize` takes it.
      key: of stochastic rounding.
      title: above the picture.
      size: width and height in inches.

    Returns:
      A figure with three axes.

    Raises:
      TypeError: another dtype.
      ValueError: no numbers, numbers that are not finite, a recipe that does not fit.

    Example:
      >>> figure = quantized_values(np.linspace(-1, 1, 64, dtype=np.float32), "int2_g64")
      >>> len(figure.axes)
      3
    """
    data, kind = array("quantized_values", x), get_quantizer(recipe)
    stored = quantize(data, kind, key=key)
    y = np.asarray(stored.dequantize())
    errors = compare(data, y)
    figure = new(12, 3.9, size, title)
    left, middle, right = (frame(axes) for axes in figure.subplots(1, 3))
    before, after = data.ravel(), y.ravel()
    some = thinned(before.size, _POINTS)
    ends = [float(before.min()), float(before.max())]
    left.plot(ends, ends, color=GREY, linewidth=1, linestyle="--", label="no error")
    left.plot(
        before[some], after[some], ".", color=BLUE, markersize=2.5, alpha=0.6, label="quantized"
    )
    left.set_xlabel("original value")
    left.set_ylabel("dequantized value")
    left.legend(loc="upper left", markerscale=3)
    left.set_title(f"{label(recipe)}: {kind.bits_per_weight(data.shape):.4g} bits a number")
    middle.hist(after - before, bins=61, color=ORANGE, alpha=0.75)
    middle.set_xlabel(f"error: dequantized {MINUS} original")
    middle.set_ylabel("numbers")
    middle.set_title(f"SQNR {float(errors.sqnr_db):.1f} dB, largest {float(errors.max_error):.3g}")
    middle.locator_params(axis="x", nbins=5)
    _levels(right, data, stored, y)
    return figure


def _levels(axes: "Axes", data: np.ndarray, stored: "Quantized", y: np.ndarray) -> None:
    """The numbers in units of their scales, and the format's levels."""
    fmt, cut = stored.recipe.element, stored.cut
    step = np.asarray(cut.merge(jnp.broadcast_to(cut.spread(stored.scales), _split(cut, data))))
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
    """The shape of a tensor that is cut into blocks."""
    return jax.eval_shape(cut.split, jnp.asarray(data)).shape


@picture
def channel_errors(
    x: jax.typing.ArrayLike,
    recipes: Sequence[Spec] = ("int8_tensor", "int8_channel"),
    *,
    axis: int = -1,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """The signal-to-noise ratio of every channel: one scale for all against one for each.

    Channels are in the order of their power. With one scale a tensor the quiet ones, on the left,
    drown in the noise that the loud ones cause.

    Args:
      x: finite float16, bfloat16 or float32, of at least one axis.
      recipes: as the steps of `jaxq.chain`.
      axis: that of the channels.
      title: above the picture.
      size: width and height in inches.

    Returns:
      A figure.

    Raises:
      TypeError: another dtype.
      ValueError: no numbers, numbers that are not finite, a recipe or axis that does not fit.

    Example:
      >>> x = np.float32([[1, 10, 100], [0.7, -6, 50]])
      >>> figure = channel_errors(x)
      >>> len(figure.axes[0].get_lines())
      4
    """
    data = array("channel_errors", x, ndim=1)
    per = PerChannel((axis,))
    chosen = listed("channel_errors", "recipes", recipes)
    results = [chain(data, [spec])[0] for spec in chosen]
    found = [compare(data, y, per=per) for y in results]
    order = np.argsort(np.asarray(found[0].power).ravel(), kind="stable")
    places = np.arange(len(order))
    figure = new(9, 4.6, size, title)
    axes = frame(figure.add_subplot())
    many = len(order) > 150
    for i, (spec, errors) in enumerate(zip(chosen, found, strict=True)):
        db = np.asarray(errors.sqnr_db, np.float64).ravel()[order]
        db = np.where(np.isfinite(db), db, np.nan)
        colour = COLOURS[i % len(COLOURS)]
        style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 2.5 if many else 4.5}
        whole = float(compare(data, results[i]).sqnr_db)
        axes.axhline(whole, color=colour, linewidth=1, linestyle=(0, (4, 3)))
        name = f"{label(spec)} (all together {whole:.1f} dB)"
        axes.plot(places, db, linestyle="", color=colour, label=name, **style)
    axes.set_xlabel(f"channels along axis {axis}, from the weakest to the strongest")
    axes.set_ylabel("SQNR of the channel, dB")
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure
