"""The quantized cache of keys and values."""

import functools

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import serving
from tests import data

HEADS, CHANNELS, CAPACITY = 2, 16, 16

# A small form of KIVI's recipe, whose groups and window fit into few tokens.
SCALING = jaxq.recipes.ScaleAndMin(stored=True, reciprocal=False)
KIVI = serving.CacheRecipe(
    jaxq.Recipe("uint2", jaxq.PerBlock(4, axes=-2), SCALING),
    jaxq.Recipe("uint2", jaxq.PerBlock(8), SCALING),
    residual_length=6,
)


@functools.cache
def tokens(count: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values; one channel of the keys is ten times as large as the others."""
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, count, HEADS, CHANNELS), np.float32)
    keys[..., 3] *= 10
    return jnp.asarray(keys), jnp.asarray(values)


@jax.jit
def append(cache, keys, values):
    return cache.append(keys, values)


@jax.jit
def dequantize(cache):
    return cache.dequantize()


@functools.partial(jax.jit, static_argnames="chunk")
def attend(cache, query, chunk=None):
    return cache.attend(query, chunk=chunk)


@functools.cache
def history() -> tuple[serving.KVCache, serving.KVCache]:
    """Returns a cache after 27 tokens, one at a time, and the caches after each token."""
    empty = serving.KVCache.empty((CAPACITY, HEADS, CHANNELS), KIVI)
    keys, values = tokens(27)

    @jax.jit
    def run(cache, keys, values):
        def step(cache, new):
            cache = cache.append(new[0][None], new[1][None])
            return cache, cache

        return jax.lax.scan(step, cache, (keys, values))

    return run(empty, keys, values)


def attention(query, keys, values, positions, own) -> np.ndarray:
    """Returns plain float64 attention; each query sees the positions up to its own."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    share = query.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, share, 1), np.repeat(values, share, 1)
    logits = np.einsum("thd,shd->hts", query, keys) / np.sqrt(query.shape[-1])
    seen = (positions >= 0) & (positions <= own[:, None])
    weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), values)


