"""The random Hadamard transform, compared with its matrix."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests.data import normal
from tests.oracle import assert_same
from tests.test_dots import MATMUL, both_gradients, dot


def matrix(size: int) -> np.ndarray:
    """Returns Sylvester's matrix, from the parity of the common bits of row and column."""
    i = np.arange(size)
    return np.array([[(-1.0) ** int(a & b).bit_count() for a in i] for b in i])


def applied(transform: jaxq.Hadamard, x, axes: dict[int, int], signs) -> jax.Array:
    """Applies a transform in one jitted program."""
    return jax.jit(lambda x, signs: transform.apply(x, axes, signs))(x, signs)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_equals_matrix_product(size: int):
    """Uses small integers, whose sums are exact."""
    x = np.round(np.asarray(normal((3, 128, 2))) * 8).astype(np.float32)
    transform = jaxq.Hadamard(size)
    signs = transform.draw(jax.random.key(0))
    assert set(np.asarray(signs)) <= {-1.0, 1.0}
    rotation = matrix(size) @ np.diag(signs)
    want = np.einsum("ij,abjc->abic", rotation, x.reshape(3, -1, size, 2)).reshape(x.shape)
    got = applied(transform, jnp.asarray(x), {1: size}, signs)
    assert_same(got, want.astype(np.float32) * np.float32(1 / np.sqrt(size)))


def test_blocks_over_several_axes_equal_flattened_blocks():
    x, transform = normal((4, 3, 8)), jaxq.Hadamard(16)
    signs = transform.draw(jax.random.key(1))
    got = applied(transform, x, {0: 2, 2: 8}, signs)
    flat = jnp.moveaxis(x, 1, 2).reshape(32, 3)
    want = applied(transform, flat, {0: 16}, signs).reshape(4, 8, 3)
    assert_same(jnp.moveaxis(got, 1, 2), want)
    permuted = applied(transform, jnp.moveaxis(x, 0, 2), {2: 2, 1: 8}, signs)
    assert_same(jnp.moveaxis(permuted, 2, 0), got)


def test_jit_and_vmap_agree():
    x, transform = normal((64, 32)), jaxq.Hadamard(16)
    signs = transform.draw(jax.random.key(2))
    f = lambda x: transform.apply(x, {0: 16}, signs)
    assert_same(jax.jit(f)(x), f(x))
    assert_same(jax.jit(jax.vmap(f, 1, 1))(x[:, :, None]), f(x)[:, :, None])


def test_products_are_unchanged_except_rounding():
    x, w = normal((8, 32)), normal((32, 8), 1)
    recipe = jaxq.ProductRecipe(hadamard=16)
    key = jax.random.key(3)
    ours = jax.jit(lambda x, w: both_gradients(lambda x, w: dot(x, w, recipe, key), x, w))
    theirs = both_gradients(jnp.matmul, x, w)
    for got, want in zip(ours(x, w), theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_transform_reduces_error_of_outliers():
    """Checks that the transform reduces the error caused by one large number in a block."""
    x, w = normal((8, 64)).at[:, 5].set(60.0), normal((64, 8), 1)
    plain = jaxq.ProductRecipe("mxfp4", None)
    transformed = jaxq.ProductRecipe("mxfp4", None, hadamard=32)
    results = jax.jit(lambda x, w: (dot(x, w, plain), dot(x, w, transformed, jax.random.key(0))))(
        x, w
    )
    errors = [np.linalg.norm(y - x @ w) for y in results]
    assert errors[1] < errors[0]


def test_nonfinite_data_affects_only_its_block():
    x = jnp.zeros((2, 32)).at[0, 3].set(jnp.nan).at[1, 20].set(jnp.inf)
    y = np.asarray(applied(jaxq.Hadamard(16, (1,) * 16), x, {1: 16}, jnp.ones(16)))
    assert np.isnan(y[0, :16]).all()
    assert not np.isfinite(y[1, 16:]).any()
    assert (y[0, 16:] == 0).all()
    assert (y[1, :16] == 0).all()


def test_half_precision_is_transformed_in_float32():
    x, w = normal((4, 32)).astype(jnp.bfloat16), jnp.eye(32, dtype=jnp.bfloat16)
    signs = (1,) * 16
    recipe = jaxq.ProductRecipe("nvfp4", None, hadamard=jaxq.Hadamard(16, signs))

    @jax.jit
    def transform(x):
        y = jaxq.Hadamard(16).apply(x.astype(jnp.float32), {1: 16}, jnp.ones(16))
        return y.astype(jnp.bfloat16)

    want = jaxq.fake_quant(transform(x), "nvfp4") @ transform(w).T
    assert_same(jaxq.dot_general(x, w, MATMUL, recipe=recipe), want)


def test_weights_that_are_transformed_before_quantization_are_not_stored():
    recipe = jaxq.ProductRecipe(None, "int4_g32", hadamard=jaxq.Hadamard(32, (1, -1) * 16))
    model = lambda w, x: x @ w
    w, x = np.random.default_rng(0).standard_normal((2, 32, 32)).astype(np.float32)
    with pytest.warns(UserWarning, match="its product quantizes its Hadamard transform"):
        packed = jaxq.quantize_weights(model, recipe)(w, x)
    assert packed is w


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jaxq.Hadamard(12), "power of two, at least 2, got 12"),
        (lambda: jaxq.Hadamard(1), "power of two"),
        (lambda: jaxq.Hadamard(4, (1, 1, -1)), "must be 4 numbers 1 or -1"),
        (lambda: jaxq.Hadamard(2, (1, 2)), "numbers 1 or -1"),
    ],
)
def test_invalid_arguments_raise(make, text):
    with pytest.raises(ValueError, match=text):
        make()
