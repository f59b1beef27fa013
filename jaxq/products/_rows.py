"""Statistics of products that leave a differentiated program as the cotangent of a row.

    row float32 [size]                        an argument of the function; its value is not used
    y   = record_row(product, row, …)         sends statistics to the row's cotangent

Statistics of cotangents exist only in the backward pass, so they leave as amax values do in delayed
scaling (`_histories.py`). A row has three kinds of numbers, which merge by addition, by a maximum,
and by an addition of values that have exponents of their own. A row of zeros is neutral, because
JAX creates cotangents of zeros for branches that do not run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxq._jax.arithmetic import barrier
from jaxq._jax.meshes import varying
from jaxq.products._cotangents import with_transpose
from jaxq.products._tensors import Running
from jaxq.recipes import Recipe

__all__ = ["Probe", "Row", "RowLayout", "Scaled", "Tally", "layout_of", "record_row"]


class Scaled(NamedTuple):
    """A float32 number value · 2^exponent that cannot overflow; 0 whenever the value is 0."""

    value: jax.Array
    exponent: jax.Array


class Tally(NamedTuple):
    """Numbers by name, each with the way in which two of them merge.

    Attributes:
      added: float32 vectors that are added.
      largest: nonnegative float32 scalars of which the larger one counts.
      scaled: numbers with an exponent that are added.
    """

    added: Mapping[str, jax.Array]
    largest: Mapping[str, jax.Array]
    scaled: Mapping[str, Scaled]

    def join(self, other: "Tally") -> "Tally":
        """Returns a tally with the names of both."""
        return Tally(
            {**self.added, **other.added},
            {**self.largest, **other.largest},
            {**self.scaled, **other.scaled},
        )

    def prefixed(self, prefix: str) -> "Tally":
        """Returns the tally with a prefix and a slash before every name."""
        return Tally(
            {f"{prefix}/{name}": x for name, x in self.added.items()},
            {f"{prefix}/{name}": x for name, x in self.largest.items()},
            {f"{prefix}/{name}": x for name, x in self.scaled.items()},
        )

    def split(self) -> "dict[str, Tally]":
        """Returns the tallies from which `prefixed` has made this one, by their prefixes."""
        found: dict[str, Tally] = {}
        for kind, part in enumerate(self):
            for path, x in part.items():
                prefix, _, name = path.rpartition("/")
                own: Any = found.setdefault(prefix, Tally({}, {}, {}))[kind]
                own[name] = x
        return found


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The places of a tally's numbers in a row.

    Attributes:
      added: the names of the added vectors and their lengths.
      largest: the names of the largest values.
      scaled: the names of the numbers with exponents.
    """

    added: tuple[tuple[str, int], ...]
    largest: tuple[str, ...]
    scaled: tuple[str, ...]

    @classmethod
    def of(cls, tally: Tally) -> "RowLayout":
        """Returns the layout of a tally of arrays or of their shapes."""
        added = tuple((name, math.prod(x.shape)) for name, x in sorted(tally.added.items()))
        return cls(added, tuple(sorted(tally.largest)), tuple(sorted(tally.scaled)))

    @property
    def ends(self) -> tuple[int, int, int, int]:
        """The ends of the four parts: added, largest, values and exponents."""
        first = sum(n for _, n in self.added)
        second = first + len(self.largest)
        return first, second, second + len(self.scaled), second + 2 * len(self.scaled)

    @property
    def size(self) -> int:
        """The number of elements of a row."""
        return self.ends[-1]

    def pack(self, tally: Tally) -> jax.Array:
        """Returns the row of a tally."""
        parts = [part.astype(jnp.float32) for part in self._parts(tally)]
        return jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.float32)

    def order(self, first: "RowLayout", second: "RowLayout") -> np.ndarray:
        """Returns the indices of this row's elements in the concatenation of two rows."""
        tallies = first.unpack(np.arange(first.size)), second.unpack(np.arange(second.size))
        moved = jax.tree.map(lambda x: x + first.size, tallies[1])
        return np.concatenate(self._parts(tallies[0].join(moved)))

    def _parts(self, tally: Tally) -> list[Any]:
        parts = [tally.added[name].reshape(-1) for name, _ in self.added]
        parts += [tally.largest[name].reshape(1) for name in self.largest]
        parts += [tally.scaled[name].value.reshape(1) for name in self.scaled]
        return parts + [tally.scaled[name].exponent.reshape(1) for name in self.scaled]

    def unpack(self, row: Any) -> Tally:
        """Returns the tally of a row, or of rows with leading axes."""
        added, at = {}, 0
        for name, n in self.added:
            added[name] = row[..., at : at + n]
            at += n
        largest = {name: row[..., at + i] for i, name in enumerate(self.largest)}
        values, exponents = self.ends[1], self.ends[2]
        scaled = {
            name: Scaled(row[..., values + i], row[..., exponents + i])
            for i, name in enumerate(self.scaled)
        }
        return Tally(added, largest, scaled)

    def merge(self, rows: jax.Array) -> jax.Array:
        """Merges rows along the first axis."""
        first, second, third, _ = self.ends
        values, exponents = rows[..., second:third], rows[..., third:]
        used = jnp.where(values != 0, exponents, -jnp.inf)
        top = used.max(0)
        top = jnp.where(jnp.isfinite(top), top, np.float32(0))
        # Terms that are smaller by more than the range of float32 become 0.
        steps = lax.clamp(
            np.float32(-127), jnp.where(values != 0, used - top[None], 0), np.float32(0)
        )
        factors = jnp.where(steps > -127, _power_of_two(steps), np.float32(0))
        return jnp.concatenate(
            [
                rows[..., :first].sum(0),
                rows[..., first:second].max(0),
                (values * factors).sum(0),
                top,
            ],
            -1,
        )


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent for whole float32 exponents from -126 to 127, exactly."""
    bits = (lax.max(exponent, np.float32(-126)).astype(jnp.int32) + np.int32(127)) << np.int32(23)
    return lax.bitcast_convert_type(bits, jnp.float32)


class Probe(Protocol):
    """The definition of the statistics of a product. Frozen and hashable."""

    @property
    def every(self) -> int:
        """The number of steps from one step with statistics to the next."""
        ...

    @property
    def keeps_operands(self) -> bool:
        """True if the backward pass needs the values of the operands."""
        ...

    def forward(self, running: Running, y: jax.Array, output: Recipe | None) -> Tally:
        """Returns the statistics that are known in the forward pass.

        Args:
          running: the product with its operands.
          y: its result.
          output: the recipe of the result, if it has one.
        """
        ...

    def backward(self, running: Running, cotangent: jax.Array) -> Tally:
        """Returns the statistics that are known in the backward pass."""
        ...

    def finish(self, tally: Tally) -> dict[str, jax.Array]:
        """Returns the statistics of a product by name."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "active"],
    meta_fields=["layout", "probe"],
)
@dataclasses.dataclass(frozen=True)
class Row:
    """An array whose cotangent receives the statistics of one product: a pytree.

    Attributes:
      values: float32 `[..., size]`.
      active: float32 `[...]`; 0 in steps without statistics.
      layout: the places of the statistics.
      probe: the definition of the statistics.
    """

    values: jax.Array
    active: jax.Array
    layout: RowLayout
    probe: Probe

    def spread(self, count: int) -> "Row":
        """Copies the row for `count` products; its cotangent merges theirs."""

        def copies(values: jax.Array) -> jax.Array:
            return jnp.broadcast_to(values, (count, *values.shape))

        merge = self.layout.merge
        values = with_transpose(copies, merge, self.values, join=merge)
        active = jnp.broadcast_to(self.active, (count, *self.active.shape))
        return dataclasses.replace(self, values=values, active=active)


