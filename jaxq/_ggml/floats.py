"""ggml's scales and codes of MXFP4 and NVFP4, whose elements are E2M1 floats.

Ties are rounded toward zero, and no code is that of minus zero.
"""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._ggml.blocks import FloatBlocks, QuantizedBlocks, divided
from jaxq._ggml.searches import largest
from jaxq._jax.arithmetic import rounded
from jaxq.formats import get_format

__all__ = ["mxfp4", "nvfp4"]

_MAGNITUDES = np.unique(np.abs(get_format("float4_e2m1fn").values))
_LARGEST = float(np.finfo(np.float32).max)
_E4M3 = get_format("float8_e4m3fn").max


def mxfp4(blocks: FloatBlocks) -> QuantizedBlocks:
    """Quantizes blocks of 32 elements to MXFP4, with scales that are powers of two."""
    amax = largest(blocks.x)[0]
    exponent = _floored_log2(jnp.maximum(amax, np.float32(2**-126))) + 125
    exponent = jnp.where(amax > 0, jnp.maximum(exponent, 0), 0)
    bits = jnp.where(exponent > 0, exponent << 23, np.int32(1 << 22))
    d = lax.bitcast_convert_type(bits, jnp.float32)
    return QuantizedBlocks(d, None, _nearest_e2m1(blocks.x, d).T)


def nvfp4(blocks: FloatBlocks) -> QuantizedBlocks:
    """Quantizes blocks of 16 elements to NVFP4, with scales in E4M3."""
    d = _to_e4m3(divided(largest(blocks.x)[0], 6))
    return QuantizedBlocks(d, None, _nearest_e2m1(blocks.x, d).T)


def _floored_log2(x: jax.Array) -> jax.Array:
    """Returns floor(log2(x)) of positive normal numbers as C computes it in float32.

    The logarithm of a number just below 2^k rounds to k if the gap between float32 numbers there is
    wide enough.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) - np.int32(127)
    above = np.arange(-126, 130)  # k, the logarithm of the next power of two.
    with np.errstate(all="ignore"):
        # Half the gap below k, in steps of the numbers below 2^k: one step is 2^-24 / ln 2.
        gap = above.astype(np.float64) - np.nextafter(above.astype(np.float32), np.float32(-1e9))
    steps = np.where(above == 0, 0.0, np.abs(gap) / 2 * np.log(2) * 2.0**24)
    most = jnp.asarray(np.floor(steps).astype(np.int32))
    missing = np.int32(1 << 23) - (bits & np.int32((1 << 23) - 1))
    return exponent + (missing <= most[exponent + 126]).astype(jnp.int32)


def _nearest_e2m1(x: jax.Array, d: jax.Array) -> jax.Array:
    """Returns the codes of the nearest E2M1 numbers; ties go to the smaller magnitude."""
    magnitude, d = jnp.abs(x), d[None]
    best, code = magnitude, jnp.zeros(x.shape, jnp.int32)
    for i, value in enumerate(_MAGNITUDES[1:].tolist(), 1):
        error = jnp.abs(rounded(d * np.float32(value)) - magnitude)
        # XLA on CPU (JAX 0.10) may compute the error of an infinite product as a finite number.
        is_finite = d <= np.float32(min(_LARGEST / value, _LARGEST))
        better = is_finite & (error < best)
        code, best = jnp.where(better, i, code), jnp.where(better, error, best)
    return jnp.where((x < 0) & (code > 0), code + 8, code)


def _to_e4m3(x: jax.Array) -> jax.Array:
    """Returns nonnegative numbers rounded to E4M3, ties away from zero.

    As in ggml, numbers from 248 on become 448.
    """
    x = jnp.clip(x, 0, np.float32(_E4M3))
    steps = jnp.clip((rounded(x * np.float32(512)) + np.float32(0.5)).astype(jnp.int32), 0, 7)
    small = steps.astype(jnp.float32) * np.float32(2**-9)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    code = ((bits - np.int32(120 << 23)) + np.int32(1 << 19)) >> 20
    normal = lax.bitcast_convert_type((code + np.int32(120 << 3)) << 20, jnp.float32)
    normal = jnp.where(code >= 0x78, np.float32(_E4M3), normal)
    return jnp.where(bits >> 23 <= 120, small, normal)
