"""Statistics of products that leave a differentiated program as the cotangent of a row.

    row float32 [size]                        an argument of the function; its value is not used
    y   = record_row(product, row, …)         sends statistics to the row's cotangent

Statistics of cotangents exist only in the backward pass, so they leave as amax values do in delayed
scaling (`_histories.py`). `_layouts.py` defines the layout of a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxq._jax.barriers import barrier
from jaxq._jax.meshes import like, varying
from jaxq.products._cotangents import with_transpose
from jaxq.products._layouts import PassLayouts, RowLayout, Tally
from jaxq.products._tensors import Gradient, Operands, Running
from jaxq.recipes import Recipe

__all__ = ["Probe", "Row", "array_layouts", "layouts_of", "record_array", "record_row"]


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

    def forward(
        self, running: Running, operands: Operands, y: jax.Array, output: Recipe | None
    ) -> Tally:
        """Returns the statistics that are known in the forward pass.

        Args:
          running: the product.
          operands: its operands before and after quantization.
          y: its result.
          output: the recipe of the result, if it has one.
        """
        ...

    def backward(
        self,
        running: Running,
        operands: Operands | None,
        gradients: tuple[Gradient, Gradient],
        cotangent: jax.Array,
    ) -> Tally:
        """Returns the statistics that are known in the backward pass.

        Args:
          running: the product; its operands are zeros unless `keeps_operands`.
          operands: as in `forward`, or None unless `keeps_operands`.
          gradients: the operands of the two products of the gradient.
          cotangent: the cotangent of the result.
        """
        ...

    def array(self, tensor: str, x: jax.Array) -> Tally:
        """Returns the statistics of a marked array or of its cotangent.

        Args:
          tensor: `"output"` for the array, `"cotangent"` for its cotangent.
          x: the array.
        """
        ...

    def finish(self, tally: Tally) -> dict[str, jax.Array]:
        """Returns the statistics of a product by name."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "active"],
    meta_fields=["layout", "probe", "recipes"],
)
@dataclasses.dataclass(frozen=True)
class Row:
    """An array whose cotangent receives the statistics of one product. A pytree.

    Attributes:
      values: float32 `[..., size]`.
      active: float32 `[...]`; 0 in steps without statistics.
      layout: the positions of the statistics of both passes in a row.
      probe: the definition of the statistics.
      recipes: the names of the quantized tensors and their recipes.
    """

    values: jax.Array
    active: jax.Array
    layout: PassLayouts
    probe: Probe
    recipes: tuple[tuple[str, Recipe], ...] = ()

    def copies_for_loop(self, count: int) -> "Row":
        """Copies the row for `count` products; its cotangent merges theirs."""

        def copies(values: jax.Array) -> jax.Array:
            return jnp.broadcast_to(values, (count, *values.shape))

        merge = self.layout.merge
        values = with_transpose(copies, merge, self.values, join=merge)
        active = jnp.broadcast_to(self.active, (count, *self.active.shape))
        return dataclasses.replace(self, values=values, active=active)


def layouts_of(probe: Probe, running: Running, output: Recipe | None) -> PassLayouts:
    """Returns the layouts of a product's row, from shapes alone.

    Args:
      probe: the definition of the statistics.
      running: the product, whose operands and other arrays may be shapes.
      output: the recipe of the result, if it has one.
    """

    def tallies_of(operands: Any, keys: Any, scales: Any) -> tuple[Tally, Tally]:
        traced = dataclasses.replace(running, operands=operands, keys=keys, scales=scales)
        y = traced.operation.function(*operands, *traced.operation.arguments)
        tensors = traced.forward
        forward = probe.forward(traced, tensors, y, output)
        return forward, probe.backward(traced, tensors, traced.gradients(y, tensors), y)

    tallies = jax.eval_shape(tallies_of, running.operands, running.keys, running.scales)
    return PassLayouts(*map(RowLayout.of, tallies))


def array_layouts(probe: Probe, x: jax.ShapeDtypeStruct) -> PassLayouts:
    """Returns the layouts of the row of a marked array, from its shape and dtype."""

    def tallies_of(x: jax.Array) -> tuple[Tally, Tally]:
        return probe.array("output", x), probe.array("cotangent", x)

    return PassLayouts(*map(RowLayout.of, jax.eval_shape(tallies_of, x)))


def record_row(y: jax.Array, row: Row, running: Running, output: Recipe | None = None) -> jax.Array:
    """Returns a product whose gradient records statistics in a row.

    Args:
      y: the product.
      row: the row of the product.
      running: the product with its operands.
      output: the recipe of the result, if it has one.

    Returns:
      y.
    """
    probe, operation = row.probe, running.operation
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in running.operands]
    rest = (operation.arguments, running.keys, running.scales)

    def restored(operands: Any, rest: Any) -> Running:
        arguments, keys, scales = rest
        current = dataclasses.replace(operation, arguments=arguments)
        return Running(current, operands, running.recipe, keys, scales)

    def forward(y: jax.Array, operands: Any, rest: Any) -> _Stage:
        tensors = restored(operands, rest).forward
        y, operands, tensors = _separate((y, operands, tensors))
        residuals = (operands, tensors) if probe.keeps_operands else None
        rebuilt = restored(operands, rest)
        return _Stage(lambda: probe.forward(rebuilt, tensors, y, output), (residuals, rest))

    def backward(cotangent: jax.Array, residuals: Any, rest: Any) -> _Stage:
        # Without residuals, zeros of the same shapes suffice, so no operand is kept in memory.
        operands, tensors = residuals or (tuple(map(jnp.zeros_like, shapes)), None)
        rebuilt = restored(operands, rest)
        cotangent, gradients = _separate((cotangent, rebuilt.gradients(cotangent, tensors)))
        return _Stage(lambda: probe.backward(rebuilt, tensors, gradients, cotangent))

    return _recorded(y, row, (running.operands, rest), forward, backward)


