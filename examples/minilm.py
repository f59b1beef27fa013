"""Quantizes the sentence encoder all-MiniLM-L6-v2 with every named recipe.

More than sixty sentences of Python's documentation are embedded in float32 and, for every recipe in
`jaxq.recipes.RECIPES`, in two quantized models: one stores all weights (the kernels of the encoder
and the embeddings) with the recipe; the other also quantizes the activations that are multiplied by
those kernels. The model (`encoder.py`) is plain JAX without any code for quantization. There is no
training and no calibration.

The table shows the mean cosine between the embeddings and those of float32, Spearman's rank
correlation between the similarities of all pairs and those of float32, and the bytes of the
weights. Before that, the float32 model is compared with published similarities.

    python examples/minilm.py [--short] [--output PICTURE]
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import common
import encoder
import jax
import numpy as np
from common import BLUE, GRAY, ORANGE, plt
from matplotlib import ticker
from scipy import stats

import jaxq

SHORT = ("int8_channel", "int4_g32", "int2_g64", "fp8_e4m3_tile128")
PARTS = {  # Label, color and marker in the picture, by field of `Result`.
    "weights": ("weights", BLUE, "D"),
    "activations": ("weights and activations", ORANGE, "o"),
}


@dataclasses.dataclass(frozen=True)
class Quality:
    """The similarity to the float32 embeddings.

    Attributes:
      cosine: the mean cosine between embeddings.
      rank: Spearman's correlation between the similarities of all pairs.
    """

    cosine: float = np.nan
    rank: float = np.nan


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one recipe.

    Attributes:
      name: the recipe.
      bits: the storage bits per quantized weight, including scales.
      megabytes: the size of the quantized weights.
      weights: the quality with quantized weights.
      activations: the quality with quantized weights and activations.
      reason: the error if the recipe does not fit the model, else empty.
    """

    name: str
    bits: float = np.nan
    megabytes: float = np.nan
    weights: Quality = Quality()
    activations: Quality = Quality()
    reason: str = ""


def activation_recipe(recipe: jaxq.Recipe) -> jaxq.Recipe:
    """Returns the recipe of the activations for one of the weights.

    It has one scale per token if the weights have one per channel.
    """
    if isinstance(recipe.granularity, jaxq.PerChannel):
        return dataclasses.replace(recipe, granularity=jaxq.PerToken())
    return recipe


def check(params: Any) -> float:
    """Returns the largest difference from the published similarities, which have four decimals."""
    texts = list(dict.fromkeys(text for *pair, _ in encoder.PUBLISHED for text in pair))
    embeddings = np.asarray(jax.jit(encoder.encode)(params, *encoder.tokenize(texts)))
    by_text = dict(zip(texts, embeddings, strict=True))
    return max(abs(by_text[a] @ by_text[b] - similarity) for a, b, similarity in encoder.PUBLISHED)


def similarities(embeddings: np.ndarray) -> np.ndarray:
    """Returns the cosines of all pairs of embeddings."""
    return (embeddings @ embeddings.T)[np.triu_indices(len(embeddings), 1)]


def study(name: str, params: Any, base: np.ndarray, tokens: jax.Array, mask: jax.Array) -> Result:
    """Embeds with one recipe, with quantized weights alone and also with quantized activations."""
    recipe = jaxq.recipes.RECIPES[name]
    weights = [("", recipe)]
    both = [
        ("^embeddings/", recipe),
        ("^layers/", jaxq.ProductRecipe(activation_recipe(recipe), recipe)),
    ]

    def quality(rules: Sequence[Any]) -> Quality:
        embed = jax.jit(jaxq.quantize_fn(encoder.encode, rules))
        embeddings = np.asarray(embed(packed, tokens, mask))
        ranks = [stats.rankdata(similarities(x)) for x in (base, embeddings)]
        return Quality(float((embeddings * base).sum(1).mean()), float(np.corrcoef(*ranks)[0, 1]))

    try:
        packed = jaxq.quantize_weights(encoder.encode, weights)(params, tokens, mask)
        qualities = quality(weights), quality(both)
    except ValueError as error:  # The block size of the recipe does not divide an axis.
        return Result(name, reason=re.sub(r" \(\S+ \(\w+\)\)", "", str(error)))
    rows = [row for row in jaxq.tree_report(packed).rows if row.format not in ("-", "")]
    size = sum(row.bytes_after for row in rows)
    bits = 32 * size / sum(row.bytes_before for row in rows)
    return Result(name, bits, size / 1e6, *qualities)


def run(
    names: Sequence[str], count: int, params: Any, report: Callable[[str], None]
) -> list[Result]:
    """Runs every recipe on the first `count` sentences."""
    tokens, mask = encoder.tokenize(encoder.sentences()[:count])
    base = np.asarray(jax.jit(encoder.encode)(params, tokens, mask))
    results = []
    for name in names:
        results.append(study(name, params, base, tokens, mask))
        report(name)
    return results


