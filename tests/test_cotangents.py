"""`grad_cast` compared with `fake_quant` of the cotangent, under JAX transformations."""

import functools

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq.products import with_transpose
from tests import data
from tests.oracle import assert_same

STOCHASTIC = jaxq.Recipe("int4", rounding="stochastic")
COTANGENT = jnp.asarray([7.0, 2.2, -0.4, 3.3])
KEYS = {"new": jax.random.key(3), "old": jax.random.PRNGKey(3)}


def pulled(recipe, x, cotangent, key=None):
    y, pull = jax.vjp(lambda x: jaxq.grad_cast(x, recipe, key), x)
    assert_same(y, x)
    return pull(cotangent)[0]


# One of each kind of kernel.
FORMATS = ["float8_e4m3fn", "bfloat16", "int8", "nf4", "posit8"]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("fmt", data.each(FORMATS, ["float8_e4m3fn", "nf4", "posit8"]))
def test_cotangents_are_rounded_to_every_kind_of_format(fmt: str):
    # The shape of `data.in_pieces`, for which operations are compiled.
    x, cotangent = np.ones(4096, np.float32), np.resize(COTANGENT, 4096)
    for rounding, key in (("nearest_even", None), ("stochastic", KEYS["new"])):
        recipe = jaxq.Recipe(fmt, rounding=rounding)
        want = jaxq.fake_quant(cotangent, recipe, key=key)
        assert_same(pulled(recipe, x, cotangent, key), want)


@pytest.mark.parametrize("kind", ["new", data.slow("old")])
def test_grad_cast_works_under_transformations(kind: str):
    key = KEYS[kind]

    def f(x, key):
        return (jaxq.grad_cast(x**3, STOCHASTIC, key) * COTANGENT).sum()

    x = np.float32([1.0, -0.5, 2.0, 3.0])
    moved = np.float32([1.0, 2.0, 3.0, 4.0])
    quantized = np.asarray(jaxq.fake_quant(COTANGENT, STOCHASTIC, key=key))
    want = quantized * (3 * x**2)
    assert_same(jax.grad(f)(x, key), want)
    keys = jax.random.split(key, 3)
    each = np.stack([jax.grad(f)(x, k) for k in keys])
    assert len(np.unique(each, axis=0)) > 1

    @jax.jit
    def of_one_key(x, key):
        batched = lambda x: jax.vmap(f, (0, None))(x, key).sum()
        gradients = jax.grad(f)(x, key), jax.grad(jax.checkpoint(f))(x, key)
        tangent = jax.jvp(lambda x: f(x, key), (x,), (moved,))[1]
        second = [jac(jax.grad(f))(x, key) for jac in (jax.jacfwd, jax.jacrev)]
        return (*gradients, jax.grad(batched)(x[None])[0]), tangent, second

    @jax.jit
    def of_many_keys(x, keys):
        f_x = jax.grad(f)
        return jax.vmap(f_x, (None, 0))(x, keys), jax.vmap(f_x)(jnp.stack([x] * 3), keys)

    gradients, tangent, second = of_one_key(x, key)
    for got in gradients:
        assert_same(got, want)
    for got in of_many_keys(x, keys):
        assert_same(got, each)
    # Tangents in forward mode are unchanged, and second derivatives are straight-through.
    np.testing.assert_allclose(tangent, (np.asarray(COTANGENT) * 3 * x**2 * moved).sum(), rtol=1e-6)
    for got in second:
        np.testing.assert_array_equal(got, np.diag(quantized * (6 * x)))


def test_every_scan_step_quantizes():
    key = jax.random.key(0)
    keys = jax.random.split(key, 3)

    def f(x):
        step = lambda c, k: (jaxq.grad_cast(c, STOCHASTIC, k) * 1.5, None)
        return jax.lax.scan(step, x, keys)[0] @ COTANGENT

    want = COTANGENT
    for k in keys[::-1]:
        want = jaxq.fake_quant(want * 1.5, STOCHASTIC, key=k)
    assert_same(jax.jit(jax.grad(f))(jnp.ones(4)), want)


def test_sharded_cotangents_equal_unsharded_ones():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    recipe = jaxq.Recipe("int4", jaxq.PerBlock(2))
    cotangent = jnp.arange(8.0)
    x = jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mesh, spec))
    f = lambda x: jaxq.grad_cast(x, recipe)
    whole = jax.jit(lambda x: jax.vjp(f, x)[1](cotangent)[0])(x)
    assert_same(whole, jaxq.fake_quant(cotangent, recipe))
    parts = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_same(jax.jit(lambda x: jax.vjp(parts, x)[1](cotangent)[0])(x), whole)


def test_bfloat16_cotangent_keeps_dtype():
    x = jnp.ones(4, jnp.bfloat16)
    got = pulled("int4_tensor", x, COTANGENT.astype(jnp.bfloat16))
    chex.assert_type(got, jnp.bfloat16)
    assert_same(got, jaxq.fake_quant(COTANGENT.astype(jnp.bfloat16), "int4_tensor"))


def test_invalid_arguments_raise_in_forward_pass():
    with pytest.raises(ValueError, match="`key` must be given"):
        jaxq.grad_cast(jnp.ones(4), STOCHASTIC)
    with pytest.raises(ValueError, match="draws no random bits"):
        jaxq.grad_cast(jnp.ones(4), "int4_tensor", jax.random.key(0))
    with pytest.raises(ValueError, match="does not divide axis 0"):
        jaxq.grad_cast(jnp.ones(4), "mxfp4")
    with pytest.raises(TypeError, match="got int32"):
        jaxq.grad_cast(jnp.ones(4, jnp.int32), "int4_tensor")


def test_custom_transpose_with_residuals():
    """Uses a custom transpose that differs from the true transpose of the function."""

    def f(x, scale):
        return with_transpose(
            lambda x, scale: x * scale, lambda g, scale: g * scale + 1, jnp.sin(x), scale
        )

    x, scale = jnp.asarray([0.5, 1.0]), jnp.asarray([2.0, 3.0])
    one = jnp.ones(2)
    want = (np.sin(x), np.cos(x))
    value, tangent = jax.jvp(f, (x, scale), (one, one))
    np.testing.assert_allclose(value, want[0] * scale, rtol=1e-6)
    np.testing.assert_allclose(tangent, want[1] * scale + want[0], rtol=1e-6)
    pull = jax.jit(lambda x, scale: jax.vjp(lambda x: f(x, scale), x)[1](one)[0])
    np.testing.assert_allclose(pull(x, scale), want[1] * (scale + 1), rtol=1e-6)
    # Under vmap an unbatched x still has a separate cotangent for each element.
    many = jnp.stack([scale, scale + 1])
    got = jax.vmap(functools.partial(jax.vjp, f), (None, 0))(x, many)[0]
    np.testing.assert_allclose(got, want[0][None] * many, rtol=1e-6)
    total = jax.grad(lambda x: jax.vmap(f, (None, 0))(x, many).sum())(x)
    np.testing.assert_allclose(total, (want[1][None] * (many + 1)).sum(0), rtol=1e-6)
