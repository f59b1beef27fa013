"""Statistics of a training step: errors of its gradient, and updates that are lost in rounding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import flags
from jaxq._base.paths import leaf_path
from jaxq._jax.serialization import named_tuple
from jaxq.analysis._sums import share
from jaxq.numerics import cast

__all__ = ["GradientError", "UpdateStatistics", "gradient_errors", "update_statistics"]


@named_tuple
class GradientError(NamedTuple):
    """The error of a parameter's gradient relative to an exact one: float32 scalars.

    With samples g_i of the gradient, their mean m and the exact gradient f; a ratio is 0 if both of
    its norms are 0:

    Attributes:
      cosine: the cosine of the angle between m and f; 0 if one of them is 0.
      norm_ratio: |m| / |f|.
      error: |m - f| / |f|. Over many keys of a stochastic recipe this is its bias.
      deviation: the square root of the mean of |g_i - m|^2, relative to |f|; 0 for one sample.

    Example:
      >>> import jax.numpy as jnp
      >>> samples = {"w": jnp.array([[1.0, 3.0], [3.0, 5.0]])}  # Two samples, without bias.
      >>> e = gradient_errors(samples, {"w": jnp.array([2.0, 4.0])}, sampled=True)["w"]
      >>> float(e.error), round(float(e.deviation), 3)
      (0.0, 0.316)
    """

    cosine: jax.Array
    norm_ratio: jax.Array
    error: jax.Array
    deviation: jax.Array


def gradient_errors(
    gradient: Any, exact: Any, *, sampled: bool = False
) -> dict[str, GradientError]:
    """Returns the error of a quantized gradient for each parameter.

    Args:
      gradient: the gradient of the quantized loss, a tree of arrays.
      exact: the gradient of the float loss on the same batch, a tree of the same structure.
      sampled: True if the arrays of `gradient` have a leading axis of samples, such as gradients
        over keys of a stochastic recipe. Default: False.

    Returns:
      A dictionary with the `GradientError` of each parameter. Its keys are the paths of the
      parameters in the tree, with slashes between the parts, such as `"layers/up"`.

    Raises:
      ValueError: if the trees or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> e = gradient_errors({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([3.0, 3.0])})["w"]
      >>> round(float(e.cosine), 3), round(float(e.norm_ratio), 3), round(float(e.error), 3)
      (0.99, 1.179, 0.236)
    """
    remedy = "Use True only for gradients with a leading axis of samples."
    flags("gradient_errors", remedy, sampled=sampled)

    def of_leaf(path: str, g: jax.Array, f: jax.Array) -> GradientError:
        if g.shape[int(sampled) :] != f.shape:
            raise ValueError(
                f"gradient_errors: `gradient` at {path!r} must have the shape "
                f"{'[samples, *' if sampled else ''}{f.shape}{']' if sampled else ''}, got "
                f"{g.shape}. Pass gradients of the same parameters, and `sampled` only with a "
                "leading axis of samples."
            )
        samples = (g if sampled else g[None]).astype(jnp.float32)
        f = f.astype(jnp.float32)
        of_g, of_f = _unit(samples), _unit(f)
        larger = lax.max(of_g, of_f)
        samples, f = samples / of_g, f / of_f
        mean = samples.mean(0)
        mean_norm, exact_norm = _norm(mean), _norm(f)
        norm_product = mean_norm * exact_norm
        cosine = jnp.where(
            norm_product > 0, (mean * f).sum() / jnp.where(norm_product > 0, norm_product, 1), 0
        )
        error = _norm(mean * (of_g / larger) - f * (of_f / larger))
        deviation = jnp.sqrt(((samples - mean[None]) ** 2).sum() / np.float32(samples.shape[0]))
        return GradientError(
            cosine,
            _ratio(mean_norm, exact_norm, of_g, of_f),
            _ratio(error, exact_norm, larger, of_f),
            _ratio(deviation, exact_norm, of_g, of_f),
        )

    return _by_path("gradient_errors", "gradient", of_leaf, gradient, exact)


@named_tuple
class UpdateStatistics(NamedTuple):
    """The update of a parameter in relation to the parameter: float32 scalars.

    Attributes:
      ratio: |update| / |parameter|; infinite if only the parameter is 0, 0 if both are.
      swamped: the fraction of the nonzero elements of the update that do not change the parameter,
        because the sum rounds to the old value in the parameter's dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones(4, jnp.bfloat16)}
      >>> statistics = update_statistics({"w": jnp.full(4, 2**-10, jnp.bfloat16)}, params)["w"]
      >>> float(statistics.ratio), float(statistics.swamped)  # All of the update is lost.
      (0.0009765625, 1.0)
    """

    ratio: jax.Array
    swamped: jax.Array


def update_statistics(updates: Any, params: Any) -> dict[str, UpdateStatistics]:
    """Returns the size of the updates of parameters, and the fraction that rounding loses.

    Args:
      updates: the updates to add to the parameters, as an optax optimizer returns them.
      params: the parameters before the step, a tree of the same structure.

    Returns:
      A dictionary with the `UpdateStatistics` of each parameter, with keys as in
      `gradient_errors`.

    Raises:
      ValueError: if the trees or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones(4, jnp.bfloat16)}
      >>> updates = {"w": jnp.array([0.0, 1e-3, -1e-3, 1e-2], jnp.bfloat16)}
      >>> round(float(update_statistics(updates, params)["w"].swamped), 3)
      0.667
    """

    def of_leaf(path: str, u: jax.Array, p: jax.Array) -> UpdateStatistics:
        if u.shape != p.shape:
            raise ValueError(
                f"update_statistics: `updates` at {path!r} must have the shape {p.shape}, got "
                f"{u.shape}. Pass the updates of these parameters."
            )
        dtype = np.dtype(np.float64 if p.dtype == np.float64 else np.float32)
        wide, old = u.astype(dtype), p.astype(dtype)
        new = old + wide if p.dtype == dtype else cast(old + wide, str(p.dtype))
        moving = wide != 0
        count = lax.max(moving.sum(dtype=jnp.int32), np.int32(1)).astype(jnp.float32)
        lost = (moving & (new == old)).sum(dtype=jnp.int32).astype(jnp.float32)
        units = _unit(wide), _unit(old)
        ratio = _ratio(_norm(wide / units[0]), _norm(old / units[1]), *units)
        return UpdateStatistics(ratio.astype(jnp.float32), share(lost, count))

    return _by_path("update_statistics", "updates", of_leaf, updates, params)


def _unit(x: jax.Array) -> jax.Array:
    """Returns a magnitude near the largest, by which values are divided before they are squared.

    It is at most 2^125, because XLA multiplies by its reciprocal, which must not be subnormal.
    """
    top = lax.min(jnp.abs(x).max(initial=0), x.dtype.type(2.0**125))
    return jnp.where(top == 0, jnp.ones_like(top), top)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt((x * x).sum())


def _ratio(x: jax.Array, y: jax.Array, of_x: jax.Array, of_y: jax.Array) -> jax.Array:
    """Returns the ratio of two norms, given in units of their own; 0 if both are 0."""
    ratio = x / y * (of_x / of_y)
    return jnp.where((x == 0) & (y == 0), jnp.zeros_like(ratio), ratio)


def _by_path(
    owner: str, name: str, function: Callable[..., Any], first: Any, second: Any
) -> dict[str, Any]:
    """Returns the results of a function for pairs of leaves of two trees, by their paths."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(first)
    if structure != jax.tree.structure(second):
        raise ValueError(
            f"{owner}: `{name}` must have the structure {jax.tree.structure(second)!s:.80}, got "
            f"{structure!s:.80}. Pass two trees of the same parameters."
        )
    results = {}
    for (path, a), b in zip(leaves, jax.tree.leaves(second), strict=True):
        key = leaf_path(path)
        results[key] = function(key, jnp.asarray(a), jnp.asarray(b))
    return results
