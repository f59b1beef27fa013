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

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import common
import encoder
import jax
import numpy as np
from common import BLUE, GREEN, GREY, ORANGE, plt
from scipy import stats

import jaxq

SHORT = ("int8_channel", "int4_g32", "int2_g64", "fp8_e4m3_tile128")
# Which colour a recipe has in the picture: the first part of a name that fits.
FAMILIES = {
    "integers": (BLUE, "o", ("int", "uint")),
    "MX, NVFP4, FP8": (ORANGE, "D", ("mx", "nvfp4", "fp8")),
    "GGUF": (GREEN, "s", ("q",)),
    "codebooks": (GREY, "^", ("nf4", "fp4", "ternary", "binary")),
}


@dataclasses.dataclass(frozen=True)
class Quality:
    """How near to float32 embeddings are: mean cosine, and Spearman's correlation of pairs."""

    cosine: float
    rank: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What one recipe does to the model, or why it cannot be."""

    name: str
    bits: float = np.nan
    megabytes: float = np.nan
    weights: Quality | None = None
    activations: Quality | None = None
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
        rank = stats.spearmanr(similarities(base), similarities(embeddings))
        return Quality(float((embeddings * base).sum(1).mean()), float(rank.statistic))

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
    for r in sorted(results, key=lambda r: -r.bits):
        cells = ["-"] * 6
        if r.weights is not None and r.activations is not None:
            qualities = (r.weights, r.activations)
            numbers = [f"{v:.5f}" for q in qualities for v in (q.cosine, q.rank)]
            cells = [f"{r.bits:.2f}", f"{r.megabytes:.1f}", *numbers]
        grid.add_row(r.name, *cells)
    return grid


def family(name: str) -> str:
    """The family of a preset."""
    return next(f for f, (_, _, starts) in FAMILIES.items() if name.startswith(starts))


def picture(results: Sequence[Result], path: pathlib.Path) -> None:
    """Cosine against bits, weights alone and with activations; a line along the best."""
    figure, both = plt.subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    for axes, part in zip(both, ("weights", "activations"), strict=True):
        points = [(r.bits, 1 - getattr(r, part).cosine, r.name) for r in results if not r.reason]
        points.sort(key=lambda point: (point[0], point[1]))
        front: list[tuple[float, float, str]] = []
        for point in points:
            if not front or point[1] < front[-1][1]:
                front.append(point)
        axes.step(*zip(*((b, e) for b, e, _ in front), strict=True), where="post", color="#cccccc")
        for label, (colour, marker, _) in FAMILIES.items():
            own = [(b, e) for b, e, name in points if family(name) == label]
            if own:
                axes.plot(*zip(*own, strict=True), marker, color=colour, label=label, alpha=0.8)
        for bits, error, name in points:
            best = any(name == other for *_, other in front)
            axes.annotate(
                name,
                (bits, error),
                (5, -3),
                textcoords="offset points",
                fontsize=8 if best else 6.5,
                color="black" if best else GREY,
            )
        axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 3, 4, 5, 6, 8], ["1", "2", "3", "4", "5", "6", "8"])
        axes.set_xlim(0.9, 11)
        axes.set_xlabel("bits a weight, scales included")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    both[0].invert_yaxis()
    ticks = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]
    both[0].set_yticks(ticks, [f"{1 - tick:.7g}" for tick in ticks])
    both[0].set_ylabel("mean cosine to the float32 embeddings, up is better")
    both[0].set_title("Weights in the format", loc="left")
    both[1].set_title("Weights and activations", loc="left")
    both[0].legend(loc="upper left", frameon=False)
    common.save(figure, path)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a quick run with fewer of everything")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("docs/images/minilm.png")
    )
    args = parser.parse_args(argv)
    names = SHORT if args.short else tuple(jaxq.presets.ALL)
    params = encoder.load()

    console = common.Console()
    off = check(params)
    console.print(f"Published similarities, which have four decimals, are met within {off:.6f}.")
    with common.progress(console) as progress:
        task = progress.add_task("embedding", total=len(names))
        results = run(
            names,
            12 if args.short else 100,
            params,
            lambda name: progress.update(task, advance=1, description=name),
        )
    console.print(table(results))
    for r in results:
        if r.reason:
            console.print(f"{r.name} cannot be: {r.reason}", highlight=False)
    picture(results, args.output)
    console.print(f"Picture: {args.output}")
    return results


if __name__ == "__main__":
    main()
