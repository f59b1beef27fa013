"""The shared style of all plots: the palette, the frame, and the import of matplotlib.

The colors are those of Okabe and Ito, which are distinguishable with red-green color blindness; a
line style or a marker always repeats the distinction. A plot is a `Figure` made without pyplot: no
window, no backend, nothing to close.
"""

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import jax
import numpy as np

from jaxq._base.arguments import items_of, numbers_of
from jaxq.numerics import floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "COLORS",
    "DASHES",
    "GRAY",
    "GREEN",
    "LIGHT",
    "MARKERS",
    "MINUS",
    "ORANGE",
    "PURPLE",
    "SKY",
    "YELLOW",
    "array",
    "as_list",
    "blank",
    "frame",
    "image",
    "new",
    "picture",
    "power",
    "spaced_indices",
]

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW, GRAY, LIGHT = "#56B4E9", "#E69F00", "#666666", "#E4E4E4"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, "#000000")
MINUS = "\N{MINUS SIGN}"
MARKERS = ("o", "D", "s", "^", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))

_LARGEST_SVG = 400_000  # Characters; plots with more marks are shown as PNG.

_STYLE: Any = {
    "axes.edgecolor": GRAY,
    "axes.facecolor": "white",
    "axes.labelcolor": "#333333",
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titlepad": 8,
    "axes.unicode_minus": True,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "hatch.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "mathtext.fontset": "dejavusans",
    "text.color": "#222222",
    "text.usetex": False,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}

_P = ParamSpec("_P")


def picture(draw: "Callable[_P, Figure]") -> "Callable[_P, Figure]":
    """Decorates a plot function to use this style without changing the caller's matplotlib style.

    Raises:
      ImportError: when the function is called, if matplotlib is not installed.
    """

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> "Figure":
        try:
            import matplotlib as mpl
        except ImportError as error:
            raise ImportError(
                f"jaxq.analysis.plots.{draw.__name__} needs matplotlib: pip install matplotlib."
            ) from error
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


@functools.cache
def _figure_type() -> "type[Figure]":
    """Returns a `Figure` type that notebooks display, as they do only for pyplot's own figures."""
    from matplotlib.figure import Figure as Base

    class Figure(Base):
        def _repr_png_(self) -> bytes:
            return image(self, "png")

        def _repr_svg_(self) -> str | None:
            text = image(self, "svg").decode()
            return text if len(text) < _LARGEST_SVG else None

    return Figure


def image(figure: "Figure", kind: Literal["pdf", "png", "svg"]) -> bytes:
    """Returns a figure as the bytes of a file, which are the same every time."""
    import matplotlib as mpl

    dates = {"pdf": "CreationDate", "svg": "Date"}
    metadata = {dates[kind]: None} if kind in dates else None
    data = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "jaxq"}):  # The names in an SVG are random by default.
        figure.savefig(data, format=kind, dpi=150, metadata=metadata)
    return data.getvalue()


def new(
    width: float, height: float, size: tuple[float, float] | None, title: str | None
) -> "Figure":
    """Returns an empty figure of the given size in inches; `size` replaces width and height."""
    if size is not None:
        requirement, remedy = "two positive numbers of inches", "Use, for example, (8, 5)."
        numbers_of("plots", "size", size, requirement, lambda v: 0 < v <= 1000, remedy)
        if len(size) != 2:
            raise ValueError(f"plots: `size` must be {requirement}, got {len(size)}. {remedy}")
    figure = _figure_type()(figsize=size or (width, height), dpi=100, layout="constrained")
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def frame(axes: "Axes", *, grid: Literal["both", "x", "y"] = "both") -> "Axes":
    """Styles axes with two spines and a faint grid, and returns them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, axis=grid, color=LIGHT, linewidth=0.8)
    axes.tick_params(color=GRAY, labelcolor="#333333", labelsize=8.5, width=0.8, length=3)
    axes.tick_params(which="minor", color=GRAY, width=0.5, length=2)
    return axes


def blank(axes: "Axes") -> "Axes":
    """Hides the spines and ticks of axes, and returns them."""
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelcolor="#333333", labelsize=9)
    return axes


def power(value: float) -> str:
    """Formats a number as a short decimal, a power of two or a power of ten."""
    mantissa, exponent = np.frexp(abs(value))
    if value and mantissa == 0.5 and not -4 <= exponent - 1 <= 12:
        return f"{MINUS if value < 0 else ''}$2^{{{int(exponent) - 1}}}$"
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, exp10 = f"{value:.2e}".split("e")
        digits = digits.rstrip("0").rstrip(".").replace("-", MINUS)
        return f"${digits} \\cdot 10^{{{int(exp10)}}}$"
    return f"{value:.6g}".replace("-", MINUS)


def as_list(name: str, argument: str, items: "Iterable", least: int = 1) -> list:
    """Converts an iterable to a list; rejects strings and single items.

    Raises:
      ValueError: if there are fewer than `least` items.
      TypeError: if `items` is a string or not iterable.
    """
    result = items_of(name, argument, items)
    if len(result) < least:
        raise ValueError(
            f"{name}: `{argument}` must hold at least {least}, got {len(result)}. Add items."
        )
    return result


def array(name: str, x: jax.typing.ArrayLike, *, ndim: int = 0) -> np.ndarray:
    """Checks data to be drawn and converts it to float32.

    Raises:
      TypeError: if the dtype is not float16, bfloat16 or float32.
      ValueError: if the tensor is empty, has too few axes or is not finite.
    """
    y = floats(name, x, float64=False)
    if not y.size:
        raise ValueError(
            f"{name}: `x` must have one element or more, got the shape {y.shape}. Pass a tensor "
            "that is not empty."
        )
    if y.ndim < ndim:
        raise ValueError(
            f"{name}: `x` must have {ndim} or more axes, got the shape {y.shape}. "
            "Reshape it, or stack several vectors."
        )
    data = np.asarray(y).astype(np.float32)
    if not np.isfinite(data).all():
        raise ValueError(
            f"{name}: `x` must be finite, got {int((~np.isfinite(data)).sum())} NaN or infinite "
            "numbers. Remove them first."
        )
    return data


def spaced_indices(count: int, most: int) -> Sequence[int]:
    """Returns at most `most` evenly spaced indices of `count` items."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
