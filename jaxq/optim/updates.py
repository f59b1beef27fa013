"""Updates of narrow weights, without a wider copy."""

from typing import Any

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

from jaxq.casting import cast, encode
from jaxq.catalog import get_format
from jaxq.codecs import code_dtype, decode
from jaxq.formats import Format
from jaxq.rounding import Rounding, Stochastic, get_rounding
from jaxq.trees import Rules, assign, is_floating, naming

__all__ = ["apply_updates"]

_WIDE = (jnp.float32, jnp.float64)  # Dtypes that sums are computed in.


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    *,
    fmt: "str | Format | np.dtype | type | Rules | None" = None,
    rounding: str | Rounding = "stochastic",
    key: jax.Array | None = None,
) -> optax.Params:
    """Adds updates to parameters, rounded as it is asked: `optax.apply_updates` for narrow weights.

    Each sum is computed in float32 (float64 for such parameters), and then rounded to the
    parameter's format. Rounding to nearest loses every update below half the spacing at the weight,
    for bfloat16 1/512 to 1/256 of it; stochastic rounding keeps them all in the mean, so that no
    float32 copy of the weights is needed.

    Args:
      params: any pytree of parameters.
      updates: the same tree of updates, of any floating dtypes.
      fmt: None: every parameter has its dtype's format. A format: all floating parameters are on
        its grid, whatever dtype holds them; for those that no dtype has. Or rules as
        `jaxq.quantize_tree` has them, with formats; where none holds the dtype decides.
      rounding: a mode of `jaxq.rounding`, for each parameter that has fewer bits than the sum.
      key: a key of `jax.random` for a stochastic mode; each leaf has bits of its own. Take another
        key at every step.

    Returns:
      The parameters, in their dtypes. A finite sum beyond the format's largest value becomes that;
      infinities and NaN are what `jaxq.cast` makes of them. Other dtypes are added as optax does.

    Raises:
      ValueError: a key missing or not needed, a rule that holds for no leaf, or a dtype that is not
        a format of whole bytes.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> w, u = jnp.ones(4096, jnp.bfloat16), jnp.full(4096, 2.0**-10)
      >>> (w + u.astype(jnp.bfloat16)).astype(jnp.float32).mean()  # Nothing has moved.
      Array(1., dtype=float32)
      >>> new = jaxq.optim.apply_updates(w, u, key=jax.random.key(0))
      >>> bool(abs(new.astype(jnp.float32).mean() - (1 + 2.0**-10)) < 1e-4)
      True

    References:
      Gupta et al., "Deep Learning with Limited Numerical Precision" (2015); Zamirai et al.,
      "Revisiting BFloat16 Training" (2020).
    """
    rounding = get_rounding(rounding)
    if isinstance(rounding, Stochastic) and key is None:
        raise ValueError(
            "apply_updates: stochastic rounding needs `key`, got None. Pass "
            "key=jax.random.fold_in(key, step), another one at every step."
        )
    ruled = isinstance(fmt, list | tuple)
    rules: Any = fmt if ruled else [("", fmt)]
    formats = assign("apply_updates", params, rules, look_up=get_format, strict=ruled)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    result = []
    for i, ((path, p), u) in enumerate(zip(leaves, structure.flatten_up_to(updates), strict=True)):
        own = None if key is None else jax.random.fold_in(key, i)
        with naming("apply_updates", path):
            result.append(_moved(jnp.asarray(p), jnp.asarray(u), formats[i], rounding, own))
    return structure.unflatten(result)


def _moved(
    p: jax.Array, u: jax.Array, fmt: Format | None, rounding: Rounding, key: jax.Array | None
) -> jax.Array:
    """The rounded sum of a parameter and its update."""
    if not is_floating(p):
        return (p + u).astype(p.dtype)
    wide = _wide(p)
    total = wide + _wide(u).astype(wide.dtype)
    options: dict[str, Any] = {"rounding": rounding, "overflow": "propagate", "key": key}
    if fmt is not None:
        total, options = cast(total, fmt, **options), {}
    if p.dtype in _WIDE:
        return total
    return lax.bitcast_convert_type(encode(total, p.dtype, **options), p.dtype)


def _wide(x: jax.Array) -> jax.Array:
    """Floats of a dtype as narrow as one or two bytes as float32; others as they are."""
    if x.dtype in _WIDE:
        return x
    fmt = get_format(x.dtype)
    if fmt.bits != 8 * x.dtype.itemsize or fmt.bits not in (8, 16):
        raise ValueError(
            f"its dtype must fill one or two bytes, got {x.dtype}. Hold such weights "
            f"as float32 with fmt={fmt.name!r}."
        )
    return decode(lax.bitcast_convert_type(x, code_dtype(fmt)), fmt)
