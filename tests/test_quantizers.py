"""Scales and integers of quantizers against NumPy."""

import functools
import math

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq._jax.arithmetic import _divide_in_integers, _square_root_in_integers, divide
from tests import data
from tests.oracle import assert_same

pytestmark = pytest.mark.optimized


def weights(shape=(12, 8, 5)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def whole(x, recipe: jaxq.Recipe):
    """Returns a `Quantized`, its codes and its values, computed in one program."""
    q = jaxq.quantize(x, recipe)
    return q, q.unpack(), q.dequantize()


@pytest.mark.parametrize(
    ("bits", "axes"),
    [
        *((bits, (-1,)) for bits in (2, 8, 16)),
        *(data.slow(bits, (-1,)) for bits in range(2, 17) if bits not in (2, 8, 16)),
        (3, None),
        (5, (0,)),
        data.slow(8, (1, -3)),
        (12, (1, 2)),
    ],
)
def test_absmax_scales_and_codes_match_numpy(bits: int, axes):
    x = weights()
    granularity = jaxq.PerTensor() if axes is None else jaxq.PerChannel(axes)
    fmt = jaxq.get_format("int8") if bits == 8 else jaxq.IntFormat(f"int{bits}", bits)
    q, unpacked, y = whole(x, jaxq.Recipe(fmt, granularity))
    channel_axes = {a % 3 for a in axes or ()}
    reduced = tuple(a for a in range(3) if a not in channel_axes)
    qmax = np.float32(2 ** (bits - 1) - 1)
    scale = np.abs(x).max(axis=reduced, keepdims=True) / qmax
    assert_same(q.scale, scale)
    integers = np.rint(x / scale)
    codes = integers.astype(np.int32) & (2**bits - 1)
    np.testing.assert_array_equal(unpacked, codes)
    assert_same(y, (integers + 0.0).astype(np.float32) * scale)


@pytest.mark.parametrize(
    ("bits", "signed"),
    [
        *((bits, False) for bits in (3, 4, 16)),
        *(data.slow(bits, False) for bits in range(2, 17) if bits not in (3, 4, 16)),
        *((bits, True) for bits in (2, 8)),
        *(data.slow(bits, True) for bits in (5, 16)),
    ],
)
def test_zero_points_and_codes_match_numpy(bits: int, signed: bool):
    x = weights((6, 40)) + np.float32(0.7)
    fmt = jaxq.IntFormat("custom", bits, signed=signed)
    recipe = jaxq.Recipe(fmt, jaxq.PerChannel((0,)), jaxq.Affine())
    q, unpacked, y = whole(x, recipe)
    low = np.minimum(x.min(1, keepdims=True), 0)
    high = np.maximum(x.max(1, keepdims=True), 0)
    scale = (high - low) / np.float32(2**bits - 1)
    np.testing.assert_allclose(q.scale, scale, rtol=3e-7)
    scale = np.asarray(q.scale)
    zero_point = np.clip(fmt.min_int - np.rint(low / scale), fmt.min_int, fmt.max_int)
    np.testing.assert_array_equal(q.zero_point, zero_point)
    integers = np.clip(np.rint(x / scale) + zero_point, fmt.min_int, fmt.max_int)
    np.testing.assert_array_equal(unpacked, integers.astype(np.int32) & (2**bits - 1))
    assert (np.abs(y - x) <= scale * 1.0001).all()


def test_zero_is_exact_with_a_zero_point():
    x = np.float32([0.0, 0.31, 2.9, -1.7])
    assert jaxq.fake_quant(x, "uint8_tensor")[0] == 0


def test_float_formats_use_full_range():
    x = weights((64, 64))
    q = jaxq.quantize(x, "fp8_e4m3_tensor")
    assert float(jnp.abs(jaxq.decode(q.codes, "float8_e4m3fn")).max()) == 448.0


def test_special_inputs_give_documented_results():
    assert_same(
        jaxq.fake_quant(np.zeros((2, 2), np.float32), "int8_tensor"), np.zeros((2, 2), "f4")
    )
    assert_same(jaxq.fake_quant(np.float32(-3.0), "int8_tensor"), np.float32(-3.0))
    constant = np.full((3,), 2.5, np.float32)
    np.testing.assert_allclose(jaxq.fake_quant(constant, "uint8_tensor"), constant, rtol=1e-6)
    chex.assert_shape(jaxq.fake_quant(np.zeros((0, 3), np.float32), "int8_channel"), (0, 3))
    # A half-precision scale would be zero here, and would make the tensor zero.
    tiny = jnp.asarray([6e-8, -6e-8, 1.2e-7], jnp.float16)
    assert_same(jaxq.fake_quant(tiny, "int8_tensor"), np.asarray(tiny))
    # A NaN in a long array must not be lost in the maximum.
    x = np.zeros(5000, np.float32)
    x[4321] = np.nan
    assert np.isnan(jaxq.fake_quant(x, "int8_tensor")).all()
    # The range is wider than the largest float32 number.
    x = np.float32([-3e38, 3e38])
    np.testing.assert_allclose(jaxq.fake_quant(x, "uint8_tensor"), x, rtol=0.01)


def test_bits_per_weight_counts_scales():
    assert jaxq.get_recipe("int4_channel").bits_per_weight((64, 32)) == 4 + 32 / 64
    assert jaxq.get_recipe("uint8_channel").bits_per_weight((64, 32)) == 8 + 40 / 64
    assert jaxq.get_recipe("int8_tensor").bits_per_weight((10, 10)) == 8.32


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        (jaxq.Recipe("int3"), (2, 5, 7)),
        (jaxq.Recipe("int3"), ()),
        ("uint4_channel", (3, 5)),
        ("nf4_dq", (3, 192)),
        ("nvfp4", (0, 64)),
        ("q4_1", (2, 5, 64)),
        (jaxq.Recipe("int4", outliers=jaxq.Outliers(0.1)), (3, 5)),
    ],
)
def test_nbytes_equals_the_bytes_of_stored_arrays(recipe, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    q = jax.eval_shape(lambda x: jaxq.quantize(x, recipe), x)
    nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(q))
    assert q.recipe.nbytes(shape) == nbytes


