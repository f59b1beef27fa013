"""Random bits and keys against `jax.random`, to the bit."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq._jax import draws
from tests.data import slow
from tests.oracle import assert_same

IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


def data(keys):
    return jax.random.key_data(keys)


@pytest.mark.parametrize("impl", [IMPLEMENTATIONS[0], *map(slow, IMPLEMENTATIONS[1:])])
def test_bits_and_keys_match_jax(impl: str):
    key = jax.random.key(2**40 + 7, impl=impl)
    numbers = np.array([0, 5, 2**31 - 1])

    def drawn(module, key):
        """Returns the bits of many shapes and dtypes, and the data of derived keys."""
        shapes, dtypes = ((), (3,), (2, 1, 5)), (jnp.uint8, jnp.uint16, jnp.uint32)
        bits = [module.bits(key, shape, dtype) for shape in shapes for dtype in dtypes]
        return bits, data(module.split(key, 3)), data(module.fold_in(key, 7))

    def of_many(key):
        split = draws.split(key, 3)
        keys = draws.split(split, 2), draws.fold_in(key, numbers), draws.fold_in(split, 7)
        return drawn(draws, key), [data(k) for k in keys]

    def one_by_one(key):
        split = jax.random.split(key, 3)
        keys = (
            [jax.random.split(k, 2) for k in split],
            [jax.random.fold_in(key, n) for n in numbers],
            [jax.random.fold_in(k, 7) for k in split],
        )
        return drawn(jax.random, key), [data(jnp.stack(k)) for k in keys]

    jax.tree.map(assert_same, jax.jit(of_many)(key), jax.jit(one_by_one)(key))


def test_raw_keys_and_unpartitionable_threefry_match_jax():
    bare = jax.random.PRNGKey(3)
    assert_same(draws.bits(bare, (4,), jnp.uint32), jax.random.bits(bare, (4,)))
    with jax.threefry_partitionable(False):
        key = jax.random.key(3)
        assert_same(draws.bits(key, (5,), jnp.uint8), jax.random.bits(key, (5,), jnp.uint8))
        assert_same(data(draws.split(key, 3)), data(jax.random.split(key, 3)))


WRONG_KEYS = {
    "number": (0, TypeError, "got 0"),
    "floats": (np.ones(2, np.float32), TypeError, "got float32 of shape"),
    "several": (np.zeros((3, 2), np.uint32), ValueError, "one random key"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_wrong_keys_are_refused(name: str):
    key, error, text = WRONG_KEYS[name]
    x = jnp.ones((4, 4))

    def product(x):
        product = (((1,), (0,)), ((), ()))
        return jaxq.dot_general(x, x, product, recipe="int8_training", key=key).sum()

    with pytest.raises(error, match=text):
        jaxq.cast(x, "int4", rounding="stochastic", key=key)
    with pytest.raises(error, match=text):
        jaxq.fake_quant(x, jaxq.Recipe("int4", rounding="stochastic"), key=key)
    with pytest.raises(error, match=text):
        jax.grad(product)(x)


def test_vmapped_bits_match_jax():
    keys = jax.random.split(jax.random.key(0), 4)
    bits = jax.vmap(lambda key: draws.bits(key, (2, 3), jnp.uint32))(keys)
    assert_same(bits, jnp.stack([jax.random.bits(key, (2, 3)) for key in keys]))


def test_stochastic_rounding_needs_no_temporary():
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    cast = jax.jit(lambda x, key: jaxq.cast(x, "bfloat16", rounding="stochastic", key=key))
    assert cast.lower(x, key).compile().memory_analysis().temp_size_in_bytes == 0
