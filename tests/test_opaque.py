"""Opaque functions, which stay one equation of a jaxpr, and platform-dependent functions."""

import jax
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq._jax import compat
from jaxq._jax.opaque import by_platform, opaque
from tests.oracle import assert_same, assert_same_trees


def primitives(jaxpr) -> list[str]:
    """Returns the names of equations, including inner ones except those of opaque functions."""
    names = []
    for eqn in jaxpr.eqns:
        inner = [v for v in eqn.params.values() if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
        if not inner or eqn.primitive.name == "jaxq_opaque":
            names.append(eqn.primitive.name)
        else:
            names += [n for v in inner for n in primitives(getattr(v, "jaxpr", v))]
    return names


def test_gradient_of_scan_keeps_quantizer_inside():
    """Checks that constants of `where` do not become large arrays outside of the scan."""

    def loss(x, weights):
        def step(x, w):
            return jaxq.fake_quant(x, "nvfp4") * jaxq.fake_quant(w, "int8_channel"), None

        return lax.scan(step, x, weights)[0].sum()

    x, weights = jnp.ones((8, 32)), jnp.ones((3, 8, 32))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights)
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert [compat.loop_counts(eqn)[0] for eqn in loops] == [0, 0]
    outside = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert "jaxq_opaque" not in outside
    assert primitives(loops[0].params["jaxpr"].jaxpr).count("jaxq_opaque") == 2


def test_opaque_function_with_pytrees():
    def function(tree, none):
        assert none is None
        return {"sum": tree["a"] + tree["b"]}, None, [tree["a"]]

    tree = {"a": jnp.arange(3.0), "b": jnp.ones(3)}
    assert_same_trees(opaque(function, tree, None), function(tree, None))
    got = jax.vmap(lambda a: opaque(function, {"a": a, "b": jnp.float32(1)}, None))(tree["a"])
    assert_same_trees(got, function(tree, None))


def test_platform_function_is_chosen_at_lowering():
    def on_cpu(x, y):
        return lax.select(x > y, x * 1234, y)

    def on_other_platforms(x, y):
        return lax.select(x > y, x * 5678, y)

    def function(x, y):
        return by_platform(on_cpu, on_other_platforms, x, y)

    x, y = jnp.arange(3.0), jnp.zeros(3)
    assert_same(function(x, y), x * 1234)
    assert_same(jax.jit(jax.vmap(function, (0, None)))(x, y[0]), x * 1234)
    assert_same(jax.grad(lambda x: function(x, y).sum())(x + 1), jnp.full(3, 1234.0))
    traced = jax.jit(function).trace(x, y)
    for platform, own, other in (("cpu", "1.234", "5.678"), ("tpu", "5.678", "1.234")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert own in text
        assert other not in text
