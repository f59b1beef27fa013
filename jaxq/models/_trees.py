"""Quantization of whole parameter trees by rules that match the paths of leaves."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax import numpy as jnp

from jaxq._base.paths import leaf_path
from jaxq._base.tables import Table
from jaxq._jax.draws import checked_key
from jaxq.models._rules import (
    LeafRules,
    describe_recipe,
    hidden_message,
    leaf_rules,
    unmatched_message,
)
from jaxq.quantizers import Quantized, quantize
from jaxq.recipes import PerTensor, Recipe

__all__ = [
    "assign",
    "dequantize_tree",
    "not_floating",
    "prefix_leaf_errors",
    "quantize_tree",
    "tree_report",
]

_Value = TypeVar("_Value")


def quantize_tree(
    params: Any, rules: LeafRules, *, axis: int | None = None, key: jax.Array | None = None
) -> Any:
    """Quantizes the leaves of a tree whose paths match a rule.

    A tree does not show which axis of a leaf products contract, and blocks, tiles and channels are
    placed relative to that axis, as in `jaxq.SingleProduct`. It is therefore an argument. If leaves
    differ in it, call the function once for each axis; quantized leaves stay as they are.
    `jaxq.quantize_weights` reads the axes from the model instead.

    Args:
      params: any pytree. A leaf's path is its keys joined by slashes, as in `"layers/0/kernel"`.
      rules: a recipe or its name for all leaves; a mapping from patterns to recipes; or a sequence
        of `jaxq.Rule`s and pairs (pattern, recipe). A pattern is a regular expression, searched for
        anywhere in the path. The first rule that matches a leaf applies, and the recipe None leaves
        the leaf unchanged. Leaves without a floating dtype match no rule.
      axis: the axis of the matched leaves that products contract: -2 for kernels
        `[inputs, outputs]` (Flax, Haiku, Keras, `x @ w`), -1 for weights `[outputs, inputs]`
        (PyTorch, Equinox). `PerBlock(n)` gives blocks along it, `PerToken()` one scale per vector
        along it, and `PerChannel(-1)` one scale per index of the last other axis. May be None only
        if every matched recipe has one scale per tensor.
      key: a key of `jax.random`, if the recipes are stochastic; each leaf gets its own.

    Returns:
      The tree with the matched leaves replaced by `jaxq.Quantized`.

    Raises:
      ValueError: if a rule applies to no leaf, has a product recipe or a condition on products, or
        does not fit a leaf, or if `axis` is needed and missing.
      TypeError: if the rules have another form.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
      >>> small = quantize_tree(params, {"kernel": "int4_g32"}, axis=-2)
      >>> small["dense"]["kernel"].block, small["dense"]["bias"].nbytes
      ((32, 1), 128)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_quantized)
    recipes = assign("quantize_tree", params, leaf_rules("quantize_tree", rules))
    result = []
    for i, ((path, leaf), recipe) in enumerate(zip(leaves, recipes, strict=True)):
        if recipe is None:
            result.append(leaf)
            continue
        leaf_key = None if key is None else jax.random.fold_in(checked_key("quantize_tree", key), i)
        with prefix_leaf_errors("quantize_tree", path):
            _check_axis(recipe, axis)
            result.append(quantize(leaf, recipe, axis=axis, key=leaf_key))
    return jax.tree_util.tree_unflatten(structure, result)


def _check_axis(recipe: Recipe, axis: int | None) -> None:
    """Checks that `axis` is given for a recipe whose scales depend on the contracted axis."""
    if axis is None and not isinstance(recipe.granularity, PerTensor):
        raise ValueError(
            f"{describe_recipe(recipe)} needs `axis`, the axis that products contract, got None. "
            "Pass axis=-2 for kernels [inputs, outputs] (Flax, Haiku, Keras, x @ w) or axis=-1 for "
            "weights [outputs, inputs] (PyTorch, Equinox)."
        )


