"""Scales and integers of the quantizers against plain NumPy."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq.scaling import _divide_in_integers, divide
from tests import data
from tests.oracle import assert_same


def weights(shape=(12, 8, 5)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "axes"),
    [*((bits, (-1,)) for bits in range(2, 17)), (3, None), (5, (0,)), (8, (1, -3)), (12, (1, 2))],
)
def test_absmax_of_any_width_and_axis(bits: int, axes):
    x = weights()
    granularity = jaxq.PerTensor() if axes is None else jaxq.PerChannel(axes)
    fmt = jaxq.get_format("int8") if bits == 8 else jaxq.IntFormat(f"int{bits}", bits)
    q = jaxq.quantize(x, jaxq.Quantizer(fmt, granularity))
    kept = {a % 3 for a in axes or ()}
    reduced = tuple(a for a in range(3) if a not in kept)
    qmax = np.float32(2 ** (bits - 1) - 1)
    scale = np.abs(x).max(axis=reduced, keepdims=True) / qmax
    assert_same(q.scale, scale)
    integers = np.rint(x / scale)
    codes = integers.astype(np.int32) & (2**bits - 1)
    np.testing.assert_array_equal(q.unpack(), codes)
    assert_same(q.dequantize(), (integers + 0.0).astype(np.float32) * scale)


@pytest.mark.parametrize(
    ("bits", "signed"),
    [*((bits, False) for bits in range(2, 17)), (2, True), (5, True), (8, True), (16, True)],
)
def test_zero_point_of_any_width(bits: int, signed: bool):
    x = weights((6, 40)) + np.float32(0.7)
    fmt = jaxq.IntFormat("custom", bits, signed=signed)
    q = jaxq.quantize(x, jaxq.Quantizer(fmt, jaxq.PerChannel((0,)), zero_point="integer"))
    low = np.minimum(x.min(1, keepdims=True), 0)
    high = np.maximum(x.max(1, keepdims=True), 0)
    scale = (high - low) / np.float32(2**bits - 1)
    np.testing.assert_allclose(q.scale, scale, rtol=3e-7)
    scale = np.asarray(q.scale)
    zero_point = np.clip(fmt.min_int - np.rint(low / scale), fmt.min_int, fmt.max_int)
    np.testing.assert_array_equal(q.zero_point, zero_point)
    integers = np.clip(np.rint(x / scale) + zero_point, fmt.min_int, fmt.max_int)
    np.testing.assert_array_equal(q.unpack(), integers.astype(np.int32) & (2**bits - 1))
    assert (np.abs(q.dequantize() - x) <= scale * 1.0001).all()


def test_zero_is_exact_with_a_zero_point():
    x = np.float32([0.0, 0.31, 2.9, -1.7])
    assert jaxq.fake_quant(x, "uint8_tensor")[0] == 0


def test_float_formats_use_their_whole_range():
    x = weights((64, 64))
    q = jaxq.quantize(x, "fp8_e4m3_tensor")
    assert float(jnp.abs(jaxq.decode(q.codes, "float8_e4m3fn")).max()) == 448.0


def test_defined_for_every_kind_of_input():
    assert_same(
        jaxq.fake_quant(np.zeros((2, 2), np.float32), "int8_tensor"), np.zeros((2, 2), "f4")
    )
    assert_same(jaxq.fake_quant(np.float32(-3.0), "int8_tensor"), np.float32(-3.0))
    constant = np.full((3,), 2.5, np.float32)
    np.testing.assert_allclose(jaxq.fake_quant(constant, "uint8_tensor"), constant, rtol=1e-6)
    assert jaxq.fake_quant(np.zeros((0, 3), np.float32), "int8_channel").shape == (0, 3)
    # A half-precision scale would be zero here, and the tensor with it.
    tiny = jnp.asarray([6e-8, -6e-8, 1.2e-7], jnp.float16)
    assert_same(jaxq.fake_quant(tiny, "int8_tensor"), np.asarray(tiny))
    # The largest NaN-free maximum of a long array is not lost, nor a NaN in one.
    x = np.zeros(5000, np.float32)
    x[4321] = np.nan
    assert np.isnan(jaxq.fake_quant(x, "int8_tensor")).all()
    # A range wider than the largest float32.
    x = np.float32([-3e38, 3e38])
    np.testing.assert_allclose(jaxq.fake_quant(x, "uint8_tensor"), x, rtol=0.01)


def test_bits_per_weight_counts_scales():
    assert jaxq.get_quantizer("int4_channel").bits_per_weight((64, 32)) == 4 + 32 / 64
    assert jaxq.get_quantizer("uint8_channel").bits_per_weight((64, 32)) == 8 + 40 / 64
    assert jaxq.get_quantizer("int8_tensor").bits_per_weight((10, 10)) == 8.32


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        ("int3", (2, 5, 7)),
        ("int3", ()),
        ("uint4_channel", (3, 5)),
        ("nf4_dq", (3, 192)),
        ("nvfp4", (0, 64)),
        ("q4_1", (2, 5, 64)),
        (jaxq.Quantizer("int4", outliers=jaxq.Outliers(0.1)), (3, 5)),
    ],
)
def test_bytes_are_told_from_the_shape(recipe, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    q = jax.eval_shape(lambda x: jaxq.quantize(x, recipe), x)
    nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(q))
    assert q.recipe.nbytes(shape) == nbytes


def test_stochastic_recipe_takes_a_key_and_is_unbiased():
    recipe = jaxq.Quantizer("int4", rounding="stochastic")
    x = weights((50,))
    with pytest.raises(ValueError, match="needs either `key`"):
        jaxq.fake_quant(x, recipe)
    keys = jax.random.split(jax.random.key(0), 4000)
    y = jax.vmap(lambda k: jaxq.fake_quant(x, recipe, key=k))(keys)
    step = np.abs(x).max() / 7
    assert np.abs(y.mean(0) - x).max() < 5 * step / 2 / 4000**0.5
    q = jaxq.quantize(x, recipe, key=keys[0])
    assert_same(q.dequantize(), y[0])


@pytest.mark.parametrize("error", [-3, -1, 0, 1, 3])
def test_division_is_correctly_rounded_from_any_near_quotient(error: int):
    """As on a backend whose own division is a few ulps off."""

    def off(a: jax.Array, b: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(a / b, jnp.int32) + error
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    a = data.random_float32(100_000)
    b = np.abs(data.random_float32(100_000)[::-1])
    b = np.where(b >= np.finfo(np.float32).tiny, b, np.float32(127))
    a = np.where(np.isinf(a), np.float32(np.nan), np.where(np.abs(a) < 2.0**-126, 0, a))
    with np.errstate(all="ignore"):
        want = (a / b).astype(np.float32)
    want = np.where((np.abs(want) < 2.0**-126) & (want == want), np.copysign(0, a), want)
    want = want.astype(np.float32)
    assert_same(jax.jit(lambda a, b: _divide_in_integers(a, b, off))(a, b), want, a)
    assert_same(jax.jit(divide)(a, b), want, a)


@pytest.mark.parametrize("divisor", [127.0, 3.0, 448.0])
def test_division_by_a_scalar_or_a_constant_is_a_division(divisor: float):
    a = weights((64, 64))
    want = a / np.float32(divisor)
    assert_same(jax.jit(divide)(a, jnp.float32(divisor)), want, a)
    assert_same(jax.jit(lambda a: divide(a, jnp.float32(divisor)))(a), want, a)
