"""What bits buy: signal-to-noise ratios against bits, in theory and of real recipes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxq import presets
from jaxq.analysis.distributions import Distribution, get_distribution
from jaxq.analysis.metrics import compare
from jaxq.analysis.plots.labels import annotate
from jaxq.analysis.plots.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    array,
    frame,
    listed,
    new,
    picture,
)
from jaxq.analysis.specs import Spec, meaning
from jaxq.analysis.sqnr import bounds_table, label, pareto, sqnr_table
from jaxq.chains import chain
from jaxq.recipes import Quantizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["compression", "sqnr_by_bits"]


@picture
def sqnr_by_bits(
    bits: Sequence[int] = tuple(range(2, 9)),
    distribution: "str | Distribution" = "gaussian",
    *,
    shape: tuple[int, ...] = (256, 256),
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Signal-to-noise ratio against bits: 6.02 dB for each, below what theory allows.

    From the top: Shannon's bound, the levels of Lloyd and Max, the best evenly spaced levels, and
    integers with absmax scaling, one scale a tensor, as theory has them and as measured.

    Args:
      bits: whole numbers from 2 to 8.
      distribution: a name in `jaxq.analysis.distributions.ALL` or a `Distribution`.
      shape: of the tensor that is quantized.
      title: above the picture.
      size: width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: an unknown distribution, or bits out of range.

    Example:
      >>> figure = sqnr_by_bits([4], shape=(64,))
      >>> figure.axes[0].get_ylabel()
      'SQNR, dB'
    """
    widths = sorted(listed("sqnr_by_bits", "bits", bits))
    if widths[0] < 2 or widths[-1] > 8:
        raise ValueError(f"sqnr_by_bits: `bits` must be 2 to 8, got {widths}.")
    d = get_distribution(distribution)
    bounds = bounds_table(widths, d).rows
    measured = sqnr_table([Quantizer(f"int{b}") for b in widths], d, shape=shape).rows
    figure = new(8, 5.4, size, title)
    axes = frame(figure.add_subplot())
    lines = (
        ("Shannon's bound", [r.shannon_db for r in bounds], GREY, "-", ""),
        ("best levels (Lloyd and Max)", [r.lloyd_max_db for r in bounds], GREEN, "--", "s"),
        ("best evenly spaced levels", [r.uniform_db for r in bounds], PURPLE, "-.", "^"),
        ("absmax integers, theory", [r.expected_db for r in measured], BLUE, "-", ""),
        ("absmax integers, measured", [r.measured_db for r in measured], ORANGE, "", "o"),
    )
    expected, deviation = (
        np.array([getattr(r, name) for r in measured]) for name in ("expected_db", "deviation_db")
    )
    axes.fill_between(
        widths,
        expected - 2 * deviation,
        expected + 2 * deviation,
        color=BLUE,
        alpha=0.18,
        linewidth=0,
        label="spread of absmax integers: two deviations",
    )
    for name, db, colour, dash, marker in lines:
        axes.plot(widths, db, color=colour, linestyle=dash, marker=marker, label=name)
    line = [20 * np.log10(2) * b for b in widths]
    axes.plot(widths, line, ":", color="#000000", linewidth=1.2, label="6.02 dB a bit", zorder=4)
    axes.set_xticks(widths)
    axes.set_xlabel(f"bits a number ({d.name} numbers)")
    axes.set_ylabel("SQNR, dB")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(loc="upper left")
    return figure


@picture
def compression(
    x: jax.typing.ArrayLike,
    recipes: Sequence[Spec] | None = None,
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Bits against signal-to-noise ratio of recipes on a tensor, the Pareto front marked.

    On the line are the recipes that no other beats: none has fewer bits and as good a ratio.

    Args:
      x: finite float16, bfloat16 or float32.
      recipes: as the steps of `jaxq.chain`; None means every preset whose
        blocks fit x. What is left out, as it does not fit, is exact or goes beyond its range, is
        named below the picture.
      title: above the picture.
      size: width and height in inches.

    Returns:
      A figure.

    Raises:
      TypeError: another dtype.
      ValueError: no numbers, numbers that are not finite, a recipe that does not fit.

    Example:
      >>> x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
      >>> figure = compression(x, ["int8_tensor", "int4_g64", "nf4"])
      >>> figure.axes[0].get_xlabel()
      'bits a number, scales included'
    """
    data = array("compression", x)
    chosen, missing = _fitting(data.shape, recipes)
    bits, db = [], []
    for spec in chosen:
        kind = meaning(spec)
        whole = isinstance(kind, Quantizer)
        bits.append(kind.bits_per_weight(data.shape) if whole else float(kind.bits))
        db.append(float(compare(data, chain(data, [spec])[0]).sqnr_db))
    sound = [i for i, ratio in enumerate(db) if np.isfinite(ratio)]
    notes = {
        "Blocks do not fit": missing,
        "Exact": [label(spec) for spec, ratio in zip(chosen, db, strict=True) if ratio == np.inf],
        "Beyond the range": [
            label(spec) for spec, ratio in zip(chosen, db, strict=True) if ratio == -np.inf
        ],
    }
    if not sound:
        raise ValueError(f"compression: nothing to draw, as no ratio is finite: {notes}.")
    chosen, points = [chosen[i] for i in sound], np.stack([bits, db], axis=1)[sound]
    front = pareto(points[:, 0], points[:, 1])
    figure = new(*((10.5, 7) if len(chosen) > 14 else (8, 5)), size, title)
    axes = frame(figure.add_subplot())
    behind = np.setdiff1d(np.arange(len(chosen)), front)
    axes.plot(*points[front].T, color=ORANGE, drawstyle="steps-post", linewidth=1.2, zorder=2)
    axes.plot(*points[front].T, "D", color=ORANGE, label="Pareto front: none is better", zorder=3)
    axes.plot(*points[behind].T, "o", color=BLUE, label="others", zorder=3)
    axes.set_xlabel("bits a number, scales included")
    axes.set_ylabel("SQNR, dB")
    axes.margins(0.1, 0.08)
    axes.legend(loc="upper left")
    note = ". ".join(f"{why}: {', '.join(names)}" for why, names in notes.items() if names)
    if note:
        figure.supxlabel(note, fontsize=7.5, color=GREY, wrap=True)
    colours = [ORANGE if i in front else BLUE for i in range(len(chosen))]
    steps = np.repeat(points[front], 2, axis=0)[:-1]
    steps[1::2, 0] = points[front][1:, 0]
    names = [label(spec) for spec in chosen]
    annotate(axes, points, names, colours=colours, line=steps)
    return figure


def _fitting(
    shape: tuple[int, ...], recipes: Sequence[Spec] | None
) -> tuple[list[Spec], list[str]]:
    """The recipes, or all presets that fit a shape and the names of the others."""
    if recipes is not None:
        return listed("compression", "recipes", recipes), []
    fitting, missing = [], []
    for name, recipe in presets.ALL.items():
        try:
            recipe.cut(shape)
            fitting.append(name)
        except ValueError:
            missing.append(name)
    return fitting, missing
