"""Learned rounding of the weights of a model, block by block (`learn_rounding`)."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import described
from jaxq._jax import compat
from jaxq._jax.draws import checked_key
from jaxq.models import ModelPlan, Program, Rules, build_program, plan
from jaxq.ptq._calibration_runs import Calls, Model, read_calls, replace_parameters, without_weight
from jaxq.ptq._results import Entry, LearnedBlock, RoundingReport, folder_of, journal_of
from jaxq.ptq._rounding._block_training import (
    BlockData,
    BlockLoss,
    LearnedLeaf,
    StepRange,
    Trainer,
    Trainers,
    relative_loss,
)
from jaxq.ptq._rounding._methods import (
    Rounded,
    RoundingMethod,
    RoundingProblem,
    get_rounding_method,
)
from jaxq.ptq._solvers import check_recipe
from jaxq.quantizers import Quantized, grid_values_of, with_levels

__all__ = ["learn_rounding"]

_OWNER = "ptq.learn_rounding"
_MEASUREMENTS = 20  # The measurements of a block's rounded weights after the first one.


def learn_rounding(
    blocks: Sequence[Callable[..., Any]],
    rules: Rules,
    *,
    method: str | RoundingMethod = "signround",
    mask: Callable[..., Any] | None = None,
    progress: Callable[[LearnedBlock], None] | None = None,
    resume: str | pathlib.Path | None = None,
) -> Callable[..., tuple[list[Any], RoundingReport]]:
    """Returns a function that packs the weights of a list of blocks, with learned rounding.

    The model is the composition of the blocks. For each block, gradient steps choose codes such
    that its outputs, computed from the outputs of the packed blocks before it, match those of the
    float model. The loss is the squared error of the floating outputs, relative to their power;
    each step uses one batch. At regular intervals the rounded weights are measured on all batches.
    The best of these weights are returned, and rounding to nearest is the first candidate. Without
    validation, the loss therefore never exceeds that of rounding to nearest.

    Steps on few tokens overfit: the error on other data may grow while the loss falls. With
    held-out batches for validation, which no step uses, the weights with the least error on these
    are returned, so this error never exceeds that of rounding to nearest. The weights of each block
    are measured at most 21 times, without gradients and without further programs.

    Activations are quantized as the rules specify. The inputs and outputs of one block are in
    memory for all batches. Blocks with equal programs, such as equal layers, are compiled once.

    Args:
      blocks: functions `(params, x) -> y`. Each receives its own parameters and the output of the
        previous block; a tuple is passed as several arguments, such as hidden states and a mask.
      rules: as in `jaxq.quantize_fn`. Paths begin with the index of the block, as in `"0/up"`.
      method: a rounding method, or its name in `jaxq.ptq.ROUNDING_METHODS`.
      mask: a function of the inputs of the first block that returns a boolean array, False for
        padding. Its shape must be a prefix of the shape of every output. None (the default) uses
        all tokens.
      progress: a function that is called with the state of a block after each measurement.
      resume: a folder in which each learned block is stored as one file, or None, as in
        `jaxq.ptq.quantize_weights`.

    Returns:
      A function `(params, batches, *, key, validation=None) -> (packed, RoundingReport)`. `params`
      is a sequence with one pytree per block, `batches` is a sequence of inputs of the first block,
      all of the same shapes, and `key` is a key of `jax.random` for the order of the batches.
      `validation` is None or a sequence of held-out batches of the same shapes, and the report then
      has the errors on both. `packed` is the list of the blocks' parameters with stored weights,
      for `jaxq.quantize_fn(blocks[k], ...)`.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.ptq.quantize_weights`; or if `params` does not have one pytree per
        block.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> block = lambda params, x: jax.nn.relu(x @ params["w"])
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = [{"w": jax.random.normal(k, (16, 16)) / 4} for k in keys[:2]]
      >>> batches = [jax.random.normal(k, (32, 16)) for k in jax.random.split(keys[2], 4)]
      >>> learn = ptq.learn_rounding([block, block], "int4_channel")
      >>> packed, report = learn(params, batches, key=jax.random.key(1))
      >>> type(packed[0]["w"]).__name__, [row.loss < row.rtn for row in report.rows]
      ('Quantized', [True, True])

      With two of the batches for validation:

      >>> _, report = learn(params, batches[:2], key=jax.random.key(1), validation=batches[2:])
      >>> [row.validation_loss <= row.validation_rtn for row in report.rows]
      [True, True]

    References:
      Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020). Li et
      al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (2021).
      Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
      LLMs" (2024).
    """
    resolved, folder = get_rounding_method(method), folder_of(_OWNER, resume)
    if not isinstance(blocks, list | tuple):
        raise TypeError(
            f"{_OWNER}: `blocks` must be a list of functions, got {described(blocks)}. Put a "
            "single function into a list."
        )
    blocks = list(blocks)
    if not blocks or not all(map(callable, blocks)):
        raise ValueError(
            f"{_OWNER}: `blocks` must be a sequence of functions (params, x) -> y, got "
            f"{len(blocks)} blocks. Put a single function into a list."
        )

    def model(params: Sequence[Any], *args: Any) -> Any:
        for block, block_params in zip(blocks, params, strict=True):
            args = _as_arguments(block(block_params, *args))
        return args

    def learned(
        params: Any, batches: Any, *, key: jax.Array, validation: Any = None
    ) -> tuple[list[Any], RoundingReport]:
        if not isinstance(params, (list, tuple)) or len(params) != len(blocks):
            count = len(params) if isinstance(params, (list, tuple)) else type(params).__name__
            raise ValueError(
                f"{_OWNER}: `params` must be a list with one pytree for each of the {len(blocks)} "
                f"blocks, got {count}. Split stacked layers with jax.tree.map(lambda w: w[i], "
                "layers)."
            )
        if checked_key(_OWNER, key) is None:
            raise TypeError(
                f"{_OWNER}: `key` must be a random key, got None. Pass jax.random.key(seed)."
            )
        calls = read_calls(_OWNER, model, mask, (list(params), batches), validation)
        run = _LearningRun(calls, blocks, resolved, progress)
        return run.learn(rules, key, folder)

    return learned


def _as_arguments(x: Any) -> tuple[Any, ...]:
    """Returns the output of a block as the arguments of the next block."""
    return x if isinstance(x, tuple) else (x,)


class _Offsets(NamedTuple):
    """The indices of the first leaf and the first product of a block in the model."""

    leaf: int = 0
    product: int = 0


class _LearningRun:
    """One call of the function, which learns all blocks in order.

    Args:
      calls: the calls of the composition of all blocks.
      blocks: the blocks.
      method: the rounding method.
      progress: the user's function, or None.
    """

    def __init__(
        self,
        calls: Calls,
        blocks: Sequence[Callable[..., Any]],
        method: RoundingMethod,
        progress: Callable[[LearnedBlock], None] | None,
    ) -> None:
        self._calls, self._blocks, self._method = calls, blocks, method
        self._progress = progress or (lambda _: None)
        self._trainers = Trainers(method)

    def learn(
        self, rules: Rules, key: jax.Array, folder: pathlib.Path | None
    ) -> tuple[list[Any], RoundingReport]:
        """Learns all blocks and returns the packed parameters and the report.

        Args:
          rules: the rules.
          key: the key for the order of the batches.
          folder: the folder of learned blocks, or None.
        """
        model = self._calls.plan(rules)
        self._check_model(model)
        journal = None
        if folder is not None:
            settings = self._method, np.asarray(jax.random.key_data(key)).tolist()
            if self._calls.validation:
                settings += (self._calls.training,)
            journal = journal_of(folder, self._calls, model, settings, LearnedBlock)
        example, first, rows, packed = self._calls.calls[0][1:], _Offsets(), [], []
        floats = _stack_arguments([call[1:] for call in self._calls.calls])
        quantized = floats
        present = [mask for mask in self._calls.masks if mask is not None]
        masks = jnp.stack(present) if present else None
        for k, function in enumerate(self._blocks):
            planned = plan(_OWNER, function, [], 0, (self._calls.calls[0][0][k], *example), {})
            block = _ModelBlock(k, planned, model.planned, first)
            float_program = build_program(planned.node, [None] * len(planned.products))
            floats = self._trainers.get(float_program, ()).outputs({}, block.arrays, floats)
            trainer = self._trainers.get(block.program(), tuple(block.leaves))
            data = BlockData(quantized, floats, masks, self._calls.training)
            entry = None if journal is None else journal.read(k)
            if entry is not None:
                row, best = entry.row, block.levels_of(entry.packed)
                self._progress(row)
            else:
                row, best = self._learn_block(block, trainer, data, jax.random.fold_in(key, k))
                if journal is not None:
                    journal.write(k, Entry(row, block.packed_leaves(best)))
            quantized = trainer.outputs(trainer.values(best), block.arrays, quantized)
            packed.append(block.packed(best))
            rows.append(row)
            example = _as_arguments(planned.traced.rebuild([x[0] for x in floats]))
            first = block.next
        return packed, RoundingReport(tuple(rows))

    def _check_model(self, model: Model) -> None:
        """Raises a ValueError if the batches differ or a stored weight cannot be learned."""
        traced = model.planned.traced
        self._calls.environments(model, compat.body(traced.jaxpr).invars)
        for leaf, storage in model.planned.stored.leaves.items():
            origin = traced.origins[leaf]
            assert origin is not None, "only parameters are stored"
            owner = f"{_OWNER}: leaf {origin.paths[0]!r}"
            check_recipe(owner, storage.recipe)
            if storage.recipe.outliers is not None:
                raise ValueError(
                    f"{owner}: `recipe` must round every element to its block's grid, got a recipe "
                    f"of {storage.recipe.element.name} that stores outliers separately. Use "
                    "outliers=None, or ptq.quantize_weights."
                )

    def _learn_block(
        self, block: "_ModelBlock", trainer: Trainer, data: BlockData, key: jax.Array
    ) -> tuple[LearnedBlock, dict[int, Rounded]]:
        """Learns one block and returns its row of the report and the best levels of each leaf."""
        problems = block.problems()
        best = {i: Rounded(p.start, grid_values_of(p.start)) for i, p in problems.items()}

        def measure(choice: dict[int, Rounded], noun: str) -> BlockLoss:
            outputs = trainer.outputs(trainer.values(choice), block.arrays, data.inputs)
            loss = jax.tree.map(float, relative_loss(outputs, data))
            _check_finite(loss, block.number, noun)
            return loss

        least = measure(best, "results")
        row = LearnedBlock(
            block=block.number,
            step=0,
            rtn=least.training,
            loss=least.training,
            weights=len(problems),
            validation_rtn=least.validation,
            validation_loss=least.validation,
            note=block.note,
        )
        self._progress(row)
        steps = self._method.steps
        if not problems:
            return row, best
        state = trainer.start(problems)
        order = _batch_order(key, steps, data.training)
        count, done = min(_MEASUREMENTS, steps), 0
        for measurement in range(1, count + 1):
            until = steps * measurement // count
            step_range = StepRange(order, done, until)
            state = trainer.advance(state, problems, block.arrays, data, step_range)
            done, choice = until, trainer.select_levels(state, problems)
            loss = measure(choice, "gradients")
            if loss.decisive < least.decisive:
                least, best = loss, choice
                row = dataclasses.replace(
                    row, step=done, loss=loss.training, validation_loss=loss.validation
                )
            self._progress(dataclasses.replace(row, step=done))
        return row, best


class _ModelBlock:
    """A block of a planned model.

    Args:
      number: the index of the block.
      planned: the plan of the block alone, without rules.
      model: the plan of the model, with the rules.
      first: the indices of the block's first leaf and first product in the model.

    Attributes:
      number: the index of the block.
      arrays: the parameters of the block.
      leaves: the leaves to learn.
      next: the indices of the next block's first leaf and first product in the model.
    """

    def __init__(self, number: int, planned: ModelPlan, model: ModelPlan, first: _Offsets) -> None:
        self.number, self._planned, self._model, self._first = number, planned, model, first
        count = sum(origin is not None for origin in planned.traced.origins)
        self.arrays = [jnp.asarray(x) for x in planned.traced.arrays[:count]]
        self.next = _Offsets(first.leaf + count, first.product + len(planned.products))
        stored = model.stored.leaves
        self._storages = {
            i: stored[first.leaf + i] for i in range(count) if first.leaf + i in stored
        }
        self.leaves = [
            LearnedLeaf(i, storage.recipe, jnp.dtype(storage.dtype), self.arrays[i].dtype)
            for i, storage in self._storages.items()
        ]

    @property
    def _products(self) -> range:
        """The numbers of the block's products in the model."""
        return range(self._first.product, self.next.product)

    @property
    def note(self) -> str:
        """The names of weights that are not stored, with the reasons."""
        model = self._model
        pairs = [(model.products[n].name, model.stored.reasons.get(n)) for n in self._products]
        return "; ".join(f"{name}: not stored: {reason}" for name, reason in pairs if reason)

    def program(self) -> Program:
        """Returns the program of the block, whose stored weights are dequantized arguments."""
        model = self._model
        chosen = [
            model.chosen[n]
            if n in model.stored.reasons
            else without_weight(model.products[n], model.chosen[n])
            for n in self._products
        ]
        return build_program(self._planned.node, chosen, True)

    def problems(self) -> dict[int, RoundingProblem]:
        """Returns the leaves to learn, by their index among the arguments."""
        return {
            i: RoundingProblem(
                weight=storage.convert(self.arrays[i]).astype(jnp.float32),
                start=storage.quantize(self.arrays[i]),
            )
            for i, storage in self._storages.items()
        }

    def packed_leaves(self, choice: dict[int, Rounded]) -> list[Quantized]:
        """Returns the learned leaves with stored weights."""
        return [with_levels(*choice[leaf.index]) for leaf in self.leaves]

    def levels_of(self, packed: Sequence[Quantized]) -> dict[int, Rounded]:
        """Returns the levels of learned leaves, the inverse of `packed_leaves`."""
        pairs = zip(self.leaves, packed, strict=True)
        return {leaf.index: Rounded(q, grid_values_of(q)) for leaf, q in pairs}

    def packed(self, choice: dict[int, Rounded]) -> Any:
        """Returns the parameters of the block with stored weights."""
        leaves = {i: with_levels(*rounded) for i, rounded in choice.items()}
        return replace_parameters(self._planned, leaves)


def _check_finite(loss: BlockLoss, block: int, noun: str) -> None:
    """Raises a ValueError if a loss of a block is NaN."""
    if any(value != value for value in jax.tree.leaves(loss)):
        raise ValueError(
            f"{_OWNER}: {noun} must be finite, but those of block {block} contain a NaN or an "
            "infinity. Check the batches; padding must also be finite, even under `mask`."
        )


def _stack_arguments(calls: Sequence[tuple[Any, ...]]) -> list[jax.Array]:
    """Returns the arrays of the arguments of all calls, stacked."""
    flat = [[x for x in jax.tree.leaves(call) if compat.is_array(x)] for call in calls]
    return [jnp.stack([jnp.asarray(x) for x in arrays]) for arrays in zip(*flat, strict=True)]


def _batch_order(key: jax.Array, steps: int, batches: int) -> jax.Array:
    """Returns the index of each step's batch, as a sequence of random permutations."""
    keys = jax.random.split(key, -(-steps // batches))
    orders = jax.vmap(lambda key: jax.random.permutation(key, batches))(keys)
    return orders.reshape(-1)[:steps]
