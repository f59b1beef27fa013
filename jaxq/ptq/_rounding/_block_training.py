"""Training of the rounding of one block, in compiled functions."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from jaxq.models import ProductInputs, Program, StoredView, as_array, run_program
from jaxq.numerics import converted
from jaxq.ptq._calibration_runs import signature, without_names
from jaxq.ptq._rounding._methods import Rounded, RoundingMethod, RoundingProblem
from jaxq.quantizers import levels, values_of
from jaxq.recipes import Recipe

__all__ = [
    "BlockData",
    "BlockLoss",
    "LearnedLeaf",
    "StepRange",
    "Trainer",
    "Trainers",
    "relative_loss",
]


class LearnedLeaf(NamedTuple):
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "targets", "masks"],
    meta_fields=["training"],
)
@dataclasses.dataclass(frozen=True)
class BlockData:
    """The data of a block, stacked over the batches.

    Batches for validation follow those for training, so that one program computes the results of
    both.

    Attributes:
      inputs: the arrays of its arguments after the parameters.
      targets: the results of the float model.
      masks: the masks of the tokens, or None.
      training: the number of batches for training.
    """

    inputs: list[jax.Array]
    targets: list[jax.Array]
    masks: jax.Array | None
    training: int

    def take(self, i: jax.typing.ArrayLike | slice) -> "BlockData":
        """Returns one batch or a range of batches; `training` still counts those of all data."""
        return jax.tree.map(lambda x: x[i], self)


class BlockLoss(NamedTuple):
    """The squared errors of the results of a block, relative to the power of the targets.

    Attributes:
      training: the error of the batches for training.
      validation: the error of the batches for validation, or None if there are none.
    """

    training: Any
    validation: Any

    @property
    def decisive(self) -> Any:
        """The error by which weights are chosen."""
        return self.training if self.validation is None else self.validation


class TrainingState(NamedTuple):
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

    def get(self, program: Program, leaves: tuple[LearnedLeaf, ...]) -> "Trainer":
        """Returns the trainer of a block."""
        unnamed = without_names(program, {a.name: str(k) for k, a in enumerate(program.all())})
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

    def __init__(
        self, program: Program, leaves: tuple[LearnedLeaf, ...], method: RoundingMethod
    ) -> None:
        self._program, self._method = program, method
        self._leaves = {leaf.index: leaf for leaf in leaves}
        self._optimizer = method.optimizer()
        self.start = jax.jit(self._start)
        self.advance = jax.jit(self._advance)
        self.select_levels = jax.jit(self._select_levels)
        self.values = jax.jit(self._values)
        self.outputs = jax.jit(self._outputs)

    def _start(self, problems: Mapping[int, RoundingProblem]) -> TrainingState:
        """Returns the initial state."""
        variables = {
            i: self._method.variables(problem, self._leaves[i].recipe)
            for i, problem in problems.items()
        }
        return TrainingState(variables, self._optimizer.init(variables))

    def _select_levels(
        self, state: TrainingState, problems: dict[int, RoundingProblem]
    ) -> dict[int, Rounded]:
        """Returns the levels that the variables select."""
        return {
            i: self._method.rounded(variables, problems[i], self._leaves[i].recipe)
            for i, variables in state.variables.items()
        }

    def _values(self, choice: Mapping[int, Rounded]) -> dict[int, jax.Array]:
        """Returns the values of leaves, bitwise equal to the dequantized packed leaves."""
        return {
            i: values_of(rounded.grid_values, levels(rounded.start), self._leaves[i].recipe)
            for i, rounded in choice.items()
        }

    def _results(
        self, values: Mapping[int, jax.Array], params: Sequence[jax.Array], inputs: Any
    ) -> list[jax.Array]:
        """Returns the results of one batch with given values of the leaves."""
        arguments: list[Any] = list(params)
        for i, x in values.items():
            leaf = self._leaves[i]
            arguments[i] = StoredView(converted(x, leaf.product_dtype), leaf.dtype)
        arguments += inputs
        results, _ = run_program(self._program, ProductInputs.empty(), arguments)
        return list(map(as_array, results))

    def _outputs(
        self,
        values: Mapping[int, jax.Array],
        params: Sequence[jax.Array],
        inputs: list[jax.Array],
    ) -> list[jax.Array]:
        """Returns the results of all batches, stacked."""
        return lax.map(functools.partial(self._results, values, params), inputs)

    def _advance(
        self,
        state: TrainingState,
        problems: Mapping[int, RoundingProblem],
        params: Sequence[jax.Array],
        data: BlockData,
        steps: StepRange,
    ) -> TrainingState:
        """Takes training steps.

        Args:
          state: the state.
          problems: the leaves to learn.
          params: the parameters of the block.
          data: the data.
          steps: the range of steps.
        """
        training = data.take(slice(data.training))
        total = squares(training.targets, training)
        power = jnp.where(total.power > 0, total.power / jnp.maximum(total.count, 1), 1)
        loss_scale = _loss_scale(total.power)

        def objective(
            variables: Mapping[int, Any], batch: BlockData, number: jax.Array
        ) -> jax.Array:
            values = {
                i: self._method.soft(leaf_variables, problems[i], self._leaves[i].recipe)
                for i, leaf_variables in variables.items()
            }
            sums = squares(self._results(values, params, batch.inputs), batch)
            loss = sums.error / jnp.maximum(sums.count, 1) / power
            loss = loss + sum(self._method.penalty(x, number) for x in variables.values())
            return loss * loss_scale

        def take_step(number: jax.Array, state: TrainingState) -> TrainingState:
            batch = data.take(steps.order[number])
            gradient = jax.grad(objective)(state.variables, batch, number)
            gradient = jax.tree.map(
                lambda x: (x.astype(jnp.float32) / loss_scale).astype(x.dtype), gradient
            )
            # optax mixes dtypes, which fails under strict dtype promotion.
            with jax.numpy_dtype_promotion("standard"):
                updates, optimizer = self._optimizer.update(
                    gradient, state.optimizer, state.variables
                )
                variables: Any = optax.apply_updates(state.variables, updates)
            return TrainingState(
                {i: self._method.clipped(x) for i, x in variables.items()}, optimizer
            )

        return lax.fori_loop(steps.first, steps.until, take_step, state)


def _loss_scale(power: jax.Array) -> jax.Array:
    """Returns a power of two near the norm of the targets, by which a loss is multiplied.

    The gradients with respect to the results are then the relative errors, which float16 can
    represent; it would round those of the loss to 0.
    """
    exponent = jnp.frexp(jnp.where(power > 0, power, 1))[1] // 2
    return jnp.ldexp(jnp.float32(1), exponent)


def squares(results: Sequence[jax.Array], data: BlockData) -> Squares:
    """Returns the sums of squares of the floating results of a batch or of stacked batches."""
    total = [jnp.zeros((), jnp.float32)] * 3
    for result, target in zip(results, data.targets, strict=True):
        if not jnp.issubdtype(target.dtype, jnp.floating):
            continue
        y, t = (x.astype(jnp.float32).reshape(x.shape or (1,)) for x in (result, target))
        error, power = (jnp.sum(x * x, axis=-1) for x in (y - t, t))
        weight = jnp.ones(error.shape, jnp.float32)
        if data.masks is not None:
            weight = _token_weights(data.masks, y.shape)
            # Multiplication by a weight of 0 would not remove a NaN in the padding.
            error, power = (jnp.where(weight > 0, x, 0) for x in (error, power))
        total = [old + jnp.sum(x) for old, x in zip(total, (error, power, weight), strict=True)]
    return Squares(*total)


def _token_weights(masks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the masks as a float32 weight of each vector of a result with a given shape."""
    vectors = shape[:-1]
    if vectors[: masks.ndim] != masks.shape:
        raise ValueError(
            "ptq.learn_rounding: `mask` must have the first axes of every result of a "
            f"block, got the shape {masks.shape} for a result of shape {shape}. "
            "Let blocks return results with the axes of the tokens first."
        )
    mask = masks.reshape(masks.shape + (1,) * (len(vectors) - masks.ndim))
    return jnp.broadcast_to(mask, vectors).astype(jnp.float32)


@jax.jit
def relative_loss(results: Sequence[jax.Array], data: BlockData) -> BlockLoss:
    """Returns the loss of the results of all batches."""

    def error(batches: slice) -> jax.Array:
        sums = squares([x[batches] for x in results], data.take(batches))
        return sums.error / jnp.where(sums.power > 0, sums.power, 1)

    has_validation = data.training < len(data.targets[0])
    validation = error(slice(data.training, None)) if has_validation else None
    return BlockLoss(error(slice(data.training)), validation)
