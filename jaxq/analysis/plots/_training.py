"""Plots of the statistics that a training run has logged."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxq._base.arguments import described
from jaxq._base.registry import suggestion
from jaxq.analysis._logs import Log
from jaxq.analysis.plots._look import BLUE, COLORS, DASHES, GRAY, frame, new, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["column", "gradient_cosines", "statistic_by_step", "statistics_map"]

_SHARES = ("clipped", "flushed", "lost", "zeros", "nonfinite", "scale_ends")


@picture
def statistics_map(
    log: Log,
    statistic: str = "sqnr_db",
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws a statistic of every tensor over the steps of a run, with a row per tensor and layer.

    Args:
      log: a log, from `jaxq.analysis.read_log`.
      statistic: the last part of the statistic's name, such as `"sqnr_db"` or `"flushed"`.
        Default: `"sqnr_db"`.
      title: the title. Default: none.
      size: the width and height in inches. Default: according to the number of rows.

    Returns:
      The figure. Values that are not finite are left white.

    Raises:
      ValueError: if the log has no such statistic, or no steps.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from jaxq.analysis import Log
      >>> layers = np.float32([[31.0, 30.0], [31.0, 12.0]])  # Two steps of a scan over two layers.
      >>> figure = statistics_map(Log(np.array([0, 10]), {"up/lhs/sqnr_db": layers}))
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
      ['up/lhs [0]', 'up/lhs [1]']
    """
    rows = _rows(log, "statistics_map", statistic)
    figure = new(7.5, 1.3 + 0.2 * len(rows), size, title)
    axes = figure.subplots()
    data = np.array([values for _, values in rows])
    data = np.where(np.isfinite(data), data, np.nan)
    share = statistic in _SHARES
    image = axes.imshow(
        data,
        aspect="auto",
        interpolation="nearest",
        cmap="magma_r" if share else "viridis",
        vmin=0 if share else None,
        vmax=max(0.05, float(np.nanmax(data, initial=0))) if share else None,
    )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    places = np.unique(np.linspace(0, len(log.steps) - 1, min(len(log.steps), 8)).astype(int))
    axes.set_xticks(places, [str(log.steps[i]) for i in places])
    axes.set_xlabel("step")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("share" if share else "dB" if statistic.endswith("db") else statistic)
    axes.set_title(statistic)
    return figure


@picture
def statistic_by_step(
    log: Log,
    names: Sequence[str],
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws statistics over the steps of a run as lines, such as cosines, amax values or scales.

    Args:
      log: a log, from `jaxq.analysis.read_log`.
      names: full names of statistics, such as `"up/lhs/amax"`. For a product in a scan over layers,
        all layers are drawn.
      title: the title. Default: none.
      size: the width and height in inches.

    Returns:
      The figure. Its vertical axis is logarithmic if all values are positive and the largest is
      more than 100 times the smallest.

    Raises:
      ValueError: if the log lacks a name.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from jaxq.analysis import Log
      >>> log = Log(np.array([0, 10]), {"up/lhs/amax": np.float32([0.5, 80.0])})
      >>> figure = statistic_by_step(log, ["up/lhs/amax"])
      >>> figure.axes[0].get_yscale()  # 80 is more than 100 times 0.5.
      'log'
    """
    figure = new(7.0, 3.4, size, title)
    axes = frame(figure.subplots())
    lines = []
    for i, name in enumerate(names):
        for j, values in enumerate(column(log, "statistic_by_step", name).T):
            color, dash = COLORS[i % len(COLORS)], DASHES[j % len(DASHES)]
            axes.plot(log.steps, values, color=color, linestyle=dash, label=name if j == 0 else "")
            lines.append(values[np.isfinite(values)])
    data = np.concatenate(lines) if lines else np.ones(1)
    if data.size and data.min() > 0 and data.max() / data.min() > 100:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend()
    return figure


@picture
def gradient_cosines(
    log: Log,
    worst: int = 7,
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws the cosine between the quantized and the float gradient of parameters over the steps.

    Args:
      log: a log to which the result of `jaxq.analysis.gradient_errors` was appended.
      worst: the number of parameters with the lowest cosines that are named. All others are drawn
        in gray. Default: 7.
      title: the title. Default: none.
      size: the width and height in inches.

    Returns:
      The figure. Steps without gradient errors are left out.

    Raises:
      ValueError: if the log has no gradient errors.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from jaxq.analysis import Log
      >>> up, down = np.float32([0.99, 0.98]), np.float32([0.99, 0.6])
      >>> cosines = {"up/gradient/cosine": up, "down/gradient/cosine": down}
      >>> figure = gradient_cosines(Log(np.array([0, 10]), cosines))
      >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # Lowest first.
      ['down', 'up']
    """
    last = "/gradient/cosine"
    cosines = {
        name.removesuffix(last): values
        for name, values in log.values.items()
        if name.endswith(last)
    }
    if not cosines or not len(log.steps):
        raise ValueError(
            "gradient_cosines: the log has no gradient errors. Append them with "
            "StatisticsLog.append(step, seen, gradients=gradient_errors(...))."
        )
    lowest = {name: np.fmin.reduce(values, initial=1.0) for name, values in cosines.items()}
    figure = new(7.0, 3.4, size, title)
    axes = frame(figure.subplots())
    for i, name in enumerate(sorted(cosines, key=lowest.__getitem__)):
        known = np.isfinite(cosines[name])
        dash = DASHES[i // len(COLORS) % len(DASHES)]
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "linestyle": dash}
        if i >= worst:
            style = {"color": GRAY, "alpha": 0.3, "zorder": 1}
        label = name if i < worst else ""
        axes.plot(log.steps[known], cosines[name][known], marker=".", label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("cosine", color=GRAY)
    axes.set_title("quantized gradient against float gradient", color=BLUE)
    axes.legend()
    return figure


def _rows(log: Log, owner: str, statistic: str) -> list[tuple[str, np.ndarray]]:
    """Returns the names and values of a statistic, one row for each tensor and layer."""
    _check_log(owner, log)
    rows = []
    for name, values in log.values.items():
        path, _, last = name.rpartition("/")
        if last != statistic:
            continue
        columns = values.reshape(len(log.steps), -1)
        for i in range(columns.shape[1]):
            rows.append((path if values.ndim == 1 else f"{path} [{i}]", columns[:, i]))
    if not rows or not len(log.steps):
        known = sorted({name.rpartition("/")[2] for name in log.values})
        raise ValueError(f"{owner}: the log has no {statistic!r}. {suggestion(statistic, known)}")
    return rows


def _check_log(owner: str, log: Log) -> None:
    if not isinstance(log, Log):
        raise TypeError(
            f"{owner}: `log` must be a jaxq.analysis.Log, got {described(log)}. Pass the result of "
            "read_log(path)."
        )


def column(log: Log, owner: str, name: str, raw: bool = False) -> np.ndarray:
    """Returns the values of one statistic, `[steps, layers]` unless `raw`."""
    _check_log(owner, log)
    if name not in log.values:
        hint = suggestion(name, log.values, most=4)
        raise ValueError(f"{owner}: the log has no {name!r}. {hint}")
    values = log.values[name]
    return values if raw else values.reshape(len(log.steps), -1)
