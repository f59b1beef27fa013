"""Second-level scales and scale searches against NumPy."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import Affine, Symmetric
from tests import data
from tests.oracle import assert_same

F = np.float32


def weights(shape=(64, 512), seed=0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_t(5, shape).astype(F)
    x[1, :64] = 0
    return x


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns the index of the nearest level; ties give the lower one."""
    return np.abs(x[..., None].astype(np.float64) - levels.astype(np.float64)).argmin(-1)


def test_double_quantization_matches_qlora():
    x = weights()
    q = jaxq.quantize(x, "nf4_dq")
    amax = np.abs(x.reshape(-1, 64)).max(1)
    nf4, dynamic = (np.sort(np.float32(jaxq.get_format(n).levels)) for n in ("nf4", "dynamic8"))
    units = x.reshape(-1, 64) / np.where(amax, amax, F(1))[:, None]
    codes = nearest(units, nf4)
    np.testing.assert_array_equal(q.unpack().reshape(-1, 64), codes)
    second, mean = (np.asarray(a) for a in q.second)
    np.testing.assert_allclose(mean, amax.mean(dtype=np.float64), rtol=1e-6)
    centered = (amax - mean).reshape(-1, 256)
    assert_same(second, np.abs(centered).max(1))
    index = nearest(centered / second[:, None], dynamic)
    np.testing.assert_array_equal(q.scale.reshape(-1, 256), index)
    steps = (dynamic[index] * second[:, None] + mean).reshape(-1, 1)
    assert_same(q.scales.reshape(-1, 1), steps)
    assert_same(q.dequantize(), (nf4[codes] * steps).reshape(x.shape))
    assert jaxq.get_recipe("nf4_dq").bits_per_weight((4096, 4096)) == pytest.approx(4.127, 1e-4)


@pytest.mark.parametrize(
    "shape", [data.slow((2, 64)), (3, 320), (0, 64), data.slow((64,))], ids=str
)
def test_double_quantization_takes_few_or_no_scales(shape):
    x = np.resize(weights(), shape).astype(F)
    assert_same(jaxq.fake_quant(x, "nf4_dq"), jaxq.quantize(x, "nf4_dq").dequantize())


def test_nan_affects_its_second_level_block():
    x = weights()
    clean = jaxq.fake_quant(x, "nf4_dq")
    x[40, 3] = np.nan  # The scales of row 40 have the indices 320 to 327.
    y = np.asarray(jaxq.fake_quant(x, "nf4_dq"))
    assert np.isnan(y[32:]).all()
    assert ((y[:32] - clean[:32]) ** 2).mean() < 1e-4  # Only the mean of the scales differs.
    assert_same(jaxq.quantize(x, "nf4_dq").dequantize(), y)


def test_selected_rows_keep_their_values_and_second_scales():
    q = jaxq.quantize(weights((4, 64 * 256)), "nf4_dq")
    y = np.asarray(q.dequantize())
    assert_same(q[2].dequantize(), y[2])
    assert_same(q[1:3].dequantize(), y[1:3])
    with pytest.raises(ValueError, match="share second-level scales"):
        jaxq.quantize(weights(), "nf4_dq")[5]
    both = jax.vmap(lambda x: jaxq.quantize(x, "nf4_dq"))(jnp.stack([weights(), weights(seed=1)]))
    assert_same(both[1].dequantize(), jaxq.fake_quant(weights(seed=1), "nf4_dq"))


