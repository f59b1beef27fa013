"""Statistics of products, and the layout in which one float32 row holds them.

Statistics are merged over products, loop iterations and devices. There are four groups: counts,
vectors that are added, largest values, and sums with separate exponents. Merging with a row of
zeros changes nothing, because JAX creates cotangents of zeros for branches that do not run.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

__all__ = ["PassLayouts", "RowLayout", "Scaled", "Tally"]


class Scaled(NamedTuple):
    """A number value · 2^exponent that cannot overflow: float32 and int32, or float32 in a row."""

    value: jax.Array
    exponent: jax.Array


class Tally(NamedTuple):
    """Statistics by name, grouped by the operation that merges two of them.

    Attributes:
      counts: int32 `[1]`, added without rounding; float32 scalars from a row.
      added: float32 vectors that are added.
      largest: int32 `[1]`, the bits of nonnegative float32 numbers of which the larger one counts;
        float32 scalars from a row.
      scaled: vectors of one length whose elements are added, with an exponent `[1]`; scalars from
        a row.
    """

    counts: Mapping[str, jax.Array]
    added: Mapping[str, jax.Array]
    largest: Mapping[str, jax.Array]
    scaled: Mapping[str, Scaled]

    @classmethod
    def empty(cls) -> "Tally":
        """Returns a tally without statistics."""
        return cls({}, {}, {}, {})

    def join(self, other: "Tally") -> "Tally":
        """Returns a tally with the names of both."""
        parts: Any = ({**a, **b} for a, b in zip(self, other, strict=True))
        return Tally(*parts)

    def prefixed(self, prefix: str) -> "Tally":
        """Returns the tally with a prefix and a slash before every name."""
        parts: Any = ({f"{prefix}/{name}": x for name, x in part.items()} for part in self)
        return Tally(*parts)

    def split(self) -> "dict[str, Tally]":
        """Splits a tally whose names have prefixes into one tally per prefix."""
        tallies: dict[str, Tally] = {}
        for index, part in enumerate(self):
            for path, x in part.items():
                prefix, _, name = path.rpartition("/")
                numbers: Any = tallies.setdefault(prefix, Tally.empty())[index]
                numbers[name] = x
        return tallies


_HALF = 16  # A count n is stored as n >> 16 and n & 65535, whose float32 sums stay exact.


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The positions of a tally's statistics in a row.

    Each group is contiguous, so that `pack` needs few operations, which compile slowly.

    Attributes:
      counts: the names of the counts.
      added: the names of the added vectors and their lengths.
      largest: the names of the largest values.
      scaled: the names of the numbers with exponents.
    """

    counts: tuple[str, ...]
    added: tuple[tuple[str, int], ...]
    largest: tuple[str, ...]
    scaled: tuple[str, ...]

    @classmethod
    def of(cls, tally: Tally) -> "RowLayout":
        """Returns the layout of a tally of arrays or of their shapes."""
        added = tuple((name, math.prod(x.shape)) for name, x in sorted(tally.added.items()))
        counts, largest, scaled = (tuple(sorted(tally[index])) for index in (0, 2, 3))
        return cls(counts, added, largest, scaled)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the parts: high and low counts, added, largest, values and exponents."""
        added = sum(n for _, n in self.added)
        count, largest, scaled = len(self.counts), len(self.largest), len(self.scaled)
        return count, count, added, largest, scaled, scaled

    @property
    def size(self) -> int:
        """The number of elements of a row."""
        return sum(self.lengths)

    def pack(self, tally: Tally) -> jax.Array:
        """Returns the row of a tally."""
        parts: list[jax.Array] = []
        if self.counts:
            counts = jnp.concatenate([tally.counts[name] for name in self.counts])
            low = counts & np.int32(2**_HALF - 1)
            parts += [(counts >> np.int32(_HALF)).astype(jnp.float32), low.astype(jnp.float32)]
        parts += [tally.added[name].astype(jnp.float32).reshape(-1) for name, _ in self.added]
        if self.largest:
            bits = jnp.concatenate([tally.largest[name] for name in self.largest])
            parts.append(lax.bitcast_convert_type(bits, jnp.float32))
        if self.scaled:
            sums = jnp.stack([tally.scaled[name].value for name in self.scaled])
            values = jnp.sum(sums, axis=1)
            exponents = jnp.concatenate([tally.scaled[name].exponent for name in self.scaled])
            exponents = jnp.where(values != 0, exponents, np.int32(0))
            parts += [values, exponents.astype(jnp.float32)]
        return jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.float32)

    def unpack(self, row: jax.Array) -> Tally:
        """Returns the tally of a row, or of rows with leading axes."""
        ends = np.cumsum(self.lengths)[:-1].tolist()
        high, low, vectors, tops, values, exponents = jnp.split(row, ends, axis=-1)
        counts, added, start = high * np.float32(2**_HALF) + low, {}, 0
        for name, n in self.added:
            added[name] = vectors[..., start : start + n]
            start += n
        return Tally(
            {name: counts[..., i] for i, name in enumerate(self.counts)},
            added,
            {name: tops[..., i] for i, name in enumerate(self.largest)},
            {name: Scaled(values[..., i], exponents[..., i]) for i, name in enumerate(self.scaled)},
        )

    def merge(self, rows: jax.Array) -> jax.Array:
        """Combines rows of statistics, stacked along the first axis, into one."""
        first, second, third = np.cumsum(self.lengths)[2:5].tolist()
        values, exponents = rows[..., second:third], rows[..., third:]
        used_exponents = jnp.where(values != 0, exponents, -jnp.inf)
        largest_exponent = used_exponents.max(0)
        largest_exponent = jnp.where(
            jnp.isfinite(largest_exponent), largest_exponent, np.float32(0)
        )
        # Terms that are smaller by more than the range of float32 become 0.
        differences = lax.clamp(
            np.float32(-127),
            jnp.where(values != 0, used_exponents - largest_exponent[None], 0),
            np.float32(0),
        )
        factors = jnp.where(differences > -127, _power_of_two(differences), np.float32(0))
        return jnp.concatenate(
            [
                rows[..., :first].sum(0),
                rows[..., first:second].max(0),
                (values * factors).sum(0),
                largest_exponent,
            ],
            -1,
        )


class PassLayouts(NamedTuple):
    """The layouts of the two parts of a row: the forward pass, then the backward pass."""

    forward: RowLayout
    backward: RowLayout

    @property
    def size(self) -> int:
        """The number of elements of a row."""
        return self.forward.size + self.backward.size

    def unpack(self, row: jax.Array) -> Tally:
        """Returns the tally of a row, or of rows with leading axes."""
        first, second = jnp.split(row, [self.forward.size], axis=-1)
        return self.forward.unpack(first).join(self.backward.unpack(second))

    def merge(self, rows: jax.Array) -> jax.Array:
        """Combines rows of statistics, stacked along the first axis, into one."""
        first, second = jnp.split(rows, [self.forward.size], axis=-1)
        return jnp.concatenate([self.forward.merge(first), self.backward.merge(second)], -1)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent for whole float32 exponents from -126 to 127, exactly."""
    bits = (lax.max(exponent, np.float32(-126)).astype(jnp.int32) + np.int32(127)) << np.int32(23)
    return lax.bitcast_convert_type(bits, jnp.float32)
