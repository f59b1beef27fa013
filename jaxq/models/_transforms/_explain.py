"""A report of a quantized function: one table row per product."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq._base.tables import Table
from jaxq.models._assigning import (
    Assigned,
    Experts,
    axes_of,
    first_match,
    recipe_on_operand_axes,
    weight_of,
)
from jaxq.models._reading import LOOK_UP, Piece, Product, flops, operation_of
from jaxq.models._rules import Rule, Rules, as_rules
from jaxq.models._transforms._planning import ModelPlan, plan
from jaxq.products import ProductRecipe, SingleProduct, check_gradients, placed
from jaxq.quantizers import Quantized
from jaxq.recipes import Recipe, title_of

__all__ = ["ProductRow", "explain"]


@dataclasses.dataclass(frozen=True)
class ProductRow:
    """One product in the report of `jaxq.explain`.

    Attributes:
      product: the name: the path of its weight, the paths of weights that are multiplied as one
        (`cell/{hf,hi}/kernel`), those that a computed weight depends on (`computed(w, a, b)`), or
        its scope and operation.
      operation: the name of its primitive.
      scope: the named scopes around it.
      shapes: the shapes of its operands and its result.
      recipe: the recipes of both operands, each by its name or by its format and granularity, in
        the order of the product, and those of the operands in the gradients of lhs and rhs, if they
        are quantized. A note in parentheses says if it needs a key, or cannot be differentiated.
        `"-"` if it is unchanged. A note then gives the reason if it cannot be quantized or computes
        a weight, and any rule that matches it nevertheless. If no rule can name an operand by a
        weight, the note lists the parameters that the operand is computed from.
      times: the number of executions per call; -1 if unknown.
      flops: floating-point operations of all executions; 0 for a look-up and for operations that
        cannot be quantized.
      bits: bits per element of the weight, scales included; NaN without a weight.
      bytes: bytes of the weight in all stacked layers, as `jaxq.quantize_weights` stores it.
      stored: `"yes"` if `jaxq.quantize_weights` stores the weight packed, otherwise the reason why
        it does not; `"-"` if the weight is not quantized.
      source: the line of the code.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> table = jaxq.explain(model, [])({"w": jnp.ones((4, 2))}, jnp.ones((1, 4)))
      >>> table.rows[0].shapes, table.rows[0].recipe
      ('1x4 4x2 -> 1x2', '-')
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
    stored: str
    source: str


def explain(
    fn: Callable[..., Any], rules: Rules, *, argnums: int | Sequence[int] = 0
) -> Callable[..., Table]:
    """Returns a function that tabulates the recipe of each product, without running the model.

    The table also lists operations on tensors that cannot be quantized: products of integers,
    sparse products, kernels, transforms, solvers and decompositions.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`; `[]` lists the products.
      argnums: as in `jaxq.quantize_fn`.

    Returns:
      `(*args) -> Table`, with one `ProductRow` per product in the order in which they run; its
      `str` is aligned text. Arguments may be shapes, as `jax.eval_shape` returns them.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> params = {"w": jnp.ones((64, 32))}
      >>> row = jaxq.explain(model, [("w", "w8a8")])(params, jnp.ones((2, 64))).rows[0]
      >>> row.product, row.shapes, row.recipe, row.flops, row.bits, row.bytes
      ('w', '2x64 64x32 -> 2x32', 'int8_token int8_channel', 8192, 8.5, 2176)
    """

    @functools.wraps(fn, updated=())
    def explained(*args: Any, **kwargs: Any) -> Table:
        planned = plan("explain", fn, rules, argnums, args, kwargs)
        rule_records = as_rules("explain", rules)
        return Table(
            tuple(
                _row(planned, product, assigned, rule_records)
                for product, assigned in zip(planned.products, planned.chosen, strict=True)
            )
        )

    return explained


def _row(
    planned: ModelPlan, product: Product, assigned: Assigned | None, rules: Sequence[Rule]
) -> ProductRow:
    shapes = " ".join(map(_shape, product.operands))
    bits, nbytes = _weight(planned, product, assigned)
    if assigned is None or assigned.plain:
        recipe = _left_alone(product, rules)
    else:
        recipe = _recipe(product, assigned)
    return ProductRow(
        product.name,
        product.operation,
        product.scope,
        f"{shapes} -> {_shape(product.out)}",
        recipe,
        -1 if product.times is None else product.times,
        flops(product) * (product.times or 1),
        bits,
        nbytes,
        _stored(planned, product, assigned),
        product.source,
    )


def _shape(x: Any) -> str:
    return "x".join(map(str, x.shape)) or "scalar"


def _left_alone(product: Product, rules: Sequence[Rule]) -> str:
    """Returns the recipe entry of a product without one, with the reason unless no rule matched."""
    reason = product.barred_reason
    if reason:
        n = first_match(rules, product)[0]
        if n is not None and rules[n].recipe is not None:
            reason += f"; {rules[n]} matches it"
    elif product.within:
        reason = f"part of {product.within[0].name}"
    elif product.sources and not any(product.origins):
        reason = f"an operand is computed from {', '.join(product.sources)}"
    return f"- ({reason})" if reason else "-"


