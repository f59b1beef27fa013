"""Statistics of tensors and of quantization errors, from their sums (`_tallies.py`)."""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import Layout, where
from jaxq.products import Scaled, Tally

__all__ = ["finished"]

_FLOAT32 = Layout.of(np.dtype(np.float32))
_ZERO, _ONE = np.float32(0), np.float32(1)


def finished(tally: Tally) -> dict[str, jax.Array]:
    """Returns the statistics of a tally by name; the leading axes of its numbers are kept."""
    found = {}
    for prefix, own in tally.split().items():
        named = {**_of_tensor(own), **_of_errors(own), **_of_scales(own)}
        found |= {f"{prefix}/{name}": x for name, x in named.items()}
    return found


def _of_tensor(own: Tally) -> dict[str, jax.Array]:
    if "count" not in own.counts:
        return {}
    count, lost = own.counts["count"], own.counts["nonfinite"]
    finite = count - lost
    amax, small = own.largest["amax"], _decoded(own.largest["small"])
    found = {
        "amax": _known(amax, count),
        "smallest": _known(small, amax),
        "rms": _root_mean(own.scaled["squares"], finite),
        "mean": _mean(own.scaled["sum"], finite),
        "zeros": _share(own.counts["zeros"], finite),
        "nonfinite": _share(lost, count),
        "range_bits": _known(jnp.log2(amax) - jnp.log2(small), amax),
    }
    if "exponents" in own.added:
        found["exponents"] = own.added["exponents"]
    return found


def _of_errors(own: Tally) -> dict[str, jax.Array]:
    if "kept" not in own.counts:
        return {}
    kept, lost = own.counts["kept"], own.counts["lost"]
    signal, noise = own.scaled["signal"], own.scaled["noise"]
    octaves = (signal.exponent - noise.exponent) * np.float32(10 * np.log10(2))
    ratio = jnp.log10(where(noise.value > 0, signal.value / noise.value, _ONE))
    decibels = where(noise.value > 0, octaves + np.float32(10) * ratio, np.float32(np.inf))
    found = {
        "sqnr_db": _known(decibels, kept),
        "mse": _mean(noise, kept),
        "lost": _share(lost, kept + lost),
    }
    if "drift" in own.scaled:
        found["bias"] = _mean(own.scaled["drift"], kept)
    if "inner" in own.scaled:
        found["cosine"] = _known(_cosine(signal, own.scaled["energy"], own.scaled["inner"]), kept)
    for name in ("clipped", "flushed"):
        if name in own.counts:
            found[name] = _share(own.counts[name], kept + lost)
    if "block_range" in own.largest:
        found["block_range_bits"] = _known(own.largest["block_range"], kept)
    if "codes" in own.added:
        used = (own.added["codes"] > 0).astype(jnp.float32)
        found["codes_used"] = _known(used.mean(-1), kept)
    return found


def _cosine(signal: Scaled, energy: Scaled, inner: Scaled) -> jax.Array:
    norms = jnp.sqrt(signal.value) * jnp.sqrt(energy.value)
    shift = inner.exponent - (signal.exponent + energy.exponent) / np.float32(2)
    cosine = inner.value / where(norms > 0, norms, _ONE) * jnp.exp2(shift)
    same = where((signal.value == 0) & (energy.value == 0), _ONE, _ZERO)
    return where(norms > 0, lax.clamp(-_ONE, cosine, _ONE), same)


def _of_scales(own: Tally) -> dict[str, jax.Array]:
    if "scales" not in own.counts:
        return {}
    count = own.counts["scales"]
    amax, small = own.largest["scale_amax"], _decoded(own.largest["scale_small"])
    return {
        "scale_amax": _known(amax, count),
        "scale_smallest": _known(small, amax),
        "scale_range_bits": _known(jnp.log2(amax) - jnp.log2(small), amax),
        "scale_ends": _share(own.counts["scale_ends"], count),
    }


def _decoded(small: jax.Array) -> jax.Array:
    return _FLOAT32.floats(_FLOAT32.inf - _FLOAT32.bits(small))


def _known(value: jax.Array, count: jax.Array) -> jax.Array:
    return where(count > 0, value, np.float32(np.nan))


def _share(part: jax.Array, count: jax.Array) -> jax.Array:
    return _known(part / where(count > 0, count, _ONE), count)


def _mean(total: Scaled, count: jax.Array) -> jax.Array:
    value = total.value / where(count > 0, count, _ONE)
    half = jnp.floor(total.exponent / np.float32(2))
    return _known(value * jnp.exp2(half) * jnp.exp2(total.exponent - half), count)


def _root_mean(total: Scaled, count: jax.Array) -> jax.Array:
    value = jnp.sqrt(total.value / where(count > 0, count, _ONE))
    return _known(value * jnp.exp2(total.exponent / np.float32(2)), count)
