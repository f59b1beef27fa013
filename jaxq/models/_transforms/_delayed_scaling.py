"""Delayed scaling: scales from the amax values of previous steps.

state = jaxq.delayed_scaling(loss, rules)(params, batch)
grads, seen = jax.grad(lambda p, s: jaxq.quantize_fn(loss, s)(p, batch), (0, 1))(params, state)
state = state.update(seen)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax import numpy as jnp

from jaxq._base.arguments import integer
from jaxq.models._rules import Delayed, Rules, as_rules
from jaxq.models._transforms._planning import plan
from jaxq.products import History

__all__ = ["delayed_scaling"]


def delayed_scaling(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    history: int = 1024,
    margin: int = 0,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Any]:
    """Returns the initial state of delayed scaling, for training in float8.

    A recipe with one scale per tensor, computed from its amax, takes that amax from a history
    of earlier steps. Both operands of a product and its cotangent have a history. All other
    quantizers are unchanged. The state is passed in place of rules, and its gradient holds the
    observed amax values:

        def step(params, state, batch):
            def objective(params, state):
                return jaxq.quantize_fn(loss, state)(params, batch)

            gradients, seen = jax.grad(objective, argnums=(0, 1))(params, state)
            return optimizer(params, gradients), state.update(seen)

    Gradients of micro-batches are added, but their states are merged by `seen.merge(more)`, which
    takes the larger amax values. If one loss calls the function several times, give each call one
    of `state.copies(count)`, because autodiff would add the observations of calls that share a
    state. Keep the state separate from the parameters, so that nothing averages or decays it. A
    product that runs several times within the function, in a loop or under `vmap`, records the
    largest amax of all runs.

    A tensor with an empty history, as in the first step, is scaled by its own amax, as in current
    scaling. A step in which the tensor had a NaN or an infinity is not recorded. Magnitudes beyond
    the range of the scale are rounded as the recipe's format rounds them, and saturate if the
    format saturates. Products in a `while` loop or in a function with a custom derivative keep
    current scaling, as do operands under a Hadamard transform.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`.
      history: the number of steps over which the largest amax is taken. 1 uses only the previous
        step.
      margin: an exponent; scales are 2^margin times the scale that the amax requires.
      argnums: as in `jaxq.quantize_fn`.

    Returns:
      `(*args) -> jaxq.models.Delayed`. Only the shapes and dtypes of the arguments are used.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`; or if no recipe has one scale per tensor; or if
        `history` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> loss = lambda params, x: ((x @ params["w"]) ** 2).sum()
      >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.5, -3.0]])
      >>> state = jaxq.delayed_scaling(loss, [("w", "fp8_training")], history=4)(params, x)
      >>> objective = lambda params, state, x: jaxq.quantize_fn(loss, state)(params, x)
      >>> seen = jax.grad(objective, argnums=1)(params, state, x)
      >>> state = state.update(seen)
      >>> [history.amax.tolist() for history in state.histories["w"]]
      [[3.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [6.0, 0.0, 0.0, 0.0]]
      >>> float(objective(params, state, 2 * x))  # 6 is beyond the range of the scale.
      18.0

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning" (2022); NVIDIA, TransformerEngine,
      `DelayedScaling` with `amax_compute_algo="max"`, whose first scale is 1 instead.
    """
    remedy = "Use 1 for the previous step only."
    history = integer("delayed_scaling", "history", history, remedy, least=1)

    @functools.wraps(fn, updated=())
    def initial_state(*args: Any, **kwargs: Any) -> Delayed:
        planned = plan("delayed_scaling", fn, rules, argnums, args, kwargs)
        histories = {}
        for product, assigned in zip(planned.products, planned.chosen, strict=True):
            if assigned is None or not any(assigned.delayed_per_tensor):
                continue
            shape = (*product.stacks, history)
            histories[product.name] = tuple(
                None if recipe is None else History(jnp.zeros(shape, jnp.float32), margin)
                for recipe in assigned.delayed_per_tensor
            )
        if not histories:
            raise ValueError(
                "delayed_scaling: `rules` must give some product a recipe with one scale per "
                "tensor, got none. Use a product recipe such as 'fp8_training'."
            )
        return Delayed(as_rules("delayed_scaling", rules), histories)

    return initial_state
