"""Cotangents: what flows backward, quantized only where it is asked for.

A quantizer of cotangents is a linear function with a transpose of its own. `linear_call` of JAX has
no rule for `vmap`, and a `custom_vjp` none for forward mode, so it is a primitive here, with all of
them: forward mode sees the function, reverse mode the transpose, and second derivatives what the
transpose itself has.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jax.interpreters import ad, batching, mlir

from jaxq.formats import Format
from jaxq.presets import get_quantizer
from jaxq.quantizers import fake_quant
from jaxq.recipes import Quantizer

__all__ = ["grad_cast", "with_transpose"]

Function = Callable[..., jax.Array]


def grad_cast(
    x: jax.typing.ArrayLike,
    recipe: str | Format | Quantizer,
    key: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The identity, whose cotangent is quantized on its way back.

    With y = grad_cast(x) a cotangent g of y becomes the cotangent fake_quant(g, recipe) of x.

    Forward mode leaves tangents as they are: they are no cotangents, and a quantizer of one is no
    linear function. Second derivatives go through the quantizer of the cotangent by the recipe's
    own `gradient`. Inside `vmap` every element has scales of its own.

    Args:
      x: float16, bfloat16 or float32 of any shape.
      recipe: how the cotangent is quantized, as `jaxq.fake_quant` takes it.
      key: a key of `jax.random` for a stochastic recipe, and only then.

    Returns:
      x.

    Raises:
      TypeError: x is of another dtype.
      ValueError: as `jaxq.fake_quant` raises it for an array of x's shape, in the forward pass
        already.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> f = lambda x: (jaxq.grad_cast(x, "int4") * jnp.array([7.0, 2.2, -0.4])).sum()
      >>> jax.grad(f)(jnp.ones(3)).tolist()
      [7.0, 2.0, 0.0]
    """
    recipe = get_quantizer(recipe)
    keys = () if key is None else (key,)

    def quantized(cotangent: jax.Array, *keys: jax.Array) -> jax.Array:
        return fake_quant(cotangent, recipe, key=keys[0] if keys else None)

    jax.eval_shape(quantized, x, *keys)  # What is wrong is said now, not in the backward pass.
    return with_transpose(_first, quantized, x, *keys)


def _first(x: jax.Array, *keys: jax.Array) -> jax.Array:
    del keys
    return x


def _total(cotangents: jax.Array) -> jax.Array:
    return cotangents.sum(0)


def with_transpose(
    function: Function, transpose: Function, x: Any, *rest: Any, join: Function = _total
) -> jax.Array:
    """A function that is linear in its first argument, with a transpose that is given.

    Args:
      function: `(x, *rest) -> y`, linear in x.
      transpose: `(cotangent of y, *rest) -> cotangent of x`. It need not be linear.
      x: an array.
      rest: arrays that both take; keys too.
      join: the cotangent of an x that all elements of a `vmap` share, from those that each of them
        has for it, along a leading axis.

    Returns:
      `function(x, *rest)`. In forward mode it differentiates as itself, in `rest` too. Reverse
      mode calls `transpose` and no more: `rest` gets no cotangent but through it.
    """
    return _primitive().bind(x, *rest, function=function, transpose=transpose, join=join)


@functools.cache
def _primitive() -> Any:
    """The primitive and its rules. Made at its first use: `jax.extend` brings Pallas with it."""
    from jax.extend.core import Primitive

    primitive = Primitive("jaxq_with_transpose")
    primitive.def_impl(_apply)
    primitive.def_abstract_eval(_shape)
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, mlir.lower_fun(_apply, multiple_results=False))
    return primitive


def _apply(*operands: Any, function: Function, transpose: Function, join: Function) -> jax.Array:
    del transpose, join
    return function(*operands)


def _shape(*operands: Any, function: Function, transpose: Function, join: Function) -> Any:
    del transpose, join
    return jax.make_jaxpr(function)(*operands).out_avals[0]


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    function: Function,
    transpose: Function,
    join: Function,
) -> tuple:
    (x, *rest), (moved, *others) = primals, tangents
    y = with_transpose(function, transpose, x, *rest, join=join)
    parts = []
    if type(moved) is not ad.Zero:
        parts.append(with_transpose(function, transpose, moved, *rest, join=join))
    moving = [i for i, other in enumerate(others) if type(other) is not ad.Zero]
    if moving:

        def of_rest(*values: jax.Array) -> jax.Array:
            given = dict(zip(moving, values, strict=True))
            return function(x, *(given.get(i, value) for i, value in enumerate(rest)))

        values, steps = ([array[i] for i in moving] for array in (rest, others))
        parts.append(jax.jvp(of_rest, values, steps)[1])
    return y, sum(parts[1:], start=parts[0])


def _transpose(
    cotangent: Any, x: Any, *rest: Any, function: Function, transpose: Function, join: Function
) -> list[Any]:
    del function, join
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval), *(None for _ in rest)]
    return [transpose(cotangent, *rest), *(None for _ in rest)]


def _batch(
    operands: Sequence[Any],
    axes: Sequence[Any],
    *,
    function: Function,
    transpose: Function,
    join: Function,
) -> tuple[jax.Array, int]:
    each = jax.vmap(transpose, in_axes=(0, *axes[1:]))
    x, axis = operands[0], axes[0]
    if axis is not None:
        x, axis = jnp.moveaxis(x, axis, 0), 0

    def joined(*operands: jax.Array) -> jax.Array:
        return join(each(*operands))

    function, transpose = jax.vmap(function, (axis, *axes[1:])), joined if axis is None else each
    return with_transpose(function, transpose, x, *operands[1:], join=join), 0
