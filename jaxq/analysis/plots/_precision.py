"""Plots of range against precision, and of precision over the range of a format."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax import numpy as jnp

from jaxq.analysis._arguments import significant_bits
from jaxq.analysis.plots._labels import annotate
from jaxq.analysis.plots._look import (
    BLUE,
    COLORS,
    DASHES,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    as_list,
    frame,
    new,
    picture,
    power,
)
from jaxq.formats import (
    FORMATS,
    CodebookFormat,
    FloatFormat,
    Format,
    IntFormat,
    TaperedFormat,
    get_format,
)
from jaxq.numerics import cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["range_and_precision", "relative_error"]

_FAMILIES = (
    (FloatFormat, "floats", BLUE, "o"),
    (IntFormat, "integers, fixed point", ORANGE, "s"),
    (TaperedFormat, "posits, takums", GREEN, "^"),
    (CodebookFormat, "codebooks", PURPLE, "D"),
)


@picture
def range_and_precision(
    formats: Sequence[str | Format] | None = None,
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Plots the precision of formats against their range, one point per format.

    The horizontal axis is the range, from the least positive number to the largest; the vertical
    axis is the largest precision of the format. Formats at the same point share a label.

    Args:
      formats: formats or their names, as in `jaxq.get_format`. Default: None, the whole catalog.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: if a format is unknown or the list is empty.

    Example:
      >>> figure = range_and_precision(["float16", "bfloat16", "int8"])
      >>> figure.axes[0].get_xlabel()
      'range: powers of two from the least positive number to the largest'
    """
    specs = FORMATS.values() if formats is None else formats
    chosen = [get_format(spec) for spec in as_list("range_and_precision", "formats", specs)]
    many = len(chosen) > 16
    figure = new(*((11, 8) if many else (8, 5.5)), size, title)
    axes = frame(figure.add_subplot())
    places: dict[tuple[float, float, str], list[Format]] = {}
    for fmt in chosen:
        octaves = fmt.dynamic_range_db / (20 * math.log10(2))
        # Rounded, so that formats that would look like one point share it.
        place = round(octaves, 1 if octaves < 100 else 0), round(significant_bits(fmt), 1)
        places.setdefault((*place, type(fmt).__name__), []).append(fmt)
    points = np.array([place[:2] for place in places])
    labels = ["\n".join(_pairs([fmt.name for fmt in group])) for group in places.values()]
    for family, label, color, marker in _FAMILIES:
        family_points = [place[:2] for place in places if place[2] == family.__name__]
        if family_points:
            x, y = np.array(family_points).T
            axes.scatter(
                x, y, s=30, color=color, marker=marker, label=label, clip_on=False, zorder=3
            )
    palette = {family.__name__: color for family, _, color, _ in _FAMILIES}
    colors = [palette[place[2]] for place in places]
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.6)
    axes.set_yscale("symlog", base=2, linthresh=1, linscale=0.6)
    top = points.max(0)
    axes.set_xlim(-0.15, max(top[0] * 1.5, 8))
    axes.set_ylim(-0.15, max(top[1] * 1.3, 4))
    ticks = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    axes.set_xticks([t for t in ticks if t <= axes.get_xlim()[1]])
    ticks = [0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 24]
    axes.set_yticks([t for t in ticks if t <= axes.get_ylim()[1]])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("range: powers of two from the least positive number to the largest")
    axes.set_ylabel("precision: significant bits, where there are most")
    axes.legend(loc="upper left")
    annotate(axes, points, labels, colors=colors, fontsize=7 if many else 8.5, linespacing=1.0)
    return figure


def _pairs(names: list[str]) -> list[str]:
    """Joins names into lines of limited length."""
    lines: list[str] = []
    for name in names:
        if lines and len(lines[-1]) + len(name) < 24:
            lines[-1] += f", {name}"
        else:
            lines.append(name)
    return lines


