"""Gradient quantization with error feedback."""

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp

from jaxq._jax.serialization import named_tuple
from jaxq.models import LeafRules, assign, leaf_rules, prefix_leaf_errors, refuse_states
from jaxq.numerics import as_dtype, widen
from jaxq.optim._common import RandomState, own_key
from jaxq.quantizers import fake_quant

__all__ = ["QuantizedGradients", "quantize_gradients"]


@named_tuple
class QuantizedGradients(NamedTuple):
    """The state of `quantize_gradients`.

    Attributes:
      residual: the float32 rounding error of each gradient, in the tree structure of the gradients;
        None for gradients without error feedback.
      key: the key data of a `jax.random` key, or None.
    """

    residual: Any
    key: jax.Array | None


def quantize_gradients(
    rules: LeafRules,
    *,
    error_feedback: bool = True,
    key: jax.Array | None = None,
) -> optax.GradientTransformation:
    """Quantizes gradients and adds each step's rounding error to the next gradient.

    With error feedback, a step returns q = Q(g + e) and keeps e' = g + e - q. The sum of the
    returned gradients then differs from the sum of the true gradients only by the last e, up to
    float32 rounding, so even one bit per element loses no direction in the long run. Placed before
    an optimizer in `optax.chain`, the transformation quantizes gradients; placed after it, updates.

    Args:
      rules: as in `jaxq.quantize_tree`: one recipe for all gradients, a mapping, or a sequence.
        Recipes refer to a gradient's own axes: blocks lie along the last one. Leaves that are not
        floating point are unchanged.
      error_feedback: True (the default) to keep the rounding errors.
      key: a `jax.random` key, required if a recipe rounds stochastically. The state carries it from
        step to step.

    Returns:
      A transformation. The gradients keep their dtypes; g + e is computed in float32. A block with
      a NaN or an infinity becomes all NaN, and its rounding error is set to 0.

    Raises:
      ValueError: if a key is missing or not needed; on `init` and on tracing, if a rule matches
        no leaf, or a recipe does not fit a leaf.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> tx = jaxq.optim.quantize_gradients(jaxq.Recipe("int2"))
      >>> g, total = jnp.array([1.0, 0.25, 0.125]), 0
      >>> state = tx.init(g)
      >>> for _ in range(8):
      ...     q, state = tx.update(g, state)
      ...     total += q
      >>> total
      Array([8., 2., 1.], dtype=float32)

    References:
      Seide et al., "1-Bit Stochastic Gradient Descent" (2014); Karimireddy et al., "Error Feedback
      Fixes SignSGD and other Gradient Compression Schemes" (2019).
    """
    recipe_rules = leaf_rules("quantize_gradients", rules)
    random = RandomState.of("quantize_gradients", recipe_rules, key)
    recipes_of = functools.partial(assign, "quantize_gradients", rules=recipe_rules)

    def init(params: optax.Params) -> Any:
        refuse_states("quantize_gradients", params)
        leaves, structure = jax.tree.flatten(params)
        residual = [
            jnp.zeros(leaf.shape, jnp.float32) if error_feedback and recipe is not None else None
            for leaf, recipe in zip(leaves, recipes_of(params), strict=True)
        ]
        return QuantizedGradients(structure.unflatten(residual), random.data)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[Any, Any]:
        del params
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        later, now = random.split(state.key)
        gradients, residuals = [leaf for _, leaf in leaves], structure.flatten_up_to(state.residual)
        for i, ((path, leaf), recipe) in enumerate(zip(leaves, recipes_of(updates), strict=True)):
            if recipe is None:
                continue
            total = leaf if residuals[i] is None else widen(leaf) + residuals[i]
            with prefix_leaf_errors("quantize_gradients", path):
                rounded = fake_quant(total, recipe, key=own_key(recipe, now, i))
            gradients[i] = as_dtype(rounded, leaf.dtype)
            if residuals[i] is not None:
                error = total - widen(gradients[i])
                residuals[i] = jnp.where(jnp.isfinite(error), error, jnp.zeros_like(error))
        state = QuantizedGradients(structure.unflatten(residuals), later)
        return structure.unflatten(gradients), state

    return optax.GradientTransformation(init, update)
