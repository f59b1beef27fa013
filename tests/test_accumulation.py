"""Narrow accumulation, bitwise against loops in NumPy."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests import data
from tests.data import normal
from tests.oracle import assert_same, assert_same_trees
from tests.test_dots import MATMUL, dot

pytestmark = pytest.mark.optimized

# A format close to the 22-bit accumulator of Hopper's float8 products.
E8M13 = jaxq.FloatFormat("e8m13", 8, 13, inf=True, nan="ieee")


def e8m13(x: np.ndarray) -> np.ndarray:
    """Rounds to 13 mantissa bits, half to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x1FF + (bits >> 10 & 1)) & 0xFFFFFC00).view(np.float32)


ROUNDED = {
    "float32": lambda x: x,
    "bfloat16": lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
    "float16": lambda x: x.astype(np.float16).astype(np.float32),
    E8M13: e8m13,
}


def loop(a, b, fmt, chunk, order, outer):
    """Returns the products of rows of a `[M, K]` and b `[N, K]`, summed term by term."""
    narrow, wide = ROUNDED[fmt], ROUNDED[outer]
    sums = []
    for start in range(0, a.shape[1], chunk):
        total = np.zeros((len(a), len(b)), np.float32)
        for k in range(start, start + chunk):
            total = narrow(total + a[:, k, None] * b[None, :, k])
        sums.append(total)
    if order == "sequential":
        return functools.reduce(lambda s, more: wide(s + more), sums, np.zeros_like(sums[0]))
    while len(sums) > 1:
        pairs = [wide(x + y) for x, y in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


@pytest.mark.parametrize(
    ("fmt", "chunk", "order", "outer"),
    [
        ("bfloat16", 40, "sequential", "bfloat16"),
        data.slow("float16", 8, "sequential", "float16"),
        (E8M13, 8, "sequential", "float32"),
        data.slow("bfloat16", 8, "pairwise", "float32"),
        ("float32", 4, "pairwise", "float16"),
    ],
)
def test_sums_equal_numpy_loop(fmt, chunk, order, outer):
    a, b = (np.asarray(normal((n, 40), n)).astype(ml_dtypes.bfloat16) for n in (3, 4))
    execution = jaxq.Accumulation(fmt, chunk, order, outer)
    recipe = jaxq.ProductRecipe(execution=execution)
    a, b = jnp.asarray(a), jnp.asarray(b)
    f = lambda a, b: jaxq.dot_general(
        a, b.T, MATMUL, preferred_element_type=jnp.float32, recipe=recipe
    )
    wide = (np.asarray(x).astype(np.float32) for x in (a, b))
    want = loop(*wide, fmt, chunk, order, outer)
    assert_same(f(a, b), want)
    assert_same(jax.jit(f)(a, b), want)
    assert_same(jax.jit(jax.vmap(f, (0, None)))(jnp.stack([a, a]), b)[1], want)
    plain = np.asarray(a, np.float32) @ np.asarray(b, np.float32).T
    assert (want != plain).any()


def test_token_scales_are_applied_after_sum():
    """Checks that codes are summed before scaling: their float16 sum overflows."""
    x, w = normal((3, 64)), normal((64, 4), 1)
    recipe = jaxq.ProductRecipe(
        "int8_token", "int8_channel", execution=jaxq.Accumulation("float16")
    )
    (a, left), (b, right) = (
        (np.asarray(jaxq.decode(q.codes, "int8")), np.asarray(q.scales))
        for q in (jaxq.quantize(x, "int8_token"), jaxq.quantize(w, "int8_channel"))
    )
    sums = loop(a, b.T, "float16", 64, "sequential", "float16")
    assert_same(dot(x, w, recipe), sums * left * right)
    ones = jnp.ones((1, 64))
    assert np.isinf(dot(ones, ones.T, recipe)).all()


@pytest.mark.slow
def test_block_scales_are_applied_before_sum():
    """Checks that block scales, but not the tensor scale, are applied before the sum."""
    x, w = normal((3, 32)), normal((32, 4), 1)
    nvfp4 = jaxq.get_recipe("nvfp4")
    recipe = jaxq.ProductRecipe(nvfp4, nvfp4, execution=jaxq.Accumulation("bfloat16", 16))
    arrays, tensors = [], []
    for q in (jaxq.quantize(x, nvfp4), jaxq.quantize(w.T, nvfp4)):
        scales = np.asarray(jaxq.decode(q.scale, "float8_e4m3fn")).repeat(16, 1)
        arrays.append(np.asarray(jaxq.decode(q.unpack(), "float4_e2m1fn")) * scales)
        tensors.append(np.float32(q.second[0]))
    sums = loop(*arrays, "bfloat16", 16, "sequential", "bfloat16")
    assert_same(dot(x, w, recipe), sums * tensors[0] * tensors[1])


def test_zero_points_are_subtracted_before_sum():
    x, w = normal((3, 16)) + 1, normal((16, 4), 1)
    recipe = jaxq.ProductRecipe(
        "uint8_tensor", "int8_tensor", execution=jaxq.Accumulation("float32")
    )
    q, p = jaxq.quantize(x, "uint8_tensor"), jaxq.quantize(w, "int8_tensor")
    whole = np.asarray(q.codes).astype(np.int64) - np.asarray(q.zero_point).astype(np.int64)
    sums = (whole @ np.asarray(jaxq.decode(p.codes, "int8")).astype(np.int64)).astype(np.float32)
    assert_same(dot(x, w, recipe), sums * np.asarray(q.scales) * np.asarray(p.scales))


def test_gradients_of_exact_sums_and_their_derivatives_equal_jax():
    """Checks that gradients of exact sums, and their derivatives, are those of JAX."""
    x, w = jnp.round(normal((4, 8)) * 4), jnp.round(normal((8, 2), 1) * 4)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    narrow = jaxq.SingleProduct(execution=jaxq.Accumulation("float32", 2))
    recipe = jaxq.ProductRecipe(execution=narrow.execution, dlhs=narrow, drhs=narrow)
    ours = lambda x, w: (dot(x, w, recipe).astype(jnp.float32) ** 2).sum()
    theirs = lambda x, w: ((x @ w).astype(jnp.float32) ** 2).sum()

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f, x, w):
        return jax.grad(f, (0, 1))(x, w), jax.jvp(jax.grad(f), (x, w), (x, w))[1]

    (got, second), (want, other) = (derivatives(f, x, w) for f in (ours, theirs))
    assert_same_trees(got, want)
    np.testing.assert_allclose(*(s.astype(jnp.float32) for s in (second, other)), rtol=0.02)


def test_empty_contraction_is_zero():
    a = jnp.zeros((2, 3, 0))
    for order in ("sequential", "pairwise"):
        assert_same(jaxq.Accumulation("float16", 4, order).matmul(a, a), np.zeros((2, 3, 3), "f4"))


def test_temporary_memory_does_not_grow_with_contraction():
    n = 256
    a = jax.ShapeDtypeStruct((1, n, n), jnp.float32)
    compiled = jax.jit(jaxq.Accumulation("bfloat16", 32).matmul).lower(a, a).compile()
    # Two transposed operands, the sum of a chunk and the total.
    assert compiled.memory_analysis().temp_size_in_bytes <= 5 * 4 * n * n


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jaxq.Accumulation("no such"), "No number format is named"),
        (lambda: jaxq.Accumulation(chunk=0), "`chunk` must be an integer of at least 1, got 0"),
        (lambda: jaxq.Accumulation(order="random"), "`order` must be 'sequential' or 'pairwise'"),
    ],
)
def test_invalid_arguments_raise(make, text):
    with pytest.raises(ValueError, match=text):
        make()
