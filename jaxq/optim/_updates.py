"""Updates of low-precision weights without a wider master copy."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

from jaxq._jax.draws import checked_key
from jaxq.formats import Format, get_format
from jaxq.models import assign, not_floating, pairs, prefix_leaf_errors
from jaxq.numerics import Rounding, Stochastic, cast, code_dtype, decode, encode, get_rounding

__all__ = ["apply_updates"]

_FormatLike: TypeAlias = str | Format | np.dtype | type
_WIDE = (jnp.float32, jnp.float64)  # The dtypes in which sums are computed.


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    *,
    fmt: _FormatLike
    | Mapping[str, _FormatLike | None]
    | Sequence[tuple[str, _FormatLike | None]]
    | None = None,
    rounding: str | Rounding = "stochastic",
    key: jax.Array | None = None,
) -> optax.Params:
    """Adds updates to low-precision parameters, as `optax.apply_updates`, with chosen rounding.

    Each sum is computed in float32 (in float64 for float64 parameters) and then rounded to the
    parameter's format. Rounding to nearest loses every update below half the spacing at the weight,
    which for bfloat16 is 1/512 to 1/256 of the weight. Stochastic rounding preserves all updates in
    the mean, so no float32 copy of the weights is needed.

    Args:
      params: any pytree of parameters.
      updates: a tree of updates of the same structure, of any floating dtypes.
      fmt: the format to which parameters are rounded. None (the default) uses the format of each
        parameter's dtype. A format applies to all floating parameters, whatever their dtype; use it
        for formats without a dtype. A mapping or a sequence of pairs as in `jaxq.quantize_tree`,
        with formats in place of recipes, applies where a pattern matches; elsewhere the dtype
        decides.
      rounding: a mode in `jaxq.numerics.ROUNDINGS`, for parameters with fewer bits than the sum;
        `"stochastic"` by default.
      key: a `jax.random` key for a stochastic mode; each leaf draws different bits. Pass a new key
        at every step.

    Returns:
      The parameters, in their dtypes. A finite sum beyond the format's largest value becomes that
      value; infinities and NaN are converted as by `jaxq.cast`. Parameters that are not floating
      point are added as in optax.

    Raises:
      ValueError: if a key is missing or not needed, a rule matches no leaf, or a dtype is not a
        format that fills whole bytes.

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
    if checked_key("apply_updates", key) is None and isinstance(rounding, Stochastic):
        raise ValueError(
            "apply_updates: stochastic rounding needs `key`, got None. Pass a different key at "
            "every step, such as key=jax.random.fold_in(key, step)."
        )
    formats = assign("apply_updates", params, pairs("apply_updates", fmt, get_format))
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    try:
        changes = structure.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"apply_updates: `updates` must have the structure of `params`, {structure!s:.80}, got "
            f"{jax.tree.structure(updates)!s:.80}. Pass the updates that optax computes for them."
        ) from error
    result = []
    for i, ((path, p), u) in enumerate(zip(leaves, changes, strict=True)):
        leaf_key = None if key is None else jax.random.fold_in(key, i)
        with prefix_leaf_errors("apply_updates", path):
            result.append(_updated(jnp.asarray(p), jnp.asarray(u), formats[i], rounding, leaf_key))
    return structure.unflatten(result)


def _updated(
    p: jax.Array, u: jax.Array, fmt: Format | None, rounding: Rounding, key: jax.Array | None
) -> jax.Array:
    """Returns the rounded sum of a parameter and its update."""
    if not_floating(p):
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
    """Converts floats of one or two bytes to float32; wider ones are returned unchanged."""
    if x.dtype in _WIDE:
        return x
    fmt = get_format(x.dtype)
    if fmt.bits != 8 * x.dtype.itemsize or fmt.bits not in (8, 16):
        raise ValueError(
            f"the dtype of a parameter must fill one or two bytes, got {x.dtype}. Store such "
            f"weights as float32 with fmt={fmt.name!r}."
        )
    return decode(lax.bitcast_convert_type(x, code_dtype(fmt)), fmt)