@contextlib.contextmanager
def prefix_leaf_errors(owner: str, path: tuple) -> Iterator[None]:
    """Prefixes errors raised in the context with a function's name and a leaf's path."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error_type = TypeError if isinstance(error, TypeError) else ValueError
        raise error_type(f"{owner}: leaf {leaf_path(path)!r}: {error}") from error


def not_floating(leaf: Any) -> str:
    """Returns the reason why a leaf is not an array of a floating dtype, or "" if it is one."""
    if _is_quantized(leaf):
        return "is already quantized"
    if not hasattr(leaf, "dtype"):
        return f"is not an array but a {type(leaf).__name__}"
    return "" if jnp.issubdtype(leaf.dtype, jnp.floating) else f"has the dtype {leaf.dtype}"


def assign(
    owner: str,
    tree: Any,
    rules: Sequence[tuple[str, _Value | None]],
    *,
    unfit: Callable[[Any], str] = not_floating,
    strict: bool = True,
) -> list[_Value | None]:
    """Returns for each leaf the value of the first rule that matches its path, or None.

    Args:
      owner: the name of the calling function, for errors.
      tree: any pytree.
      rules: pairs of a regular expression and a value, or None.
      unfit: a function that returns the reason why rules cannot match a leaf, such as "has the
        dtype int32", or "" if they can.
      strict: True to raise an error for a rule that applies to no leaf, unless its pattern is
        empty and so means everything.

    Returns:
      A list in the order of the leaves.

    Raises:
      ValueError: if a rule applies to no leaf.
    """
    leaves = [
        (leaf_path(path), unfit(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_quantized)
    ]
    chosen = [None if reason else _first(rules, path) for path, reason in leaves]
    for n, (pattern, _) in enumerate(rules):
        if strict and pattern and n not in chosen:
            raise ValueError(f"{owner}: {_unused(pattern, rules, leaves)}")
    return [None if n is None else rules[n][1] for n in chosen]


def _first(rules: Sequence[tuple[str, Any]], path: str) -> int | None:
    """Returns the index of the first rule whose pattern is found in a path, or None."""
    return next((n for n, rule in enumerate(rules) if re.search(rule[0], path)), None)


def _unused(
    pattern: str, rules: Sequence[tuple[str, Any]], leaves: Sequence[tuple[str, str]]
) -> str:
    """Returns the reason why a rule applies to no leaf.

    Args:
      pattern: the rule's pattern.
      rules: all rules.
      leaves: the path of each leaf, and the reason why rules cannot match it, or "".
    """
    matched = [(path, reason) for path, reason in leaves if re.search(pattern, path)]
    for path, reason in matched:
        first = _first(rules, path)
        if not reason and first is not None:
            return hidden_message(pattern, f"leaf {path!r}", rules[first][0])
    if matched:
        path, reason = matched[0]
        return f"Rule({pattern!r}) matches only leaf {path!r}, which {reason}. Remove the rule."
    remedy = "Correct the pattern." if leaves else "Pass a tree of arrays."
    return unmatched_message(pattern, "leaf", [path for path, _ in leaves], remedy)


def dequantize_tree(params: Any) -> Any:
    """Dequantizes every `jaxq.Quantized` in a tree.

    Args:
      params: any pytree.

    Returns:
      The tree with arrays in place of the quantized leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> small = quantize_tree({"w": jnp.ones((4, 2))}, "int8_tensor")
      >>> dequantize_tree(small)["w"].shape
      (4, 2)
    """
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if _is_quantized(leaf) else leaf,
        params,
        is_leaf=_is_quantized,
    )


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One leaf in a `tree_report`: bytes before and after quantization, and bits per element."""

    path: str
    shape: str
    dtype: str
    format: str
    bytes_before: int
    bytes_after: int
    bits: float


def tree_report(params: Any) -> Table:
    """Returns a table of the format and size of each leaf in a tree; the last row is the total.

    Args:
      params: the result of `quantize_tree`, or its shapes as `jax.eval_shape` returns them.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Example:
      >>> import jax.numpy as jnp
      >>> small = quantize_tree({"w": jnp.ones((64, 32))}, {"w": "int4_channel"}, axis=-2)
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
        rows.append(LeafRow(leaf_path(path), shape, str(leaf.dtype), label, before, after, bits))
        elements += size
    before, after = (
        sum(getattr(row, f"bytes_{when}") for row in rows) for when in ("before", "after")
    )
    bits = 8 * after / elements if elements else math.nan
    return Table((*rows, LeafRow("total", "", "", "", before, after, bits)))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _nbytes(leaf: Any) -> int:
    """Returns the bytes of a leaf, given its arrays or their shapes and dtypes."""
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(leaf))
