"""Errors of parameter trees, one row per leaf."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.paths import leaf_path
from jaxq._base.tables import Table
from jaxq.analysis._codes import code_usage
from jaxq.analysis._metrics import Energies, measure, pair, total
from jaxq.models import Rule, quantize_tree
from jaxq.products import ProductRecipe
from jaxq.quantizers import Quantized
from jaxq.recipes import Recipe

__all__ = ["ErrorRow", "tree_errors"]


@dataclasses.dataclass(frozen=True)
class ErrorRow:
    """One leaf in a `tree_errors` table; the fields match those of `Comparison` and `CodeUsage`.

    `bits` is bits per element, including scales; `entropy` is NaN for a leaf without codes.
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


def tree_errors(
    params: Any, small: Any, *, axis: int | None = None, key: jax.Array | None = None
) -> Table:
    """Returns the error of each quantized floating-point leaf of a tree, and the total.

    Args:
      params: a pytree of arrays.
      small: rules, as in `jaxq.quantize_tree`; or a tree of the same structure whose leaves are
        `jaxq.Quantized` or other arrays. Leaves that are the same object in both trees are
        skipped.
      axis: the contracted axis, for rules, as in `jaxq.quantize_tree`.
      key: a key of `jax.random`, for rules with stochastic recipes.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text. The last row is the total:
      its errors are means over all elements, its entropy is the mean per code, and its cosine is
      NaN (printed as a dash).

    Raises:
      ValueError: as in `jaxq.quantize_tree`; or if the trees differ in structure.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.linspace(-1.0, 1.0, 256).reshape(4, 64), "bias": jnp.ones(4)}
      >>> table = tree_errors(params, {"w": "int8_channel"}, axis=-2)
      >>> [(row.path, row.bits) for row in table.rows]
      [('w', 16.0), ('total', 16.0)]
    """
    if _are_rules(small):
        small = quantize_tree(params, small, axis=axis, key=key)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    others, other = jax.tree.flatten(small, is_leaf=_is_quantized)
    if structure != other:
        raise ValueError(
            f"tree_errors: `small` must have the structure of `params`, {structure!s:.100}, "
            f"got {other!s:.100}. Pass the quantized `params`."
        )
    rows, sizes, energies = [], [], []
    for (path, leaf), after in zip(leaves, others, strict=True):
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if leaf is after or not floating:
            continue
        name = leaf_path(path)
        row, energy = _row(name, leaf, after)
        rows.append(row)
        sizes.append(leaf.size)
        energies.append(energy)
    return Table((*rows, _total(rows, np.array(sizes), energies)))


def _are_rules(small: Any) -> bool:
    """Returns whether the argument is rules rather than a quantized tree."""
    if isinstance(small, str | Recipe | ProductRecipe):
        return True
    if isinstance(small, Mapping):
        return bool(small) and all(
            isinstance(r, str | Recipe | ProductRecipe | None) for r in small.values()
        )
    return isinstance(small, Sequence) and all(
        isinstance(rule, Rule)
        or (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str))
        for rule in small
    )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _row(name: str, leaf: jax.Array, after: Any) -> tuple[ErrorRow, Energies]:
    """Returns the row of a leaf, and its energies for the total."""
    entropy, size = math.nan, max(leaf.size, 1)
    if _is_quantized(after):
        entropy, label = float(code_usage(after).entropy), after.recipe.element.name
        bits, y = 8 * after.nbytes / size, after.dequantize()
    else:
        y, label, bits = after, str(after.dtype), 8.0 * after.dtype.itemsize
    if y.shape != leaf.shape:
        raise ValueError(
            f"tree_errors: leaf {name!r} must have shape {leaf.shape}, got {y.shape}. Pass the "
            "quantized `params`."
        )
    c, energies = jax.device_get(_measure(*pair("tree_errors", leaf, y)))
    row = ErrorRow(
        path=name,
        shape="x".join(map(str, leaf.shape)) or "scalar",
        format=label,
        bits=bits,
        sqnr_db=float(c.sqnr_db),
        mse=total([energies]).mse,
        max_error=float(c.max_error),
        mean_relative_error=float(c.mean_relative_error),
        cosine=float(c.cosine),
        lost=float(c.lost),
        entropy=entropy,
    )
    return row, energies


_measure = jax.jit(measure)


def _total(rows: list[ErrorRow], sizes: np.ndarray, energies: list[Energies]) -> ErrorRow:
    """Returns the row of the total over all leaves."""
    finite = np.array([float(e.count) for e in energies])

    def column(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], np.float64)

    def mean(values: np.ndarray) -> float:
        # Zeros do not contribute to the sum, so their weights are set to 0.
        weights = np.where(values == 0, 0, finite)
        return float((values * weights).sum() / finite.sum()) if finite.any() else 0.0

    errors = total(energies)
    entropies = column("entropy")
    coded = np.isfinite(entropies)
    return ErrorRow(
        path="total",
        shape="",
        format="",
        bits=float((column("bits") * sizes).sum() / sizes.sum()) if sizes.sum() else math.nan,
        sqnr_db=errors.sqnr_db,
        mse=errors.mse,
        max_error=float(column("max_error").max(initial=0)),
        mean_relative_error=mean(column("mean_relative_error")),
        cosine=math.nan,
        lost=mean(column("lost")),
        entropy=float((entropies * sizes)[coded].sum() / sizes[coded].sum())
        if coded.any()
        else math.nan,
    )