def record_array(x: jax.Array, row: Row) -> jax.Array:
    """Returns an array whose gradient records its statistics and those of its cotangent in a row.

    Args:
      x: the array.
      row: the row of the array.

    Returns:
      x.
    """

    def stage(tensor: str) -> Callable[..., _Stage]:
        def measure(x: jax.Array) -> _Stage:
            x = _separate(x)
            return _Stage(lambda: row.probe.array(tensor, x))

        return measure

    return _recorded(x, row, (), stage("output"), stage("cotangent"))


class _Stage(NamedTuple):
    """The statistics of the forward or of the backward pass.

    The tensors that `tally` uses are computed in every step, not only in steps with statistics. The
    product needs the same tensors, so XLA computes them once.

    Attributes:
      tally: a function that computes the statistics.
      residuals: the arrays that the backward pass needs.
    """

    tally: Callable[[], Tally]
    residuals: tuple[Any, ...] = ()


def _recorded(
    y: jax.Array,
    row: Row,
    arrays: tuple[Any, ...],
    forward: Callable[..., _Stage],
    backward: Callable[..., _Stage],
) -> jax.Array:
    """Returns y; statistics are the cotangent of the row.

    Args:
      y: the array.
      row: the row.
      arrays: further arguments of `forward`.
      forward: `(y, *arrays) -> _Stage`.
      backward: `(cotangent, *residuals) -> _Stage`.
    """
    devices, shared = varying(y), varying(row.values)
    sharding = like(y).sharding
    layout, probe = row.layout, row.probe

    def everywhere(x: jax.Array) -> jax.Array:
        return lax.pcast(x, tuple(devices - varying(x)), to="varying")

    def run(part: RowLayout, active: jax.Array, tally: Callable[[], Tally]) -> jax.Array:
        def measured() -> jax.Array:
            return everywhere(part.pack(tally()))

        def skipped() -> jax.Array:
            return everywhere(jnp.zeros(part.size, jnp.float32))

        return measured() if probe.every == 1 else lax.cond(active > 0, measured, skipped)

    def zeros(values: jax.Array, *_: Any) -> jax.Array:
        del values
        return everywhere(jnp.zeros(y.shape, y.dtype, device=sharding))

    @jax.custom_jvp
    def recorded(y: jax.Array, values: jax.Array, active: jax.Array, arrays: Any) -> jax.Array:
        del values, active, arrays
        return y

    def jvp(primals: tuple, tangents: tuple) -> tuple:
        y_tangent, values_tangent, *_ = tangents
        parts = [] if isinstance(y_tangent, SymbolicZero) else [y_tangent]
        if isinstance(values_tangent, SymbolicZero):
            return primals[0], parts[0] if parts else jnp.zeros_like(primals[0])
        y, _, active, arrays = jax.tree.map(lax.stop_gradient, primals)
        stage = forward(y, *arrays)
        forward_row = run(layout.forward, active, stage.tally)
        leaves, structure = jax.tree.flatten((forward_row, active, stage.residuals))

        def statistics(cotangent: jax.Array, element: jax.Array, *leaves: Any) -> jax.Array:
            del element  # It is batched whenever the product is.
            forward_row, active, residuals = jax.tree.unflatten(structure, leaves)
            backward_row = run(layout.backward, active, backward(cotangent, *residuals).tally)
            full_row = jnp.concatenate([forward_row, backward_row])
            return _over_devices(full_row, tuple(sorted(devices - shared)), layout)

        # Depends on `y` only so that `vmap` batches it; JAX can compute this sum on any mesh.
        element = jnp.sum(y[:0], dtype=y.dtype) if y.ndim else y
        statistics_tangent = with_transpose(
            zeros, statistics, values_tangent, element, *leaves, join=layout.merge
        )
        parts.append(statistics_tangent)
        return primals[0], sum(parts[1:], start=parts[0])

    recorded.defjvp(jvp, symbolic_zeros=True)
    return recorded(y, row.values, row.active, arrays)


def _separate(tree: Any) -> Any:
    """Returns a tree of arrays behind an optimization barrier.

    XLA must neither compute statistics of constants when it compiles, which is slow, nor fuse them
    with the step, which could change its bits. Equal arrays stay equal objects.
    """
    leaves, structure = jax.tree.flatten(tree)
    distinct = {id(leaf): leaf for leaf in leaves}
    separated = dict(zip(distinct, barrier(tuple(distinct.values())), strict=True))
    return jax.tree.unflatten(structure, [separated[id(leaf)] for leaf in leaves])


def _over_devices(row: jax.Array, axes: tuple[str, ...], layout: PassLayouts) -> jax.Array:
    """Merges the rows of all devices along mesh axes, by a sum that all of them receive."""
    if not axes:
        return row
    place, count = lax.axis_index(axes), lax.axis_size(axes)
    rows = jnp.zeros((count, *row.shape), row.dtype).at[place].set(row)
    return layout.merge(lax.psum(rows, axes))
