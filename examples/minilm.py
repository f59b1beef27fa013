"""What does every recipe do to a real model? The sentence encoder all-MiniLM-L6-v2 in all presets.

Sixty-odd sentences of Python's documentation are embedded in float32 and then, for every recipe in
`jaxq.presets.ALL`, with all weights of the model stored in it (the kernels of the encoder and the
embeddings), and with the activations that meet those kernels quantized as well. The model
(`encoder.py`) is plain JAX and knows nothing of it. Nothing is trained or calibrated.

Shown are the mean cosine of the embeddings to those of float32, how far the similarities of all
pairs keep their order (Spearman's rank correlation), and the bytes of the weights. First the model
is checked against published similarities.

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
from common import BLUE, GREY, ORANGE, plt
from matplotlib import ticker
from scipy import stats

import jaxq

SHORT = ("int8_channel", "int4_g32", "int2_g64", "fp8_e4m3_tile128")
PARTS = {  # A field of `Result`: what the picture calls it, and how it shows it.
    "weights": ("weights", BLUE, "D"),
    "activations": ("weights and activations", ORANGE, "o"),
}


@dataclasses.dataclass(frozen=True)
class Quality:
    """How near to float32 embeddings are: mean cosine, and Spearman's correlation of pairs."""

    cosine: float = np.nan
    rank: float = np.nan


@dataclasses.dataclass(frozen=True)
class Result:
    """What one recipe does to the model, or why it cannot be."""

    name: str
    bits: float = np.nan
    megabytes: float = np.nan
    weights: Quality = Quality()
    activations: Quality = Quality()
    reason: str = ""


def of_activations(recipe: jaxq.Quantizer) -> jaxq.Quantizer:
    """A weights' recipe for activations: one scale a token where weights have one a channel."""
    if isinstance(recipe.granularity, jaxq.PerChannel):
        return dataclasses.replace(recipe, granularity=jaxq.PerToken())
    return recipe


def check(params: Any) -> float:
    """The largest difference to the published similarities, which have four decimals."""
    texts = list(dict.fromkeys(text for *pair, _ in encoder.PUBLISHED for text in pair))
    embeddings = np.asarray(jax.jit(encoder.encode)(params, *encoder.tokenize(texts)))
    own = dict(zip(texts, embeddings, strict=True))
    return max(abs(own[a] @ own[b] - similarity) for a, b, similarity in encoder.PUBLISHED)


def similarities(embeddings: np.ndarray) -> np.ndarray:
    """The cosines of all pairs."""
    return (embeddings @ embeddings.T)[np.triu_indices(len(embeddings), 1)]


def study(name: str, params: Any, base: np.ndarray, tokens: jax.Array, mask: jax.Array) -> Result:
    """Embeds with one recipe, weights alone and with activations."""
    recipe = jaxq.presets.ALL[name]
    weights = [("", recipe)]
    both = [
        ("^embeddings/", recipe),
        ("^layers/", jaxq.DotRecipe(of_activations(recipe), recipe)),
    ]

    def quality(rules: Sequence[Any]) -> Quality:
        embed = jax.jit(jaxq.quantize_fn(encoder.encode, rules))
        embeddings = np.asarray(embed(packed, tokens, mask))
        ranks = [stats.rankdata(similarities(x)) for x in (base, embeddings)]
        return Quality(float((embeddings * base).sum(1).mean()), float(np.corrcoef(*ranks)[0, 1]))

    try:
        packed = jaxq.quantize_weights(encoder.encode, weights)(params, tokens, mask)
        qualities = quality(weights), quality(both)
    except ValueError as error:  # A recipe whose blocks do not fit.
        return Result(name, reason=re.sub(r" \(\S+ \(\w+\)\)", "", str(error)))
    rows = [row for row in jaxq.tree_report(packed).rows if row.format not in ("-", "")]
    size = sum(row.bytes_after for row in rows)
    bits = 32 * size / sum(row.bytes_before for row in rows)
    return Result(name, bits, size / 1e6, *qualities)


