"""Deterministic bounds: temporary memory, size of the traced program, compilations, passes."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq


def equations(jaxpr) -> int:
    """Equations of a jaxpr, those of inner calls counted in their place."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        total += sum(equations(getattr(v, "jaxpr", v)) for v in inner) if inner else 1
    return total


# Formats that reach float32's subnormals take the longer way through integers.
REACH_SUBNORMALS = ("float32", "tf32", "bfloat16", "float8_e8m0fnu")
SHORT = [
    name
    for name, fmt in jaxq.catalog.ALL.items()
    if not isinstance(fmt, jaxq.CodebookFormat) and name not in REACH_SUBNORMALS
]


@pytest.mark.parametrize("name", SHORT)
def test_a_cast_is_at_most_25_equations(name: str):
    jaxpr = jax.make_jaxpr(lambda x: jaxq.cast(x, name, gradient="zero"))(jnp.ones(8))
    assert equations(jaxpr.jaxpr) <= 25 + 1  # + 1: the gradient rule's own call.


@pytest.mark.parametrize("name", jaxq.catalog.ALL)
def test_a_cast_and_its_gradient_need_no_temporary(name: str):
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    compiled = jax.jit(lambda x: jaxq.cast(x, name)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0

    def both(x, cotangent):
        y, pull = jax.vjp(lambda x: jaxq.cast(x, name), x)
        return y, pull(cotangent)[0]

    compiled = jax.jit(both).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0


def test_calls_of_one_shape_compile_once():
    f = jax.jit(lambda x: jaxq.fake_quant(x, "int8_channel"))
    for seed in range(3):
        f(np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32))
    assert f._cache_size() == 1
