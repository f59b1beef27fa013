"""Outliers: a few large elements stored separately, so that they do not enlarge any scale."""

import dataclasses
import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import number
from jaxq._base.bits import FloatLayout, where
from jaxq._base.cutting import Cut
from jaxq.formats import FloatFormat, Format, get_format
from jaxq.numerics import decode, encode, widen
from jaxq.recipes._arithmetic import absmax, powers
from jaxq.recipes._texts import text_of

__all__ = ["Outliers"]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))


@dataclasses.dataclass(frozen=True, repr=False)
class Outliers:
    """The elements of a tensor to store separately, with their positions, in a wider format.

    The scales are computed with 0 in place of the outliers. A NaN or an infinity counts as the
    largest magnitude, so that it is stored as an outlier and affects no block.

    Attributes:
      fraction: the share of elements to store as outliers, those of largest magnitude, rounded up
        to a whole number of elements. In (0, 1). If elements of equal magnitude do not all fit,
        none of them is stored and their slots stay empty, so the choice does not depend on the
        order of the elements.
      sigma: None, or the number of standard deviations from the mean beyond which an element is an
        outlier. The number of outliers then depends on the data, but array shapes cannot, so
        `fraction` is its bound: if there are more, the farthest are stored; if there are fewer,
        some slots stay empty; all slots count as bytes. (A tensor with a NaN or an infinity has no
        standard deviation, so none of its elements is an outlier.)
      format: the format of the outliers, a signed float of at most 16 bits. Finite values beyond
        its range become its largest value.

    Raises:
      ValueError: if `fraction`, `sigma` or `format` is invalid.
      TypeError: if a field has another type.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> x = jnp.array([0.1, -0.2, 0.3, 50.0])
      >>> recipe = jaxq.Recipe("int4", outliers=Outliers(0.25))
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
        example, between = "Use, for example, Outliers(0.005).", "a number between 0 and 1"
        number("Outliers", "fraction", self.fraction, between, lambda v: 0 < v < 1, example)
        if self.sigma is not None:
            number("Outliers", "sigma", self.sigma, "a positive number", lambda v: v > 0, example)
        if not (isinstance(fmt, FloatFormat) and fmt.bits <= 16 and fmt.signed):
            raise ValueError(
                "Outliers: `format` must be a signed float of at most 16 bits, got "
                f"{fmt.name!r}. {example}"
            )

    def __repr__(self) -> str:
        return text_of(self)

    @property
    def element(self) -> Format:
        """The format of the outliers as a record."""
        return get_format(self.format)

    def count(self, size: int) -> int:
        """Returns the largest number of outliers in a tensor of `size` elements."""
        return math.ceil(self.fraction * size)

    def bits(self, size: int) -> int:
        """Returns the bits that the outliers of a tensor of `size` elements take."""
        return self.count(size) * (8 * (1 + (self.element.bits > 8)) + 32)

    def take(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns the tensor with zeros for the outliers, and the outliers' codes and positions.

        Positions refer to the flattened tensor; the position of an empty slot is the tensor's size.
        """
        flat = widen(x).reshape(-1)
        distance = flat
        if self.sigma is not None:
            cut = Cut(flat.shape, flat.shape)
            down, _ = powers(absmax(cut.split(flat), cut))
            distance = flat * down.reshape(())
            distance = distance - distance.mean()
        # Compares bits, so that NaN ranks as the largest.
        key = _FLOAT32.bits(distance) & _FLOAT32.magnitude_mask
        indices = _largest(key, self.count(flat.size))
        if self.sigma is not None:
            beyond = jnp.abs(distance[indices]) > np.float32(self.sigma) * jnp.std(distance)
            indices = where(beyond, indices, np.int32(flat.size))
        values = flat.at[indices].get(mode="fill", fill_value=0)
        codes = encode(values, self.element, overflow="propagate")
        rest = x.reshape(-1).at[indices].set(jnp.zeros((), x.dtype), mode="drop")
        return rest.reshape(x.shape), (codes, indices)

    def mask(self, shape: tuple[int, ...], stored: tuple[jax.Array, ...]) -> jax.Array:
        """Returns a boolean array of a shape that is True at the outliers."""
        flat = jnp.zeros(math.prod(shape), bool).at[stored[1]].set(True, mode="drop")
        return flat.reshape(shape)

    def put(self, y: jax.Array, stored: tuple[jax.Array, ...]) -> jax.Array:
        """Returns a float32 tensor with the outliers inserted at their positions."""
        codes, indices = stored
        if indices.ndim > 1:  # Stacked by `jax.vmap`.
            return jax.vmap(self.put)(y, stored)
        values = decode(codes, self.element)
        return y.reshape(-1).at[indices].set(values, mode="drop").reshape(y.shape)


def _largest(key: jax.Array, count: int) -> jax.Array:
    """Returns the positions, ascending, of the largest non-negative integers.

    Equal integers are selected together or, if there are too many, not at all. Unused positions are
    the number of integers. The smallest selected integer is found bit by bit, with one count per
    bit: a sort takes seven times as long.
    """

    def step(i: jax.Array, least: jax.Array) -> jax.Array:
        candidate = least | (np.int32(1) << (np.int32(30) - i))
        enough = jnp.sum(key >= candidate, dtype=jnp.int32) >= count
        return jnp.where(enough, candidate, least)

    least = lax.fori_loop(np.int32(0), np.int32(31), step, np.int32(0))
    fits = jnp.sum(key >= least, dtype=jnp.int32) == count
    chosen = (key > least) | ((key == least) & fits)
    rank = where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, np.int32(count))
    indices = jnp.arange(key.size, dtype=jnp.int32)
    empty = jnp.full(count, key.size, jnp.int32)
    return empty.at[rank].set(indices, mode="drop", unique_indices=True)
