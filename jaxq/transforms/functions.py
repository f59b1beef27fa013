"""The transforms of a model's function: run it quantized, and store its weights."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxq.quantized import Quantized
from jaxq.transforms.planning import Planned, plan
from jaxq.transforms.programs import Extra, program
from jaxq.transforms.rules import Rules
from jaxq.transforms.running import run

__all__ = ["quantize_fn", "quantize_weights"]


def quantize_fn(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    argnums: int | Sequence[int] = 0,
    key: jax.Array | None = None,
) -> Callable[..., Any]:
    """The same function with its matrix products, convolutions and look-ups quantized.

    The function is traced, and run again equation by equation, its products by their recipes, as
    `jaxq.dot_general` would give them where they stand. Neither `fn` nor what it has compiled is
    touched. The result is a plain function: jit, grad, vmap and jvp go around it and inside it.

    It looks into `jit`, `checkpoint`, `scan`, `while`, `cond`, `vmap` and `shard_map`, which stay
    what they are. A function with derivatives of its own (`jax.custom_jvp`, `jax.custom_vjp`) is
    quantized within and keeps its derivative, that of the operands as they were. Anything else with
    a program inside, such as a Pallas kernel, is left as it is; `jaxq.explain` reports it.

    A weight is a leaf of the parameters, wherever it is multiplied: through transposes, reshapes,
    conversions, slices, and layers stacked for a scan.

    Args:
      fn: any function of arrays. If it is a pytree itself, such as an Equinox module, its own
        leaves are the parameters. Leaves of its arguments that are no arrays are static.
      rules: which product gets which recipe: `jaxq.Rule`s, or pairs of a regular expression for the
        weight's path and a recipe. The first that matches a product holds; a product that none
        matches is left as it is.
      argnums: which positional arguments hold the parameters. A weight's path is its keys within
        its argument joined by slashes, as in `"params/Dense_0/kernel"`.
      key: a key of `jax.random` if recipes draw anything, a new one for every step; if only their
        gradients do, it may be left out where none is taken. The product
        number n, as `jaxq.explain` counts them from 0, draws from `fold_in(key, n)`; within a loop
        the turn is folded in first. Within a `shard_map` each device's place is folded in last,
        for each axis along which the operands vary, by name: devices that multiply the same draw
        the same. With `check_vma=False` nothing says what varies, so every device draws its own.

    Returns:
      `fn`, quantized, of the same arguments. Parameters may be `jaxq.Quantized`, as
      `jaxq.quantize_weights` makes them: then weights are not rounded again, and are the same
      to the bit, and so is the result but for the order of XLA's sums. What lays one out over
      devices (`jax.lax.with_sharding_constraint`, `jax.sharding.reshard`) moves it packed.

    Raises:
      TypeError: when called: a function that cannot be traced.
      ValueError: when called: a rule that holds for no product; a weight with two quantizers; a
        recipe that does not fit a product; a key that is missing or not needed. The text names the
        product, and the line of the code.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.full((4, 8), 0.3), "out": jnp.full((8, 2), 0.7)}
      >>> small = jaxq.quantize_fn(model, [("out", "w8a8"), ("", "int4_channel")])
      >>> jax.jit(small)(params, jnp.ones((1, 4))).shape
      (1, 2)
      >>> jaxq.quantize_fn(model, [("hiden", "w8a8")])(params, jnp.ones((1, 4)))
      Traceback (most recent call last):
      ...
      ValueError: quantize_fn: Rule('hiden') matches the weight of no product. The nearest are \
hidden, out. jaxq.explain(fn, [])(*args) lists all.
    """

    @functools.wraps(fn, updated=())
    def quantized(*args: Any, **kwargs: Any) -> Any:
        planned = plan("quantize_fn", fn, rules, argnums, args, kwargs)
        results, _ = run_planned("quantize_fn", planned, key)
        return planned.traced.rebuild(results)

    return quantized


def run_planned(
    owner: str, planned: Planned, key: jax.Array | None, observing: bool = False
) -> tuple[list[Any], Mapping[str, Any]]:
    """The results of a planned function, and the states that were gathered."""
    what = program(planned.node, planned.chosen)
    drawing = [a for a in what.all() if a.draws]
    needing = [a for a in drawing if a.needs_key]
    if needing and key is None:
        raise ValueError(
            f"{owner}: the recipe of {needing[0].where} draws random numbers, and needs `key`, "
            "such as jax.random.key(step)."
        )
    if key is not None and not drawing:
        raise ValueError(f"{owner}: no recipe draws random numbers, got a key. Leave it out.")
    return run(
        what,
        Extra(key, planned.scales, planned.histories, {}),
        planned.traced.arrays,
        observing=observing,
    )


def quantize_weights(
    fn: Callable[..., Any], rules: Rules, *, argnums: int | Sequence[int] = 0
) -> Callable[..., Any]:
    """The parameters of a function, those that its rules quantize packed.

    Where a recipe's scales lie depends on which axes of a weight are contracted, which only the
    model knows. So this traces the model, on arguments of which only shapes and dtypes count, and
    stores each weight as its products want it. `jaxq.quantize_fn` with the same rules runs the
    model on the result, with weights that are the same to the bit.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: likewise.
      argnums: likewise.

    Returns:
      `(*args) -> parameters`: the argument (a tuple of arguments, if `argnums` is a sequence; the
      function itself, if it is a pytree) with `jaxq.Quantized` in the place of weights. Layers that
      are stacked for a scan have scales of their own.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: likewise; or a weight that is multiplied as a part of its leaf, with axes merged,
        in two ways, or by a recipe that draws.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"].T
      >>> params, x = {"w": jnp.ones((16, 64))}, jnp.ones((2, 64))
      >>> small = jaxq.quantize_weights(model, [("w", "mxfp4")])(params, x)
      >>> small["w"].block, small["w"].nbytes  # Blocks of 32 along what is contracted.
      ((1, 32), 544)
    """

    @functools.wraps(fn, updated=())
    def packed(*args: Any, **kwargs: Any) -> Any:
        planned = plan("quantize_weights", fn, rules, argnums, args, kwargs)
        traced, stored = planned.traced, dict(planned.storages)
        tree, places = traced.parameters
        leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Quantized))
        leaves = [
            stored[place].quantize(leaf)
            if place in stored and not isinstance(leaf, Quantized)
            else leaf
            for place, leaf in zip(places, leaves, strict=True)
        ]
        result = jax.tree.unflatten(structure, leaves)
        return result[0] if isinstance(argnums, int) and isinstance(result, list) else result

    return packed