def layout_of(probe: Probe, running: Running, output: Recipe | None) -> RowLayout:
    """Returns the layout of a product's row, from shapes alone.

    Args:
      probe: the definition of the statistics.
      running: the product, whose operands and other arrays may be shapes.
      output: the recipe of the result, if it has one.
    """

    def both(operands: Any, keys: Any, scales: Any) -> Tally:
        own = dataclasses.replace(running, operands=operands, keys=keys, scales=scales)
        y = own.operation.function(*operands, *own.operation.arguments)
        return probe.forward(own, y, output).join(probe.backward(own, y))

    return RowLayout.of(jax.eval_shape(both, running.operands, running.keys, running.scales))


def record_row(
    y: jax.Array,
    row: Row,
    running: Running,
    output: Recipe | None = None,
) -> jax.Array:
    """Returns a product whose gradient records statistics in a row.

    Args:
      y: the product.
      row: the row of the product.
      running: the product with its operands.
      output: the recipe of the result, if it has one.

    Returns:
      y.
    """
    devices, shared = varying(y), varying(row.values)
    layout, probe = row.layout, row.probe
    operation, recipe = running.operation, running.recipe
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in running.operands]
    arrays = (running.operands, operation.arguments, running.keys, running.scales)

    def restored(arrays: Any) -> Running:
        operands, arguments, keys, scales = arrays
        own = dataclasses.replace(operation, arguments=arguments)
        return Running(own, operands, recipe, keys, scales)

    def forward(y: jax.Array, arrays: Any) -> Tally:
        return probe.forward(restored(arrays), y, output)

    def backward(cotangent: jax.Array, arrays: Any) -> Tally:
        return probe.backward(restored(arrays), cotangent)

    before, after = (RowLayout.of(jax.eval_shape(f, y, arrays)) for f in (forward, backward))
    order = layout.order(before, after)

    def everywhere(x: jax.Array) -> jax.Array:
        return lax.pcast(x, tuple(devices - varying(x)), to="varying")

    def run(part: RowLayout, function: Callable[..., Tally], active: jax.Array, *of: Any) -> Any:
        def measured(*of: Any) -> jax.Array:
            return everywhere(part.pack(function(*of)))

        def skipped(*_: Any) -> jax.Array:
            return everywhere(jnp.zeros(part.size, jnp.float32))

        if row.probe.every == 1:
            return measured(*of)
        return lax.cond(active > 0, measured, skipped, *of)

    def zeros(values: jax.Array, *_: Any) -> jax.Array:
        del values
        return everywhere(jnp.zeros(y.shape, y.dtype))

    @jax.custom_jvp
    def recorded(y: jax.Array, values: jax.Array, active: jax.Array, arrays: Any) -> jax.Array:
        del values, active, arrays
        return y

    def tangent(primals: tuple, tangents: tuple) -> tuple:
        moved, moved_values, *_ = tangents
        parts = [] if isinstance(moved, SymbolicZero) else [moved]
        if isinstance(moved_values, SymbolicZero):
            return primals[0], parts[0] if parts else jnp.zeros_like(primals[0])
        y, _, active, arrays = jax.tree.map(lax.stop_gradient, primals)
        # XLA must neither compute statistics of constants when it compiles, which is slow, nor fuse
        # them with the step, which could change its bits.
        y, operands = barrier((y, arrays[0]))
        arrays = (operands, *arrays[1:])
        known = run(before, forward, active, y, arrays)
        if not probe.keeps_operands:
            arrays = (None, *arrays[1:])
        leaves, structure = jax.tree.flatten((known, active, arrays))

        def seen(cotangent: jax.Array, element: jax.Array, *leaves: Any) -> jax.Array:
            del element  # It is batched whenever the product is.
            known, active, arrays = jax.tree.unflatten(structure, leaves)
            if arrays[0] is None:  # Shapes suffice, so that the operands are not kept in memory.
                arrays = (tuple(map(jnp.zeros_like, shapes)), *arrays[1:])
            later = run(after, backward, active, cotangent, arrays)
            whole = jnp.concatenate([known, later])[order]
            return _over_devices(whole, tuple(sorted(devices - shared)), layout)

        element = y[(0,) * y.ndim]
        moved_y = with_transpose(zeros, seen, moved_values, element, *leaves, join=layout.merge)
        parts.append(moved_y)
        return primals[0], sum(parts[1:], start=parts[0])

    recorded.defjvp(tangent, symbolic_zeros=True)
    return recorded(y, row.values, row.active, arrays)


def _over_devices(row: jax.Array, axes: tuple[str, ...], layout: RowLayout) -> jax.Array:
    """Merges the rows of all devices along mesh axes, by a sum that all of them receive."""
    if not axes:
        return row
    place, count = lax.axis_index(axes), lax.axis_size(axes)
    rows = jnp.zeros((count, *row.shape), row.dtype).at[place].set(row)
    return layout.merge(lax.psum(rows, axes))
