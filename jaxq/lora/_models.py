"""Adapters for whole models.

Weights are observed at their products, as matrices `[inputs, outputs]`. The operations between a
leaf and its product only move elements, so these matrices are linear in the parameters, and the
transpose of the observation maps a change of a matrix to its leaf.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from jaxq._jax.arithmetic import rounded
from jaxq.lora._matrices import Factors
from jaxq.lora._methods import Method, get_method
from jaxq.lora._results import AdaptedModel, Merged, MergeError
from jaxq.models import (
    Adapted,
    LoRA,
    ModelPlan,
    Product,
    ProductInputs,
    Rules,
    as_rules,
    axes_of,
    build_program,
    can_adapt_ragged,
    contraction_of,
    dequantize_tree,
    plan,
    quantize_weights,
    run_program,
    unassigned,
    weight_of,
)
from jaxq.products import Axes
from jaxq.quantizers import Quantized

__all__ = ["adapt", "merge"]


@dataclasses.dataclass(frozen=True)
class _WeightObserver:
    """The observer of a weight as a matrix. Hashable."""

    axes: Axes
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of the matrix, after the lengths of batch axes."""
        batch, free, contract = ([self.shape[axis] for axis in axes] for axes in self.axes)
        return (*batch, math.prod(contract), math.prod(free))

    def empty(self) -> jax.Array:
        """Returns a matrix of zeros."""
        return jnp.zeros(self.matrix, jnp.float32)

    def measure(self, x: jax.Array, others: Sequence[jax.Array], mask: Any) -> jax.Array:
        """Returns the operand as a matrix."""
        del others, mask
        batch, free, contract = self.axes
        return x.transpose((*batch, *contract, *free)).reshape(self.matrix).astype(jnp.float32)

    def merge(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Returns the later of two observations, which are equal."""
        del first
        return second


def adapt(
    fn: Callable[..., Any],
    rules: Rules,
    method: str | Method = "qlora",
    *,
    argnums: int = 0,
    packed: Any = None,
) -> Callable[..., AdaptedModel]:
    """Returns a function that quantizes a model's weights and adds an adapter to each.

    `jaxq.quantize_fn(fn, state)` runs the model with the stored weights and adds
    `scaling * (x a) b` to the product of each weight that has an adapter. The state is a pytree of
    floats, so an optax optimizer trains it and nothing else:

        params, state = jaxq.lora.adapt(loss, "nf4_dq", "loftq")(params, batch)

        def step(state, opt_state, batch):
            objective = lambda state: jaxq.quantize_fn(loss, state)(params, batch)
            updates, opt_state = optimizer.update(jax.grad(objective)(state), opt_state)
            return optax.apply_updates(state, updates), opt_state

    The weights stay packed between the forward and the backward pass, which dequantizes them again.
    This applies to weights that the model multiplies directly, transposed, or layer by layer in a
    scan. Other views, such as slices, are dequantized first and saved as floats. To save memory,
    put layers into a scan: XLA on CPU before JAX 0.12 dequantizes the weights of unrolled layers
    all at once.

    Args:
      fn: as in `jaxq.quantize_fn`, for any JAX framework.
      rules: as in `jaxq.quantize_fn`. Each matrix product whose weight they quantize and that is
        stored gets an adapter, one for each expert in a ragged product; look-ups and convolutions
        get none.
      method: the method of initialization: a record such as `LoftQ(rank=8)` or `EoRA(inputs)`, or a
        name in `jaxq.lora.METHODS`; `"qlora"` by default.
      argnums: the position of the argument that holds the parameters.
      packed: already quantized parameters, for example from `jaxq.ptq.quantize_weights`, whose
        errors the adapters compensate (with `EoRA` or `LoftQ(iterations=1)`). None (the default)
        quantizes the parameters.

    Returns:
      A function `(*args) -> AdaptedModel`, whose arguments contain the float parameters.

    Raises:
      TypeError: as in `jaxq.quantize_fn`; or if `fn` is a module, that is, a pytree.
      ValueError: as in `jaxq.quantize_fn`; if no product can have an adapter; if a weight that the
        method changes has other uses; or if `packed` is given for a method that quantizes again.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> params, x = {"w": jnp.ones((64, 8))}, jnp.ones((2, 64))
      >>> small, state = jaxq.lora.adapt(model, "int4_g32", jaxq.lora.QLoRA(rank=2))(params, x)
      >>> state.adapters["w"].a.shape, small["w"].nbytes
      ((64, 2), 320)
      >>> jaxq.quantize_fn(model, state)(small, x).shape
      (2, 8)
    """
    resolved = get_method(method)

    @functools.wraps(fn, updated=())
    def adapted(*args: Any) -> AdaptedModel:
        observation = _Observation("lora.adapt", fn, rules, argnums, args)
        changes = resolved.iterations > 1
        weights = observation.weights(args[argnums])
        before = {name: resolved.first(w) for name, w in weights.items()}
        if packed is not None and (changes or any(f is not None for f in before.values())):
            raise ValueError(
                f"lora.adapt: `packed` must be None for {type(resolved).__name__}, which quantizes "
                "changed weights. Use EoRA, QLoRA or LoftQ(iterations=1)."
            )
        small = packed
        for _ in range(resolved.iterations):
            if packed is None:
                small = observation.quantized(args, before)
            stored = observation.weights(small)
            before = {n: resolved.fit(w, stored[n], before[n], n) for n, w in weights.items()}
        adapters = {
            name: LoRA(factors.a, factors.b, resolved.scaling)
            for name, factors in before.items()
            if factors is not None
        }
        return AdaptedModel(small, Adapted(adapters, as_rules("lora.adapt", rules)))

    return adapted


def merge(fn: Callable[..., Any], state: Adapted, *, argnums: int = 0) -> Callable[..., Merged]:
    """Returns a function that adds the adapters of a model to its weights.

    The sum of a quantized weight and an adapter is in general not on the grid of its recipe.
    Quantizing it again may lose much of what the adapter has learned, so the errors are
    returned: keep the adapter, or the floats, if `lost` is not small.

    Args:
      fn: the function that was passed to `adapt`.
      state: the state with the trained adapters.
      argnums: the position of the argument that holds the parameters.

    Returns:
      A function `(*args) -> Merged`, whose arguments contain the stored parameters.

    Raises:
      TypeError: if `state` was not returned by `adapt`.
      ValueError: as in `adapt`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> params, x = {"w": jnp.ones((64, 8))}, jnp.ones((2, 64))
      >>> method = jaxq.lora.LoftQ(rank=1)
      >>> small, state = jaxq.lora.adapt(model, "int4_g32", method)(params, x)
      >>> merged = jaxq.lora.merge(model, state)(small, x)
      >>> merged.params["w"].shape, [*merged.errors]
      ((64, 8), ['w'])
    """
    if not isinstance(state, Adapted):
        raise TypeError(
            f"lora.merge: `state` must be the state that lora.adapt returned, got "
            f"{type(state).__name__}. Pass it in place of rules."
        )

    @functools.wraps(fn, updated=())
    def merged(*args: Any) -> Merged:
        floats = dequantize_tree(args[argnums])
        args = (*args[:argnums], floats, *args[argnums + 1 :])
        observation = _Observation("lora.merge", fn, state.rules, argnums, args)
        # Rounded, because a product that is subtracted may be fused with the subtraction.
        changes = {n: a.delta.astype(jnp.float32) for n, a in state.adapters.items()}
        deltas = {name: -rounded(change) for name, change in changes.items()}
        params = observation.subtract_changes(args, deltas)
        args = (*args[:argnums], params, *args[argnums + 1 :])
        packed = quantize_weights(fn, state.rules, argnums=argnums)(*args)
        exact, requantized = observation.weights(params), observation.weights(packed)
        errors = {}
        for name, delta in deltas.items():
            error = _norm(requantized[name] - exact[name])
            errors[name] = MergeError(error / _norm(exact[name]), error / _norm(delta))
        return Merged(params, packed, errors)

    return merged


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, (-2, -1)))


class _Observation:
    """The weights of a model's products as functions of its parameters.

    Args:
      owner: the name of the calling function, for errors.
      fn: the function.
      rules: the rules that choose the weights.
      argnums: the position of the parameters.
      args: the arguments, with float parameters.
    """

    def __init__(
        self, owner: str, fn: Callable[..., Any], rules: Rules, argnums: int, args: tuple
    ) -> None:
        if not jax.tree_util.all_leaves([fn]):
            raise TypeError(
                f"{owner}: `fn` must take its parameters as an argument, got a module of type "
                f"{type(fn).__name__}. Pass, for example, `lambda module, x: module(x)`."
            )
        self.owner, self.fn, self.argnums, self.args = owner, fn, argnums, args
        self.rules = as_rules(owner, rules)
        planned = plan(owner, fn, self.rules, argnums, args, {})
        self.names, self.shared = _adaptable(planned)
        if not self.names:
            raise ValueError(
                f"{owner}: `rules` must quantize the stored weight of some matrix product, got "
                "none. Correct the rules; jaxq.explain(fn, rules)(*args) lists the reasons."
            )

    def weights(self, params: Any) -> dict[str, jax.Array]:
        """Returns the matrices of all products, of float or of stored parameters."""
        leaves, structure = jax.tree.flatten(params, is_leaf=_is_stored)
        arrays = [leaf if _is_array(leaf) else None for leaf in leaves]

        def observed(arrays: list[Any]) -> dict[str, jax.Array]:
            pairs = zip(arrays, leaves, strict=True)
            merged = [x if x is not None else leaf for x, leaf in pairs]
            return self._observe(jax.tree.unflatten(structure, merged))

        # Under `jax.jit`, XLA removes everything except the computation of the weights.
        return jax.jit(observed)(arrays)

    def _observe(self, params: Any) -> dict[str, jax.Array]:
        args = (*self.args[: self.argnums], params, *self.args[self.argnums + 1 :])
        planned = plan(self.owner, self.fn, self.rules, self.argnums, args, {})
        chosen = []
        for product in planned.products:
            operand = self.names.get(product.name)
            if operand is None:
                chosen.append(unassigned(product) if planned.packed else None)
                continue
            shape = tuple(product.operands[operand].shape)
            seen = _WeightObserver(axes_of(product)[operand], shape)
            fields = {"swapped": operand == 0, "observers": (None, seen)}
            chosen.append(dataclasses.replace(unassigned(product), **fields))
        runnable = build_program(planned.node, chosen, bool(planned.packed))
        arrays = [planned.packed.get(i, x) for i, x in enumerate(planned.traced.arrays)]
        _, states = run_program(runnable, ProductInputs(None, {}, {}, {}), arrays, observing=True)
        return {name: states[name][1] for name in self.names}

    def subtract_changes(self, args: tuple, deltas: Mapping[str, jax.Array]) -> Any:
        """Returns the parameters minus changes of matrices."""
        for name in deltas:
            if name in self.shared:
                raise ValueError(
                    f"{self.owner}: the weight of {name!r} must have no other use if the method "
                    f"changes it, but {self.shared[name]!r} uses it too. Exclude it by a rule with "
                    "the recipe None, or use QLoRA, EoRA or LoftQ(iterations=1)."
                )
        params = args[self.argnums]
        leaves, structure = jax.tree.flatten(params)
        floating = [i for i, x in enumerate(leaves) if _is_floating(x)]

        def observed(floats: list[Any]) -> dict[str, jax.Array]:
            full_leaves = list(leaves)
            for i, x in zip(floating, floats, strict=True):
                full_leaves[i] = x
            seen = self._observe(jax.tree.unflatten(structure, full_leaves))
            return {name: seen[name] for name in deltas}

        @jax.jit
        def changed(floats: list[Any], deltas: Mapping[str, jax.Array]) -> list[Any]:
            _, back = jax.vjp(observed, floats)
            (steps,) = back(dict(deltas))
            return [x - step for x, step in zip(floats, steps, strict=True)]

        for i, x in zip(floating, changed([leaves[i] for i in floating], deltas), strict=True):
            leaves[i] = x
        return jax.tree.unflatten(structure, leaves)

    def quantized(self, args: tuple, before: Mapping[str, Factors | None]) -> Any:
        """Returns the stored parameters, after factors are subtracted from the weights."""
        deltas = {
            name: factors.a @ factors.b for name, factors in before.items() if factors is not None
        }
        params = self.subtract_changes(args, deltas) if deltas else args[self.argnums]
        args = (*args[: self.argnums], params, *args[self.argnums + 1 :])
        return quantize_weights(self.fn, self.rules, argnums=self.argnums)(*args)


def _adaptable(planned: ModelPlan) -> tuple[dict[str, int], dict[str, str]]:
    """Returns the weight's operand of each product that can have an adapter, and shared weights.

    Returns:
      The indices of the weights' operands by the names of the products; and for a product whose
      weight another product uses too, the name of the other one.
    """
    users: dict[int, list[Product]] = {}
    for product in planned.products:
        leaves = {i for o in product.origins if o is not None for i in o.leaves.values()}
        for leaf in leaves:
            users.setdefault(leaf, []).append(product)
    names, shared = {}, {}
    for product, assigned in zip(planned.products, planned.chosen, strict=True):
        weight = None if assigned is None else weight_of(product, assigned)
        if (
            weight is None
            or not product.is_differentiated
            or not _is_adaptable(product, weight.operand)
        ):
            continue
        if product.number in planned.stored.reasons:
            continue
        names[product.name] = weight.operand
        for leaf in weight.origin.leaves.values():
            for other in users[leaf]:
                if other.number != product.number:
                    shared[product.name] = other.name
    return names, shared


def _is_adaptable(product: Product, operand: int) -> bool:
    """Returns whether a product multiplies tokens by one matrix, or by one matrix per expert."""
    if product.operation == "ragged_dot_general":
        return operand == 1 and can_adapt_ragged(contraction_of(product.eqn))
    return product.operation == "dot_general"


def _is_stored(x: Any) -> bool:
    return isinstance(x, Quantized)


def _is_array(x: Any) -> bool:
    return _is_stored(x) or hasattr(x, "shape")


def _is_floating(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
