"""The paths of leaves, by which rules, tables and errors name them."""

from typing import Any

import jax

__all__ = ["leaf_path"]


def leaf_path(keys: tuple[Any, ...]) -> str:
    """Returns the keys of a leaf, as `jax.tree_util` gives them, as text.

    Example:
      >>> [(keys, _)] = jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 1.0}]})
      >>> leaf_path(keys)
      'layers/0/kernel'
    """
    return jax.tree_util.keystr(keys, simple=True, separator="/")
