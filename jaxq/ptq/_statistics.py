"""Statistics of the inputs of products, from which all solvers start."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from jaxq._jax.meshes import spec_of
from jaxq._jax.serialization import pytree

__all__ = ["Statistics", "collect", "collect_groups", "drift_of", "nothing"]


@pytree()
@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of one product input over all tokens: a pytree.

    A token is one vector that the product contracts with its weight, `[inputs]`. Statistics of
    several batches merge into those of the concatenated data. Products with batch axes, such as the
    experts of a mixture, have one set of statistics for each of their matrices, along leading axes.

    Attributes:
      tokens: the number of tokens, int32.
      total: the sum of x, `[inputs]`, float32 like all others.
      magnitude: the sum of |x|, `[inputs]`.
      square: the sum of x^2, `[inputs]`.
      amax: the largest |x|, `[inputs]`; NaN if any x is, or x has both infinities.
      hessian: the sum of x x^T, `[inputs, inputs]`; None if it was not asked for.
      drift: the sum of (y - x) x^T, `[inputs, inputs]`, with y the input that float weights before
        the product give; None if it is not known.

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
        """Returns the statistics of the data of both. Associative, up to the rounding of sums."""
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
    """Returns maxima that are NaN where a sum is, because XLA's maximum may lose a NaN."""
    return jnp.where(jnp.isnan(total), total, amax)


def nothing(batch: tuple[int, ...], inputs: int, hessian: bool) -> Statistics:
    """Returns the statistics of no tokens."""
    zeros = jnp.zeros((*batch, inputs), jnp.float32)
    square = jnp.zeros((*batch, inputs, inputs), jnp.float32) if hessian else None
    return Statistics(jnp.zeros(batch, jnp.int32), zeros, zeros, zeros, zeros, square)


def collect(
    x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None = None, *, hessian: bool = True
) -> Statistics:
    """Returns the statistics of one array of tokens.

    Args:
      x: a float array `[..., tokens, inputs]`; leading axes have statistics of their own.
      mask: a boolean array `[tokens]`, False for padding; None counts all tokens.
      hessian: False leaves out the sum of `x x^T`, which needs `inputs^2` floats.

    Returns:
      The statistics. Sums are float32, and products have float32's full precision.
    """
    x = lax.stop_gradient(jnp.asarray(x)).astype(jnp.float32)
    count = jnp.int32(x.shape[-2])
    if mask is not None:
        own = jnp.asarray(mask, bool)
        x = jnp.where(own[:, None], x, np.float32(0))
        count = jnp.sum(own, dtype=jnp.int32)
    magnitude, total = jnp.abs(x), jnp.sum(x, -2)
    gram = None
    if hessian:
        gram = _outer(x, x)
    return Statistics(
        tokens=jnp.broadcast_to(count, x.shape[:-2]),
        total=total,
        magnitude=jnp.sum(magnitude, -2),
        square=jnp.sum(x * x, -2),
        amax=_with_nan(jnp.max(magnitude, -2, initial=0), total),
        hessian=gram,
    )


def drift_of(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the sum of `(y - x) x^T` of tokens, `[..., inputs, inputs]`.

    Args:
      x: the tokens, `[..., tokens, inputs]`, 0 for padding.
      reference: the tokens y, 0 for padding.
    """
    return _outer(reference - x, x)


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the sum of the outer products of tokens, on all devices of a mesh."""
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
    place = jnp.arange(x.shape[0], dtype=ends.dtype)

    def group(pair: Any) -> Statistics:
        start, end = pair
        return collect(x, (place >= start) & (place < end), hessian=hessian)

    return lax.map(group, (ends - sizes, ends))
