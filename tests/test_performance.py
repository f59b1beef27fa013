"""Deterministic bounds: temporary memory, size of the traced program, compilations, passes."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests import data


def equations(jaxpr) -> int:
    """Equations of a jaxpr that compute something, those of inner calls counted in their place."""
    total = 0
    for eqn in jaxpr.eqns:
        calls = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        if calls:
            total += sum(equations(getattr(v, "jaxpr", v)) for v in calls)
        else:
            total += eqn.primitive.name != "stop_gradient"
    return total


BINARY = [
    name
    for name, fmt in jaxq.catalog.ALL.items()
    if isinstance(fmt, jaxq.FloatFormat | jaxq.IntFormat)
]
# Without mantissa bits a tie asks for the parity of the exponent.
POWERS_OF_TWO = ("float8_e8m0fnu", "binary8p1se", "float4_e3m0")


@pytest.mark.parametrize("name", BINARY)
def test_a_cast_is_at_most_25_equations(name: str):
    jaxpr = jax.make_jaxpr(lambda x: jaxq.cast(x, name))(jnp.ones(8))
    assert 10 < equations(jaxpr.jaxpr) <= (30 if name in POWERS_OF_TWO else 25)


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


@pytest.mark.parametrize("name", data.structures())
def test_temporaries_of_a_quantizer_hold_scales_and_no_tensor(name: str):
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)

    def both(x, cotangent):
        y, pull = jax.vjp(lambda x: jaxq.fake_quant(x, name), x)
        return y, pull(cotangent)[0]

    compiled = jax.jit(both).lower(x, x).compile()
    blocks = np.prod(jaxq.get_quantizer(name).cut(x.shape).counts)
    # A range, a scale, its inverse, a zero point; or what one part in 32 leaves of a long row.
    bound = 36 * blocks + 9 * x.size // 32
    assert compiled.memory_analysis().temp_size_in_bytes <= bound
