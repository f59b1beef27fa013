"""GGUF blocks, bytewise against the gguf package."""

import chex
import jax
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType

import jaxq
from jaxq.interop import gguf
from tests import data
from tests.oracle import assert_same

PACK, UNPACK = jax.jit(gguf.pack), jax.jit(gguf.unpack, static_argnums=1)
NAMES = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]


def tensors() -> np.ndarray:
    """Returns rows of many scales and difficult values."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 256)) * np.exp2(rng.integers(-30, 31, (128, 1)))
    x[64:] *= np.exp2(rng.integers(-12, 1, x[64:].shape))
    x = x.astype(np.float32)
    x[0], x[1] = 0, -0.0
    x[2] = rng.integers(-8, 9, 256)  # Ties, and extremes of both signs.
    x[3] = np.tile(np.float32([3, -3]), 128)
    x[4] = np.rint(x[4] * 8) / 8 + 0.0  # No -0, because NumPy may return either zero as minimum.
    x[5] = np.abs(x[5])
    x[6] = -x[5]
    x[7] = 2.5
    x[8] *= np.float32(1e-30)  # The float16 scale is 0.
    x[9] *= np.float32(1e30)  # The float16 scale is infinite.
    # Numbers just below 0.5, whose float32 sum with 8.5 or 16.5 rounds up.
    x[10] = np.nextafter(np.float32(0.5), np.float32(0))
    x[10, ::32] = -8
    x[11] = x[10]
    x[11, ::32] = -16
    return x


@pytest.mark.parametrize("name", data.each(NAMES, ["q8_0", "q5_1"]))
def test_bytes_and_values_match_gguf(name: str):
    x, kind = tensors(), GGMLQuantizationType[name.upper()]
    # In ggml, unlike in this package, blocks of minus zeros have the scale of blocks of zeros.
    signed = name in ("q4_0", "q5_0")
    with np.errstate(all="ignore"):
        want = quants.quantize(np.where(x == 0, 0, x) if signed else x, kind)
        values = quants.dequantize(want, kind)
    q = jaxq.quantize(x, name)
    np.testing.assert_array_equal(PACK(q), want)
    assert_same(q.dequantize(), values, x)
    again = UNPACK(want, name)
    chex.assert_shape(again, x.shape)
    assert_same(again.dequantize(), values, x)
    np.testing.assert_array_equal(PACK(again), want)


@pytest.mark.parametrize(
    "shape", [data.slow((32,)), (2, 4, 64), data.slow((3, 0)), (0, 32)], ids=str
)
def test_packing_keeps_shapes_and_values(shape):
    q = jaxq.quantize(np.resize(tensors()[12:], shape), "q5_1")
    packed = PACK(q)
    chex.assert_shape(packed, (*shape[:-1], shape[-1] // 32 * 24))
    assert_same(UNPACK(packed, "q5_1").dequantize(), q.dequantize())


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="must have the recipe of a block type"):
        gguf.pack(jaxq.quantize(np.ones(32, np.float32), "int8_tensor"))
    with pytest.raises(ValueError, match="one that holds q8_0: q8_0, got 'q4_0'"):
        gguf.pack(jaxq.quantize(np.ones(32, np.float32), "q8_0"), "q4_0")
    with pytest.raises(ValueError, match=r"No GGUF type .* Did you mean mxfp4"):
        gguf.unpack(np.zeros(17, np.uint8), "mxfp4_ggml")
    with pytest.raises(ValueError, match="18 bytes, which must divide"):
        gguf.unpack(np.zeros(17, np.uint8), "q4_0")
    with pytest.raises(TypeError, match="must be uint8"):
        gguf.unpack(np.zeros(18, np.int8), "q4_0")
