"""Transforms that run a model's function quantized and that store its weights packed."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxq._base.arguments import integer
from jaxq._jax.draws import checked_key
from jaxq.models._rules import Rules
from jaxq.models._running import ProductInputs, as_array, build_program, run_program
from jaxq.models._transforms._planning import ModelPlan, plan
from jaxq.quantizers import Quantized

__all__ = ["quantize_fn", "quantize_weights"]


def quantize_fn(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    argnums: int | Sequence[int] = 0,
    key: jax.Array | None = None,
    chunk: int | None = None,
) -> Callable[..., Any]:
    """Returns the function with its matrix products, convolutions and look-ups quantized.

    The function is traced and then run equation by equation. Each product that has a recipe is
    computed as `jaxq.dot_general` would compute it there. Neither `fn` nor its compilation cache
    is changed. The result is a plain function: jit, grad, vmap and jvp work around and inside it.

    Products inside `jit`, `checkpoint`, `scan`, `while`, `cond`, `vmap` and `shard_map` are
    quantized, and these constructs are preserved. A function with a custom derivative
    (`jax.custom_jvp`, `jax.custom_vjp`) is quantized inside and keeps its derivative rule, which
    sees the original operands. Any other primitive that contains a program, such as a Pallas
    kernel, is left unchanged; `jaxq.explain` reports it.

    Scales belong to the operands of a product of the traced function. A `vmap` within `fn` becomes
    one product of the whole batch, so a scale per tensor spans the batch. `vmap` around the
    quantized function gives each example its own scales. Scales per token and per channel, as in
    `"w8a8"`, are the same in both cases. In a loop or a `shard_map`, within or around the function,
    each iteration or device has scales of its own; shardings under `jit` do not change scales.

    A weight is a leaf of the parameters. It is recognized through transposes, reshapes,
    conversions, slices, splits, concatenations, and layers stacked for a scan. A value that is
    computed element by element from a leaf and other parameters is a weight too, such as a kernel
    under weight normalization, or `w + a @ b` with a merged LoRA. It has the leaf's path, and is
    quantized as the product sees it. A rule that matches such a computed weight leaves the products
    that compute it, here `a @ b`, unchanged.

    Leaves that a product multiplies as one array, joined along its experts or its outputs, such as
    `jnp.stack(params["experts"])`, may have different recipes: each leaf is quantized separately.

    Args:
      fn: any function of arrays. If it is a pytree itself, such as an Equinox module, its own
        leaves are the parameters. Leaves of its arguments that are not arrays are static.
      rules: the recipes of products: one recipe or its name for every product of a weight; a
        mapping from patterns to recipes; or a sequence of `jaxq.Rule`s and pairs (pattern, recipe).
        A pattern is a regular expression, searched for anywhere in the weight's path. A tensor
        recipe quantizes only the weight. The first rule that matches a product applies; the recipe
        None leaves it unchanged, as does no rule.
      argnums: the positions of the arguments that hold the parameters. A weight's path is its keys
        within its argument joined by slashes, as in `"params/Dense_0/kernel"`.
      key: a key of `jax.random` if a recipe is stochastic, a new one for every step. If only
        gradients are stochastic, the key may be omitted when no gradient is taken. Product number
        n, as `jaxq.explain` counts them from 0, draws from `fold_in(key, n)`; within a loop, the
        iteration number is folded in first. Within a `shard_map`, each device's index is folded in
        last, for each axis along which the operands vary, by name, so devices with equal operands
        draw equal numbers. With `check_vma=False` the varying axes are unknown, so every device
        draws its own numbers.
      chunk: the largest number of elements of a stored weight that are dequantized at a time, as in
        `jaxq.products.stored_dot_general`, to save memory at the cost of time. It has no effect on
        convolutions, on products with a Hadamard transform, another execution, quantized gradients
        or a quantized result, and on weights with outliers or that the model reshapes or slices.
        None (the default) dequantizes a weight at once.

    Returns:
      The quantized function, with the arguments of `fn`. Parameters may be `jaxq.Quantized`, as
      `jaxq.quantize_weights` returns them. Such weights are not rounded again and are bitwise the
      same; the result is the same except for the order of XLA's sums. Functions that lay a weight
      out over devices (`jax.lax.with_sharding_constraint`, `jax.sharding.reshard`) move it packed.

    Raises:
      TypeError: when called, if the function cannot be traced.
      ValueError: when called, if a rule applies to no product, a weight has two recipes, a recipe
        does not fit a product, or a key is missing or not needed. The message names the
        product and the line of the code.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.full((4, 8), 0.3), "out": jnp.full((8, 2), 0.7)}
      >>> small = jaxq.quantize_fn(model, {"out": "w8a8", "": "int4_channel"})
      >>> jax.jit(small)(params, jnp.ones((1, 4))).shape
      (1, 2)
      >>> jaxq.quantize_fn(model, {"hiden": "w8a8"})(params, jnp.ones((1, 4)))
      Traceback (most recent call last):
      ...
      ValueError: quantize_fn: Rule('hiden') matches no weight. Did you mean hidden?...
    """
    if chunk is not None:
        remedy = "Use None to dequantize a weight at once."
        chunk = integer("quantize_fn", "chunk", chunk, remedy, least=1)

    @functools.wraps(fn, updated=())
    def quantized(*args: Any, **kwargs: Any) -> Any:
        planned = plan("quantize_fn", fn, rules, argnums, args, kwargs)
        if chunk is not None:
            planned.chosen = [a and dataclasses.replace(a, chunk=chunk) for a in planned.chosen]
        results, _ = run_planned("quantize_fn", planned, key)
        return planned.traced.rebuild(results)

    return quantized


def run_planned(
    owner: str, planned: ModelPlan, key: jax.Array | None, observing: bool = False
) -> tuple[list[Any], Mapping[str, Any]]:
    """Runs a planned function and returns its results and the calibration states."""
    traced, packed = planned.traced, planned.packed
    runnable = build_program(planned.node, planned.chosen, bool(packed), planned.marked)
    drawing = [a for a in runnable.all() if a.draws_random_bits]
    needing = [a for a in drawing if a.needs_key]
    if checked_key(owner, key) is None and needing:
        raise ValueError(
            f"{owner}: `key` must be given, as the recipe of {needing[0].where} draws random bits, "
            "got None. Pass, for example, key=jax.random.key(step)."
        )
    if key is not None and not drawing:
        raise ValueError(
            f"{owner}: `key` must be None, as no recipe draws random bits, got a key. Omit it."
        )
    arrays = [packed.get(i, array) for i, array in enumerate(traced.arrays)]
    inputs = ProductInputs(
        key=key, scales=planned.scales, product_states=planned.product_states, device_indices={}
    )
    results, seen = run_program(runnable, inputs, arrays, observing=observing)
    return [as_array(result) for result in results], seen


def quantize_weights(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    argnums: int | Sequence[int] = 0,
    strict: bool = False,
) -> Callable[..., Any]:
    """Returns a function that packs the parameters that rules quantize.

    The axes along which a weight has scales depend on the axes that the model contracts. The
    returned function therefore traces the model, using only the shapes and dtypes of its
    arguments, and stores each weight as its products need it. `jaxq.quantize_fn` with the same
    rules runs the model on the result, with bitwise identical weights.

    The stored values are those that the products see, after all conversions that the model makes.
    A weight that the model transposes, reshapes, splits, concatenates or stacks is stored in its
    own shape if its blocks stay whole. Some weights stay unpacked, with a warning, and
    `jaxq.quantize_fn` quantizes them on the fly: weights whose blocks would be cut or span several
    leaves, computed weights, and weights with a stochastic recipe. `jaxq.explain` gives the reason
    for each.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`.
      argnums: as in `jaxq.quantize_fn`.
      strict: True to raise an error if a weight that rules quantize cannot be stored.

    Returns:
      `(*args) -> parameters`: the argument (a tuple of arguments, if `argnums` is a sequence; the
      function itself, if it is a pytree) with its weights replaced by `jaxq.Quantized`. Each layer
      of a stack that is scanned has its own scales.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`; or, with `strict`, if a weight cannot be stored.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"].T
      >>> params, x = {"w": jnp.ones((16, 64))}, jnp.ones((2, 64))
      >>> small = jaxq.quantize_weights(model, "mxfp4")(params, x)
      >>> small["w"].block, small["w"].nbytes  # Blocks of 32 along the contracted axis.
      ((1, 32), 544)
    """

    @functools.wraps(fn, updated=())
    def packed(*args: Any, **kwargs: Any) -> Any:
        planned = plan("quantize_weights", fn, rules, argnums, args, kwargs)
        _warn_unpacked(planned, strict)
        stored = planned.stored.leaves
        tree, leaf_indices = planned.traced.parameters
        leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Quantized))
        leaves = [
            stored[index].quantize(leaf)
            if index is not None and index in stored and not isinstance(leaf, Quantized)
            else leaf
            for index, leaf in zip(leaf_indices, leaves, strict=True)
        ]
        result = jax.tree.unflatten(structure, leaves)
        return result[0] if isinstance(argnums, int) and isinstance(result, list) else result

    return packed


def _warn_unpacked(planned: ModelPlan, strict: bool) -> None:
    """Warns about weights that are not stored, or raises an error if `strict`."""
    reasons = planned.stored.reasons
    if not reasons:
        return
    number = min(reasons)
    first = f"{planned.products[number].where}: {reasons[number]}"
    if strict:
        raise ValueError(
            "quantize_weights: with `strict`, all weights that rules quantize must be storable, "
            f"got {first}. Exclude it by an earlier rule with recipe None, or omit `strict`."
        )
    more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    warnings.warn(
        f"quantize_weights: weights stay unpacked: {first}{more}. jaxq.explain lists them; their "
        "products quantize them on the fly.",
        stacklevel=3,
    )