def test_stochastic_recipe_takes_a_key_and_is_unbiased():
    recipe = jaxq.Recipe("int4", rounding="stochastic")
    x = weights((50,))
    with pytest.raises(ValueError, match="`key` must be given"):
        jaxq.fake_quant(x, recipe)
    keys = jax.random.split(jax.random.key(0), 4000)
    y = jax.vmap(lambda k: jaxq.fake_quant(x, recipe, key=k))(keys)
    step = np.abs(x).max() / 7
    assert np.abs(y.mean(0) - x).max() < 5 * step / 2 / 4000**0.5
    q = jaxq.quantize(x, recipe, key=keys[0])
    assert_same(q.dequantize(), y[0])


@pytest.mark.parametrize("error", [-3, -1, 0, 1, 3])
def test_division_is_correctly_rounded_with_inexact_quotient(error: int):
    """Simulates a backend whose division has an error of a few ulps."""

    def inexact(a: jax.Array, b: jax.Array) -> jax.Array:
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
    assert_same(jax.jit(lambda a, b: _divide_in_integers(a, b, inexact))(a, b), want, a)
    assert_same(jax.jit(divide)(a, b), want, a)


@pytest.mark.parametrize("error", [-3, 0, 3])
def test_square_root_is_correctly_rounded_with_inexact_root(error: int):
    """Simulates a backend whose square root has an error of a few ulps."""

    def inexact(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(jnp.sqrt(x), jnp.int32) + error
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    x = np.concatenate([data.specials(), data.random_float32(100_000)])
    with np.errstate(invalid="ignore"):
        want = np.sqrt(np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x))
    assert_same(jax.jit(lambda x: _square_root_in_integers(x, inexact))(x), want, x)


def test_division_of_infinities_follows_ieee_754():
    numbers = np.float32([np.inf, -np.inf, np.nan, 5, -5, 0, 3.4028235e38])
    a, b = (m.ravel() for m in np.meshgrid(numbers, np.float32([0.1, 1e38, np.inf, np.nan, -2])))
    with np.errstate(all="ignore"):
        want = a / b
    assert_same(jax.jit(divide)(a, b), want, a)
    assert_same(jax.jit(_divide_in_integers)(a, b), want, a)


@pytest.mark.parametrize("divisor", [127.0, 3.0, 448.0])
def test_division_by_scalar_or_constant_is_exact(divisor: float):
    a = weights((64, 64))
    want = a / np.float32(divisor)
    assert_same(jax.jit(divide)(a, jnp.float32(divisor)), want, a)
    assert_same(jax.jit(lambda a: divide(a, jnp.float32(divisor)))(a), want, a)


def test_unstored_scale_divides_unrounded():
    x = np.float32([[1.0, 0.7, -0.3, 0.1]])
    scaling = jaxq.Symmetric(scale_format="float8_e5m2", stored=False)
    recipe = jaxq.Recipe("int4", jaxq.PerBlock(4), scaling)
    codes = np.rint(x / (np.float32(1) / np.float32(7)))  # The stored scale is 5/32.
    np.testing.assert_array_equal(jaxq.fake_quant(x, recipe), codes * np.float32(5 / 32))


def test_search_avoids_infinite_scales():
    """Uses an amax whose scale overflows float16 unless the range is halved."""
    # Zeros times an infinite scale are NaN, whose bits must not count as small errors.
    x = np.random.default_rng(0).choice(np.float32([-5.5e5, 0, 5.5e5]), (64, 32))
    scaling = jaxq.Symmetric(scale_format="float16", stored=False, search=(1.0, 0.5))
    recipe = jaxq.Recipe("int4", jaxq.PerBlock(32), scaling)
    assert np.isfinite(jaxq.fake_quant(x, recipe)).all()


def test_search_counts_elements_that_a_range_clips():
    """Uses blocks with an outlier far beyond the mean magnitude."""
    x = weights((8, 64))
    x[:, 5] = 3.0 ** np.arange(3, 11)

    def error(*factors: float) -> np.ndarray:
        scaling = jaxq.Symmetric(range="absmean", search=factors)
        y = jaxq.fake_quant(x, jaxq.Recipe("int4", jaxq.PerBlock(64), scaling))
        return ((np.asarray(y, np.float64) - x) ** 2).sum(1)

    least = np.minimum(error(0.5), error(2.0))
    assert (error(0.5) != error(2.0)).all()
    np.testing.assert_allclose(error(0.5, 2.0), least, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 32)])
def test_search_in_empty_tensors(monkeypatch: pytest.MonkeyPatch, devices: int, shape: tuple):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    for granularity in (jaxq.PerTensor(), jaxq.PerToken(), jaxq.PerChannel()):
        scaling = jaxq.Symmetric(search=(1.0, 0.9 + 0.01 * devices))  # Not compiled before.
        recipe = jaxq.Recipe("int4", granularity, scaling)
        chex.assert_shape(jaxq.fake_quant(jnp.zeros(shape), recipe), shape)