def run(
    names: Sequence[str], count: int, params: Any, report: Callable[[str], None]
) -> list[Result]:
    """Every recipe on the first sentences."""
    tokens, mask = encoder.tokenize(encoder.sentences()[:count])
    base = np.asarray(jax.jit(encoder.encode)(params, tokens, mask))
    results = []
    for name in names:
        results.append(study(name, params, base, tokens, mask))
        report(name)
    return results


def table(results: Sequence[Result]) -> common.Table:
    """The results by bits, one recipe a row."""
    grid = common.Table(title="all-MiniLM-L6-v2 beside float32: cosine, and rank of similarities")
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
    """Left a dumbbell a recipe, right what is the best for its bits."""
    by_bits = sorted((r for r in results if not r.reason), key=lambda r: (r.bits, r.weights.cosine))
    rows = [*(r for r in results if r.reason), *by_bits]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 0.21 * len(rows) + 1.8), layout="constrained"
    )
    for part, (label, colour, marker) in PARTS.items():
        errors = {r.name: 1 - getattr(r, part).cosine for r in by_bits}
        for height, r in enumerate(rows):
            if r.name in errors:
                left.plot(errors[r.name], height, marker, color=colour, markersize=5)
        points = sorted((r.bits, errors[r.name], r.name) for r in by_bits)
        # Better by more than a hundredth than all that take fewer bits.
        front = [p for i, p in enumerate(points) if all(p[1] < 0.99 * q[1] for q in points[:i])]
        right.plot(
            *zip(*((bits, error) for bits, error, _ in points), strict=True),
            marker,
            color=colour,
            markersize=5,
            label=label,
        )
        bits, best, _ = zip(*front, strict=True)
        right.step((*bits, 10), (*best, best[-1]), where="post", color=colour, alpha=0.4)
        if part == "weights":
            for place in front:
                right.annotate(
                    place[2], place[:2], (-6, 2), textcoords="offset points", ha="right", fontsize=8
                )
    beside = left.get_yaxis_transform()  # x in shares of the axes' width, y a row.
    for height, r in enumerate(rows):
        if r.reason:
            left.text(
                0.02, height, "its blocks do not fit", transform=beside, va="center", color=GREY
            )
            continue
        ends = [1 - r.weights.cosine, 1 - r.activations.cosine]
        left.plot(ends, [height] * 2, color="#dddddd", linewidth=5, zorder=1)
        left.text(1.08, height, f"{r.bits:.2f}", transform=beside, va="center", ha="right")
    left.text(1.08, len(rows), "bits", transform=beside, ha="right", color=GREY)
    left.set_yticks(range(len(rows)), [r.name for r in rows], fontsize=8)
    left.set_ylim(-0.7, len(rows) - 0.3)
    left.tick_params(left=False)
    right.set_xscale("log", base=2)
    right.set_xticks([1, 2, 3, 4, 5, 6, 8], ["1", "2", "3", "4", "5", "6", "8"])
    right.set_xlim(0.8, 10)
    right.set_xlabel("bits a weight, scales included")
    right.set_title("The best for its bits", loc="left")
    right.legend(loc="upper left", frameon=False)
    left.set_xlabel("mean cosine to the float32 embeddings")
    left.set_title("all-MiniLM-L6-v2 in every preset", loc="left")
    left.set_xscale("log")
    right.set_yscale("log")
    ticks = [1e-4, 1e-3, 1e-2, 1e-1, 1]
    for axes, axis in ((left, left.xaxis), (right, right.yaxis)):
        axis.set_ticks(ticks, [f"{1 - tick:.6g}" for tick in ticks])
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_inverted(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(__doc__, argv, "minilm.png")
    names = SHORT if args.short else tuple(jaxq.presets.ALL)
    params = encoder.load()

    console = common.Console()
    off = check(params)
    console.print(f"Published similarities, which have four decimals, are met within {off:.6f}.")
    with common.progress(len(names), "embedding") as report:
        results = run(names, 8 if args.short else 100, params, report)
    common.show(table(results), picture(results), args.output)
    for r in results:
        if r.reason:
            console.print(f"{r.name} cannot be: {r.reason}", highlight=False)
    return results


if __name__ == "__main__":
    main()
