"""Errors of whole trees of parameters, a leaf a row."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.analysis.codes import code_usage
from jaxq.analysis.metrics import compare
from jaxq.quantized import Quantized
from jaxq.tables import Table
from jaxq.trees import quantize_tree

__all__ = ["ErrorRow", "tree_errors"]


@dataclasses.dataclass(frozen=True)
class ErrorRow:
    """One leaf in a `tree_errors`; the fields are those of `Comparison` and `CodeUsage`.

    `bits` are bits an element, scales included; `entropy` is NaN for a leaf that has no codes.
    """

    path: str
    shape: str
    format: str
    bits: float
    sqnr_db: float
    mse: float
    max_error: float
    mean_relative_error: float
    cosine: float
    lost: float
    entropy: float


def tree_errors(params: Any, small: Any, *, key: jax.Array | None = None) -> Table:
    """The error of every floating leaf of a tree that is quantized; the last row is of all.

    Args:
      params: any pytree of arrays.
      small: rules, as `jaxq.quantize_tree` takes them; or a tree of the same structure, with
        `jaxq.Quantized` or other arrays in the place of leaves. Leaves that are the same object
        in both are left out.
      key: a key of `jax.random`, for rules with stochastic recipes.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text. In the last row errors are
      means over all elements, the entropy is the mean a code, and there is no cosine (NaN, printed
      as a dash).

    Raises:
      ValueError: rules as `jaxq.quantize_tree` raises; trees of different structure.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.linspace(-1.0, 1.0, 256).reshape(4, 64), "bias": jnp.ones(4)}
      >>> table = tree_errors(params, [("w", "int8_channel")])
      >>> [(row.path, row.bits) for row in table.rows]
      [('w', 16.0), ('total', 16.0)]
    """
    if _are_rules(small):
        small = quantize_tree(params, small, key=key)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    others, other = jax.tree.flatten(small, is_leaf=_is_quantized)
    if structure != other:
        raise ValueError(
            f"tree_errors: `small` must have the structure of `params`, {structure}, got {other}."
        )
    rows, sizes, powers, finite = [], [], [], []
    for (path, leaf), after in zip(leaves, others, strict=True):
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if leaf is after or not floating:
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        row, power, skipped = _row(name, leaf, after)
        rows.append(row)
        sizes.append(leaf.size)
        powers.append(power)
        finite.append(leaf.size * (1 - skipped))
    return Table((*rows, _total(rows, np.array(sizes), np.array(powers), np.array(finite))))


def _are_rules(small: Any) -> bool:
    """Whether this is a sequence of pairs that begin with a pattern."""
    return isinstance(small, Sequence) and all(
        isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str) for rule in small
    )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _row(name: str, leaf: jax.Array, after: Any) -> tuple[ErrorRow, float, float]:
    """The row of a leaf, the mean square of its numbers, and the share that do not count."""
    entropy, size = math.nan, max(leaf.size, 1)
    if _is_quantized(after):
        entropy, label = float(code_usage(after).entropy), after.recipe.element.name
        bits, y = 8 * after.nbytes / size, after.dequantize()
    else:
        y, label, bits = after, str(after.dtype), 8.0 * after.dtype.itemsize
    if y.shape != leaf.shape:
        raise ValueError(f"tree_errors: leaf {name!r} must have shape {leaf.shape}, got {y.shape}.")
    c = compare(leaf, y)
    row = ErrorRow(
        path=name,
        shape="x".join(map(str, leaf.shape)) or "scalar",
        format=label,
        bits=bits,
        sqnr_db=float(c.sqnr_db),
        mse=float(c.mse),
        max_error=float(c.max_error),
        mean_relative_error=float(c.mean_relative_error),
        cosine=float(c.cosine),
        lost=float(c.lost),
        entropy=entropy,
    )
    return row, float(c.power), float(c.skipped)


def _total(
    rows: list[ErrorRow], sizes: np.ndarray, powers: np.ndarray, finite: np.ndarray
) -> ErrorRow:
    """All leaves as one, from what is known of each."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], np.float64)

    def mean(values: np.ndarray, weights: np.ndarray) -> float:
        weights = np.where(values == 0, 0, weights)  # An infinite error of nothing is none.
        return float((values * weights).sum() / count) if count else 0.0

    count = finite.sum()
    mse, power = mean(column("mse"), finite), mean(powers, finite)
    sqnr = math.inf if mse == 0 else -math.inf if power == 0 else 10 * math.log10(power / mse)
    held = column("entropy")
    coded = np.isfinite(held)
    return ErrorRow(
        path="total",
        shape="",
        format="",
        bits=float((column("bits") * sizes).sum() / sizes.sum()) if sizes.sum() else math.nan,
        sqnr_db=sqnr,
        mse=mse,
        max_error=float(column("max_error").max(initial=0)),
        mean_relative_error=mean(column("mean_relative_error"), finite),
        cosine=math.nan,
        lost=mean(column("lost"), finite),
        entropy=float((held * sizes)[coded].sum() / sizes[coded].sum())
        if coded.any()
        else math.nan,
    )
