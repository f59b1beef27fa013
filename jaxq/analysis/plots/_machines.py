"""Plots of the memory use of models, and of the accelerators that hold them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxq.analysis._arguments import FormatOrRecipe
from jaxq.analysis._memory import fits_table, memory_table
from jaxq.analysis.machines import DEVICES, MODELS, Device, Model, named
from jaxq.analysis.plots._labels import heads
from jaxq.analysis.plots._look import (
    BLUE,
    COLORS,
    DASHES,
    GRAY,
    GREEN,
    LIGHT,
    MARKERS,
    ORANGE,
    SKY,
    as_list,
    frame,
    new,
    picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["fits", "memory", "memory_by_size"]

_RECIPES = ("float32", "bfloat16", "int8_channel", "int4_g128")
_DEVICES = ("rtx-4090", "rtx-5090", "l40s", "h100", "h200", "mi300x")


@picture
def memory(
    models: "Sequence[str | Model | float]" = ("llama-3.1-8b", "llama-3.1-70b"),
    recipes: Sequence[FormatOrRecipe] = _RECIPES,
    devices: "Sequence[str | Device]" = _DEVICES,
    *,
    context: int = 8192,
    batch: int = 1,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws the memory of models in several formats: weights, key-value cache and overhead.

    Dashed lines mark the memory of accelerators: a model fits if its bar ends to the left.

    Args:
      models: models, as in `jaxq.analysis.memory`; each has its own axes.
      recipes: recipes, as in `jaxq.analysis.memory`.
      devices: names in `jaxq.analysis.machines.DEVICES`, or `Device`s.
      context: the number of cached tokens per sequence.
      batch: the number of sequences.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: if a name is unknown or a list of names is empty.

    Example:
      >>> figure = memory(["llama-3.1-8b"], ["bfloat16", "int4_g128"], ["rtx-4090"])
      >>> figure.axes[0].get_xlabel()
      'GiB'
    """
    chosen, specs = as_list("memory", "models", models), as_list("memory", "recipes", recipes)
    limits = _limits(as_list("memory", "devices", devices, least=0))
    columns = min(len(chosen), 2)
    rows = -(-len(chosen) // columns)
    height = rows * (0.33 * len(specs) + 1.9)
    figure = new(6.2 * columns if columns > 1 else 8, height, size, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    parts = (
        ("weights_gib", "weights", BLUE, ""),
        ("kv_gib", f"cache of {context * batch:,} tokens", ORANGE, "///"),
        ("overhead_gib", "overhead", LIGHT, "..."),
    )
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for axes, model in zip(grid.flat, chosen, strict=False):
        frame(axes, grid="x")
        table = memory_table(model, specs, context=context, batch=batch).rows
        places, left = np.arange(len(table)), np.zeros(len(table))
        for field, name, color, hatch in parts:
            width = np.array([getattr(row, field) for row in table])
            axes.barh(
                places, width, 0.66, left, color=color, hatch=hatch, edgecolor="white", label=name
            )
            left += width
        reach = float(left.max()) * 1.13
        for place, total in zip(places, left, strict=True):
            axes.text(
                total + 0.01 * reach, place, f"{total:.3g}", va="center", fontsize=8, bbox=clear
            )
        axes.set_yticks(places, [row.recipe for row in table])
        axes.invert_yaxis()
        axes.set_xlim(0, reach)
        axes.set_xlabel("GiB")
        axes.tick_params(axis="y", length=0)
        _draw_limits(axes, limits, reach)
        axes.set_ylabel(table[0].model, fontweight="bold")
    for axes in grid.flat[len(chosen) :]:
        axes.remove()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _limits(devices: "Sequence[str | Device]") -> dict[float, str]:
    """Returns each memory size in GiB with the names of the devices of that size."""
    names_by_size: dict[float, list[str]] = {}
    for spec in devices:
        device = named("device", spec, DEVICES)
        names_by_size.setdefault(device.gib, []).append(device.name)
    return {gib: ", ".join(names) for gib, names in sorted(names_by_size.items())}


def _draw_limits(axes: "Axes", limits: dict[float, str], reach: float) -> None:
    """Draws a line and a name for each device whose memory is within the axes."""
    within = {gib: name for gib, name in limits.items() if gib <= reach}
    for gib in within:
        axes.axvline(gib, color=GREEN, linewidth=1.1, linestyle="--", zorder=0.5)
    heads(axes, list(within), list(within.values()), color=GREEN)


@picture
def memory_by_size(
    recipes: Sequence[FormatOrRecipe] = _RECIPES,
    models: "Sequence[str | Model]" = tuple(MODELS),
    devices: "Sequence[str | Device]" = _DEVICES,
    *,
    context: int = 8192,
    batch: int = 1,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Plots memory against the number of parameters: a line per format, and the limits of devices.

    Args:
      recipes: recipes, as in `jaxq.analysis.memory`.
      models: models, as in `jaxq.analysis.memory`. Points include the cache; lines show weights and
        overhead only.
      devices: names in `jaxq.analysis.machines.DEVICES`, or `Device`s.
      context: the number of cached tokens per sequence.
      batch: the number of sequences.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: if a name is unknown or a list of names is empty.

    Example:
      >>> figure = memory_by_size(["bfloat16"], ["llama-3.1-8b"], ["h100"])
      >>> figure.axes[0].get_ylabel()
      'memory, GiB'
    """
    specs = as_list("memory_by_size", "recipes", recipes)
    chosen = as_list("memory_by_size", "models", models)
    limits = _limits(as_list("memory_by_size", "devices", devices, least=0))
    tables = [memory_table(m, specs, context=context, batch=batch).rows for m in chosen]
    records = [named("model", m, MODELS) for m in chosen]
    counts = np.array([m.parameters for m in records], float)
    ends = np.geomspace(counts.min() / 1.6, counts.max() * 1.6, 2)
    figure = new(9.5, 6, size, title)
    axes = frame(figure.add_subplot())
    for i, spec in enumerate(specs):
        color = COLORS[i % len(COLORS)]
        line = [memory_table(params=float(n), recipes=[spec]).rows[0] for n in ends]
        axes.plot(ends, [r.total_gib for r in line], color=color, linestyle=DASHES[i % len(DASHES)])
        axes.plot(
            counts,
            [table[i].total_gib for table in tables],
            MARKERS[i % len(MARKERS)],
            color=color,
            label=line[0].recipe,
        )
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xlim(*ends)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("parameters")
    axes.set_ylabel("memory, GiB")
    for gib, name in limits.items():
        axes.axhline(gib, color=GRAY, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.text(1.01, gib, name, transform=axes.get_yaxis_transform(), fontsize=8, va="center")
    for count in counts:
        axes.axvline(count, color=SKY, linewidth=0.7, zorder=0)
    axes.legend(loc="lower right")
    order = np.argsort(counts, kind="stable")
    heads(axes, counts[order].tolist(), [records[i].name for i in order], color=BLUE)
    return figure


@picture
def fits(
    models: "Sequence[str | Model | float]" = tuple(MODELS),
    recipes: Sequence[FormatOrRecipe] = ("bfloat16", "int8_channel", "int4_g128"),
    devices: "Sequence[str | Device]" = tuple(DEVICES),
    *,
    context: int = 8192,
    batch: int = 1,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws a table of the models that fit on each accelerator in several formats.

    A cell shows the percentage of one device's memory that is used, or the number of devices that
    are needed.

    Args:
      models: models, as in `jaxq.analysis.memory`.
      recipes: recipes, as in `jaxq.analysis.memory`.
      devices: names in `jaxq.analysis.machines.DEVICES`, or `Device`s.
      context: the number of cached tokens per sequence.
      batch: the number of sequences.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: if a name is unknown or a list of names is empty.

    Example:
      >>> figure = fits(["llama-3.1-8b"], ["bfloat16", "int4_g128"], ["rtx-4090"])
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['73 %', '29 %']
    """
    from matplotlib.patches import Patch, Rectangle

    arguments = zip(("models", "recipes", "devices"), (models, recipes, devices), strict=True)
    chosen, specs, places = (as_list("fits", name, items) for name, items in arguments)
    table = fits_table(chosen, specs, places, context=context, batch=batch).rows
    columns, rows = len(places), len(chosen) * len(specs)
    figure = new(max(6.0, 3.2 + 0.72 * columns), 1.6 + 0.27 * rows, size, title)
    axes = blank_table(figure)
    for i, cell in enumerate(table):
        row, column = divmod(i, columns)
        color, alpha = (BLUE, 0.12 + 0.4 * cell.share) if cell.fits else (ORANGE, 0.0)
        if not cell.fits and cell.devices <= 8:
            alpha = 0.16
        box = Rectangle((column, row), 0.96, 0.92, facecolor=color, alpha=alpha, linewidth=0)
        axes.add_patch(box)
        text = (
            f"{100 * cell.share:.0f} %" if cell.fits else f"{cell.devices} \N{MULTIPLICATION SIGN}"
        )
        gray = not cell.fits and cell.devices > 8
        axes.text(
            column + 0.48,
            row + 0.47,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color=GRAY if gray else "#222222",
        )
    for i in range(1, len(chosen)):
        axes.axhline(i * len(specs) - 0.04, color=GRAY, linewidth=0.7)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    names = [cell.recipe for cell in table[::columns]]
    axes.set_yticks(np.arange(rows) + 0.47, names)
    axes.set_xticks(np.arange(columns) + 0.48, [c.device for c in table[:columns]], rotation=40)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("left")
        label.set_rotation_mode("anchor")
    beside = axes.secondary_yaxis("left")
    # The offset to the left of the recipes' names, in points.
    beside.spines["left"].set_position(("outward", 8 + 5.2 * max(map(len, names))))
    middles = (np.arange(len(chosen)) + 0.5) * len(specs)
    beside.set_yticks(middles, [table[i * columns * len(specs)].model for i in range(len(chosen))])
    beside.spines[:].set_visible(False)
    beside.tick_params(length=0, labelsize=9)
    handles = [
        Patch(facecolor=BLUE, alpha=0.4, label="fits; share of the memory"),
        Patch(facecolor=ORANGE, alpha=0.16, label="needs 2 to 8 devices"),
        Patch(facecolor="white", edgecolor=LIGHT, label="needs more"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def blank_table(figure: "Figure") -> "Axes":
    """Adds axes for a table, with its column heads above."""
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5)
    return axes
