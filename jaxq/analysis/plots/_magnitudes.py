"""Plots of the magnitudes that a training run has logged, with the ranges of formats."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxq.analysis._logs import Log
from jaxq.analysis._tallies import EXPONENTS
from jaxq.analysis.plots._look import BLUE, COLORS, DASHES, GRAY, ORANGE, frame, new, picture
from jaxq.analysis.plots._training import column
from jaxq.formats import FloatFormat, Format, get_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["exponents_by_step", "magnitudes_by_step"]


@picture
def exponents_by_step(
    log: Log,
    tensor: str,
    fmt: str | Format | None = None,
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws a tensor's exponents over the steps of a run, with the range of a format.

    The range of the tensor's recipe is drawn as in `magnitudes_by_step`.

    Args:
      log: a log with the statistic `"exponents"`.
      tensor: the tensor's name, such as `"layers/up/cotangent"`. The counts of all layers are
        added.
      fmt: a float format, or its name. Its range without a scale is drawn as lines: the largest
        value and the smallest normal and subnormal ones, unless they are more than 4 powers of two
        away from the data. Default: None.
      title: the title. Default: none.
      size: the width and height in inches.

    Returns:
      The figure.

    Raises:
      ValueError: if the log lacks the exponents of the tensor, or the format is not a float format.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from jaxq.analysis import Log
      >>> counts = np.zeros((2, 255), np.float32)  # Two steps; the exponents -127 to 127.
      >>> counts[:, 127 - 12], counts[:, 127] = 1, 5
      >>> log = Log(np.array([0, 10]), {"up/lhs/exponents": counts})
      >>> figure = exponents_by_step(log, "up/lhs", "float8_e5m2")
      >>> [text.get_text() for text in figure.axes[0].texts]  # The ends near 2^-12.
      ['float8_e5m2 normal', 'float8_e5m2 subnormal']
    """
    counts = column(log, "exponents_by_step", f"{tensor}/exponents", raw=True)
    counts = counts.reshape(len(log.steps), -1, len(EXPONENTS)).sum(1)
    used = np.flatnonzero(counts.sum(0))
    first, last = (used[0], used[-1]) if used.size else (0, 1)
    figure = new(7.0, 3.6, size, title)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    low, high = EXPONENTS[first], EXPONENTS[last] + 1
    axes.imshow(
        shares[:, first : last + 1].T,
        aspect="auto",
        origin="lower",
        cmap="Blues",
        extent=(0, len(log.steps), low, high),
        interpolation="nearest",
    )
    if fmt is not None:
        ends = _range("exponents_by_step", fmt)
        _draw_range(
            axes, {name: float(np.log2(end)) for name, end in ends.items()}, (low - 4, high + 4)
        )
    for line in _recipe_range(log, tensor):
        heights = np.ma.log2(line.values)
        axes.plot(np.arange(len(log.steps)) + 0.5, heights, ":", color=ORANGE, label=line.label)
        axes.legend()
    places = np.unique(np.linspace(0, len(log.steps) - 1, min(len(log.steps), 8)).astype(int))
    axes.set_xticks(places + 0.5, [str(log.steps[i]) for i in places])
    axes.set_xlabel("step")
    axes.set_ylabel("exponent, log2 |x|", color=GRAY)
    axes.set_title(tensor, color=BLUE)
    return figure


