"""Sensitivity scores that weight output errors by the gradient of a loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.models import (
    LOOK_UP,
    Assigned,
    ModelPlan,
    ProductInputs,
    as_array,
    build_program,
    run_program,
    unassigned,
    weight_of,
)

__all__ = ["gradient_scores"]


def gradient_scores(
    owner: str,
    plans: Sequence[ModelPlan],
    data: Sequence[Sequence[Any]],
    masks: Sequence[jax.Array | None],
) -> dict[int, np.ndarray]:
    """Returns `sum (G dY)^2` for each leaf, one number per plan.

    Every product computes the errors dY of its output for all recipes
    (`models._running._multiply._attach_scores`), and saves them as residuals of an identity
    function with an extra input of zeros. The backward pass of it returns the scores as the
    gradient of the zeros, computed from the cotangent G and the residuals.

    Args:
      owner: the name of the public function that was called, for errors.
      plans: the plans of one function, one per recipe.
      data: the arrays of each batch, with None for parameters.
      masks: the mask of each batch, or None; outputs of masked tokens do not count.

    Raises:
      ValueError: if the function does not return a single floating scalar, or if a score is not
        finite.
    """
    first, *_ = plans
    results = first.traced.jaxpr.out_avals
    if [x.shape for x in results] != [()] or not jnp.issubdtype(results[0].dtype, jnp.floating):
        raise ValueError(
            f"{owner}: with gradient=True, `fn` must return a scalar loss, got results of shapes "
            f"{[x.shape for x in results[:3]]}. Pass a function that computes the loss, or use "
            "gradient=False."
        )
    chosen: list[Assigned | None] = [None] * len(first.products)
    leaves: dict[str, tuple[int, ...]] = {}
    zeros: dict[str, jax.Array] = {}
    places: dict[str, str] = {}
    for n, product in enumerate(first.products):
        assigned = [plan.chosen[n] for plan in plans]
        weights = [None if a is None else weight_of(product, a) for a in assigned]
        has_experts = any(a is not None and a.experts is not None for a in assigned)
        is_multiplied = product.operation != LOOK_UP and product.is_differentiated
        if not all(weights) or has_experts or not is_multiplied:
            continue
        recipes = tuple(a.recipe for a in assigned if a is not None and a.recipe is not None)
        swapped = assigned[0] is not None and assigned[0].swapped
        chosen[n] = dataclasses.replace(
            unassigned(product), swapped=swapped, scored_recipes=recipes
        )
        leaves[product.name] = tuple(weights[0].origin.leaves.values()) if weights[0] else ()
        zeros[product.name] = jnp.zeros((*product.stacks, len(plans)), jnp.float32)
        places[product.name] = product.where
    runnable = build_program(first.node, chosen)

    @jax.jit
    def scores(
        zeros: dict[str, jax.Array], arrays: list[Any], mask: jax.Array | None
    ) -> dict[str, jax.Array]:
        def loss(vectors: dict[str, jax.Array]) -> jax.Array:
            extra = ProductInputs(None, {}, {}, {}, mask=mask, vectors=vectors)
            return as_array(run_program(runnable, extra, arrays)[0][0])

        return jax.grad(loss)(zeros)

    sums: dict[int, np.ndarray] = {}
    for n, (batch, mask) in enumerate(zip(data, masks, strict=True)):
        pairs = zip(batch, first.traced.arrays, strict=True)
        batch_scores = scores(zeros, [array if x is None else x for x, array in pairs], mask)
        for name, values in batch_scores.items():
            total = np.asarray(values, np.float64).reshape(-1, len(plans)).sum(0)
            if not np.isfinite(total).all():
                raise ValueError(
                    f"{owner}: gradient scores must be finite, but that of {places[name]} is "
                    f"{total[~np.isfinite(total)][0]} in batch {n}. Pass a loss whose gradient is "
                    "finite, scale the loss down if it is large, or use gradient=False."
                )
            for leaf in leaves[name]:
                sums[leaf] = sums.get(leaf, 0) + total / len(leaves[name])
    return sums
