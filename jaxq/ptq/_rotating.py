"""Hadamard rotations of the inputs of products, undone by their weights."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.tables import Table, Tabular
from jaxq._jax.serialization import pytree
from jaxq.models import Rules
from jaxq.products import Hadamard
from jaxq.ptq._calls import Model, read_calls
from jaxq.ptq._collectors import Layout
from jaxq.ptq._input_changes import check_same, named_inputs, reason_of, with_arrays
from jaxq.ptq._leaves import Leaves, followed
from jaxq.ptq._models import stages_of
from jaxq.ptq._observing import sought
from jaxq.ptq._parts import Place
from jaxq.ptq._scaled_functions import changed

__all__ = ["InputRotations", "rotate_inputs"]

_OWNER = "ptq.rotate_inputs"


@dataclasses.dataclass(frozen=True)
class _Line:
    product: str
    input: str
    block: int | str
    note: str


@pytree(static=("lengths", "inputs", "left"))
@dataclasses.dataclass(frozen=True, repr=False)
class InputRotations(Tabular):
    """The rotations of the inputs of a model's products: a pytree; its `str` is a table.

    Attributes:
      signs: the signs by which inputs are multiplied before the Hadamard transform, 1 or -1,
        float32 `[inputs]`, by the name of the first product that reads each. Products in a scan
        over layers have a leading axis, one entry per layer, and products with batch axes have
        these before the inputs.
      lengths: the lengths of the transformed blocks, by the same names.
      inputs: the names of all rotated products, each with the name of its input's signs.
      left: the names of the products without a rotation, each with the reason.
    """

    signs: Mapping[str, jax.Array]
    lengths: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]

    def apply(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function whose products rotate their inputs.

        With the parameters of `ptq.rotate_inputs` it equals `fn` with the original ones, up to
        rounding. It is a plain function for `jaxq.quantize_fn`, `jaxq.ptq.quantize_weights` and
        all others; its products have the names that they have in `fn`.

        Args:
          fn: the function that was passed to `ptq.rotate_inputs`.

        Raises:
          ValueError: when called, if `fn` lacks a product that has a rotation.
        """
        lengths = dict(self.lengths)
        return changed("InputRotations.apply", fn, dict(self.inputs), self.signs, lengths)

    def _table(self) -> Table:
        lengths = dict(self.lengths)
        lines = [_Line(name, first, lengths[first], "") for name, first in self.inputs]
        lines += [_Line(name, "-", "-", reason) for name, reason in self.left]
        return Table(tuple(lines))


