"""Gradients quantized on their way to the optimizer, with error feedback."""

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp

from jaxq.casting import as_dtype, widen
from jaxq.optim.common import RandomState, Recipe, as_rules, own_key
from jaxq.quantizers import fake_quant
from jaxq.trees import Rules, assign, naming

__all__ = ["QuantizedGradients", "quantize_gradients"]


class QuantizedGradients(NamedTuple):
    """What `quantize_gradients` keeps between steps.

    Attributes:
      residual: what rounding has left of each gradient, float32, in the tree of the gradients; None
        where nothing is kept.
      key: the numbers of a `jax.random` key, or None.
    """

    residual: Any
    key: jax.Array | None


def quantize_gradients(
    recipe: "Recipe | Rules",
    *,
    error_feedback: bool = True,
    key: jax.Array | None = None,
) -> optax.GradientTransformation:
    """Quantizes gradients, and adds what rounding takes from one to the next.

    With error feedback a step gives q = Q(g + e) and keeps e' = g + e - q, so that the sum of what
    it gave is the sum of the gradients but for the last e, up to float32 rounding: even one bit an
    element loses no direction in the long run. Placed before an optimizer in `optax.chain` it
    quantizes gradients, behind it updates.

    Args:
      recipe: a recipe as `jaxq.get_quantizer` takes it, or rules as `jaxq.quantize_tree` has them.
        It sees each gradient in its own shape. Leaves of other than floating dtypes pass.
      error_feedback: False forgets what rounding takes.
      key: a key of `jax.random`, if a recipe rounds stochastically; the state carries it on.

    Returns:
      A transformation. The gradients keep their dtypes; g + e is computed in float32. A block with
      a NaN or an infinity is all NaN, and what it leaves for the next step is 0.

    Raises:
      ValueError: a key missing or not needed; on `init` and on tracing, a rule that holds for no
        leaf, or a recipe that does not fit one.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> tx = jaxq.optim.quantize_gradients("int2")
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
    rules, strict = as_rules(recipe)
    random = RandomState.of("quantize_gradients", rules, key)
    recipes_of = functools.partial(assign, "quantize_gradients", rules=rules, strict=strict)

    def init(params: optax.Params) -> Any:
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
        given, left = [leaf for _, leaf in leaves], structure.flatten_up_to(state.residual)
        for i, ((path, leaf), recipe) in enumerate(zip(leaves, recipes_of(updates), strict=True)):
            if recipe is None:
                continue
            total = leaf if left[i] is None else widen(leaf) + left[i]
            with naming("quantize_gradients", path):
                rounded = fake_quant(total, recipe, key=own_key(recipe, now, i))
            given[i] = as_dtype(rounded, leaf.dtype)
            if left[i] is not None:
                rest = total - widen(given[i])
                left[i] = jnp.where(jnp.isfinite(rest), rest, jnp.zeros_like(rest))
        return structure.unflatten(given), QuantizedGradients(structure.unflatten(left), later)

    return optax.GradientTransformation(init, update)
