"""Schedules of the start of quantization and of the bit width."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import numpy as jnp

from jaxq._base.arguments import described, integer

__all__ = ["bits_schedule", "quantize_after"]


def bits_schedule(first: int, last: int, *, steps: int, begin: int = 0) -> optax.Schedule:
    """Returns a schedule that changes the bit width by one bit at equal intervals.

    Args:
      first: the width in bits until step `begin`.
      last: the width in bits from step `begin + steps` on; may be larger or smaller than `first`.
      steps: the number of steps of the transition, at least 1.
      begin: the step at which the transition starts; 0 by default.

    Returns:
      A function from a step to an int32 width, for `jaxq.int_grid` and `jaxq.float_grid`. The step
      and the width may be traced.

    Raises:
      ValueError: if a width or `steps` is below 1, or `steps * |last - first|` overflows int32.

    Example:
      >>> bits = bits_schedule(8, 2, steps=600, begin=100)
      >>> [int(bits(step)) for step in (0, 199, 200, 699, 700, 9999)]
      [8, 8, 7, 3, 2, 2]
    """
    example = "Use, for example, bits_schedule(8, 2, steps=600)."
    for name, value in (("first", first), ("last", last), ("steps", steps)):
        integer("bits_schedule", name, value, example, least=1)
    integer("bits_schedule", "begin", begin, "Use 0.", least=-(2**31), most=2**31 - 1)
    change = abs(last - first)
    if steps * max(change, 1) >= 2**31:
        raise ValueError(
            "bits_schedule: steps * |last - first| must be below 2^31, got "
            f"{described(first)}, {described(last)} and steps={described(steps)}. {example}"
        )
    sign = 1 if last > first else -1

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        passed = jnp.clip(jnp.asarray(step, jnp.int32) - begin, 0, steps)
        return first + sign * (passed * change // steps)

    return schedule


def quantize_after(
    function: Callable[[Any], Any], begin: jax.typing.ArrayLike
) -> Callable[[Any, jax.typing.ArrayLike], Any]:
    """Wraps a quantizer so that values and gradients pass unchanged before a given step.

    Args:
      function: the quantizer, a function from an array or a tree of arrays to one of the same
        structure, such as `lambda w: jaxq.fake_quant(w, "int4_channel")`.
      begin: the first step that quantizes.

    Returns:
      A function `(x, step)`. `begin` and `step` may be traced, without recompilation or branches.

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
