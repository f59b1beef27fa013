"""Statistics of the inputs of products, from which solvers choose codes."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from jaxq._base.arguments import array
from jaxq._jax.meshes import spec_of
from jaxq._jax.serialization import pytree
from jaxq.numerics import floats

__all__ = ["Statistics", "collect", "collect_groups", "drift_of", "empty_statistics", "hessian_of"]


@pytree()
@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of one product input x over all tokens. A pytree.

    A token is one vector `[inputs]` that the product contracts with its weight. The statistics of
    several batches merge into those of the concatenated data. Products with batch axes, such as the
    experts of a mixture, have one set of statistics per matrix, along leading axes.

    Attributes:
      tokens: the number of tokens, int32.
      total: the sum of x, float32 `[inputs]`.
      magnitude: the sum of |x|, float32 `[inputs]`.
      square: the sum of x^2, float32 `[inputs]`.
      amax: the largest |x|, float32 `[inputs]`; NaN if x contains a NaN or both infinities.
      hessian: the sum of x x^T, float32 `[inputs, inputs]`, or None if it was not collected.
      drift: the sum of (y - x) x^T, float32 `[inputs, inputs]`, where y is the input in the float
        model; None if it is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> some = ptq.collect(jnp.array([[1.0, -3.0], [2.0, 0.0]]))
      >>> both = some.merge(some)
      >>> int(both.tokens), both.total.tolist(), both.hessian.tolist()
      (4, [6.0, -6.0], [[10.0, -6.0], [-6.0, 18.0]])
    """

    tokens: jax.Array
    total: jax.Array
    magnitude: jax.Array
    square: jax.Array
    amax: jax.Array
    hessian: jax.Array | None
    drift: jax.Array | None = None

    @property
    def inputs(self) -> int:
        """The number of inputs."""
        return self.total.shape[-1]

    def merge(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of both data sets together. Associative up to rounding errors."""
        if (self.drift is None) != (other.drift is None):
            return self._without_drift().merge(other._without_drift())
        added = jax.tree.map(jnp.add, self, other)
        amax = _with_nan(jnp.maximum(self.amax, other.amax), added.total)
        return dataclasses.replace(added, amax=amax)

    def _without_drift(self) -> "Statistics":
        return dataclasses.replace(self, drift=None)

    def gather(self, axis_name: str) -> "Statistics":
        """Merges the statistics of all devices along an axis of `jax.shard_map` or `jax.vmap`."""
        added = jax.tree.map(lambda x: lax.psum(x, axis_name), self)
        amax = _with_nan(lax.pmax(self.amax, axis_name), added.total)
        return dataclasses.replace(added, amax=amax)


def _with_nan(amax: jax.Array, total: jax.Array) -> jax.Array:
    """Returns maxima that are NaN where the sum is NaN, because XLA's maximum may drop a NaN."""
    return jnp.where(jnp.isnan(total), total, amax)


def empty_statistics(batch: tuple[int, ...], inputs: int, hessian: bool) -> Statistics:
    """Returns the statistics of no tokens."""
    zeros = jnp.zeros((*batch, inputs), jnp.float32)
    return Statistics(
        tokens=jnp.zeros(batch, jnp.int32),
        total=zeros,
        magnitude=zeros,
        square=zeros,
        amax=zeros,
        hessian=jnp.zeros((*batch, inputs, inputs), jnp.float32) if hessian else None,
    )


def collect(
    x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None = None, *, hessian: bool = True
) -> Statistics:
    """Returns the statistics of one array of tokens.

    Args:
      x: a float array `[..., tokens, inputs]`; each index of the leading axes has its own
        statistics.
      mask: a boolean array `[tokens]`, False for padding; None (the default) uses all tokens.
      hessian: True (the default) to compute the sum of `x x^T`, which has `inputs^2` elements.

    Returns:
      The statistics, computed in float32 with the highest matmul precision.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> ptq.collect(jnp.array([[1.0, -3.0], [2.0, 0.0]])).amax.tolist()
      [2.0, 3.0]
    """
    x = lax.stop_gradient(floats("ptq.collect", x)).astype(jnp.float32)
    if x.ndim < 2:
        raise ValueError(
            f"ptq.collect: `x` must have the shape (..., tokens, inputs), got {x.shape}. Pass "
            "x[None] for one token."
        )
    count = jnp.int32(x.shape[-2])
    if mask is not None:
        is_token = array("ptq.collect", "mask", mask, "booleans", "Pass one per token.")
        if is_token.shape != (x.shape[-2],):
            raise ValueError(
                f"ptq.collect: `mask` must have the shape ({x.shape[-2]},), one boolean per token, "
                f"got {is_token.shape}. Pass False for padding."
            )
        is_token = is_token.astype(bool)
        x = jnp.where(is_token[:, None], x, np.float32(0))
        count = jnp.sum(is_token, dtype=jnp.int32)
    magnitude, total = jnp.abs(x), jnp.sum(x, -2)
    return Statistics(
        tokens=jnp.broadcast_to(count, x.shape[:-2]),
        total=total,
        magnitude=jnp.sum(magnitude, -2),
        square=jnp.sum(x * x, -2),
        amax=_with_nan(jnp.max(magnitude, -2, initial=0), total),
        hessian=hessian_of(x) if hessian else None,
    )


def hessian_of(x: jax.Array) -> jax.Array:
    """Returns the Hessian, the sum of `x x^T` of tokens, `[..., inputs, inputs]`.

    Args:
      x: the tokens, `[..., tokens, inputs]`, 0 for padding.
    """
    return _sum_of_outer_products(x, x)


def drift_of(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the sum of `(y - x) x^T` of tokens, `[..., inputs, inputs]`.

    Args:
      x: the tokens, `[..., tokens, inputs]`, 0 for padding.
      reference: the tokens y, 0 for padding.
    """
    return _sum_of_outer_products(reference - x, x)


def _sum_of_outer_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the sum of x y^T over the tokens; a mesh's devices all have the complete sum."""
    spec = spec_of(y)
    sharding = PartitionSpec(*spec[:-2], None, None) if any(spec) else None
    precision = lax.Precision.HIGHEST
    return jnp.einsum("...ti,...tj->...ij", x, y, precision=precision, out_sharding=sharding)


def collect_groups(x: jax.Array, sizes: jax.Array, hessian: bool) -> Statistics:
    """Returns the statistics of each group of a ragged product's tokens.

    Args:
      x: the tokens, `[tokens, inputs]`, sorted by group.
      sizes: the number of tokens of each group.
      hessian: as in `collect`.
    """
    ends = jnp.cumsum(sizes)
    index = jnp.arange(x.shape[0], dtype=ends.dtype)

    def group(bounds: Any) -> Statistics:
        start, end = bounds
        return collect(x, (index >= start) & (index < end), hessian=hessian)

    return lax.map(group, (ends - sizes, ends))
