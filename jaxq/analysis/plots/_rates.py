"""Plots of signal-to-noise ratios against bits, in theory and for real recipes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxq.analysis._arguments import FormatOrRecipe, format_or_recipe
from jaxq.analysis._chains import chain
from jaxq.analysis._metrics import compare
from jaxq.analysis._sqnr import bounds_table, label, pareto, sqnr_table
from jaxq.analysis.distributions import Distribution, get_distribution
from jaxq.analysis.plots._labels import annotate
from jaxq.analysis.plots._look import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    array,
    as_list,
    frame,
    new,
    picture,
)
from jaxq.formats import Format
from jaxq.recipes import RECIPES, Recipe

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
    """Plots the SQNR against bits, with a line of 6.02 dB per bit and theoretical bounds.

    From top to bottom, the lines are Shannon's bound, the levels of Lloyd and Max, the best evenly
    spaced levels, and integers with one absmax scale per tensor, expected and measured.

    Args:
      bits: the bit widths, integers from 2 to 8.
      distribution: a name in `jaxq.analysis.distributions.DISTRIBUTIONS` or a `Distribution`.
      shape: the shape of the tensor that is quantized.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: if the distribution is unknown or `bits` are out of range.

    Example:
      >>> figure = sqnr_by_bits([4], shape=(64,))
      >>> figure.axes[0].get_ylabel()
      'SQNR, dB'
    """
    widths = sorted(as_list("sqnr_by_bits", "bits", bits))
    if widths[0] < 2 or widths[-1] > 8:
        raise ValueError(
            f"sqnr_by_bits: `bits` must be from 2 to 8, got {widths}. Use range(2, 9)."
        )
    d = get_distribution(distribution)
    bounds = bounds_table(widths, d).rows
    measured = sqnr_table([Recipe(f"int{b}") for b in widths], d, shape=shape).rows
    figure = new(8, 5.4, size, title)
    axes = frame(figure.add_subplot())
    lines = (
        ("Shannon's bound", [r.shannon_db for r in bounds], GRAY, "-", ""),
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
    for name, db, color, dash, marker in lines:
        axes.plot(widths, db, color=color, linestyle=dash, marker=marker, label=name)
    line = [20 * np.log10(2) * b for b in widths]
    axes.plot(widths, line, ":", color="#000000", linewidth=1.2, label="6.02 dB per bit", zorder=4)
    axes.set_xticks(widths)
    axes.set_xlabel(f"bits per number ({d.name} numbers)")
    axes.set_ylabel("SQNR, dB")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(loc="upper left")
    return figure


@picture
def compression(
    x: jax.typing.ArrayLike,
    recipes: Sequence[FormatOrRecipe] | None = None,
    *,
    axis: int | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Plots the SQNR of recipes on a tensor against bits, with the Pareto front marked.

    The line connects the recipes on the Pareto front: recipes with fewer bits have a lower SQNR.

    Args:
      x: a finite float16, bfloat16 or float32 tensor.
      recipes: recipes or formats, as the steps of `jaxq.analysis.chain`. Default: None, every
        recipe of the registry whose blocks fit x. Recipes that do not fit, are exact or overflow
        are not drawn, but named below the plot.
      axis: the contracted axis of x, as in `jaxq.fake_quant`. Default: None, blocks lie along the
        last axis and channels along the axes that the recipe names.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      TypeError: if x has another dtype.
      ValueError: if x is empty or not finite, a recipe does not fit, or no ratio is finite.

    Example:
      >>> import numpy as np
      >>> x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
      >>> figure = compression(x, ["int8_tensor", "int4_g64", "nf4_g64"])
      >>> figure.axes[0].get_xlabel()
      'bits per number, scales included'
    """
    data = array("compression", x)
    chosen, missing = _fitting(data.shape, recipes, axis)
    bits, db = [], []
    for spec in chosen:
        target = _along(format_or_recipe(spec), axis, data.ndim)
        is_recipe = isinstance(target, Recipe)
        bits.append(target.bits_per_weight(data.shape) if is_recipe else float(target.bits))
        db.append(float(compare(data, chain(data, [target])[0]).sqnr_db))
    sound = [i for i, ratio in enumerate(db) if np.isfinite(ratio)]
    notes = {
        "Blocks do not fit": missing,
        "Exact": [label(spec) for spec, ratio in zip(chosen, db, strict=True) if ratio == np.inf],
        "Beyond the range": [
            label(spec) for spec, ratio in zip(chosen, db, strict=True) if ratio == -np.inf
        ],
    }
    if not sound:
        raise ValueError(f"compression: nothing to draw, as no SQNR is finite: {notes}.")
    chosen, points = [chosen[i] for i in sound], np.stack([bits, db], axis=1)[sound]
    front = pareto(points[:, 0], points[:, 1])
    figure = new(*((10.5, 7) if len(chosen) > 14 else (8, 5)), size, title)
    axes = frame(figure.add_subplot())
    behind = np.setdiff1d(np.arange(len(chosen)), front)
    axes.plot(*points[front].T, color=ORANGE, drawstyle="steps-post", linewidth=1.2, zorder=2)
    axes.plot(*points[front].T, "D", color=ORANGE, label="Pareto front: none is better", zorder=3)
    axes.plot(*points[behind].T, "o", color=BLUE, label="others", zorder=3)
    axes.set_xlabel("bits per number, scales included")
    axes.set_ylabel("SQNR, dB")
    axes.margins(0.1, 0.08)
    axes.legend(loc="upper left")
    note = ". ".join(f"{why}: {', '.join(names)}" for why, names in notes.items() if names)
    if note:
        figure.supxlabel(note, fontsize=7.5, color=GRAY, wrap=True)
    colors = [ORANGE if i in front else BLUE for i in range(len(chosen))]
    steps = np.repeat(points[front], 2, axis=0)[:-1]
    steps[1::2, 0] = points[front][1:, 0]
    names = [label(spec) for spec in chosen]
    annotate(axes, points, names, colors=colors, line=steps)
    return figure


def _along(recipe: Format | Recipe, axis: int | None, ndim: int) -> Format | Recipe:
    """Returns a recipe relative to a contracted axis; formats and None are returned unchanged."""
    return recipe if axis is None or not isinstance(recipe, Recipe) else recipe.along(axis, ndim)


def _fitting(
    shape: tuple[int, ...], recipes: Sequence[FormatOrRecipe] | None, axis: int | None
) -> tuple[list[FormatOrRecipe], list[str]]:
    """Returns the recipes to draw, and the names of those in the registry that do not fit."""
    if recipes is not None:
        return as_list("compression", "recipes", recipes), []
    fitting, missing = [], []
    for name, recipe in RECIPES.items():
        try:
            (recipe if axis is None else recipe.along(axis, len(shape))).cut(shape)
            fitting.append(name)
        except ValueError:
            missing.append(name)
    return fitting, missing
