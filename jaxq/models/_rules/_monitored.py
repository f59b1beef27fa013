"""Statistics of a model's products, as the gradient of a state.

`jaxq.analysis.monitor` creates such a state. Its `Probe`, which `analysis` implements,
defines the statistics.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer
from jaxq._base.records import state_repr
from jaxq.models._rules._states import Delayed, Frozen, Switched
from jaxq.products import Probe, Row
from jaxq.recipes import Recipe

__all__ = ["Monitored"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "scaling"],
    meta_fields=["rules", "probe"],
)
@dataclasses.dataclass(frozen=True)
class Monitored:
    """Rules with a request for statistics, from `jaxq.analysis.monitor`. A pytree.

    It is passed in place of rules, and its gradient is a `Monitored` that holds the statistics.

    Attributes:
      rows: the rows of the monitored products, by their names. Products in a scan over layers have
        a leading axis, one row per layer.
      scaling: the rules with scales or flags that were passed, such as those of delayed scaling, or
        None.
      rules: the rules.
      probe: the request.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> loss = lambda params, x: (x @ params["w"]).sum()
      >>> params, x = {"w": jnp.ones((2, 2))}, jnp.ones((1, 2))
      >>> state = jaxq.analysis.monitor(loss, "w8a8")(params, x)
      >>> [*state.recipes]
      ['w/lhs', 'w/rhs']
    """

    rows: Mapping[str, Row]
    scaling: Frozen | Delayed | Switched | None
    rules: tuple[Any, ...]
    probe: Probe

    def __repr__(self) -> str:
        return state_repr(self, self.rows)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes of the monitored tensors by names such as `"up/lhs"`."""
        return {
            f"{product}/{tensor}": recipe
            for product, row in self.rows.items()
            for tensor, recipe in row.recipes
        }

    def at(self, step: jax.typing.ArrayLike) -> "Monitored":
        """Returns the state for a step, in which statistics are computed if `every` divides it.

        Args:
          step: the number of the step, which may be traced.
        """
        is_active = jnp.asarray(step) % self.probe.every == 0
        rows = {
            name: dataclasses.replace(row, active=jnp.full_like(row.active, is_active))
            for name, row in self.rows.items()
        }
        return dataclasses.replace(self, rows=rows)

    def update(self, seen: "Monitored") -> "Monitored":
        """Returns the state for the next step, with the amax values of delayed scaling updated.

        Args:
          seen: the gradient with respect to this state.
        """
        if not isinstance(self.scaling, Delayed):
            return self
        assert isinstance(seen.scaling, Delayed)
        return dataclasses.replace(self, scaling=self.scaling.update(seen.scaling))

    def merge(self, other: "Monitored") -> "Monitored":
        """Merges the statistics of two micro-batches, as if they were one batch.

        Counts, largest and smallest values are exact; sums are float32 sums.

        Args:
          other: the gradient with respect to the same state, from another micro-batch.

        Raises:
          ValueError: if `other` belongs to another model or another request.
        """
        _check_same("Monitored.merge", self, other)
        rows = {
            name: dataclasses.replace(row, values=_merged(row, other.rows[name]))
            for name, row in self.rows.items()
        }
        scaling = self.scaling
        if isinstance(scaling, Delayed):
            assert isinstance(other.scaling, Delayed)
            scaling = scaling.merge(other.scaling)
        return dataclasses.replace(self, rows=rows, scaling=scaling)

    def gather(self, axis_name: str) -> "Monitored":
        """Merges the statistics of all devices along an axis of `jax.shard_map` or `jax.vmap`."""
        rows = {
            name: dataclasses.replace(
                row, values=row.layout.merge(lax.all_gather(row.values, axis_name))
            )
            for name, row in self.rows.items()
        }
        scaling = self.scaling
        if isinstance(scaling, Delayed):
            scaling = scaling.gather(axis_name)
        return dataclasses.replace(self, rows=rows, scaling=scaling)

    def copies(self, count: int) -> tuple["Monitored", ...]:
        """Returns copies of the state for several calls in one loss, one per call.

        Autodiff adds the cotangents of a state that is used twice. Through copies, the statistics
        of the calls are merged instead.

        Args:
          count: the number of copies, at least 1.

        Raises:
          ValueError: if `count` is less than 1.
        """
        integer("Monitored.copies", "count", count, "Use one per call.", least=1)
        copies = {name: row.copies_for_loop(count) for name, row in self.rows.items()}
        scaling: tuple[Any, ...] = (self.scaling,) * count
        if isinstance(self.scaling, Delayed):
            scaling = self.scaling.copies(count)
        return tuple(
            dataclasses.replace(
                self, rows=jax.tree.map(lambda x, i=i: x[i], copies), scaling=scaling[i]
            )
            for i in range(count)
        )

    def statistics(self) -> dict[str, dict[str, jax.Array]]:
        """Returns the statistics in a gradient with respect to a state. A pytree.

        Returns:
          A dictionary from products to dictionaries from names such as `"lhs/sqnr_db"` to float32
          scalars, or arrays with one value per layer for products in a scan over layers. All are
          NaN in a step without statistics.
        """
        return _statistics(self.rows, self.probe)

    def check_gradient(self, owner: str) -> None:
        """Raises a ValueError if this is a state and not the gradient with respect to one.

        Args:
          owner: the name of the calling function, for the error.
        """
        # The flag of a state is 1 in steps with statistics; a gradient with respect to it is 0.
        if any(np.any(np.asarray(row.active) > 0) for row in self.rows.values()):
            raise ValueError(
                f"{owner}: statistics exist only in the gradient with respect to a state, got the "
                "state. Differentiate the loss: value_and_grad(loss, (0, 1))(params, state)."
            )

    def flat(self) -> dict[str, float]:
        """Returns the statistics as Python numbers by names such as `"up/lhs/sqnr_db"`.

        A layer of a scan over layers has its number after the product's name, as in
        `"layers/up/3/lhs/sqnr_db"`. Histograms are left out. Must not be called in `jax.jit`.

        Raises:
          ValueError: if this is a state and not the gradient with respect to one.
        """
        self.check_gradient("Monitored.flat")
        flat: dict[str, float] = {}
        for product, statistics in jax.device_get(self.statistics()).items():
            rank = self.rows[product].values.ndim - 1
            for name, values in statistics.items():
                if values.ndim > rank:
                    continue
                if rank == 0:
                    flat[f"{product}/{name}"] = float(values)
                    continue
                for i, value in enumerate(values.reshape(-1)):
                    flat[f"{product}/{i}/{name}"] = float(value)
        return flat


@functools.partial(jax.jit, static_argnames="probe")
def _statistics(rows: Mapping[str, Row], probe: Probe) -> dict[str, dict[str, jax.Array]]:
    return {name: probe.finish(row.layout.unpack(row.values)) for name, row in rows.items()}


def _merged(first: Row, second: Row) -> jax.Array:
    return first.layout.merge(jnp.stack([first.values, second.values]))


def _check_same(owner: str, first: Monitored, second: Monitored) -> None:
    layouts = [{name: row.layout for name, row in state.rows.items()} for state in (first, second)]
    if layouts[0] != layouts[1]:
        raise ValueError(
            f"{owner}: `other` must have the products and statistics of this state, got products "
            f"{', '.join([*second.rows][:3])}. Merge only gradients of one state."
        )