@picture
def magnitudes_by_step(
    log: Log,
    tensor: str = "lhs",
    fmt: str | Format | None = None,
    *,
    scales: bool = False,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws the amax of a tensor, or of its scales, over the steps, with a line per product.

    If the log has the smallest nonzero magnitude, a band extends from the line down to it. For a
    product in a scan over layers, the largest and smallest values over all layers are drawn. A
    dotted line shows the smallest value that the tensor's recipe can represent with the scale of
    the step; values below half of it become zero. If the log has the statistics of scales, a second
    dotted line shows the largest value. Otherwise the scale is assumed to map the amax to the
    largest value, as scales that are computed from the whole tensor do.

    Args:
      log: a log with the statistic `"amax"`, or `"scale_amax"`.
      tensor: the tensor's name after that of the product, such as `"lhs"`, or `"dlhs/cotangent"`
        for scales. Default: `"lhs"`.
      fmt: a float format, or its name, such as that of the scales. Its range is drawn as lines: the
        largest value and the smallest normal and subnormal ones, unless they are more than 12
        powers of two away from the data. Default: None.
      scales: True to draw the scales of the tensor instead of its elements. Default: False.
      title: the title. Default: none.
      size: the width and height in inches.

    Returns:
      The figure, with a logarithmic vertical axis. Steps with an amax of 0 or NaN are left out.

    Raises:
      ValueError: if the log lacks the statistic of the tensor, or the format is not a float format.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import numpy as np
      >>> from jaxq.analysis import Log, LoggedRecipe
      >>> recipe = LoggedRecipe(name="int8_tensor", largest=127.0, smallest=1.0)
      >>> values = {"up/lhs/amax": np.float32([1.0, 127.0])}
      >>> figure = magnitudes_by_step(Log(np.array([0, 10]), values, {"up/lhs": recipe}))
      >>> amax, smallest = figure.axes[0].lines
      >>> smallest.get_label(), float(smallest.get_ydata()[1])
      ('smallest of int8_tensor', 1.0)
    """
    names = ("scale_amax", "scale_smallest") if scales else ("amax", "smallest")
    names_by_product = {
        name.removesuffix(f"/{tensor}/{names[0]}"): name
        for name in log.values
        if name.endswith(f"/{tensor}/{names[0]}")
    }
    if not names_by_product or not len(log.steps):
        last = f"/{names[0]}"
        known = [name.removesuffix(last) for name in log.values if name.endswith(last)]
        tensors = list(dict.fromkeys(name.rpartition("/")[2] for name in known))
        remedy = f"Record it with Monitoring(statistics=[{names[0]!r}, ...])."
        if tensors:
            remedy = f"Pass one of {', '.join(map(repr, tensors[:4]))} as `tensor`."
        raise ValueError(f"magnitudes_by_step: the log has no {names[0]!r} of {tensor!r}. {remedy}")
    ends = None if fmt is None else _range("magnitudes_by_step", fmt)
    figure = new(7.0, 3.6, size, title)
    axes = frame(figure.subplots())
    data = []
    for i, (product, name) in enumerate(names_by_product.items()):
        color, dash = COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
        top = _positive(column(log, "magnitudes_by_step", name)).max(1)
        axes.plot(log.steps, top, color=color, linestyle=dash, label=product or "product")
        data.append(top.compressed())
        low = f"{name.removesuffix(names[0])}{names[1]}"
        if low in log.values:
            least = _positive(column(log, "magnitudes_by_step", low)).min(1)
            axes.fill_between(log.steps, least, top, color=color, alpha=0.12, linewidth=0)
            data.append(least.compressed())
        for line in () if scales else _recipe_range(log, f"{product}/{tensor}"):
            labels = {old.get_label() for old in axes.lines}
            label = "" if line.label in labels else line.label
            axes.plot(log.steps, line.values, ":", color=color, linewidth=1, label=label)
    axes.set_yscale("log", base=2)
    values = np.concatenate(data)
    if ends is not None and values.size:
        span = values.min() / np.float64(2**12), values.max() * np.float64(2**12)
        _draw_range(axes, ends, span, at=float(log.steps[0]))
    axes.set_xlabel("step")
    axes.set_ylabel("scale" if scales else "magnitude", color=GRAY)
    axes.set_title(f"{'scales' if scales else 'magnitudes'} of {tensor}", color=BLUE)
    axes.legend()
    return figure


def _range(owner: str, fmt: str | Format) -> dict[str, float]:
    """Returns the ends of a float format's range by their labels."""
    fmt = get_format(fmt)
    if not isinstance(fmt, FloatFormat):
        raise ValueError(
            f"{owner}: `fmt` must be a float format, got {fmt.name}. Use, for example, "
            "'float8_e5m2'."
        )
    ends = {"max": fmt.max, "normal": fmt.smallest_normal, "subnormal": fmt.min_positive}
    return {f"{fmt.name} {label}": float(end) for label, end in ends.items()}


class _Line(NamedTuple):
    """A line over the steps of a run, of positive values."""

    label: str
    values: "np.ma.MaskedArray"


def _recipe_range(log: Log, tensor: str) -> list[_Line]:
    """Returns the ends of the range of a tensor's recipe over the steps, if the log has it."""
    product, _, last = tensor.rpartition("/")
    names = (tensor, f"{product}/dlhs/{last}", f"{product}/drhs/{last}")
    name = next((name for name in names if name in log.recipes), None)
    if name is None:
        return []
    recipe = log.recipes[name]

    def line(end: str, column: str, factor: float) -> _Line:
        values = _positive(log.values[column].reshape(len(log.steps), -1) * np.float64(factor))
        return _Line(
            f"{end} of {recipe.name}", values.min(1) if end == "smallest" else values.max(1)
        )

    if f"{name}/scale_amax" in log.values and f"{name}/scale_smallest" in log.values:
        low = line("smallest", f"{name}/scale_smallest", recipe.smallest)
        return [low, line("largest", f"{name}/scale_amax", recipe.largest)]
    if f"{tensor}/amax" in log.values:
        return [line("smallest", f"{tensor}/amax", recipe.smallest / recipe.largest)]
    return []


def _draw_range(
    axes: "Axes", ends: dict[str, float], span: tuple[float, float], *, at: float = 0.2
) -> None:
    """Draws the ends within a span as horizontal lines; their labels begin at the abscissa `at`."""
    for label, height in ends.items():
        if span[0] <= height <= span[1]:
            axes.axhline(height, color=ORANGE, linewidth=1)
            axes.annotate(label, (at, height), color=ORANGE, va="bottom", fontsize=8)


def _positive(values: np.ndarray) -> "np.ma.MaskedArray":
    """Masks values that a logarithmic axis cannot show: NaN, infinities, 0 and negative values."""
    return np.ma.masked_invalid(np.where(values > 0, values, np.nan))
