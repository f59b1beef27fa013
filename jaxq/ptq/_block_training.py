"""Training of the rounding of one block, in compiled functions."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from jaxq.models import Extra, Program, StoredView, run, unpacked
from jaxq.numerics import as_dtype
from jaxq.ptq._program_signatures import anonymous, signature
from jaxq.ptq._rounding_methods import Rounded, RoundingMethod, RoundingProblem
from jaxq.quantizers import levels, values_of
from jaxq.recipes import Recipe

__all__ = ["Data", "Leaf", "StepRange", "Trainer", "Trainers", "relative_error"]


class Leaf(NamedTuple):
    """A leaf to learn.

    Attributes:
      index: its index among the arguments of the block.
      recipe: its recipe, for the axes after those of stacked layers.
      product_dtype: the dtype in which products read it.
      dtype: the dtype of the leaf.
    """

    index: int
    recipe: Recipe
    product_dtype: Any
    dtype: Any


class Data(NamedTuple):
    """The data of a block, stacked over the batches.

    Attributes:
      inputs: the arrays of its arguments after the parameters.
      targets: the results of the float model.
      masks: the masks of the tokens, or None.
    """

    inputs: list[jax.Array]
    targets: list[jax.Array]
    masks: jax.Array | None

    def batch(self, i: jax.Array) -> "Data":
        """Returns the batch with an index."""
        return jax.tree.map(lambda x: x[i], self)


class State(NamedTuple):
    """The state of the training.

    Attributes:
      variables: the variables of each leaf, by its index.
      optimizer: the state of the optimizer.
    """

    variables: dict[int, Any]
    optimizer: Any


class StepRange(NamedTuple):
    """A range of training steps.

    Attributes:
      order: the index of the batch of each step.
      first: the first step.
      until: the step after the last one.
    """

    order: jax.Array
    first: jax.typing.ArrayLike
    until: jax.typing.ArrayLike


class Squares(NamedTuple):
    """Sums of squares over the results of a block.

    Attributes:
      error: the sum of squared errors.
      power: the sum of squared targets.
      count: the number of vectors along the last axis.
    """

    error: jax.Array
    power: jax.Array
    count: jax.Array


class Trainers:
    """The trainers of a rounding method, one for each distinct computation of a block.

    Args:
      method: the method.
    """

    def __init__(self, method: RoundingMethod) -> None:
        self._method = method
        self._trainers: dict[Any, Trainer] = {}

    def get(self, program: Program, leaves: tuple[Leaf, ...]) -> "Trainer":
        """Returns the trainer of a block."""
        unnamed = anonymous(program, {a.name: str(k) for k, a in enumerate(program.all())})
        key = signature(unnamed), leaves
        if key not in self._trainers:
            self._trainers[key] = Trainer(unnamed, leaves, self._method)
        return self._trainers[key]


class Trainer:
    """The functions that train a block, compiled at their first call.

    Args:
      program: the program of the block. The weights to learn are arguments of it.
      leaves: the leaves to learn.
      method: the method.
    """

    def __init__(self, program: Program, leaves: tuple[Leaf, ...], method: RoundingMethod) -> None:
        self._program, self._method = program, method
        self._leaves = {leaf.index: leaf for leaf in leaves}
        self._optimizer = method.optimizer()
        self.start = jax.jit(self._start)
        self.advance = jax.jit(self._advance)
        self.rounded = jax.jit(self._rounded)
        self.values = jax.jit(self._values)
        self.outputs = jax.jit(self._outputs)

    def _start(self, problems: Mapping[int, RoundingProblem]) -> State:
        """Returns the initial state."""
        variables = {
            i: self._method.variables(problem, self._leaves[i].recipe)
            for i, problem in problems.items()
        }
        return State(variables, self._optimizer.init(variables))

    def _rounded(self, state: State, problems: dict[int, RoundingProblem]) -> dict[int, Rounded]:
        """Returns the levels that the variables select."""
        return {
            i: self._method.rounded(variables, problems[i], self._leaves[i].recipe)
            for i, variables in state.variables.items()
        }

    def _values(self, choice: Mapping[int, Rounded]) -> dict[int, jax.Array]:
        """Returns the values of leaves, bitwise equal to the dequantized packed leaves."""
        return {
            i: values_of(rounded.numbers, levels(rounded.start), self._leaves[i].recipe)
            for i, rounded in choice.items()
        }

    def _results(
        self, values: Mapping[int, jax.Array], arrays: Sequence[jax.Array], inputs: Any
    ) -> list[jax.Array]:
        """Returns the results of one batch with given values of the leaves."""
        params: list[Any] = list(arrays)
        for i, x in values.items():
            leaf = self._leaves[i]
            x = x if x.dtype == leaf.product_dtype else as_dtype(x, leaf.product_dtype)
            params[i] = StoredView(x, leaf.dtype)
        return list(map(unpacked, run(self._program, Extra.empty(), [*params, *inputs])[0]))

    def _outputs(
        self,
        values: Mapping[int, jax.Array],
        arrays: Sequence[jax.Array],
        inputs: list[jax.Array],
    ) -> list[jax.Array]:
        """Returns the results of all batches, stacked."""
        return lax.map(functools.partial(self._results, values, arrays), inputs)

    def _advance(
        self,
        state: State,
        problems: Mapping[int, RoundingProblem],
        arrays: Sequence[jax.Array],
        data: Data,
        steps: StepRange,
    ) -> State:
        """Takes training steps.

        Args:
          state: the state.
          problems: the leaves to learn.
          arrays: the parameters of the block.
          data: the data.
          steps: the range of steps.
        """
        total = squares(data.targets, data)
        power = jnp.where(total.power > 0, total.power / jnp.maximum(total.count, 1), 1)

        def objective(variables: Mapping[int, Any], data: Data, step: jax.Array) -> jax.Array:
            values = {
                i: self._method.soft(leaf_variables, problems[i], self._leaves[i].recipe)
                for i, leaf_variables in variables.items()
            }
            sums = squares(self._results(values, arrays, data.inputs), data)
            loss = sums.error / jnp.maximum(sums.count, 1) / power
            return loss + sum(self._method.penalty(x, step) for x in variables.values())

        def step(number: jax.Array, state: State) -> State:
            batch = data.batch(steps.order[number])
            gradient = jax.grad(objective)(state.variables, batch, number)
            # optax mixes dtypes, which fails under strict dtype promotion.
            with jax.numpy_dtype_promotion("standard"):
                updates, optimizer = self._optimizer.update(
                    gradient, state.optimizer, state.variables
                )
                variables: Any = optax.apply_updates(state.variables, updates)
            return State({i: self._method.clipped(x) for i, x in variables.items()}, optimizer)

        return lax.fori_loop(steps.first, steps.until, step, state)


def squares(results: Sequence[jax.Array], data: Data) -> Squares:
    """Returns the sums of squares of the floating results of a batch or of stacked batches."""
    total = [jnp.zeros((), jnp.float32)] * 3
    for y, target in zip(results, data.targets, strict=True):
        if not jnp.issubdtype(target.dtype, jnp.floating):
            continue
        y, target = (x.astype(jnp.float32).reshape(x.shape or (1,)) for x in (y, target))
        error, power = (jnp.sum(x * x, axis=-1) for x in (y - target, target))
        weight = jnp.ones(error.shape, jnp.float32)
        if data.masks is not None:
            if error.shape[: data.masks.ndim] != data.masks.shape:
                raise ValueError(
                    "ptq.learn_rounding: `mask` must have the first axes of every result of a "
                    f"block, got the shape {data.masks.shape} for a result of shape {y.shape}. "
                    "Let blocks return results with the axes of the tokens first."
                )
            trailing = (1,) * (error.ndim - data.masks.ndim)
            mask = data.masks.reshape(data.masks.shape + trailing)
            weight = jnp.broadcast_to(mask, error.shape).astype(jnp.float32)
            # Multiplication by a weight of 0 would not remove a NaN in the padding.
            error, power = (jnp.where(weight > 0, x, 0) for x in (error, power))
        total = [t + jnp.sum(x) for t, x in zip(total, (error, power, weight), strict=True)]
    return Squares(*total)


@jax.jit
def relative_error(results: Sequence[jax.Array], data: Data) -> jax.Array:
    """Returns the squared error of all batches, relative to the power of the targets."""
    sums = squares(results, data)
    return sums.error / jnp.where(sums.power > 0, sums.power, 1)