def test_four_over_six_matches_transformer_engine():
    """Compares with TransformerEngine's choice of the scale with the smaller squared error."""
    x = weights((32, 256))
    blocks = x.reshape(-1, 16)
    q = jaxq.quantize(x, "nvfp4_4over6")
    enlarge = F(256 * 6) / np.abs(x).max()
    amax = np.abs(blocks).max(1, keepdims=True)
    results, errors, scales = [], [], []
    for factor in (F(1), F(1.5)):
        scale = np.minimum(amax * factor * (enlarge * F(1 / 6)), F(448))
        scale = scale.astype(ml_dtypes.float8_e4m3fn)
        step = scale.astype(F) * (F(1) / enlarge)
        with np.errstate(divide="ignore"):
            inverse = np.minimum(F(1) / step, np.finfo(F).max)
        units = np.clip(blocks * inverse, F(-6), F(6)).astype(ml_dtypes.float4_e2m1fn)
        y = units.astype(F) * step
        results.append(y)
        scales.append(scale)
        errors.append(((y.astype(np.float64) - blocks) ** 2).sum(1))
    gap = np.abs(errors[0] - errors[1]) / np.maximum(errors[0], 1e-30)
    assert gap[amax[:, 0] > 0].min() > 1e-4  # Without ties the choice is unambiguous.
    four = errors[1] < errors[0]
    assert 0.2 < four.mean() < 0.8
    want = np.where(four[:, None], results[1], results[0])
    assert_same(q.dequantize().reshape(-1, 16), want)
    chosen = np.where(four[:, None], scales[1].view(np.uint8), scales[0].view(np.uint8))
    np.testing.assert_array_equal(np.asarray(q.scale).reshape(-1, 1), chosen)


def test_equal_errors_choose_first_factor():
    """Uses data on the grids of two factors, so that their errors are equal."""
    x = np.tile(F([4, 2, 1, 0.5]), 64).reshape(4, 64)
    recipe = jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(16), Symmetric(search=(1.5, 0.75, 3.0)))
    q = jaxq.quantize(x, recipe)
    assert (np.asarray(q.scale) == 1).all()
    assert_same(q.dequantize(), x)


@pytest.mark.parametrize(
    "recipe",
    [
        data.slow(jaxq.Recipe("int3", jaxq.PerBlock(32), Symmetric(search=(1.0, 0.8, 0.6)))),
        data.slow(jaxq.Recipe("int4", scaling=Symmetric(search=(1.0, 0.8, 0.6)))),
        jaxq.Recipe("uint3", jaxq.PerBlock(32), Affine(search=(1.0, 0.8))),
        data.slow(jaxq.Recipe("nf4", jaxq.PerBlock((8, 16)), Symmetric(search=(1.0, 0.9)))),
        data.slow(jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(32), jaxq.MX(search=(1.0, 2.0)))),
    ],
)
def test_search_finds_best_factor(recipe):
    x = weights((16, 64))
    y = np.asarray(jaxq.fake_quant(x, recipe))
    assert_same(jaxq.quantize(x, recipe).dequantize(), y)
    rows, columns = recipe.cut(x.shape).block

    def errors(y):
        squares = (np.asarray(y, np.float64) - x) ** 2
        return squares.reshape(16 // rows, rows, 64 // columns, columns).sum((1, 3))

    def with_factor(factor):
        scaling = dataclasses.replace(recipe.scaling, search=(factor,))
        return dataclasses.replace(recipe, scaling=scaling)

    single = [errors(jaxq.fake_quant(x, with_factor(f))) for f in recipe.scaling.search]
    np.testing.assert_allclose(errors(y), np.min(single, 0), rtol=1e-3)
    assert (errors(y) < single[0]).any()


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="`largest` must be a positive number"):
        jaxq.TwoLevel(largest=0)
    with pytest.raises(ValueError, match="`block` must be an integer of at least 1"):
        jaxq.DoubleQuant(block=0)
    with pytest.raises(ValueError, match="up to the largest float8_e4m3fn, got 1000"):
        jaxq.TwoLevel(largest=1000.0)
    for make in (jaxq.TwoLevel, jaxq.DoubleQuant):
        with pytest.raises(ValueError, match="must have fewer than 32 bits"):
            make(scale_format="float32")


def test_search_avoids_scales_that_are_zero():
    x = np.zeros((1, 32), np.float32)
    x[0, 0], x[0, 16] = 6.0, 6.0 * 0.9 * 2.0**-18
    assert (
        jaxq.fake_quant(
            x, jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(16), jaxq.TwoLevel(largest=256.0))
        )[0, 16]
        == 0
    )
    assert jaxq.fake_quant(x, "nvfp4_4over6")[0, 16] > 0