@picture
def relative_error(
    formats: Sequence[str | Format] = ("float16", "bfloat16"),
    *,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Plots the relative error of a cast against the magnitude of the number for several formats.

    Lines show the largest error among random numbers close to that magnitude. A cross marks the
    overflow threshold of a format; an open circle marks its smallest normal number, below which
    precision decreases.

    Args:
      formats: formats or their names, as in `jaxq.get_format`; casts round to nearest.
      limits: the least and the largest magnitude. Default: None, chosen from the formats.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: if a format is unknown, the list is empty, or the limits are not ascending
        positive numbers.

    Example:
      >>> figure = relative_error(["float8_e4m3fn", "float8_e5m2"])
      >>> figure.axes[0].get_ylabel()
      'relative error of rounding'
    """
    chosen = [get_format(spec) for spec in as_list("relative_error", "formats", formats)]
    largest = float(np.finfo(np.float32).max)
    if limits is None:
        low = min(max(fmt.min_positive, 2.0**-140) for fmt in chosen) / 8
        high = min(max(fmt.max for fmt in chosen) * 8, largest)
    else:
        low, high = limits
    if not 0 < low < high <= largest:
        raise ValueError(
            "relative_error: `limits` must be two positive float32 numbers, the lower first, got "
            f"{limits}. Leave `limits` out for the range of the formats."
        )
    # As many bins per octave as are visible; an uneven division of octaves would look like noise.
    fine = min(4, max(1, int(400 / math.log2(high / low))))
    first, last = (round(math.log2(end) * fine) for end in (low, high))
    edges = np.arange(first, last + 1) / fine
    share = np.random.default_rng(0).random((len(edges) - 1, 200))
    x = np.exp2(edges[:-1, None] + np.diff(edges)[:, None] * share)
    x = np.minimum(x, largest).astype(np.float32)
    middle = np.exp2((edges[:-1] + edges[1:]) / 2)
    figure = new(10, 5, size, title)
    axes = frame(figure.add_subplot())
    worst_of_all, finest = 1.0, min(2.0 ** -significant_bits(fmt) for fmt in chosen)
    axes.axhline(1, color=GRAY, linewidth=0.8)
    for i, fmt in enumerate(chosen):
        color, dash = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]
        y = np.asarray(cast(jnp.asarray(x), fmt)).astype(np.float64)
        error = np.abs(y - x) / x
        worst = np.max(np.where(np.isfinite(error) & (x <= fmt.max), error, 0), axis=1)
        worst = np.where((x <= fmt.max).all(1), worst, np.nan)
        worst = np.where(worst > finest / 16, worst, np.nan)
        worst_of_all = float(np.nanmax(worst, initial=worst_of_all))
        axes.plot(middle, worst, color=color, linestyle=dash, linewidth=1.4, label=fmt.name)
        top = fmt.max
        if low <= top <= high:
            axes.plot([top] * 2, [finest / 4, 1], color=color, linewidth=0.9, linestyle=":")
            axes.plot([top], [1], "X", color=color, markersize=8, zorder=4)
        normal = fmt.smallest_normal
        if isinstance(fmt, FloatFormat) and fmt.min_positive < normal and low <= normal <= high:
            half = 2.0 ** -significant_bits(fmt)
            axes.plot([normal], [half], "o", color=color, markerfacecolor="white", zorder=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(low, high * (high / low) ** 0.01)
    axes.set_ylim(finest / 4, 4 * worst_of_all)
    _powers(axes.xaxis, math.log2(low), math.log2(high), 12)
    _powers(axes.yaxis, math.log2(finest / 4), math.log2(worst_of_all), 9)
    axes.set_xlabel("magnitude")
    axes.set_ylabel("relative error of rounding")
    _legend(axes, chosen)
    return figure


def _powers(axis: "Axis", low: float, high: float, most: int) -> None:
    """Sets at most `most` ticks at whole powers of two, labeled as such."""
    step = max(1, math.ceil((high - low) / most))
    first = math.ceil(low / step) * step
    ticks = [2.0**k for k in range(first, math.floor(high) + 1, step)]
    axis.set_ticks(ticks, labels=[f"$2^{{{round(math.log2(tick))}}}$" for tick in ticks])
    axis.set_ticks([], minor=True)


def _legend(axes: "Axes", formats: Sequence[Format]) -> None:
    """Draws a legend of the lines, with each format's largest value, and of the markers."""
    from matplotlib.lines import Line2D

    handles, _ = axes.get_legend_handles_labels()
    labels = [f"{fmt.name}: to {power(fmt.max)}" for fmt in formats]
    marks = (("X", GRAY, "overflow beyond"), ("o", "white", "subnormal below"))
    for marker, face, label in marks:
        handle = Line2D([], [], linestyle="", marker=marker, color=GRAY, markerfacecolor=face)
        handles.append(handle)
        labels.append(label)
    axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
