"""What a quantized function does, product by product, as a table."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq.dot_recipes import ProductRecipe
from jaxq.quantized import Quantized
from jaxq.recipes import Quantizer
from jaxq.tables import Table
from jaxq.transforms.assigning import Assigned, on_axes
from jaxq.transforms.planning import Planned, plan
from jaxq.transforms.reading import Product, flops
from jaxq.transforms.rules import Rules
from jaxq.transforms.storing import weight_of

__all__ = ["ProductRow", "explain"]


@dataclasses.dataclass(frozen=True)
class ProductRow:
    """One product in the report of `jaxq.explain`.

    Attributes:
      product: its name: the path of its weight, or its scope and operation.
      operation: which one.
      scope: the named scopes that it stands in.
      shapes: of its operands and its result.
      recipe: the formats of both operands, in the order of the product, and those of the cotangent
        in the gradients of lhs and rhs where they differ from none; `"-"` where it is left as it
        is, with the reason if it cannot be quantized.
      times: how often a call runs it; -1 if that is not known.
      flops: of all these runs.
      bits: bits an element of the weight, scales included; NaN without a weight.
      bytes: of the weight, all stacked layers.
      source: the line of the code.
    """

    product: str
    operation: str
    scope: str
    shapes: str
    recipe: str
    times: int
    flops: int
    bits: float
    bytes: int
    source: str


def explain(
    fn: Callable[..., Any], rules: Rules, *, argnums: int | Sequence[int] = 0
) -> Callable[..., Table]:
    """What every product of a function gets from rules, without running it.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: likewise; `[]` lists the products.
      argnums: as in `jaxq.quantize_fn`.

    Returns:
      `(*args) -> Table`, one `ProductRow` a product in the order in which they run; its `str` is
      text. Arguments may be shapes, as `jax.eval_shape` gives them.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: likewise.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> table = jaxq.explain(model, [("w", "w8a8")])({"w": jnp.ones((64, 32))}, jnp.ones((2, 64)))
      >>> row = table.rows[0]
      >>> row.product, row.shapes, row.recipe, row.flops, row.bits, row.bytes
      ('w', '2x64 64x32 -> 2x32', 'int8 int8', 8192, 8.5, 2176)
    """

    @functools.wraps(fn, updated=())
    def explained(*args: Any, **kwargs: Any) -> Table:
        planned = plan("explain", fn, rules, argnums, args, kwargs)
        return Table(
            tuple(
                _row(planned, product, assigned)
                for product, assigned in zip(planned.products, planned.chosen, strict=True)
            )
        )

    return explained


def _row(planned: Planned, product: Product, assigned: Assigned | None) -> ProductRow:
    shapes = " ".join(map(_shape, product.operands))
    bits, nbytes = _weight(planned, product, assigned)
    return ProductRow(
        product.name,
        product.operation,
        product.scope,
        f"{shapes} -> {_shape(product.out)}",
        _recipe(product, assigned),
        -1 if product.times is None else product.times,
        flops(product) * (product.times or 1),
        bits,
        nbytes,
        product.source,
    )


def _shape(x: Any) -> str:
    return "x".join(map(str, x.shape)) or "scalar"


def _recipe(product: Product, assigned: Assigned | None) -> str:
    if assigned is None or (assigned.recipe is None and assigned.output is None):
        return f"- ({product.barred})" if product.barred else "-"
    recipe, parts = assigned.recipe, []
    if recipe is not None:
        names = assigned.order([_name(q) for q in recipe.operands])
        parts = list(names[1:] if assigned.table is not None else names)
        for gradient in ("dlhs", "drhs"):
            how: ProductRecipe = getattr(recipe, gradient)
            if not how.plain:
                parts.append(f"{gradient} {' '.join(map(_name, how.operands))}")
    if assigned.output is not None:
        parts.append(f"-> {_name(assigned.output)}")
    return " ".join(parts)


def _name(quantizer: Quantizer | None) -> str:
    return "-" if quantizer is None else quantizer.element.name


def _weight(planned: Planned, product: Product, assigned: Assigned | None) -> tuple[float, int]:
    """Bits an element and bytes of a product's weight."""
    origins = [origin for origin in reversed(product.origins) if origin is not None]
    if not origins:
        return math.nan, 0
    leaf, array = origins[0], planned.traced.arrays[origins[0].leaf]
    size = math.prod(leaf.shape)
    if isinstance(array, Quantized):
        nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(array))
    else:
        nbytes = size * array.dtype.itemsize
        weight = None if assigned is None else weight_of(product, assigned)
        if weight is not None:
            shape = product.operands[weight[2]].shape
            quantizer = on_axes(weight[1], product, weight[2])
            assert quantizer is not None
            one = quantizer.nbytes(shape)
            nbytes = one * size // max(math.prod(shape), 1)
    return (8 * nbytes / size if size else math.nan), nbytes
