"""The results of `real_models.py`: rows, paired comparisons, the table and the picture."""

import dataclasses
import itertools
from collections.abc import Sequence

import common
import numpy as np
from common import BLUE, GRAY, GREEN, ORANGE, PURPLE, plt

__all__ = ["Row", "cells", "compared", "interval", "picture", "table"]

COLORS = {
    "nearest": ORANGE,
    "nearest, with inputs": GRAY,
    "search": PURPLE,
    "GPTQ": BLUE,
    "search + GPTQ": GREEN,
    "budget": "black",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one recipe and method.

    Attributes:
      model: the model.
      measure: the name of its quality.
      recipe: the recipe, or "float32".
      method: the method.
      nbytes: the bytes of the quantized weights.
      bits: the storage bits per quantized weight.
      seconds: the time of quantization.
      quality: the quality of each document.
      weight: the weight of each document.
      error: the divergence from the float model of each document.
    """

    model: str
    measure: str
    recipe: str
    method: str
    nbytes: int
    bits: float
    seconds: float
    quality: list[float]
    weight: list[float]
    error: list[float]


def interval(values: Sequence[float], weight: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of a weighted mean, from a bootstrap over documents."""
    draws = np.random.default_rng(0).integers(0, len(values), (4000, len(values)))
    x, w = np.asarray(values), np.asarray(weight)
    means = (x[draws] * w[draws]).sum(1) / w[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mean(values: Sequence[float], weight: Sequence[float]) -> float:
    """Returns a weighted mean."""
    return float(np.average(values, weights=weight))


def compared(scores: Sequence[float], other: Sequence[float], weight: Sequence[float]) -> str:
    """Returns "better" if a mean error is below another one, "worse", or "=" within the noise."""
    low, high = interval(np.subtract(scores, other).tolist(), weight)
    return "worse" if low > 0 else "better" if high < 0 else "="


HEADS = ("model", "recipe", "method", "bits", "MB", "quality", "float", "KL", "nearest", "seconds")


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Returns the cells of the table for the rows of one model.

    The column "float" compares the quality with that of the float model, and "nearest" the error
    with that of the nearest levels of the same recipe.
    """
    base = next(r for r in rows if r.recipe == "float32")
    nearest = {r.recipe: r for r in rows if r.method == "nearest"}
    grid = []
    for r in rows:
        quality = mean(r.quality, r.weight)
        quality = np.exp(quality) if r.measure == "perplexity" else quality
        first = [r.model, r.recipe, r.method, f"{r.bits:.2f}", "", f"{r.measure} {quality:.4f}"]
        if r is base:
            grid.append([*first, "", "", "", ""])
            continue
        is_loss = r.measure != "cosine"  # Cosines already compare with the float model.
        low, high = interval(r.error, r.weight)
        plain = nearest.get(r.recipe, r)
        is_solved = plain is not r and "inputs" not in r.method
        grid.append(
            [
                *first,
                compared(r.quality, base.quality, r.weight) if is_loss else "",
                f"{mean(r.error, r.weight):.5f} [{low:.5f}, {high:.5f}]",
                compared(r.error, plain.error, r.weight) if is_solved else "",
                f"{r.seconds:.0f}",
            ]
        )
        grid[-1][4] = f"{r.nbytes / 1e6:.1f}"
    return grid


def table(rows: Sequence[Row]) -> common.Table:
    """Returns the table of results; "=" marks differences within the noise."""
    grid = common.Table(title="Quantized layers of real models")
    for head in HEADS:
        grid.add_column(head, justify="left" if head in HEADS[:3] else "right")
    for name in dict.fromkeys(r.model for r in rows):
        for line in cells([r for r in rows if r.model == name]):
            grid.add_row(*line)
        grid.add_section()
    return grid


def spread(values: np.ndarray, gap: float) -> np.ndarray:
    """Returns values moved upward so that all differ by a gap at least."""
    order, moved = np.argsort(values), np.array(values, float)
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved


def picture(rows: Sequence[Row]) -> common.Figure:
    """Draws the error against bits per weight, one panel per model."""
    names = list(dict.fromkeys(r.model for r in rows))
    columns = min(len(names), 2)
    lines = -(-len(names) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(4.5 * columns, 3.8 * lines), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    for name, axes in zip(names, panels.flat, strict=False):
        drawn = [r for r in rows if r.model == name and r.method in COLORS]
        for method, color in COLORS.items():
            points = sorted((r for r in drawn if r.method == method), key=lambda r: r.bits)
            if not points:
                continue
            errors = [mean(r.error, r.weight) for r in points]
            ends = np.transpose([interval(r.error, r.weight) for r in points])
            bars = np.abs(ends - errors)
            # Beside each other, although the methods have the same bits.
            bits = [r.bits * (1 + 0.015 * list(COLORS).index(method)) for r in points]
            axes.errorbar(
                bits, errors, bars, fmt="o", color=color, markersize=4, elinewidth=1, label=method
            )
        named = [r for r in drawn if r.method == "nearest" and r.recipe != "int4_g32"]
        errors = [mean(r.error, r.weight) for r in named]
        decades = np.ptp(np.log10([mean(r.error, r.weight) for r in drawn]))
        heights = 10 ** spread(np.log10(errors), 0.055 * decades)  # So that no names overlap.
        for r, error, height in zip(named, errors, heights, strict=True):
            axes.annotate(  # The names of 4-bit recipes are in one column.
                r.recipe,
                (r.bits, error),
                (0.94 * min(r.bits, 4.2 if r.bits < 5 else 8), height),
                arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkA": 0},
                fontsize=7,
                ha="right",
                va="center",
                color=GRAY,
            )
        for r in drawn:
            if r.method == "nearest" and r.recipe == "int4_g32":  # At the left are other names.
                at = (r.bits, mean(r.error, r.weight))
                style = {"fontsize": 7, "va": "center", "color": GRAY}
                axes.annotate(r.recipe, at, (4, 0), textcoords="offset points", **style)
        axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.set_xlim(2.2, 10)  # With room for names.
        axes.set_xticks([3, 4, 5, 6, 8], ["3", "4", "5", "6", "8"])
        axes.set_xlabel("bits per weight, including scales")
        is_cosine = any(r.measure == "cosine" for r in drawn)
        axes.set_ylabel("1 − cosine" if is_cosine else "KL from the float model (nats)")
        axes.set_title(name, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    handles, labels = panels[0][0].get_legend_handles_labels()
    place = panels.flat[-1] if panels.size > len(names) else panels[0][0]
    place.legend(handles, labels, frameon=False, fontsize=8, loc="upper right")
    return figure
