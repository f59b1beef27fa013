"""Casts have the same bits inside fused programs, in scans and on several devices."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests import data
from tests.oracle import assert_same

pytestmark = pytest.mark.optimized

NAMES = data.each(
    ["bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn", "int8", "nf4"],
    ["bfloat16", "float8_e4m3fn", "int8", "nf4"],
)


def normal(*shape: int) -> jax.Array:
    return data.normal(shape)


def cast_alone(x: jax.Array, name: str) -> np.ndarray:
    """Casts an array outside of any program."""
    return np.asarray(jaxq.cast(np.asarray(x), name))


@pytest.mark.parametrize("name", NAMES)
def test_cast_between_two_products_has_the_same_bits(name: str):
    a, b = normal(64, 32), normal(32, 48)

    @jax.jit
    def program(a, b):
        product = a @ b
        snapped = jaxq.cast(product, name)
        return product, snapped, snapped @ b.T

    product, snapped, after = program(a, b)
    assert_same(snapped, cast_alone(product, name), product)
    assert_same(after, jax.jit(jnp.matmul)(snapped, b.T))


@pytest.mark.parametrize("name", NAMES)
def test_cast_in_a_layer_norm_has_the_same_bits(name: str):
    x, gain = normal(64, 32), 1 + normal(32) / 8

    @jax.jit
    def program(x, gain):
        scaled = jax.nn.standardize(x) * gain[None, :]
        return scaled, jaxq.cast(jaxq.cast(scaled, name) * 1.0, name)

    scaled, y = program(x, gain)
    assert_same(y, cast_alone(scaled, name), scaled)


@pytest.mark.parametrize("name", NAMES)
def test_cast_in_a_scan_has_the_same_bits(name: str):
    x = normal(16, 32)

    def step(state, row):
        state = jaxq.cast(state * 0.75 + row, name)
        return state, state

    _, states = jax.jit(lambda x: jax.lax.scan(step, jnp.zeros(32), x))(x)
    state = jnp.zeros(32)
    update = jax.jit(lambda s, r: s * 0.75 + r)
    for row, want in zip(x, states, strict=True):
        state = jaxq.cast(update(state, row), name)
        assert_same(state, want)


def test_bfloat16_cast_is_not_removed():
    """Checks that XLA cannot remove a cast as a pair of conversions with excess precision."""
    x = data.random_float32(10_000)
    text = jax.jit(lambda x: jaxq.cast(x, "bfloat16")).lower(x).as_text()
    assert "bf16" not in text
    y = jax.jit(lambda x: jaxq.cast(x.astype(jnp.bfloat16), "float8_e4m3fn"))(x)
    chex.assert_type(y, jnp.bfloat16)


# The smallest values of takums are outside the range of float32.
@pytest.mark.parametrize(
    "fmt",
    data.each_format(fmt for name, fmt in jaxq.formats.FORMATS.items() if "takum" not in name),
    ids=lambda fmt: fmt.name,
)
def test_float32_subnormals_are_never_flushed(fmt):
    """Uses a computed array, so that XLA fuses the cast with its computation."""
    least = np.float32(2.0**-149)
    bits = np.arange(1, 1000, dtype=np.int32)
    y = jax.jit(
        lambda bits: jaxq.cast(jax.lax.bitcast_convert_type(bits, jnp.float32), fmt, rounding="up")
    )(bits)
    want = fmt.values[fmt.values > 0].min(initial=fmt.min_positive) if fmt.bits <= 16 else None
    if fmt.name == "int1":  # Its values are -1 and 0.
        want = 0.0
    if fmt.name == "float32":
        assert_same(y, bits.view(np.float32))
    elif want is not None:
        assert (np.asarray(y).view(np.int32) == np.float32(want).view(np.int32)).all()
    else:
        assert (np.asarray(y) >= least).all()


@pytest.mark.parametrize("name", data.each(data.structures(), data.few()))
@pytest.mark.parametrize("spec", [("a", "b"), data.slow((None, ("a", "b")))], ids=str)
def test_sharded_quantizers_agree(name: str, spec: tuple):
    x = np.asarray(normal(128, 256))
    want = np.asarray(jaxq.fake_quant(x, name))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    got = jax.jit(lambda x: jaxq.fake_quant(x, name))(jax.device_put(x, sharding))
    assert_same(got, want)


def test_stochastic_rounding_under_vmap_uses_each_key():
    keys = jax.random.split(jax.random.key(0), 4)
    x = normal(64)
    f = lambda k: jaxq.cast(x, "int4", rounding="stochastic", key=k)
    rows = jax.vmap(f)(keys)
    for key, row in zip(keys, rows, strict=True):
        assert_same(row, f(key))
    assert len({row.tobytes() for row in np.asarray(rows)}) == 4


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("name", data.each(["nvfp4", "nvfp4_tile16", "nvfp4_4over6"], ["nvfp4"]))
def test_programs_for_one_device_give_the_same_bits(
    name: str, rounding: str, monkeypatch: pytest.MonkeyPatch
):
    """Traces as on one device, where arrays with a value per block are vectors."""
    recipe = dataclasses.replace(jaxq.get_recipe(name), rounding=rounding)
    key = jax.random.key(1) if rounding == "stochastic" else None
    x = normal(48, 64).at[3, 5].set(np.nan).at[20].set(0.0)
    expected = jaxq.quantize(x, recipe, key=key)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    quantized = jaxq.quantize(x, recipe, key=key)
    simulated = jaxq.fake_quant(x, recipe, key=key)
    jax.clear_caches()
    assert_same(np.asarray(simulated), np.asarray(expected.dequantize()))
    for one, several in zip(jax.tree.leaves(quantized), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(several))
