"""Mixed precision by element: a few large numbers kept apart, so that they stretch no scale."""

import dataclasses
import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq.bits import Layout, where
from jaxq.casting import encode, widen
from jaxq.catalog import get_format
from jaxq.codecs import decode
from jaxq.formats import FloatFormat, Format

__all__ = ["Outliers"]

_FLOAT32 = Layout.of(np.dtype(np.float32))


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Which numbers of a tensor are kept apart, in a wider format and with their places.

    In their place the tensor holds 0 when its scales are made. A NaN or an infinity counts as the
    largest of all, so that, kept apart, it harms no block.

    Attributes:
      fraction: the share that is kept, those of largest magnitude, rounded up to a whole number of
        them. In (0, 1).
      sigma: None, or how many standard deviations from the mean a number must lie to be kept. How
        many do is data and not shape, so `fraction` bounds it: of more the farthest are kept, of
        fewer places stay empty, and all are counted in the bytes. (Where the tensor holds a NaN or
        an infinity it has no deviation, and none is kept.)
      format: the format that holds them, a float of 16 bits or fewer. Finite numbers beyond it
        become its largest.

    Raises:
      ValueError: a fraction, sigma or format that is not one of these.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x = jnp.array([0.1, -0.2, 0.3, 50.0])
      >>> recipe = jaxq.Quantizer("int4", outliers=Outliers(0.25))
      >>> [round(float(v), 3) for v in jaxq.fake_quant(x, recipe)]
      [0.086, -0.214, 0.3, 50.0]

    References:
      Dettmers et al., "LLM.int8()" (2022) and "SpQR" (2023).
    """

    fraction: float = 0.005
    sigma: float | None = None
    format: str | Format = "float16"

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        object.__setattr__(self, "format", fmt)
        checks = (
            (0 < self.fraction < 1, "`fraction` must be between 0 and 1", self.fraction),
            (self.sigma is None or self.sigma > 0, "`sigma` must be positive", self.sigma),
            (
                isinstance(fmt, FloatFormat) and fmt.bits <= 16 and fmt.signed,
                "`format` must be a signed float of at most 16 bits",
                fmt.name,
            ),
        )
        for ok, requirement, got in checks:
            if not ok:
                raise ValueError(f"Outliers: {requirement}, got {got!r}.")

    @property
    def element(self) -> Format:
        """Their format as a record."""
        return get_format(self.format)

    def count(self, size: int) -> int:
        """How many of a tensor's elements are kept apart, at the most."""
        return math.ceil(self.fraction * size)

    def bits(self, size: int) -> int:
        """Bits that they take in a tensor of a size."""
        return self.count(size) * (8 * (1 + (self.element.bits > 8)) + 32)

    def take(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The tensor with zeros in their place, and their codes and places in the flattened one.

        An empty place is the tensor's size.
        """
        flat = widen(x).reshape(-1)
        distance = flat
        if self.sigma is not None:
            distance = flat - flat.mean()
        # In the order of the bits, in which a NaN is the largest.
        key = _FLOAT32.bits(distance) & _FLOAT32.magnitude_mask
        places = _largest(key, self.count(flat.size))
        if self.sigma is not None:
            beyond = jnp.abs(distance[places]) > np.float32(self.sigma) * jnp.std(flat)
            places = where(beyond, places, np.int32(flat.size))
        values = flat.at[places].get(mode="fill", fill_value=0)
        codes = encode(values, self.element, overflow="propagate")
        rest = x.reshape(-1).at[places].set(jnp.zeros((), x.dtype), mode="drop")
        return rest.reshape(x.shape), (codes, places)

    def mask(self, shape: tuple[int, ...], kept: tuple[jax.Array, ...]) -> jax.Array:
        """Where they are, in a tensor of a shape."""
        flat = jnp.zeros(math.prod(shape), bool).at[kept[1]].set(True, mode="drop")
        return flat.reshape(shape)

    def put(self, y: jax.Array, kept: tuple[jax.Array, ...]) -> jax.Array:
        """A float32 tensor with them in their places."""
        codes, places = kept
        if places.ndim > 1:  # As `jax.vmap` stacks them.
            return jax.vmap(self.put)(y, kept)
        values = decode(codes, self.element)
        return y.reshape(-1).at[places].set(values, mode="drop").reshape(y.shape)


def _largest(key: jax.Array, count: int) -> jax.Array:
    """The places of the largest of non-negative integers, ascending; of equals the first.

    By the bits of the least that belongs to them, one count each: a sort takes seven times as long.
    """

    def step(i: jax.Array, least: jax.Array) -> jax.Array:
        more = least | (np.int32(1) << (np.int32(30) - i))
        enough = jnp.sum(key >= more, dtype=jnp.int32) >= count
        return jnp.where(enough, more, least)

    least = lax.fori_loop(np.int32(0), np.int32(31), step, np.int32(0))
    above, equal = key > least, key == least
    missing = count - jnp.sum(above, dtype=jnp.int32)
    chosen = above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= missing))
    rank = where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, np.int32(count))
    places = jnp.arange(key.size, dtype=jnp.int32)
    return jnp.zeros(count, jnp.int32).at[rank].set(places, mode="drop", unique_indices=True)
