"""The random Hadamard transform against its matrix."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests.oracle import assert_same
from tests.test_dots import MATMUL, both_gradients, dot, normal


def matrix(size: int) -> np.ndarray:
    """Sylvester's, from the parity of the bits that row and column share."""
    i = np.arange(size)
    return np.array([[(-1.0) ** int(a & b).bit_count() for a in i] for b in i])


def applied(transform: jaxq.Hadamard, x, axes: dict[int, int], signs) -> jax.Array:
    """In one program, as `test_every_way_to_run_it_agrees`."""
    return jax.jit(lambda x, signs: transform.apply(x, axes, signs))(x, signs)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_is_the_matrix(size: int):
    """Small whole numbers, whose sums are exact."""
    x = np.round(np.asarray(normal((3, 128, 2))) * 8).astype(np.float32)
    transform = jaxq.Hadamard(size)
    signs = transform.draw(jax.random.key(0))
    assert set(np.asarray(signs)) <= {-1.0, 1.0}
    turned = matrix(size) @ np.diag(signs)
    want = np.einsum("ij,abjc->abic", turned, x.reshape(3, -1, size, 2)).reshape(x.shape)
    got = applied(transform, jnp.asarray(x), {1: size}, signs)
    assert_same(got, want.astype(np.float32) * np.float32(1 / np.sqrt(size)))


def test_a_block_over_several_axes_is_one_of_the_flattened_tensor():
    x, transform = normal((4, 3, 8)), jaxq.Hadamard(16)
    signs = transform.draw(jax.random.key(1))
    got = applied(transform, x, {0: 2, 2: 8}, signs)
    flat = jnp.moveaxis(x, 1, 2).reshape(32, 3)
    want = applied(transform, flat, {0: 16}, signs).reshape(4, 8, 3)
    assert_same(jnp.moveaxis(got, 1, 2), want)
    turned = applied(transform, jnp.moveaxis(x, 0, 2), {2: 2, 1: 8}, signs)
    assert_same(jnp.moveaxis(turned, 2, 0), got)


def test_every_way_to_run_it_agrees():
    x, transform = normal((64, 32)), jaxq.Hadamard(16)
    signs = transform.draw(jax.random.key(2))
    f = lambda x: transform.apply(x, {0: 16}, signs)
    assert_same(jax.jit(f)(x), f(x))
    assert_same(jax.vmap(f, 1, 1)(x[:, :, None]), f(x)[:, :, None])


def test_products_stay_what_they_were_but_for_rounding():
    x, w = normal((8, 32)), normal((32, 8), 1)
    recipe = jaxq.DotRecipe(hadamard=16)
    key = jax.random.key(3)
    ours = jax.jit(lambda x, w: both_gradients(lambda x, w: dot(x, w, recipe, key), x, w))
    theirs = both_gradients(jnp.matmul, x, w)
    for got, want in zip(ours(x, w), theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_outliers_are_spread():
    """One large number in a block costs the others their precision, but not after the transform."""
    x, w = normal((8, 64)).at[:, 5].set(60.0), normal((64, 8), 1)
    plain = jaxq.DotRecipe("mxfp4", None)
    turned = jaxq.DotRecipe("mxfp4", None, hadamard=32)
    results = jax.jit(lambda x, w: (dot(x, w, plain), dot(x, w, turned, jax.random.key(0))))(x, w)
    errors = [np.linalg.norm(y - x @ w) for y in results]
    assert errors[1] < errors[0]


def test_bad_data_stays_in_its_block():
    x = jnp.zeros((2, 32)).at[0, 3].set(jnp.nan).at[1, 20].set(jnp.inf)
    y = np.asarray(applied(jaxq.Hadamard(16, (1,) * 16), x, {1: 16}, jnp.ones(16)))
    assert np.isnan(y[0, :16]).all()
    assert not np.isfinite(y[1, 16:]).any()
    assert (y[0, 16:] == 0).all()
    assert (y[1, :16] == 0).all()


def test_half_precision_is_transformed_in_float32():
    x, w = normal((4, 32)).astype(jnp.bfloat16), jnp.eye(32, dtype=jnp.bfloat16)
    signs = (1,) * 16
    recipe = jaxq.DotRecipe("nvfp4", None, hadamard=jaxq.Hadamard(16, signs))

    @jax.jit
    def transform(x):
        y = jaxq.Hadamard(16).apply(x.astype(jnp.float32), {1: 16}, jnp.ones(16))
        return y.astype(jnp.bfloat16)

    want = jaxq.fake_quant(transform(x), "nvfp4") @ transform(w).T
    assert_same(jaxq.dot_general(x, w, MATMUL, recipe=recipe), want)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jaxq.Hadamard(12), "power of two from 2, got 12"),
        (lambda: jaxq.Hadamard(1), "power of two"),
        (lambda: jaxq.Hadamard(4, (1, 1, -1)), "must be 4 numbers 1 or -1"),
        (lambda: jaxq.Hadamard(2, (1, 2)), "numbers 1 or -1"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=text):
        make()