def rotate_inputs(
    fn: Callable[..., Any], rules: Rules, *, length: int | None = None
) -> Callable[..., Any]:
    """Returns a function that rotates the inputs of products, and their weights to match.

    Each product `x W` whose weight the rules quantize becomes `(x R) (R^T W)`, where R is a random
    Hadamard transform of blocks of the inputs, as in `jaxq.Hadamard`. It spreads outliers of the
    inputs and of the weights over a block, which helps recipes with few bits whose blocks are long.
    Blocks of 16, as in NVFP4, can lose by it, so compare losses. The rotation of x stays in the
    program, so every layer can have one. Products that read the same array share theirs.

        params, rotations = ptq.rotate_inputs(fn, rules)(params, x, key=key)
        rotated = rotations.apply(fn)  # The same function of the new parameters.
        packed, report = ptq.quantize_weights(rotated, rules)(params, batches)
        y = jaxq.quantize_fn(rotated, rules)(packed, x)

    The field `hadamard` of a `ProductRecipe` rotates both operands in each call instead, which
    also covers gradients, but such weights are not stored.

    Args:
      fn: a function of the parameters and the inputs, as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`.
      length: the length of a block, a power of two that divides the number of inputs of every
        product; None (the default) takes the largest such power for each input.

    Returns:
      `(params, *args, *, key) -> (params, InputRotations)`. The arguments are those of `fn`, and
      `key` is a key of `jax.random` for the signs. The new parameters have the dtypes of the old
      ones. The products that `ptq.scale_inputs` leaves alone have no rotations either, nor do
      those with an odd number of inputs; `InputRotations.left` lists them.

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
    if not jax.tree_util.all_leaves([fn]):
        raise TypeError(
            f"{_OWNER}: `fn` must be a function of the parameters, got a pytree, "
            f"{type(fn).__name__}. Pass lambda module, x: module(x)."
        )

    def rotated(params: Any, *args: Any, key: jax.Array) -> tuple[Any, InputRotations]:
        calls = read_calls(_OWNER, fn, None, (params, [args]))
        model = calls.plan(rules)
        model = Model(model.planned, sought(model.planned, hessian=False))
        rotating = _Rotating(model, length, key)
        stages = stages_of(calls, model, rotating.leaves, rotating.solve)
        nothing: Any = dict.fromkeys(product.name for product in model.planned.products)
        stages.together(stages.root(), nothing)
        params, rotations = rotating.result()
        check_same(calls, rotations.apply(fn), params)
        return params, rotations

    return rotated


class _Rotating:
    """The state of a run: the signs chosen so far, and the rotated leaves.

    Args:
      model: the model.
      length: the length of a block, or None.
      key: the key for the signs.
    """

    def __init__(self, model: Model, length: int | None, key: jax.Array) -> None:
        self._model, self._planned, self._key = model, model.planned, key
        self.leaves = Leaves(model.planned)
        self._arrays: dict[int, np.ndarray] = {}
        self._signs: dict[str, jax.Array] = {}
        self._lengths: dict[str, int] = {}
        self._left: dict[int, str] = {}
        for n in (*model.sought.matrices, *model.sought.reasons):
            product = model.planned.products[n]
            reason = reason_of(model, product)
            inputs = 0 if reason else model.sought.matrices[n].collector.inputs
            if length is not None and not reason:
                self._check_length(length, inputs, product.where)
            own = inputs & -inputs if length is None else length
            if not reason and own < 2:
                reason = f"its {inputs} inputs have no block with a power of two"
            if reason:
                self._left[n] = reason
            else:
                self._lengths[product.name] = own

    def _check_length(self, length: int, inputs: int, where: str) -> None:
        if length < 2 or length & (length - 1) or inputs % length:
            raise ValueError(
                f"{_OWNER}: `length` must be a power of two that divides the inputs of every "
                f"product, got {length} for the {inputs} inputs of {where}. Leave it out."
            )

    def solve(self, place: Place, _: Any) -> None:
        """Rotates the weight of one product at one iteration."""
        number = place.product.number
        if number in self._left:
            return
        seen = followed(place.frame, place.variable)
        if isinstance(seen, str):
            self._left[number] = seen
            return
        first = self._planned.products[self._model.sought.first[number]]
        layout = Layout(self._model.sought.matrices[number].axes, seen.x.shape)
        batch, inputs, _ = layout.sizes
        if first.name not in self._signs:
            shape = (*first.stacks, *(seen.x.shape[axis] for axis in layout.axes.batch), inputs)
            drawn = jax.random.rademacher(jax.random.fold_in(self._key, first.number), shape)
            self._signs[first.name] = drawn.astype(jnp.float32)
        signs = self._signs[first.name][place.iterations].reshape(batch, inputs)
        for key in seen.keys:
            if key.leaf not in self._arrays:
                self._arrays[key.leaf] = np.array(self._planned.traced.arrays[key.leaf])
        # Not `seen.x`, which is rounded to the dtype of the product.
        old = [np.asarray(self._arrays[k.leaf][k.rows], np.float32) for k in seen.keys]
        weight = layout.matrices(seen.move(*map(jnp.asarray, old)))
        new = layout.weight(_rotated(weight, signs, self._lengths[first.name]))
        for key, x in seen.back(new, old).items():
            self._arrays[key.leaf][key.rows] = np.asarray(x)
            self.leaves.forget(key)

    def result(self) -> tuple[Any, InputRotations]:
        """Returns the rotated parameters and the rotations."""
        inputs, left = named_inputs(_OWNER, self._model, self._left, self._signs)
        lengths = tuple((name, self._lengths[name]) for name in self._signs)
        params = with_arrays(self._planned, self._arrays)
        return params, InputRotations(self._signs, lengths, inputs, left)


@functools.partial(jax.jit, static_argnames="length")
def _rotated(weight: jax.Array, signs: jax.Array, length: int) -> jax.Array:
    """Returns matrices `[matrices, inputs, outputs]` whose inputs are rotated."""
    ones = jnp.ones((length,), jnp.float32)
    return Hadamard(length).apply(weight * signs[..., None], {1: length}, ones)
