"""Whole trees of parameters: which leaf gets which recipe, by patterns of paths."""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
from jax import numpy as jnp

from jaxq.formats import Format
from jaxq.presets import get_quantizer
from jaxq.quantized import Quantized
from jaxq.quantizers import quantize
from jaxq.recipes import Quantizer
from jaxq.tables import Table

__all__ = [
    "Rules",
    "assign",
    "dequantize_tree",
    "is_floating",
    "naming",
    "quantize_tree",
    "tree_report",
]

Rules: TypeAlias = "Sequence[tuple[str, str | Format | Quantizer | None]]"


def quantize_tree(params: Any, rules: Rules, *, key: jax.Array | None = None) -> Any:
    """Quantizes the leaves of a tree whose paths match a rule.

    Args:
      params: any pytree. A leaf's path is its keys joined by slashes, as in `"layers/0/kernel"`.
      rules: pairs of a regular expression, searched for anywhere in the path, and a recipe as
        `jaxq.get_quantizer` takes it, or None to leave the leaf as it is. The first rule that
        matches a leaf holds. Leaves of other than floating dtypes match none.
      key: a key of `jax.random`, if the recipes are stochastic; each leaf gets its own.

    Returns:
      The tree with `jaxq.Quantized` in the place of the leaves.

    Raises:
      ValueError: a rule holds for no leaf, or a recipe does not fit a leaf; the text names both.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
      >>> small = quantize_tree(params, [("kernel", "int4_channel")])
      >>> small["dense"]["kernel"].nbytes, small["dense"]["bias"].nbytes
      (1152, 128)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    recipes = assign("quantize_tree", params, rules)
    result = []
    for i, ((path, leaf), recipe) in enumerate(zip(leaves, recipes, strict=True)):
        if recipe is None:
            result.append(leaf)
            continue
        own = None if key is None else jax.random.fold_in(key, i)
        with naming("quantize_tree", path):
            result.append(quantize(leaf, recipe, key=own))
    return jax.tree_util.tree_unflatten(structure, result)


@contextlib.contextmanager
def naming(owner: str, path: tuple) -> Iterator[None]:
    """Errors within it name a function and the leaf that it is at."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{owner}: leaf {_path(path)!r}: {error}") from error


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array of a floating dtype."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def assign(
    owner: str,
    tree: Any,
    rules: Sequence[tuple[str, Any]],
    *,
    look_up: Callable[[Any], Any] = get_quantizer,
    takes: Callable[[Any], bool] = is_floating,
    others: str = "of no floating dtype",
    strict: bool = True,
) -> list[Any]:
    """What the first rule that matches a leaf's path says, or None: for each leaf of a tree.

    Args:
      owner: the function that an error names.
      tree: any pytree.
      rules: pairs of a regular expression and what `look_up` takes, or None.
      look_up: what a rule's second part stands for.
      takes: which leaves rules may hold for.
      others: what the leaves are that `takes` refuses, in the words of an error.
      strict: whether a rule that holds for no leaf is an error.

    Returns:
      A list in the order of the leaves.

    Raises:
      ValueError: a rule holds for no leaf; or what `look_up` raises.
    """
    found = [None if said is None else look_up(said) for _, said in rules]
    patterns = [re.compile(pattern) for pattern, _ in rules]
    leaves = [(_path(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    chosen = [
        next((n for n, p in enumerate(patterns) if takes(leaf) and p.search(path)), None)
        for path, leaf in leaves
    ]
    paths = [path for path, _ in leaves]
    for n in range(len(rules)):
        if strict and n not in chosen:
            matched = [path for path in paths if patterns[n].search(path)]
            raise ValueError(_unused(owner, rules[n][0], matched, paths, others))
    return [None if n is None else found[n] for n in chosen]


def dequantize_tree(params: Any) -> Any:
    """A tree with every `jaxq.Quantized` in it dequantized.

    Args:
      params: any pytree.

    Returns:
      The tree with arrays in their place.
    """
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if _is_quantized(leaf) else leaf,
        params,
        is_leaf=_is_quantized,
    )


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One leaf in a `tree_report`: bytes before and after, and bits an element after."""

    path: str
    shape: str
    dtype: str
    format: str
    bytes_before: int
    bytes_after: int
    bits: float


def tree_report(params: Any) -> Table:
    """What became what in a tree, and how many bytes it takes; the last row is the sum.

    Args:
      params: what `quantize_tree` gave; shapes without values, as `jax.eval_shape` gives them, do.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Example:
      >>> import jax.numpy as jnp
      >>> small = quantize_tree({"w": jnp.ones((64, 32))}, [("w", "int4_channel")])
      >>> print(tree_report(small))
      path   shape    dtype  format  bytes_before  bytes_after  bits
      w      64x32  float32    int4          8192         1152   4.5
      total                                  8192         1152   4.5
    """
    rows, elements = [], 0
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_quantized)[0]
    for path, leaf in leaves:
        if not hasattr(leaf, "shape"):
            continue
        size = math.prod(leaf.shape)
        before = size * leaf.dtype.itemsize
        after = _nbytes(leaf)
        label = leaf.recipe.element.name if _is_quantized(leaf) else "-"
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        bits = 8 * after / size if size else math.nan
        rows.append(LeafRow(_path(path), shape, str(leaf.dtype), label, before, after, bits))
        elements += size
    before, after = (
        sum(getattr(row, f"bytes_{when}") for row in rows) for when in ("before", "after")
    )
    bits = 8 * after / elements if elements else math.nan
    return Table((*rows, LeafRow("total", "", "", "", before, after, bits)))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _nbytes(leaf: Any) -> int:
    """Bytes of a leaf, of shapes without values too."""
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(leaf))


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _unused(owner: str, pattern: str, matched: list[str], paths: list[str], others: str) -> str:
    """The error text for a rule that holds for no leaf."""
    if matched:
        return (
            f"{owner}: rule {pattern!r} holds for no leaf: {', '.join(matched[:3])} are {others} "
            "or belong to an earlier rule. Move it up, or leave it out."
        )
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return (
        f"{owner}: rule {pattern!r} matches no path. The nearest are "
        f"{', '.join(near) or 'none: the tree is empty'}."
    )
