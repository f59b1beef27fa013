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


# "unsafe_rbg" is slow-only, because it splits like the first and draws like the second.
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS[:2], slow(IMPLEMENTATIONS[2])])
def test_bits_and_keys_match_jax(impl: str):
    key = jax.random.key(2**40 + 7, impl=impl)
    for shape in ((), (3,), (2, 1, 5)):
        for dtype in (jnp.uint8, jnp.uint16, jnp.uint32):
            assert_same(draws.bits(key, shape, dtype), jax.random.bits(key, shape, dtype))
    split = draws.split(key, 3)
    assert_same(data(split), data(jax.random.split(key, 3)))
    each = jnp.stack([jax.random.split(k, 2) for k in split])
    assert_same(data(draws.split(split, 2)), data(each))
    numbers = np.array([0, 5, 2**31 - 1])
    each = jnp.stack([jax.random.fold_in(key, n) for n in numbers])
    assert_same(data(draws.fold_in(key, numbers)), data(each))
    assert_same(data(draws.fold_in(key, 7)), data(jax.random.fold_in(key, 7)))
    each = jnp.stack([jax.random.fold_in(k, 7) for k in split])
    assert_same(data(draws.fold_in(split, 7)), data(each))


def test_raw_keys_and_unpartitionable_threefry_match_jax():
    bare = jax.random.PRNGKey(3)
    assert_same(draws.bits(bare, (4,), jnp.uint32), jax.random.bits(bare, (4,)))
    with jax.threefry_partitionable(False):
        key = jax.random.key(3)
        assert_same(draws.bits(key, (5,), jnp.uint8), jax.random.bits(key, (5,), jnp.uint8))
        assert_same(data(draws.split(key, 3)), data(jax.random.split(key, 3)))


def test_vmapped_bits_match_jax():
    keys = jax.random.split(jax.random.key(0), 4)
    bits = jax.vmap(lambda key: draws.bits(key, (2, 3), jnp.uint32))(keys)
    assert_same(bits, jnp.stack([jax.random.bits(key, (2, 3)) for key in keys]))


def test_stochastic_rounding_needs_no_temporary():
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    cast = jax.jit(lambda x, key: jaxq.cast(x, "bfloat16", rounding="stochastic", key=key))
    assert cast.lower(x, key).compile().memory_analysis().temp_size_in_bytes == 0
