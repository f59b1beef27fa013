"""Statistics of tensors and of quantization errors, from their sums (`_tallies.py`)."""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, where
from jaxq.analysis._sums import share
from jaxq.products import Scaled, Tally

__all__ = ["finished"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))
_ZERO, _ONE = np.float32(0), np.float32(1)


def finished(tally: Tally) -> dict[str, jax.Array]:
    """Returns the statistics of a tally by name; the leading axes of its numbers are kept."""
    statistics = {}
    for prefix, sums in tally.split().items():
        named = {**_of_tensor(sums), **_of_errors(sums), **_of_scales(sums)}
        statistics |= {f"{prefix}/{name}": x for name, x in named.items()}
    return statistics


def _of_tensor(sums: Tally) -> dict[str, jax.Array]:
    if "count" not in sums.counts:
        return {}
    count, nonfinite = sums.counts["count"], sums.counts["nonfinite"]
    finite = count - nonfinite
    amax, small = sums.largest["amax"], _decoded(sums.largest["small"])
    statistics = {
        "amax": _known(amax, count),
        "smallest": _known(small, amax),
        "rms": _root_mean(sums.scaled["squares"], finite),
        "mean": _mean(sums.scaled["sum"], finite),
        "zeros": _share(sums.counts["zeros"], finite),
        "nonfinite": _share(nonfinite, count),
        "range_bits": _known(jnp.log2(amax) - jnp.log2(small), amax),
    }
    if "exponents" in sums.added:
        statistics["exponents"] = sums.added["exponents"]
    return statistics


def _of_errors(sums: Tally) -> dict[str, jax.Array]:
    if "compared" not in sums.counts:
        return {}
    compared, lost = sums.counts["compared"], sums.counts["lost"]
    signal, noise = sums.scaled["signal"], sums.scaled["noise"]
    octaves = (signal.exponent - noise.exponent) * np.float32(10 * np.log10(2))
    ratio = jnp.log10(where(noise.value > 0, signal.value / noise.value, _ONE))
    decibels = where(noise.value > 0, octaves + np.float32(10) * ratio, np.float32(np.inf))
    statistics = {
        "sqnr_db": _known(decibels, compared),
        "mse": _mean(noise, compared),
        "lost": _share(lost, compared + lost),
    }
    if "drift" in sums.scaled:
        statistics["bias"] = _mean(sums.scaled["drift"], compared)
    if "inner" in sums.scaled:
        statistics["cosine"] = _known(
            _cosine(signal, sums.scaled["energy"], sums.scaled["inner"]), compared
        )
    for name in ("clipped", "flushed"):
        if name in sums.counts:
            statistics[name] = _share(sums.counts[name], compared + lost)
    if "block_range" in sums.largest:
        statistics["block_range_bits"] = _known(sums.largest["block_range"], compared)
    if "codes" in sums.added:
        used = (sums.added["codes"] > 0).astype(jnp.float32)
        size = np.float32(used.shape[-1])
        statistics["codes_used"] = _known(share(used.sum(-1), size), compared)
    return statistics


def _cosine(signal: Scaled, energy: Scaled, inner: Scaled) -> jax.Array:
    norms = jnp.sqrt(signal.value) * jnp.sqrt(energy.value)
    shift = inner.exponent - (signal.exponent + energy.exponent) / np.float32(2)
    cosine = inner.value / where(norms > 0, norms, _ONE) * jnp.exp2(shift)
    same = where((signal.value == 0) & (energy.value == 0), _ONE, _ZERO)
    return where(norms > 0, lax.clamp(-_ONE, cosine, _ONE), same)


def _of_scales(sums: Tally) -> dict[str, jax.Array]:
    if "scales" not in sums.counts:
        return {}
    count = sums.counts["scales"]
    amax, small = sums.largest["scale_amax"], _decoded(sums.largest["scale_small"])
    return {
        "scale_amax": _known(amax, count),
        "scale_smallest": _known(small, amax),
        "scale_range_bits": _known(jnp.log2(amax) - jnp.log2(small), amax),
        "scale_ends": _share(sums.counts["scale_ends"], count),
    }


def _decoded(small: jax.Array) -> jax.Array:
    return _FLOAT32.floats(_FLOAT32.inf - _FLOAT32.bits(small))


def _known(value: jax.Array, count: jax.Array) -> jax.Array:
    return where(count > 0, value, np.float32(np.nan))


def _share(part: jax.Array, count: jax.Array) -> jax.Array:
    return _known(share(part, where(count > 0, count, _ONE)), count)


def _mean(total: Scaled, count: jax.Array) -> jax.Array:
    value = total.value / where(count > 0, count, _ONE)
    half = jnp.floor(total.exponent / np.float32(2))
    return _known(value * jnp.exp2(half) * jnp.exp2(total.exponent - half), count)


def _root_mean(total: Scaled, count: jax.Array) -> jax.Array:
    value = jnp.sqrt(total.value / where(count > 0, count, _ONE))
    return _known(value * jnp.exp2(total.exponent / np.float32(2)), count)
