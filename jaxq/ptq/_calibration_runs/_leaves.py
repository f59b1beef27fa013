"""The leaves of a model while their weights are solved."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from jaxq.models import ModelPlan, Storage, StoredView
from jaxq.quantizers import Levels, Quantized, grid_values_of, levels, snap, with_levels

__all__ = ["LeafKey", "LeafState", "Leaves", "replace_parameters"]


class LeafKey(NamedTuple):
    """A leaf of the parameters, or a slice of a stacked leaf.

    Attributes:
      leaf: the index among the arrays of the arguments.
      slice_index: the indices of the slice along the leading axes, over which scans over layers
        iterate; empty for the whole leaf.
    """

    leaf: int
    slice_index: tuple[int, ...] = ()


class LeafState(NamedTuple):
    """A leaf that is being solved. All arrays have the shape of the leaf.

    Attributes:
      x: the float values that its products multiply, float32.
      levels: the levels of its elements.
      nearest: the nearest grid values.
      grid_values: the chosen grid values.
      start: the leaf quantized to the nearest levels.
    """

    x: jax.Array
    levels: Levels
    nearest: jax.Array
    grid_values: jax.Array
    start: Quantized


class Leaves:
    """The leaves of a planned model, which are float arrays until they are solved.

    Args:
      planned: the model, planned with float parameters.
    """

    def __init__(self, planned: ModelPlan) -> None:
        self._arrays = planned.traced.arrays
        self._storage = planned.stored.leaves
        self._packed: dict[LeafKey, Quantized] = {}
        self._states: dict[LeafKey, LeafState] = {}

    def array(self, key: LeafKey) -> Any:
        """Returns the float array of a leaf."""
        return (
            self._arrays[key.leaf][key.slice_index] if key.slice_index else self._arrays[key.leaf]
        )

    def storage(self, key: LeafKey) -> Storage | None:
        """Returns the stored form of a leaf, or None if it stays an array."""
        storage = self._storage.get(key.leaf)
        return storage and storage._replace(leading=storage.leading - len(key.slice_index))

    def value(self, key: LeafKey) -> Any:
        """Returns a leaf as an argument of the model: packed once a slice of it is solved."""
        q = self._packed.get(key)
        if q is None and any(other.leaf == key.leaf for other in self._packed):
            q = self._stack(key, self._packed_slices(key.leaf))
        if q is None:
            return self.array(key)
        return StoredView(dataclasses.replace(q, dtype=self._storage[key.leaf].dtype), q.dtype)

    def nearest(self, key: LeafKey) -> Quantized:
        """Returns a leaf with the nearest levels."""
        storage = self.storage(key)
        assert storage is not None, "only stored leaves are solved"
        return storage.quantize(self.array(key))

    def state(self, key: LeafKey) -> LeafState:
        """Returns the state of a leaf that is being solved."""
        if key not in self._states:
            storage = self.storage(key)
            assert storage is not None, "only stored leaves are solved"
            q = self.nearest(key)
            x = storage.convert(self.array(key)).astype(jnp.float32)
            grid_values = grid_values_of(q)
            self._states[key] = LeafState(
                x=x, levels=levels(q), nearest=grid_values, grid_values=grid_values, start=q
            )
        return self._states[key]

    def put(self, key: LeafKey, grid_values: jax.Array, is_last: bool) -> None:
        """Packs a leaf with the chosen grid values.

        Args:
          key: the leaf.
          grid_values: the grid values.
          is_last: True if no other product solves the leaf, so that its state is no longer needed.
        """
        state = self.state(key)
        self._packed[key] = with_levels(state.start, grid_values)
        self._states[key] = state._replace(grid_values=grid_values)
        if is_last:
            del self._states[key]

    def restore(self, key: LeafKey, q: Quantized) -> None:
        """Restores a leaf from the journal of an earlier run."""
        self._packed[key] = q
        self.forget(key)

    def packed(self, key: LeafKey) -> Quantized:
        """Returns a solved leaf."""
        return self._packed[key]

    def rescale(self, key: LeafKey, start: Quantized) -> None:
        """Replaces the scales of a leaf that is being solved by those of `start`."""
        state, new = self.state(key), levels(start)
        nearest = snap(state.x, new, start.recipe)[0]
        self._states[key] = state._replace(levels=new, nearest=nearest, start=start)

    def forget(self, key: LeafKey) -> None:
        """Frees the state of a leaf."""
        self._states.pop(key, None)

    def pack(self, key: LeafKey) -> None:
        """Packs a leaf with the nearest levels."""
        self._packed[key] = self.nearest(key)

    def results(self) -> dict[int, Quantized]:
        """Returns the packed leaves by index; unsolved slices have the nearest levels."""
        return {
            leaf: self._stack(LeafKey(leaf), self._packed_slices(leaf)) for leaf in self._storage
        }

    def _packed_slices(self, leaf: int) -> dict[tuple[int, ...], Quantized]:
        """Returns the packed slices of a leaf."""
        return {key.slice_index: q for key, q in self._packed.items() if key.leaf == leaf}

    def _stack(self, key: LeafKey, slices: Mapping[tuple[int, ...], Quantized]) -> Quantized:
        """Returns a leaf as a stack of packed slices; all others have the nearest levels."""
        if key.slice_index in slices:
            return slices[key.slice_index]
        depth = len(key.slice_index)
        if not any(index[:depth] == key.slice_index for index in slices):
            return self.nearest(key)
        count = len(self.array(key))
        parts = [
            self._stack(LeafKey(key.leaf, (*key.slice_index, i)), slices) for i in range(count)
        ]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)


def replace_parameters(planned: ModelPlan, leaves: Mapping[int, Any]) -> Any:
    """Returns the parameters of a model with some leaves replaced, given by their indices."""
    tree, indices = planned.traced.parameters
    old, structure = jax.tree.flatten(tree)
    new = [leaves.get(i, x) if i is not None else x for i, x in zip(indices, old, strict=True)]
    result = jax.tree.unflatten(structure, new)
    # The parameters of a function are a list with its first argument; those of a module are not.
    return result[0] if isinstance(result, list) else result