def _recipe(product: Product, assigned: Assigned) -> str:
    recipe, parts = assigned.recipe, []
    if assigned.experts is not None:
        recipe = recipe or ProductRecipe()
    if recipe is not None:
        weight = _name(recipe.operands[1])
        if assigned.experts is not None:
            names = (part.recipe and _name(part.recipe) for part in assigned.experts.parts)
            weight = "|".join(dict.fromkeys(name or "float" for name in names))
        names = assigned.reorder_operands([_name(recipe.operands[0]), weight])
        parts = list(names[1:] if assigned.table_recipe is not None else names)
        for gradient in ("dlhs", "drhs"):
            single: SingleProduct = getattr(recipe, gradient)
            if not single.plain:
                parts.append(f"{gradient} {' '.join(map(_name, single.operands))}")
    if assigned.output_recipe is not None:
        parts.append(f"-> {_name(assigned.output_recipe)}")
    if assigned.draws_random_bits:
        parts.append("(needs a key)" if assigned.needs_key else "(its gradient needs a key)")
    parts.append(_no_gradient(product, assigned))
    return " ".join(filter(None, parts))


def _no_gradient(product: Product, assigned: Assigned) -> str:
    """Returns the reason why a product's recipe cannot be differentiated, or ""."""
    if assigned.recipe is None or product.operation == LOOK_UP or not product.is_differentiated:
        return ""
    operation = operation_of(product.eqn, product.operation, assigned.swapped)
    first, second = assigned.reorder_operands(product.operands)
    try:
        check_gradients(operation, first, second, product.out, assigned.recipe)
    except (TypeError, ValueError) as error:
        return f"(cannot be differentiated: {error})"
    return ""


def _name(recipe: Recipe | None) -> str:
    return "-" if recipe is None else title_of(recipe, fields=False)


def _stored(planned: ModelPlan, product: Product, assigned: Assigned | None) -> str:
    """Returns the `stored` entry of a product's row."""
    if product.number in planned.stored.reasons:
        return f"no: {planned.stored.reasons[product.number]}"
    weights = [origin for origin in product.origins if origin is not None]
    packed = any(i in planned.packed for origin in weights for i in origin.leaves.values())
    return "yes" if packed or (assigned and weight_of(product, assigned)) else "-"


def _weight(planned: ModelPlan, product: Product, assigned: Assigned | None) -> tuple[float, int]:
    """Returns the bits per element and the bytes of a product's weight."""
    i = next((i for i, o in reversed([*enumerate(product.origins)]) if o is not None), None)
    if i is None:
        return math.nan, 0
    origin, operand = product.origins[i], product.operands[i]
    assert origin is not None
    arrays, size, nbytes = planned.traced.arrays, math.prod(operand.shape), 0.0
    count = sum(_elements(piece, size) for piece in origin.pieces)
    weight = None if assigned is None else weight_of(product, assigned)
    if weight is not None and product.number not in planned.stored.reasons:
        if weight.experts is None:
            recipe = recipe_on_operand_axes(weight.recipe, product, i)
            assert recipe is not None
            nbytes = recipe.nbytes(operand.shape) * count / max(size, 1)
        else:
            for piece, piece_recipe in zip(origin.pieces, weight.recipes, strict=True):
                nbytes += _of_expert(product, i, piece, piece_recipe, weight.experts)
    else:
        for piece in origin.pieces:
            array, share = arrays[piece.leaf], _elements(piece, size)
            if isinstance(array, Quantized):
                whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(array))
                nbytes += whole * share / math.prod(piece.shape)
            else:
                nbytes += share * array.dtype.itemsize
    return (8 * nbytes / count if count else math.nan), int(nbytes)


def _of_expert(
    product: Product, operand: int, piece: Piece, recipe: Recipe | None, experts: Experts
) -> float:
    """Returns the bytes of the experts of one leaf in all layers."""
    x = product.operands[operand]
    _, shape = experts.alone(piece, x.shape)
    share = _elements(piece, math.prod(shape))
    if recipe is None:
        return share * x.dtype.itemsize
    granularity = placed(recipe.granularity, shape, axes_of(product)[operand])
    placed_recipe = dataclasses.replace(recipe, granularity=granularity)
    return placed_recipe.nbytes(shape) * share / max(math.prod(shape), 1)


def _elements(piece: Piece, size: int) -> int:
    """Returns the number of a leaf's elements that a product multiplies in all layers.

    Args:
      piece: the leaf's piece of the product's operand.
      size: the number of the operand's elements.
    """
    if piece.axes is not None:
        shown_sizes = (d.size for digits in piece.axes for d in digits if d.axis is not None)
        size = math.prod(shown_sizes)
    return piece.copies * size