def table(results: Sequence[Result]) -> common.Table:
    """Returns the table of results, one row per recipe, sorted by bits."""
    grid = common.Table(title="all-MiniLM-L6-v2 compared with float32: cosine and rank correlation")
    grid.add_column("recipe", no_wrap=True)
    heads = ("bits", "MB", "weights: cosine", "rank", "with activations: cosine", "rank")
    for head in heads:
        grid.add_column(head, justify="right")
    for r in sorted(results, key=lambda r: (r.reason, -r.bits)):
        cells = ["-"] * 6
        if not r.reason:
            qualities = (r.weights, r.activations)
            numbers = [f"{v:.5f}" for q in qualities for v in (q.cosine, q.rank)]
            cells = [f"{r.bits:.2f}", f"{r.megabytes:.1f}", *numbers]
        grid.add_row(r.name, *cells)
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Draws the cosines of every recipe and, below them, those over bits per weight."""
    by_bits = sorted((r for r in results if not r.reason), key=lambda r: (r.bits, r.weights.cosine))
    rows = [*(r for r in results if r.reason), *by_bits]
    height = 0.21 * len(rows) + 0.9
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(9, height + 6.5), layout="constrained", height_ratios=(height, 6.5)
    )
    for part, (label, color, marker) in PARTS.items():
        errors = {r.name: 1 - getattr(r, part).cosine for r in by_bits}
        for height, r in enumerate(rows):
            if r.name in errors:
                upper.plot(errors[r.name], height, marker, color=color, markersize=5)
        points = sorted((r.bits, errors[r.name], r.name) for r in by_bits)
        # Points whose error is at least 1 % smaller than that of all points with fewer bits.
        frontier = [p for i, p in enumerate(points) if all(p[1] < 0.99 * q[1] for q in points[:i])]
        lower.plot(
            *zip(*((bits, error) for bits, error, _ in points), strict=True),
            marker,
            color=color,
            markersize=5,
            label=label,
        )
        bits, best, _ = zip(*frontier, strict=True)
        lower.step((*bits, 10), (*best, best[-1]), where="post", color=color, alpha=0.4)
        if part == "weights":
            for point in frontier:
                lower.annotate(
                    point[2], point[:2], (-6, 2), textcoords="offset points", ha="right", fontsize=8
                )
    margin = upper.get_yaxis_transform()  # x in fractions of the axes' width, y in data units.
    for height, r in enumerate(rows):
        if r.reason:
            upper.text(
                0.02,
                height,
                "its block size does not divide an axis",
                transform=margin,
                va="center",
                color=GRAY,
            )
            continue
        ends = [1 - r.weights.cosine, 1 - r.activations.cosine]
        upper.plot(ends, [height] * 2, color="#dddddd", linewidth=5, zorder=1)
        upper.text(1.08, height, f"{r.bits:.2f}", transform=margin, va="center", ha="right")
    upper.text(1.08, len(rows), "bits", transform=margin, ha="right", color=GRAY)
    upper.set_yticks(range(len(rows)), [r.name for r in rows], fontsize=8)
    upper.set_ylim(-0.7, len(rows) - 0.3)
    upper.tick_params(left=False)
    lower.set_xscale("log", base=2)
    lower.set_xticks([1, 2, 3, 4, 5, 6, 8], ["1", "2", "3", "4", "5", "6", "8"])
    lower.set_xlim(0.8, 10)
    lower.set_xlabel("bits per weight, including scales")
    lower.set_title("Cosine by bits, best recipes connected", loc="left")
    lower.legend(loc="upper left", frameon=False)
    upper.legend(*lower.get_legend_handles_labels(), loc="lower right", frameon=False)
    upper.set_xlabel("mean cosine to the float32 embeddings")
    upper.set_title("all-MiniLM-L6-v2 with every named recipe", loc="left")
    upper.set_xscale("log")
    lower.set_yscale("log")
    ticks = [1e-4, 1e-3, 1e-2, 1e-1, 1]
    for axes, axis in ((upper, upper.xaxis), (lower, lower.yaxis)):
        axis.set_ticks(ticks, [f"{1 - tick:.6g}" for tick in ticks])
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_inverted(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(__doc__, argv, "minilm.svg")
    names = SHORT if args.short else tuple(jaxq.recipes.RECIPES)
    params = encoder.load()

    console = common.Console()
    difference = check(params)
    console.print(
        f"Largest difference from the published similarities (four decimals): {difference:.6f}."
    )
    with common.progress(len(names), "embedding") as report:
        results = run(names, 8 if args.short else 100, params, report)
    common.show(table(results), picture(results), args.output)
    for r in results:
        if r.reason:
            console.print(f"{r.name} does not fit the model: {r.reason}", highlight=False)
    return results


if __name__ == "__main__":
    main()
