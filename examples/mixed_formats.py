"""A mixture of formats for the products of `language_model.py`, from the errors of their gradients.

`jaxq.analysis.blame` gives the error of the gradient that a format causes in each product alone.
Errors of different products are nearly independent, so their squares are added. The best mixture
has the smallest sum of squares among all mixtures with at most the bits of the uniform format.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from common import Table

import jaxq
from jaxq.analysis import blame

__all__ = ["FORMATS", "Ranking", "bits_of", "ranked", "ranking_table", "rules_of"]

FORMATS = {"MXFP4": "mxfp4_training", "MXFP6": "mxfp6_training", "MXFP8": "mxfp8_training"}
"""The formats of a mixture, by name, with their product recipes."""
UNIFORM = 1  # The number of the format to which mixtures are compared, MXFP6.


class Ranking(NamedTuple):
    """The squared errors of the gradient by kinds of products.

    Attributes:
      kinds: the paths of the weights, such as `"layers/mlp/up"`, `[kinds]`.
      share: the share of each kind in the multiplications, `[kinds]`.
      bits: the bits per number in each format, `[formats]`.
      squares: the squared relative error of the gradient that a format causes in a kind of product
        alone, summed over the layers, `[kinds, formats]`.
    """

    kinds: tuple[str, ...]
    share: np.ndarray
    bits: np.ndarray
    squares: np.ndarray

    @property
    def uniform(self) -> tuple[int, ...]:
        """The number of the uniform format for each kind."""
        return (UNIFORM,) * len(self.kinds)

    def bits_of(self, choice: Sequence[int]) -> float:
        """Returns the mean bits per number of a mixture."""
        return float((self.bits[list(choice)] * self.share).sum())

    def error(self, choice: Sequence[int]) -> float:
        """Returns the root of the sum of squared errors of a mixture."""
        return float(np.sqrt(self.squares[np.arange(len(self.kinds)), list(choice)].sum()))

    def best(self) -> tuple[int, ...]:
        """Returns the mixture with the smallest error and at most the bits of the uniform format.

        A mixture is the number of a format for each kind of product.
        """
        limit = self.bits[UNIFORM] + 1e-6
        return min((c for c in self._mixtures() if self.bits_of(c) <= limit), key=self.error)

    def worst(self) -> tuple[int, ...]:
        """Returns the mixture with the largest error and the bits of the uniform format."""
        bits = self.bits[UNIFORM]
        return max(
            (c for c in self._mixtures() if abs(self.bits_of(c) - bits) < 1e-6), key=self.error
        )

    def _mixtures(self) -> itertools.product:
        return itertools.product(range(len(self.bits)), repeat=len(self.kinds))


def bits_of(recipe: jaxq.ProductRecipe) -> float:
    """Returns the bits per number of the first operand of a product, scales included."""
    first = recipe.operands[0]
    assert first is not None
    return first.bits_per_weight((1024, 1024))


def ranked(
    loss: Callable[..., jax.Array], params: Any, rows: jax.Array, report: Callable[[str], None]
) -> Ranking:
    """Returns the errors of the gradient that each format causes in the products of the layers."""
    squares: dict[str, list[float]] = {}
    for i, name in enumerate(FORMATS.values()):
        table = blame(loss, [("^layers/", name)])(params, rows)
        for row in table.rows[1:]:
            kind = row.product.rpartition("/")[0]
            squares.setdefault(kind, [0.0] * len(FORMATS))[i] += row.gradient_alone**2
        report("ranking")
    kinds = tuple(sorted(squares))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    sizes = {jax.tree_util.keystr(p, simple=True, separator="/"): x.size for p, x in leaves}
    share = np.array([sizes[kind] for kind in kinds], float)
    bits = np.array([bits_of(jaxq.get_product_recipe(name)) for name in FORMATS.values()])
    return Ranking(kinds, share / share.sum(), bits, np.array([squares[kind] for kind in kinds]))


def rules_of(ranking: Ranking, choice: Sequence[int]) -> list[tuple[str, jaxq.ProductRecipe]]:
    """Returns the rules of a mixture."""
    recipes = [jaxq.get_product_recipe(name) for name in FORMATS.values()]
    return [(f"^{kind}$", recipes[i]) for kind, i in zip(ranking.kinds, choice, strict=True)]


def ranking_table(ranking: Ranking) -> Table:
    """Returns the error of the gradient by kinds of products, with the best and worst mixtures.

    The share is that of the multiplications.
    """
    names, best, worst = [*FORMATS], ranking.best(), ranking.worst()
    grid = Table(title="Error of the gradient caused by a kind of product alone")
    for head in ("products", "share", *names, "best", "worst"):
        grid.add_column(head, no_wrap=True)
    for i in np.argsort(-ranking.squares[:, 0]):
        errors = [f"{e:.4f}" for e in np.sqrt(ranking.squares[i])]
        kind = ranking.kinds[i].removeprefix("layers/")
        grid.add_row(kind, f"{ranking.share[i]:.0%}", *errors, names[best[i]], names[worst[i]])
    mixtures = {"uniform": ranking.uniform, "best": best, "worst": worst}
    sums = ", ".join(f"{name} {ranking.error(choice):.4f}" for name, choice in mixtures.items())
    grid.caption = f"Root of the sum of squares: {sums}"
    return grid
