"""Delayed scaling: scales from the largest magnitudes of the steps before.

state = jaxq.delayed_scaling(loss, rules)(params, batch)
grads, seen = jax.grad(lambda p, s: jaxq.quantize_fn(loss, s)(p, batch), (0, 1))(params, state)
state = state.update(seen)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax import numpy as jnp

from jaxq.histories import History
from jaxq.transforms.planning import plan
from jaxq.transforms.rules import Delayed, Rules, as_rules

__all__ = ["delayed_scaling"]


def delayed_scaling(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    history: int = 1024,
    margin: int = 0,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Any]:
    """Rules whose scales are those of the steps before, for training in float8: the first state.

    A quantizer with one scale a tensor, from its largest magnitude, takes that magnitude from a
    history of earlier steps: of both operands of a product, and of its cotangent. All other
    quantizers stay as they are. The state stands where rules do, and its gradient is what was seen:

        def step(params, state, batch):
            def objective(params, state):
                return jaxq.quantize_fn(loss, state)(params, batch)

            gradients, seen = jax.grad(objective, argnums=(0, 1))(params, state)
            return optimizer(params, gradients), state.update(seen)

    Of micro-batches, gradients are added, but `seen.merge(more)` takes the larger magnitudes. Keep
    the state apart from the parameters, so that nothing averages or decays it. A product that runs
    often in one step, in a loop or under `vmap`, sees the largest of all.

    A tensor whose history has seen nothing, as at first, is scaled by its own largest magnitude, as
    in current scaling. A step in which it had a NaN or an infinity counts as not seen. Magnitudes
    beyond what the scale covers are rounded as the quantizer's format rounds them, so saturated
    where that does. Products in a `while` loop or in a function with derivatives of its own keep
    current scaling, as do operands under a Hadamard transform.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: likewise.
      history: how many steps count, the largest of which is taken. 1 is the step before alone.
      margin: scales are 2^margin times what the largest magnitude asks for.
      argnums: as in `jaxq.quantize_fn`.

    Returns:
      `(*args) -> jaxq.transforms.Delayed`. Only shapes and dtypes of the arguments count.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: likewise; or nothing has one scale a tensor; or `history` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> loss = lambda params, x: ((x @ params["w"]) ** 2).sum()
      >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.5, -3.0]])
      >>> state = jaxq.delayed_scaling(loss, [("w", "fp8")], history=4)(params, x)
      >>> objective = lambda params, state, x: jaxq.quantize_fn(loss, state)(params, x)
      >>> seen = jax.grad(objective, argnums=1)(params, state, x)
      >>> state = state.update(seen)
      >>> [history.amax.tolist() for history in state.histories["w"]]
      [[3.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [6.0, 0.0, 0.0, 0.0]]
      >>> float(objective(params, state, 2 * x))  # 6 is beyond what the scale covers.
      18.0

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning" (2022); NVIDIA, TransformerEngine,
      `DelayedScaling` with `amax_compute_algo="max"`, whose first scale is 1 instead.
    """
    if history < 1:
        raise ValueError(f"delayed_scaling: `history` must be at least 1, got {history}.")

    @functools.wraps(fn, updated=())
    def first(*args: Any, **kwargs: Any) -> Delayed:
        planned = plan("delayed_scaling", fn, rules, argnums, args, kwargs)
        histories = {}
        for product, assigned in zip(planned.products, planned.chosen, strict=True):
            if assigned is None or not any(assigned.delayed):
                continue
            shape = (*(product.loops[turn] for turn in sorted(product.stacked)), history)
            histories[product.name] = tuple(
                None if quantizer is None else History(jnp.zeros(shape, jnp.float32), margin)
                for quantizer in assigned.delayed
            )
        if not histories:
            raise ValueError(
                "delayed_scaling: no product has a quantizer with one scale a tensor, so there is "
                "nothing to delay. Use a recipe such as 'fp8'."
            )
        return Delayed(as_rules("delayed_scaling", rules), histories)

    return first
