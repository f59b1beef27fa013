"""Layers that are stacked along a first axis, or a list with one dictionary per layer.

A stack is one array per weight, so it has one recipe. Lists give every layer its own recipes.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

__all__ = ["restacked", "through", "unstacked"]

_KEY = "layers"


def through(
    layer: Callable[..., jax.Array], x: jax.Array, layers: Any, *more: jax.Array
) -> jax.Array:
    """Applies all layers in turn, in a scan if they are stacked.

    Args:
      layer: a function from x, the parameters of a layer and its further inputs to the next x.
      x: the input of the first layer.
      layers: the parameters, stacked or as a list.
      *more: further inputs of the layers, stacked.
    """
    if isinstance(layers, list):
        for i, own in enumerate(layers):
            x = layer(x, own, *(each[i] for each in more))
        return x
    return lax.scan(lambda x, own: (layer(x, *own), None), x, (layers, *more))[0]


def unstacked(params: Any) -> Any:
    """Returns parameters with lists in place of all stacks of layers."""
    if not isinstance(params, dict):
        return params
    return {k: _listed(v) if k == _KEY else unstacked(v) for k, v in params.items()}


def restacked(params: Any) -> Any:
    """Returns parameters with stacks in place of all lists of layers; stacks remain as they are."""
    if not isinstance(params, dict):
        return params
    lists = {k: v for k, v in params.items() if isinstance(v, list)}
    stacked = {k: jax.tree.map(lambda *x: jnp.stack(x), *v) for k, v in lists.items()}
    return {k: stacked[k] if k in lists else restacked(v) for k, v in params.items()}


def _listed(stack: Any) -> list[Any]:
    leaves, structure = jax.tree.flatten(stack)
    return [jax.tree.unflatten(structure, own) for own in zip(*leaves, strict=True)]
