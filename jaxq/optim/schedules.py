"""Schedules: when quantization begins, and how many bits a step has."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import numpy as jnp

__all__ = ["bits_schedule", "quantize_after"]


def bits_schedule(first: int, last: int, *, steps: int, begin: int = 0) -> optax.Schedule:
    """A bit width that goes from one to another, a bit at a time, at equal distances.

    Args:
      first: the width until step `begin`.
      last: the width from step `begin + steps` on; more or less than `first`.
      steps: how many steps it takes, at least 1.
      begin: the step to start at.

    Returns:
      A function from a step to an int32 width, both of which may be traced: for `jaxq.int_grid` and
      `jaxq.float_grid`.

    Raises:
      ValueError: a width or `steps` below 1, or so many steps that int32 cannot count them.

    Example:
      >>> bits = bits_schedule(8, 2, steps=600, begin=100)
      >>> [int(bits(step)) for step in (0, 199, 200, 699, 700, 9999)]
      [8, 8, 7, 3, 2, 2]
    """
    change = abs(last - first)
    if min(first, last, steps) < 1 or steps * max(change, 1) >= 2**31:
        raise ValueError(
            "bits_schedule: widths and `steps` must be at least 1 and steps * |last - first| below "
            f"2^31, got first={first}, last={last}, steps={steps}."
        )
    sign = 1 if last > first else -1

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        passed = jnp.clip(jnp.asarray(step, jnp.int32) - begin, 0, steps)
        return first + sign * (passed * change // steps)

    return schedule


def quantize_after(
    function: Callable[[Any], Any], begin: jax.typing.ArrayLike
) -> Callable[[Any, jax.typing.ArrayLike], Any]:
    """A quantizer that leaves values untouched before a step, gradients included.

    Args:
      function: from an array or a tree of them to its like, such as
        `lambda w: jaxq.fake_quant(w, "int4_channel")`.
      begin: the first step that quantizes.

    Returns:
      A function `(x, step)`. Both numbers may be traced; nothing recompiles and nothing branches.

    Example:
      >>> import jaxq, jax.numpy as jnp
      >>> late = quantize_after(lambda x: jaxq.cast(x, "int4"), 10)
      >>> late(jnp.array([0.75]), 9), late(jnp.array([0.75]), 10)
      (Array([0.75], dtype=float32), Array([1.], dtype=float32))
    """

    def quantizer(x: Any, step: jax.typing.ArrayLike) -> Any:
        on = jnp.asarray(step) >= begin
        return jax.tree.map(lambda new, old: jnp.where(on, new, old), function(x), x)

    return quantizer
