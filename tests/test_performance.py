"""Deterministic bounds: temporary memory, size of the traced program, compilations, passes."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq.blocks import Cut
from jaxq.scaling import absmax
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


def compiled_pass(recipe: jaxq.Quantizer, shape: tuple[int, ...]):
    """`fake_quant` as it is computed where its gradient is wanted too."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(lambda x: jax.vjp(lambda x: jaxq.fake_quant(x, recipe), x)[0]).lower(x).compile()


def instructions(compiled) -> dict[str, tuple[int, str]]:
    """What a program runs one after the other: elements of each result, and how it is made."""
    entry = compiled.as_text().split("ENTRY")[1].split("\n}")[0]
    found = re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]\S* (.*)", entry)
    return {
        name: (math.prod(int(n) for n in shape.split(",") if n), made)
        for name, shape, made in found
    }


@pytest.mark.parametrize(
    ("name", "size", "passes"),
    [
        *[(name, None, 2) for name in ("int8_token", "int8_channel", "int8_tensor", "int4_g128")],
        *[(name, None, 2) for name in ("fp8_e4m3_tile128", "nf4", "mxfp8_e4m3", "nvfp4")],
        *[(name, None, 3) for name in ("uint8_channel", "uint4_g128", "q4_0", "q4_1")],
        *[("int4_g128", 128, 2), ("mxfp4", 32, 2), ("nf4", 64, 2), ("nvfp4", 16, 2)],
    ],
)
def test_a_quantizer_reads_the_tensor_once_for_its_range_and_once_more(name, size, passes):
    """Twice for both ends of a range. Nothing else has the tensor's size: no copy, no transpose.

    A size is that of blocks on axis 0.
    """
    recipe = jaxq.get_quantizer(name)
    if size:
        recipe = dataclasses.replace(recipe, granularity=jaxq.PerBlock(size, axes=0))
    steps = instructions(compiled_pass(recipe, (256, 512)))
    (x,) = [name for name, (_, made) in steps.items() if made.startswith("parameter")]
    assert sum(f"{x})" in made or f"{x}," in made for _, made in steps.values()) == passes
    large = [made for size, made in steps.values() if size >= 256 * 512]
    assert sum(not made.startswith(("parameter", "bitcast(")) for made in large) == 1


@pytest.mark.parametrize(
    ("granularity", "one_in"),
    [
        *[(jaxq.PerBlock(size), None) for size in (16, 32, 64, 128)],
        *[(jaxq.PerToken(), None), (jaxq.PerTensor(), 32), (jaxq.PerChannel(-1), 32)],
        *[(jaxq.PerBlock(128, axes=0), 20), (jaxq.PerBlock((128, 128)), 100)],
    ],
    ids=str,
)
def test_a_range_needs_no_temporary_or_a_small_part(granularity, one_in: int | None):
    x = jax.ShapeDtypeStruct((512, 1003 if granularity == jaxq.PerToken() else 1024), jnp.float32)
    cut = Cut(x.shape, granularity.block(x.shape))
    compiled = jax.jit(lambda x: absmax(cut.split(x), cut)).lower(x).compile()
    bound = 4 * x.size // one_in if one_in else 0
    assert compiled.memory_analysis().temp_size_in_bytes <= bound


@pytest.mark.parametrize("name", ["int4_g128", "nf4", "mxfp4", "nvfp4", "int2_g64", "binary"])
def test_packed_codes_are_made_without_a_temporary_of_codes(name: str):
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    compiled = jax.jit(lambda x: jaxq.quantize(x, name)).lower(x).compile()
    blocks = np.prod(jaxq.get_quantizer(name).cut(x.shape).counts)
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * blocks + x.size // 8
