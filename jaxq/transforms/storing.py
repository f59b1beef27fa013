"""Weights stored as their products want them: each leaf's quantizer on the leaf's own axes.

A recipe for a product says its granularity of the matrix `[free, contract]`; only the model says
which axis of a leaf is which. So weights are packed by looking at where the model multiplies them.
"""

import dataclasses
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jax

from jaxq.blocks import Granularity, PerBlock, PerChannel
from jaxq.contractions import placed
from jaxq.dot_recipes import is_stochastic
from jaxq.outliers import Outliers
from jaxq.quantized import Quantized
from jaxq.quantizers import quantize
from jaxq.recipes import Quantizer
from jaxq.second_level import DoubleScale
from jaxq.transforms.assigning import Assigned, axes_of, naming
from jaxq.transforms.origins import Origin
from jaxq.transforms.reading import LOOK_UP, Product

__all__ = ["Storage", "storages", "weight_of"]


class Storage(NamedTuple):
    """How a leaf is stored.

    Attributes:
      leading: how many leading axes are stacked: what is behind them is quantized by itself.
      recipe: on the axes behind those.
      dtype: in which the product has it.
    """

    leading: int
    recipe: Quantizer
    dtype: Any

    def quantize(self, x: jax.Array) -> Quantized:
        """The leaf, packed."""

        def function(x: jax.Array) -> Quantized:
            return quantize(x.astype(self.dtype), self.recipe)

        for _ in range(self.leading):
            function = jax.vmap(function)
        return dataclasses.replace(function(x), dtype=x.dtype)


def weight_of(product: Product, assigned: Assigned) -> tuple[Origin, Quantizer, int] | None:
    """The leaf that a product quantizes as its weight, its quantizer, and which operand it is."""
    if assigned.recipe is None or assigned.recipe.operands[1] is None:
        return None
    i = 0 if assigned.swapped or product.operation == LOOK_UP else 1
    origin = product.origins[i]
    return None if origin is None else (origin, assigned.recipe.operands[1], i)


def storages(
    owner: str,
    products: Sequence[Product],
    chosen: Sequence[Assigned | None],
    leaves: Container[int] | None = None,
) -> dict[int, Storage]:
    """How the leaves that products quantize are stored, by their places.

    Args:
      owner: what errors call the caller.
      products: the products.
      chosen: what each gets.
      leaves: of which leaves; None is all.

    Raises:
      ValueError: a product sees its weight in a way that no stored form gives.
    """
    found: dict[int, tuple[Storage, Product]] = {}
    for product, assigned in zip(products, chosen, strict=True):
        weight = None if assigned is None else weight_of(product, assigned)
        if weight is None or not (leaves is None or weight[0].leaf in leaves):
            continue
        origin, quantizer, i = weight
        with naming(owner, product.where):
            storage = _storage(product, i, origin, quantizer)
            known, other = found.setdefault(origin.leaf, (storage, product))
            if known != storage:
                raise ValueError(
                    f"weight {origin.path!r} is wanted by {storage.recipe.granularity} on its axes "
                    f"here, and by {known.recipe.granularity} in {other.where}. Leave one of them "
                    "as it is, by a rule with the recipe None."
                )
    return {leaf: storage for leaf, (storage, _) in found.items()}


def _storage(product: Product, i: int, origin: Origin, quantizer: Quantizer) -> Storage:
    shape = product.operands[i].shape
    remedy = "Store it in the shape in which it is multiplied, or quantize it on the fly."
    if origin.axes is None:
        raise ValueError(
            f"weight {origin.path!r} of shape {origin.shape} is multiplied as {shape}, which is a "
            f"part of it or merges its axes, so that it cannot be stored quantized. {remedy}"
        )
    if is_stochastic(quantizer):
        raise ValueError(
            f"weight {origin.path!r}: a stored weight is rounded once, and its recipe draws anew "
            "in every call. Give its quantizer another rounding."
        )
    own = [axis for axis in origin.axes if axis is not None]
    stacked = [axis for axis in range(len(origin.shape)) if axis not in own]
    ordered = not isinstance(quantizer.second_level, DoubleScale) and not isinstance(
        quantizer.outliers, Outliers
    )
    if stacked != list(range(len(stacked))) or (not ordered and own != sorted(own)):
        raise ValueError(
            f"weight {origin.path!r} of shape {origin.shape} is multiplied with its axes in the "
            f"order {own}, in which it cannot be stored. {remedy}"
        )
    granularity = placed(quantizer.granularity, shape, axes_of(product)[i])
    moved = _moved(granularity, origin.axes, len(stacked))
    recipe = dataclasses.replace(quantizer, granularity=moved)
    return Storage(len(stacked), recipe, product.operands[i].dtype)


def _moved(granularity: Granularity, axes: Sequence[int | None], leading: int) -> Granularity:
    """A granularity of a view as one of the leaf, without its leading axes."""

    def on_leaf(numbers: Any) -> dict[int, int]:
        """Positions in the granularity by the leaf's axis."""
        placed = {axes[number]: at for at, number in enumerate(numbers)}
        return {axis - leading: at for axis, at in placed.items() if axis is not None}

    if isinstance(granularity, PerChannel):
        return PerChannel(tuple(sorted(on_leaf(granularity.axes))))
    if isinstance(granularity, PerBlock):
        assert isinstance(granularity.sizes, tuple)
        where = dict(sorted(on_leaf(granularity.axes).items()))
        sizes = tuple(granularity.sizes[at] for at in where.values())
        return PerBlock(sizes, tuple(where), pad=granularity.pad)
    return granularity
