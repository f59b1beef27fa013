"""Hadamard rotations of the inputs of all products of a model (`rotate_inputs`)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.tables import Table, Tabular
from jaxq._jax.processes import host_array
from jaxq._jax.serialization import pytree
from jaxq.models import Rules
from jaxq.products import Hadamard
from jaxq.ptq._calibration_runs import (
    Leaves,
    Model,
    Occurrence,
    model_runner,
    read_calls,
    replace_parameters,
    trace_weight,
)
from jaxq.ptq._statistics import MatrixLayout, find_targets
from jaxq.ptq._transformations._changed_functions import with_changed_inputs
from jaxq.ptq._transformations._checks import (
    check_equal_outputs,
    check_function,
    named_inputs,
    reason_of,
)

__all__ = ["InputRotations", "rotate_inputs"]

_OWNER = "ptq.rotate_inputs"


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the printed table."""

    product: str
    input: str
    block: int | str
    note: str


@pytree(static=("lengths", "inputs", "skipped"))
@dataclasses.dataclass(frozen=True, repr=False)
class InputRotations(Tabular):
    """The rotations of the inputs of a model's products. A pytree that prints as a table.

    Attributes:
      signs: the factors 1 or -1 by which inputs are multiplied before the Hadamard transform,
        float32 `[inputs]`, under the name of the first product that reads the input. Products in a
        scan over layers have a leading axis with one entry per layer; batch axes follow it.
      lengths: pairs of an input's key in `signs` and the length of its transformed blocks.
      inputs: pairs of a rotated product's name and its input's key in `signs`.
      skipped: pairs of the name of a product without rotation and the reason.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> ptq.InputRotations({"w": jnp.ones(8)}, (("w", 8),), (("w", "w"),), ()).lengths
      (('w', 8),)
    """

    signs: Mapping[str, jax.Array]
    lengths: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]

    def apply(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function whose products rotate their inputs.

        With the parameters that `ptq.rotate_inputs` returned, it equals `fn` with the original
        parameters up to rounding errors. It can be passed to `jaxq.quantize_fn`,
        `jaxq.ptq.quantize_weights` and all other transforms; product names are those of `fn`.

        Args:
          fn: the function that was passed to `ptq.rotate_inputs`.

        Raises:
          ValueError: when called, if `fn` lacks a product that has a rotation.
        """
        inputs, lengths = dict(self.inputs), dict(self.lengths)
        return with_changed_inputs("InputRotations.apply", fn, inputs, self.signs, lengths)

    def _table(self) -> Table:
        lengths = dict(self.lengths)
        lines = [_Line(name, first, lengths[first], "") for name, first in self.inputs]
        lines += [_Line(name, "-", "-", reason) for name, reason in self.skipped]
        return Table(tuple(lines))


def rotate_inputs(
    fn: Callable[..., Any], rules: Rules, *, length: int | None = None
) -> Callable[..., Any]:
    """Returns a function that rotates the inputs of products, and their weights to match.

    Each product `x W` whose weight the rules quantize becomes `(x R) (R^T W)`, where R is a random
    Hadamard transform of blocks of the inputs, as in `jaxq.Hadamard`. R spreads outliers of the
    inputs and of the weights over a block, which helps recipes with few bits and long blocks. It
    can increase the loss for blocks of 16, as in NVFP4, so compare losses. The rotation of x is
    computed at run time, so every layer can have one. Products that read the same array share it.

        params, rotations = ptq.rotate_inputs(fn, rules)(params, x, key=key)
        rotated = rotations.apply(fn)  # The same function of the new parameters.
        packed, report = ptq.quantize_weights(rotated, rules)(params, batches)
        y = jaxq.quantize_fn(rotated, rules)(packed, x)

    The field `hadamard` of a `ProductRecipe` instead rotates both operands in each call. It also
    covers gradients, but such weights cannot be stored.

    Args:
      fn: a function of the parameters and the inputs, as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`.
      length: the length of a block, a power of two that divides the number of inputs of every
        product; None (the default) takes the largest such power for each input.

    Returns:
      A function `(params, *args, key) -> (params, InputRotations)`. The arguments are those of
      `fn`, and `key` is a key of `jax.random` for the signs. The new parameters have the dtypes of
      the old ones. Products that `ptq.scale_inputs` does not support, and products with an odd
      number of inputs, are not rotated; `InputRotations.skipped` lists them.

    Raises:
      TypeError: if `fn` is a pytree, such as a module.
      ValueError: as in `jaxq.quantize_fn`; if `length` does not divide the inputs of a product; if
        no product can be rotated; or if the outputs of the rotated function differ from those of
        `fn`, because a weight is also used elsewhere.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq import ptq
      >>> model = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> params = {"up": jax.random.normal(keys[0], (8, 24)),
      ...           "down": jax.random.normal(keys[1], (24, 4))}
      >>> x = jax.random.normal(keys[2], (32, 8))
      >>> new, rotations = ptq.rotate_inputs(model, "int4_channel")(params, x, key=keys[3])
      >>> rotations.lengths
      (('up', 8), ('down', 8))
      >>> bool(jnp.allclose(rotations.apply(model)(new, x), model(params, x), atol=1e-4))
      True

    References:
      Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024). Egiazarian et
      al., "Bridging the Gap Between Promise and Performance for Microscaling FP4 Quantization"
      (2025), for blocks.
    """
    check_function(_OWNER, fn)

    def rotated(params: Any, *args: Any, key: jax.Array) -> tuple[Any, InputRotations]:
        calls = read_calls(_OWNER, fn, None, (params, [args]))
        model = calls.plan(rules)
        model = Model(model.planned, find_targets(model.planned, hessian=False))
        rotating = _RotationRun(model, length, key)
        runner = model_runner(calls, model, rotating.leaves, rotating.solve)
        no_statistics: Any = dict.fromkeys(product.name for product in model.planned.products)
        runner.solve_together(runner.root(), no_statistics)
        params, rotations = rotating.result()
        check_equal_outputs(calls, rotations.apply(fn), params)
        return params, rotations

    return rotated


class _RotationRun:
    """The signs and the rotated leaves in one call of the function.

    Args:
      model: the planned model.
      length: the length of a block, or None for the largest possible one.
      key: the key for the signs.
    """

    def __init__(self, model: Model, length: int | None, key: jax.Array) -> None:
        self._model, self._planned, self._key = model, model.planned, key
        self.leaves = Leaves(model.planned)
        self._arrays: dict[int, np.ndarray] = {}
        self._signs: dict[str, jax.Array] = {}
        self._lengths: dict[str, int] = {}
        self._unrotated_reasons: dict[int, str] = {}  # The reasons why products are not rotated.
        for n in (*model.targets.matrices, *model.targets.reasons):
            product = model.planned.products[n]
            reason = reason_of(model, product)
            inputs = 0 if reason else model.targets.matrices[n].collector.inputs
            if length is not None and not reason:
                self._check_length(length, inputs, product.where)
            block_length = inputs & -inputs if length is None else length
            if not reason and block_length < 2:
                reason = f"the number of its inputs, {inputs}, is odd"
            if reason:
                self._unrotated_reasons[n] = reason
            else:
                self._lengths[product.name] = block_length

    def _check_length(self, length: int, inputs: int, where: str) -> None:
        if length < 2 or length & (length - 1) or inputs % length:
            raise ValueError(
                f"{_OWNER}: `length` must be a power of two that divides the inputs of every "
                f"product, got {length} for the {inputs} inputs of {where}. Use length=None."
            )

    def solve(self, occurrence: Occurrence, _: Any) -> None:
        """Rotates the weight of one product, in one iteration of the scans around it."""
        number = occurrence.product.number
        if number in self._unrotated_reasons:
            return
        view, reason = trace_weight(occurrence.frame, occurrence.variable)
        if view is None:
            self._unrotated_reasons[number] = reason
            return
        first = self._planned.products[self._model.targets.first[number]]
        layout = MatrixLayout(self._model.targets.matrices[number].axes, view.x.shape)
        batch, inputs, _ = layout.sizes
        if first.name not in self._signs:
            shape = (*first.stacks, *(view.x.shape[axis] for axis in layout.axes.batch), inputs)
            key = jax.random.fold_in(self._key, first.number)
            self._signs[first.name] = jax.random.rademacher(key, shape).astype(jnp.float32)
        signs = self._signs[first.name][occurrence.iterations].reshape(batch, inputs)
        for leaf in {key.leaf for key in view.keys} - self._arrays.keys():
            self._arrays[leaf] = np.array(host_array(self._planned.traced.arrays[leaf]))
        # The values of the leaves, because `view.x` is rounded to the dtype of the product.
        old = [np.asarray(self._arrays[k.leaf][k.slice_index], np.float32) for k in view.keys]
        weight = layout.matrices(view.move(*map(jnp.asarray, old)))
        new = layout.weight(_rotated(weight, signs, self._lengths[first.name]))
        for leaf_key, x in view.move_back(new, old).items():
            self._arrays[leaf_key.leaf][leaf_key.slice_index] = np.asarray(x)
            self.leaves.forget(leaf_key)

    def result(self) -> tuple[Any, InputRotations]:
        """Returns the rotated parameters and the rotations."""
        inputs, skipped = named_inputs(_OWNER, self._model, self._unrotated_reasons, self._signs)
        lengths = tuple((name, self._lengths[name]) for name in self._signs)
        params = replace_parameters(
            self._planned, {leaf: jnp.asarray(x) for leaf, x in self._arrays.items()}
        )
        return params, InputRotations(self._signs, lengths, inputs, skipped)


@functools.partial(jax.jit, static_argnames="length")
def _rotated(weight: jax.Array, signs: jax.Array, length: int) -> jax.Array:
    """Rotates the inputs of matrices `[matrices, inputs, outputs]`."""
    ones = jnp.ones((length,), jnp.float32)
    return Hadamard(length).apply(weight * signs[..., None], {1: length}, ones)
