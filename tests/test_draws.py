"""Random bits and keys against `jax.random`, to the bit; functions that stay one equation."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import draws
from jaxq.sealed import sealed
from jaxq.transforms import compat
from tests.oracle import assert_same

IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


def data(keys):
    return jax.random.key_data(keys)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bits_and_keys_are_those_of_jax(impl: str):
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


def test_bare_numbers_and_the_older_way_to_count_are_those_of_jax():
    bare = jax.random.PRNGKey(3)
    assert_same(draws.bits(bare, (4,), jnp.uint32), jax.random.bits(bare, (4,)))
    with jax.threefry_partitionable(False):
        key = jax.random.key(3)
        assert_same(draws.bits(key, (5,), jnp.uint8), jax.random.bits(key, (5,), jnp.uint8))
        assert_same(data(draws.split(key, 3)), data(jax.random.split(key, 3)))


def test_bits_are_the_same_under_vmap_and_on_each_device():
    keys = jax.random.split(jax.random.key(0), 4)
    bits = jax.vmap(lambda key: draws.bits(key, (2, 3), jnp.uint32))(keys)
    assert_same(bits, jnp.stack([jax.random.bits(key, (2, 3)) for key in keys]))


def test_stochastic_rounding_is_one_pass_without_a_temporary():
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    cast = jax.jit(lambda x, key: jaxq.cast(x, "bfloat16", rounding="stochastic", key=key))
    assert cast.lower(x, key).compile().memory_analysis().temp_size_in_bytes == 0


def primitives(jaxpr) -> list[str]:
    """The names of equations, those of inner programs in their place, but for sealed ones."""
    names = []
    for eqn in jaxpr.eqns:
        inner = [v for v in eqn.params.values() if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
        if not inner or eqn.primitive.name == "jaxq_sealed":
            names.append(eqn.primitive.name)
        else:
            names += [n for v in inner for n in primitives(getattr(v, "jaxpr", v))]
    return names


def test_the_gradient_of_a_scan_moves_nothing_of_a_quantizer_out_of_it():
    """Else each constant of a `where` is an array of the tensor's size, read in every turn."""

    def loss(x, weights):
        def turn(x, w):
            return jaxq.fake_quant(x, "nvfp4") * jaxq.fake_quant(w, "int8_channel"), None

        return lax.scan(turn, x, weights)[0].sum()

    x, weights = jnp.ones((8, 32)), jnp.ones((3, 8, 32))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights)
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert [compat.loop_counts(eqn)[0] for eqn in loops] == [0, 0]
    outside = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert "jaxq_sealed" not in outside
    assert primitives(loops[0].params["jaxpr"].jaxpr).count("jaxq_sealed") == 2


def test_a_sealed_function_takes_and_gives_trees():
    def function(tree, none):
        assert none is None
        return {"sum": tree["a"] + tree["b"]}, None, [tree["a"]]

    tree = {"a": jnp.arange(3.0), "b": jnp.ones(3)}
    jax.tree.map(assert_same, sealed(function, tree, None), function(tree, None))
    got = jax.vmap(lambda a: sealed(function, {"a": a, "b": jnp.float32(1)}, None))(tree["a"])
    jax.tree.map(assert_same, got, function(tree, None))
