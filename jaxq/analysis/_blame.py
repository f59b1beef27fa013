"""The share of each product in the error of a quantized loss and its gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.tables import Table
from jaxq.models import Rules, make_switched, quantize_fn

__all__ = ["BlameRow", "blame"]


@dataclasses.dataclass(frozen=True)
class BlameRow:
    """The error that one product causes, in the table of `blame`.

    Errors of gradients are |g - f| / |f|, where f is the gradient of the float function and the
    norms run over all parameters.

    Attributes:
      product: the product's name, followed by the number of the layer in a scan over layers;
        `"all"` for the whole function, whose `_alone` columns are the errors of all recipes
        together and whose `_without` columns are 0.
      loss_alone: the loss minus the float loss, if only this product is quantized.
      gradient_alone: the error of the gradient, if only this product is quantized.
      loss_without: the loss minus the float loss, if all products except this one are quantized.
      gradient_without: the error of the gradient, if all products except this one are quantized.

    Example:
      >>> row = BlameRow(
      ...     product="layers/up/3",
      ...     loss_alone=0.01,
      ...     gradient_alone=0.2,
      ...     loss_without=0.05,
      ...     gradient_without=0.4,
      ... )
      >>> row.gradient_alone < row.gradient_without  # The others together cause a larger error.
      True
    """

    product: str
    loss_alone: float
    gradient_alone: float
    loss_without: float
    gradient_without: float


def blame(
    loss: Callable[..., Any],
    rules: Rules,
    *,
    argnums: int = 0,
    key: jax.Array | None = None,
) -> Callable[..., Table]:
    """Returns a function that ranks products by the error that each of them causes.

    One program computes the loss and its gradient for every set of quantized products: none, all,
    each product alone, and all but each product. Flags choose the products, so the program is
    compiled once, and a product that is turned off takes as long as in float. For n products
    (counted once per layer) the function takes the time of 2 n + 3 training steps.

    Args:
      loss: a function that returns a scalar, as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`, without scales from calibration or delayed scaling.
      argnums: the position of the parameters, whose gradient is compared.
      key: as in `jaxq.quantize_fn`; all runs use it.

    Returns:
      `(*args) -> Table` of `BlameRow`s: first all products together, then each product and layer,
      those with the largest `gradient_alone` first.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`; or if no product has a recipe.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> def loss(params, x):
      ...     return ((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2).sum()
      >>> params = {"a": jnp.eye(4) + 0.1, "b": jnp.eye(4) - 0.2}
      >>> rules = {"a": "w8a8", "b": "w4a16"}
      >>> table = blame(loss, rules)(params, jnp.arange(8.0).reshape(2, 4) / 8)
      >>> [row.product for row in table.rows]
      ['all', 'b', 'a']
    """

    def ranked(*args: Any) -> Table:
        state = make_switched("blame", loss, rules, argnums)(*args)
        names = state.names

        @jax.jit
        def run(masks: jax.Array, args: tuple) -> Any:
            def value(params: Any, mask: jax.Array) -> Any:
                arguments = [*args]
                arguments[argnums] = params
                quantized = quantize_fn(loss, state.with_flags(mask), argnums=argnums, key=key)
                return quantized(*arguments)

            def step(mask: jax.Array) -> Any:
                return jax.value_and_grad(value)(args[argnums], mask)

            value_of_float, exact = step(jnp.zeros(len(names)))

            def errors(mask: jax.Array) -> Any:
                loss_value, gradient = step(mask)
                return loss_value - value_of_float, _relative(gradient, exact)

            return lax.map(errors, masks)

        each = np.eye(len(names), dtype=np.float32)
        masks = np.concatenate([np.ones_like(each[:1]), np.zeros_like(each[:1]), each, 1 - each])
        losses, gradients = jax.device_get(run(jnp.asarray(masks), args))
        rows = [BlameRow("all", *_floats(losses[0], gradients[0], losses[1], gradients[1]))]
        alone, without = slice(2, 2 + len(names)), slice(2 + len(names), None)
        columns = losses[alone], gradients[alone], losses[without], gradients[without]
        each_row = [
            BlameRow(name, *_floats(*values)) for name, *values in zip(names, *columns, strict=True)
        ]
        rows += sorted(each_row, key=lambda row: -row.gradient_alone)
        return Table(tuple(rows))

    return ranked


def _floats(*values: Any) -> list[float]:
    return [float(value) for value in values]


def _relative(gradient: Any, exact: Any) -> jax.Array:
    """Returns the norm of the difference of two trees relative to that of the second."""

    def square(x: jax.Array, unit: jax.Array) -> jax.Array:
        return ((x.astype(jnp.float32) / unit) ** 2).sum()

    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True))
    tops = [jnp.abs(b.astype(jnp.float32)).max(initial=0) for _, b in pairs]
    unit = jnp.maximum(jnp.stack(tops).max(), np.finfo(np.float32).tiny)
    error = sum(square(a.astype(jnp.float32) - b.astype(jnp.float32), unit) for a, b in pairs)
    return jnp.sqrt(error / sum(square(b, unit) for _, b in pairs))
