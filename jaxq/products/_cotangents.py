"""Quantization of cotangents, which are quantized only on request.

A quantizer of cotangents is a linear function with a custom transpose. JAX's `linear_call` has no
rule for `vmap`, and `custom_vjp` has none for forward mode, so this module defines a primitive with
all rules: forward mode differentiates the function, reverse mode applies the transpose, and second
derivatives differentiate the transpose.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxq._jax.opaque import checked_inside
from jaxq.quantizers import fake_quant
from jaxq.recipes import Recipe, get_recipe

__all__ = ["grad_cast", "with_transpose"]

Function = Callable[..., jax.Array]


def grad_cast(
    x: jax.typing.ArrayLike,
    recipe: str | Recipe,
    key: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Returns its input unchanged and quantizes the cotangent in the backward pass.

    With y = grad_cast(x), a cotangent g of y becomes the cotangent fake_quant(g, recipe) of x.

    Forward mode leaves tangents unchanged, because tangents are not cotangents and a quantizer of
    tangents would not be linear. Second derivatives differentiate the quantizer of the cotangent by
    the recipe's own `gradient`. Inside `vmap`, every element has its own scales.

    Args:
      x: a float16, bfloat16 or float32 array of any shape.
      recipe: the recipe for the cotangent, as accepted by `jaxq.fake_quant`.
      key: a `jax.random` key, for a stochastic recipe only.

    Returns:
      x.

    Raises:
      TypeError: if x has another dtype.
      ValueError: as in `jaxq.fake_quant` for an array of x's shape; raised in the forward pass
        already.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> f = lambda x: (jaxq.grad_cast(x, "int4_tensor") * jnp.array([7.0, 2.2, -0.4])).sum()
      >>> jax.grad(f)(jnp.ones(3)).tolist()
      [7.0, 2.0, 0.0]
    """
    recipe = get_recipe(recipe)
    keys = () if key is None else (key,)

    def quantized(cotangent: jax.Array, *keys: jax.Array) -> jax.Array:
        return fake_quant(cotangent, recipe, key=keys[0] if keys else None)

    jax.eval_shape(quantized, x, *keys)  # Raises errors now, not in the backward pass.
    return with_transpose(_first, quantized, x, *keys)


def _first(x: jax.Array, *keys: jax.Array) -> jax.Array:
    del keys
    return x


def _total(cotangents: jax.Array) -> jax.Array:
    return cotangents.sum(0)


def with_transpose(
    function: Function, transpose: Function, x: Any, *rest: Any, join: Function = _total
) -> jax.Array:
    """Calls a function that is linear in its first argument, with a custom transpose.

    Args:
      function: `(x, *rest) -> y`, linear in x.
      transpose: `(cotangent of y, *rest) -> cotangent of x`. It need not be linear.
      x: an array.
      rest: further arrays, or keys, that both functions take.
      join: combines the cotangents of all elements of a `vmap`, stacked along a leading axis, into
        the cotangent of an x that the elements share; the sum by default.

    Returns:
      `function(x, *rest)`. Forward mode differentiates the function, also with respect to `rest`.
      Reverse mode calls only `transpose`: `rest` gets no cotangent except through it.
    """
    return _primitive().bind(x, *rest, function=function, transpose=transpose, join=join)


@functools.cache
def _primitive() -> Any:
    """Returns the primitive with its rules."""
    primitive = Primitive("jaxq_with_transpose")
    primitive.def_impl(_apply)
    primitive.def_abstract_eval(_shape)
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, mlir.lower_fun(_apply, multiple_results=False))
    checked_inside(primitive, lambda function, **_: function)
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
    (x, *rest), (x_tangent, *rest_tangents) = primals, tangents
    y = with_transpose(function, transpose, x, *rest, join=join)
    parts = []
    if type(x_tangent) is not ad.Zero:
        parts.append(with_transpose(function, transpose, x_tangent, *rest, join=join))
    active = [i for i, tangent in enumerate(rest_tangents) if type(tangent) is not ad.Zero]
    if active:

        def of_rest(*values: jax.Array) -> jax.Array:
            replacements = dict(zip(active, values, strict=True))
            return function(x, *(replacements.get(i, value) for i, value in enumerate(rest)))

        values, active_tangents = ([array[i] for i in active] for array in (rest, rest_tangents))
        parts.append(jax.jvp(of_rest, values, active_tangents)[1])
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
