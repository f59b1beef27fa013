"""The codes of blocks as bytes, for the layouts of the block types."""

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._jax.barriers import barrier

__all__ = ["as_bytes", "split_bits"]


def as_bytes(q: jax.Array) -> jax.Array:
    """Returns codes as uint8.

    XLA on CPU would compute them again for each field of a layout that they are split into.
    """
    return barrier(q.astype(jnp.uint8))


def split_bits(q: jax.Array) -> dict[str, jax.Array]:
    """Returns 5- or 6-bit codes as low nibbles and the bits above."""
    q = as_bytes(q)
    return {"q": q & np.uint8(15), "high": q >> np.uint8(4)}