def kivi(x: np.ndarray, axis: int) -> np.ndarray:
    """Returns one group in 2 bits by KIVI's formula, with a float16 scale and minimum."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = ((high - low) / np.float32(3)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    return np.clip(np.rint((x - low) / scale), 0, 3) * scale + low


def equal(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(bool(jnp.array_equal(a, b)) for a, b in pairs)


def test_tokens_are_quantized_by_the_formula_of_kivi():
    cache, _ = history()
    found, (keys, values) = dequantize(cache), tokens(27)
    positions = np.asarray(found.positions)
    assert sorted(positions) == [*range(11, 27)]
    # 21 tokens are older than the window: 5 groups of 4 keys, and 21 values.
    for slot, p in enumerate(positions):
        group = np.asarray(keys[p // 4 * 4 : p // 4 * 4 + 4])
        expected = kivi(group, 0)[p % 4] if p < 20 else keys[p]
        np.testing.assert_array_equal(found.keys[slot], expected)
        value = np.asarray(values[p]).reshape(HEADS, 2, 8)
        expected = kivi(value, -1).reshape(HEADS, CHANNELS) if p < 21 else values[p]
        np.testing.assert_array_equal(found.values[slot], expected)


def test_appending_does_not_change_past_tokens():
    _, after = history()
    found = jax.jit(jax.vmap(lambda cache: cache.dequantize()))(after)
    known: dict[int, np.ndarray] = {}
    for step in range(27):
        end = max(step + 1 - KIVI.residual_length, 0) // 4 * 4
        for slot, p in enumerate(np.asarray(found.positions[step])):
            if 0 <= p < end:
                now = np.stack([found.keys[step, slot], found.values[step, slot]])
                np.testing.assert_array_equal(known.setdefault(int(p), now), now)
    assert len(known) == 20


def test_one_append_equals_many_appends():
    keys, values = tokens(27)
    cache = serving.KVCache.empty((CAPACITY, HEADS, CHANNELS), KIVI)
    for start in range(0, 27, 9):
        cache = append(cache, keys[start : start + 9], values[start : start + 9])
    assert equal(cache, history()[0])


def test_sequences_of_a_batch_have_their_own_lengths():
    keys, values = (x[:9] for x in tokens(27))
    counts = jnp.array([9, 0, 4])
    cache = serving.KVCache.empty((3, CAPACITY, HEADS, CHANNELS), KIVI)
    batch = [jnp.broadcast_to(x, (3, *x.shape)) for x in (keys, values)]
    cache = jax.jit(lambda c, k, v, n: c.append(k, v, count=n))(cache, *batch, counts)
    assert cache.length.tolist() == [9, 0, 4]
    for i, count in enumerate([9, 0, 4]):
        expected = jax.tree.map(lambda x, at=count - 1: x[at], history()[1])
        if not count:
            expected = serving.KVCache.empty((CAPACITY, HEADS, CHANNELS), KIVI)
        assert equal(jax.tree.map(lambda x, i=i: x[i], cache), expected)
    y = attend(cache, jnp.ones((3, 1, HEADS, CHANNELS)))
    chex.assert_tree_all_finite(y)
    assert bool((y[1] == 0).all())


@pytest.mark.parametrize("chunk", [None, 8])
def test_attention_equals_float64_attention_over_the_dequantized_cache(chunk: int | None):
    cache, _ = history()
    query = jax.random.normal(jax.random.key(1), (3, 2 * HEADS, CHANNELS))
    y = attend(cache, query, chunk)
    found = dequantize(cache)
    own = np.array([24, 25, 26])
    expected = attention(query, found.keys, found.values, np.asarray(found.positions), own)
    np.testing.assert_allclose(y, expected, atol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("chunk", [None, 4])
def test_special_values_reach_only_the_queries_that_see_them(value: float, chunk: int | None):
    recipe = serving.CacheRecipe("fp8_e4m3_token", "fp8_e4m3_token", residual_length=6)
    cache = serving.KVCache.empty((CAPACITY, HEADS, CHANNELS), recipe)
    keys, values = (x[:4] for x in tokens(27))
    query = jnp.ones((4, HEADS, CHANNELS))
    wanted = attend(append(cache, keys, values), query, chunk)
    got = attend(append(cache, keys, values.at[2, 0, 5].set(value)), query, chunk)
    np.testing.assert_array_equal(got[2:, 0, 5], value)
    np.testing.assert_array_equal(got.at[2:, 0, 5].set(0), wanted.at[2:, 0, 5].set(0))


def test_scale_of_logits_is_an_argument():
    cache, _ = history()
    query = jnp.ones((1, HEADS, CHANNELS))
    y = jax.jit(lambda cache, query: cache.attend(query, scale=0.5))(cache, query)
    np.testing.assert_allclose(y, attend(cache, query * 2), rtol=1e-6)


def test_rotation_leaves_attention_unchanged_and_reduces_its_error():
    keys, values = tokens(16, 1)
    query = jax.random.normal(jax.random.key(2), (1, HEADS, CHANNELS))
    exact = attention(query, keys, values, np.arange(16), np.array([15]))
    errors = []
    for rotate in (False, True):
        recipe = serving.CacheRecipe("int4_token", "int4_token", rotate=rotate)
        cache = serving.KVCache.empty((16, HEADS, CHANNELS), recipe)
        cache = append(cache, keys, values)
        found = dequantize(cache)
        close = attention(query, found.keys, found.values, np.arange(16), np.array([15]))
        y = attend(cache, query)
        np.testing.assert_allclose(y, close, atol=1e-5)
        errors.append(float(np.square(y - exact).mean()))
    assert errors[1] < 0.5 * errors[0]


def test_static_scales_of_fp8_are_stored_once():
    keys, values = tokens(16)
    scales = serving.CacheScales(jnp.abs(keys).max() / 448, jnp.full((HEADS, 1, 1), 0.01))
    shape = (16, HEADS, CHANNELS)
    recipe = serving.CacheRecipe(
        "fp8_e4m3_tensor", jaxq.Recipe("float8_e4m3fn", jaxq.PerChannel((0,)))
    )
    cache = append(serving.KVCache.empty(shape, recipe, scales=scales), keys, values)
    found = dequantize(cache)
    for x, y, scale in ((keys, found.keys, scales.keys), (values, found.values, np.float32(0.01))):
        scale = np.float32(scale)
        units = np.clip(np.asarray(x) / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(y, units.astype(np.float32) * scale)
    codes, recent = 2 * 16 * HEADS * CHANNELS, 2 * HEADS * CHANNELS * 4
    assert cache.nbytes == codes + recent + 4 + 4 * HEADS + 4


def test_bytes_are_known_before_allocation():
    make = functools.partial(serving.KVCache.empty, (8, 4096, 8, 128), "kivi4", dtype=jnp.bfloat16)
    cache = jax.eval_shape(make)
    groups = 2 * 8 * 4096 * 8 * 128 // 32
    window = (128 + 31) + 128
    assert cache.nbytes == groups * (16 + 2 + 2) + 8 * window * 8 * 128 * 2 + 8 * 4


def test_attention_in_chunks_needs_less_memory():
    cache = jax.eval_shape(lambda: serving.KVCache.empty((2048, 2, 32), "kv_int8"))
    query = jax.ShapeDtypeStruct((1, 2, 32), jnp.float32)

    def temporary(chunk: int | None) -> int:
        attend = jax.jit(lambda cache, query: cache.attend(query, chunk=chunk))
        return attend.lower(cache, query).compile().memory_analysis().temp_size_in_bytes

    floats = 2 * 2048 * 2 * 32 * 4
    assert temporary(128) < floats / 4 < temporary(None)


@pytest.mark.parametrize("name", serving.CACHE_RECIPES)
def test_named_recipes_serve_a_cache(name: str):
    recipe = serving.get_cache_recipe(name)
    scales = serving.CacheScales(0.1, 0.01) if name == "kv_fp8" else None
    make = functools.partial(serving.KVCache.empty, (256, HEADS, 32), recipe, scales=scales)
    cache = jax.eval_shape(make)
    new = jax.ShapeDtypeStruct((1, HEADS, 32), jnp.float32)
    after = jax.eval_shape(lambda c, k: c.append(k, k), cache, new)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    assert after.nbytes == cache.nbytes
    assert name not in {*jaxq.recipes.RECIPES, *jaxq.products.PRODUCT_RECIPES}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: serving.get_cache_recipe("kivi5"), "Did you mean kivi4"),
        (lambda: serving.CacheRecipe("int8_token", "int8_token", -1), "at least 0"),
        (
            lambda: serving.CacheRecipe(jaxq.Recipe("int8", rounding="stochastic"), "int8_token"),
            "deterministically",
        ),
        (lambda: serving.KVCache.empty((18, 2, 16), KIVI), "multiple of 4"),
        (lambda: serving.KVCache.empty((16, 2), KIVI), "`shape` must be"),
        (lambda: serving.KVCache.empty((16, 0, 8), "kv_int8"), "at least one head"),
        (lambda: serving.KVCache.empty((16, 2, 8), "kv_int8", dtype=np.int8), "`dtype` must be"),
        (lambda: serving.KVCache.empty((16, 2, 16), "kv_fp8"), "pass CacheScales"),
        (
            lambda: serving.KVCache.empty((16, 2, 16), "kv_int8", scales=serving.CacheScales(1.0)),
            "Omit them",
        ),
        (lambda: serving.KVCache.empty((16, 2, 24), "quarot4"), "power of two"),
        (lambda: history()[0].append(*tokens(17)), "at most 16"),
        (lambda: history()[0].attend(jnp.ones((1, 3, 16))), "multiple of 2"),
        (lambda: history()[0].attend(jnp.ones((1, 2, 16)), chunk=5), "`chunk` must divide"),
    ],
)
def test_errors_say_what_to_do(call, message: str):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("name", [data.slow("int8_token"), "kivi"])
def test_rules_by_operation_quantize_keys_and_values_as_the_cache_does(name: str):
    keys, values = tokens(16)
    query = jax.random.normal(jax.random.key(3), (16, 2 * HEADS, CHANNELS))
    if name == "kivi":
        recipe = serving.CacheRecipe(KIVI.keys, KIVI.values)
        # Keys are matrices [tokens, channels]; values are [channels, tokens] and come first.
        rhs = jaxq.Recipe("uint2", jaxq.PerBlock((4, 1)), SCALING)
        lhs = jaxq.Recipe("uint2", jaxq.PerBlock((8, 1)), SCALING)
    else:
        recipe = serving.CacheRecipe(name, name)
        rhs = jaxq.get_recipe(name)
        lhs = jaxq.Recipe("int8", jaxq.PerBlock((CHANNELS, 1)))

    def model(params, query):
        del params
        return jax.nn.dot_product_attention(query, keys, values, is_causal=True)

    rules = [
        jaxq.Rule(operation="dot_general", scope="->BNTS", recipe=jaxq.ProductRecipe(None, rhs)),
        jaxq.Rule(operation="dot_general", scope="->BTNH", recipe=jaxq.ProductRecipe(lhs, None)),
    ]
    y = jax.jit(jaxq.quantize_fn(model, rules))({}, query)
    cache = append(serving.KVCache.empty((16, HEADS, CHANNELS), recipe), keys, values)
    np.testing.assert_allclose(y, attend(cache, query), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(y - model({}, query)).max()) > 1e-3
