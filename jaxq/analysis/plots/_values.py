"""Plots of the values of formats on a number line."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxq.analysis.plots._look import BLUE, GRAY, ORANGE, as_list, frame, new, picture, power
from jaxq.formats import FloatFormat, Format, get_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["number_line"]

_FORMATS = ("int4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")


@picture
def number_line(
    formats: Sequence[str | Format] = _FORMATS,
    *,
    scale: Literal["linear", "log"] = "linear",
    normalized: bool = False,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws the values of formats as ticks on one number line, a row for each.

    Subnormal numbers, which are evenly spaced around 0, have short orange ticks.

    Args:
      formats: formats of at most 16 bits or their names, as in `jaxq.get_format`.
      scale: `"linear"` or `"log"`; the latter spaces powers of two evenly on both sides of 0.
      normalized: True to divide each format's values by the largest magnitude, as a scale does.
      limits: the ends of the line. Default: None, shows all values.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: if a format or the scale is unknown, the list is empty, or a format has more than
        16 bits.

    Example:
      >>> figure = number_line(["float4_e2m1fn"])
      >>> sum(len(c.get_positions()) for c in figure.axes[0].collections)
      15
    """
    from matplotlib.lines import Line2D

    chosen = [get_format(spec) for spec in as_list("number_line", "formats", formats)]
    if scale not in ("linear", "log"):
        raise ValueError(
            f"number_line: `scale` must be 'linear' or 'log', got {scale!r}. Use 'log'."
        )
    figure = new(10, 0.55 * len(chosen) + 1.2, size, title)
    axes = frame(figure.add_subplot(), grid="x")
    least, rows, any_small = np.inf, [], False
    for row, fmt in enumerate(chosen):
        values = fmt.values
        unit = float(np.abs(values).max()) if normalized else 1.0
        small = np.zeros(len(values), bool)
        if isinstance(fmt, FloatFormat):
            small = (values != 0) & (np.abs(values) < fmt.smallest_normal)
        values, any_small = values / unit, any_small or bool(small.any())
        rows.append(values)
        nonzero = np.abs(values[values != 0])
        least = min(least, float(nonzero.min()))
        width = 1.4 if len(values) < 40 else 0.8
        styles = ((~small, BLUE, 0.62), (small, ORANGE, 0.36))
        for which, color, length in styles:
            if which.any():
                axes.eventplot(
                    values[which],
                    lineoffsets=row,
                    linelengths=length,
                    linewidths=width,
                    colors=color,
                )
    ends = limits or (min(v[0] for v in rows), max(v[-1] for v in rows))
    if scale == "log":
        _logarithmic(axes, least, ends)
    else:
        room = 0.02 * (ends[1] - ends[0])
        axes.set_xlim(ends[0] - room, ends[1] + room)
    axes.set_yticks(range(len(chosen)), [fmt.name for fmt in chosen])
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    beside = axes.get_yaxis_transform()
    for row, values in enumerate(rows):
        text = f"{len(values)} values"
        axes.text(1.01, row, text, transform=beside, va="center", fontsize=8, color=GRAY)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    label = "value, in units of the largest magnitude" if normalized else "value"
    axes.set_xlabel(label + (", logarithmic to both sides of 0" if scale == "log" else ""))
    handles = [Line2D([], [], color=BLUE, linewidth=2, label="normal numbers, and 0")]
    if any_small:
        handles.append(Line2D([], [], color=ORANGE, linewidth=2, label="subnormal numbers"))
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return figure


def _logarithmic(axes: "Axes", least: float, ends: tuple[float, float]) -> None:
    """Sets a logarithmic scale on both sides of 0, with ticks at some powers of two."""
    low = int(np.floor(np.log2(least)))
    high = int(np.ceil(np.log2(max(abs(end) for end in ends))))
    sides = int(ends[0] < 0) + int(ends[1] > 0)
    most = 14 if max(high, -low) < 100 else 12  # Labels with long exponents are wide.
    step = max(1, -(-(high - low) * sides // most))
    # 0 is drawn half a step beyond the least magnitude, to leave room for its label.
    options: dict[str, Any] = {"base": 2, "linthresh": least, "linscale": max(1, step / 2)}
    axes.set_xscale("symlog", **options)
    powers = [
        2.0**k for k in range(-(-low // step) * step, high + 1, step) if 2 * (k - low) >= step
    ]
    ticks = [0.0] if ends[0] <= 0 else []
    ticks += [p for p in powers if p <= ends[1]] + [-p for p in powers if -p >= ends[0]]
    axes.set_xticks(sorted(ticks), [power(t) for t in sorted(ticks)])
    axes.minorticks_off()
    left = ends[0] * 1.2 if ends[0] < 0 else (ends[0] / 1.2 or -least / 2)
    axes.set_xlim(left, ends[1] * 1.2)
