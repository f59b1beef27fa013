"""Scales for the inputs of all products of a model (`scale_inputs`)."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._jax.processes import host_array
from jaxq.models import Rules, weight_of
from jaxq.products import Axes, placed
from jaxq.ptq._calibration_runs import (
    LeafKey,
    Leaves,
    Model,
    Occurrence,
    WeightView,
    model_runner,
    read_calls,
    replace_parameters,
    trace_weight,
)
from jaxq.ptq._statistics import MatrixLayout, Statistics, find_targets
from jaxq.ptq._transformations._changed_functions import InputScales
from jaxq.ptq._transformations._checks import (
    check_equal_outputs,
    check_function,
    named_inputs,
    reason_of,
)
from jaxq.ptq._transformations._scaling_methods import InputProblem, InputScaler, get_input_scaler
from jaxq.quantizers import fake_quant
from jaxq.recipes import Recipe

__all__ = ["scale_inputs"]

_OWNER = "ptq.scale_inputs"


def scale_inputs(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    method: str | InputScaler = "awq",
    mask: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns a function that scales the inputs of products and, inversely, their weights.

    Each product `x W` whose weight the rules quantize becomes `(x / s) (s W)`, with one scale for
    each input. The division remains in the program, so a layer can have scales regardless of what
    precedes it. Products that read the same array, such as queries, keys and values, share their
    scales. The scales are computed from one run of the float model. Solvers can then be applied to
    the scaled function:

        params, scales = ptq.scale_inputs(fn, rules, method="awq")(params, batches)
        scaled = scales.apply(fn)  # The same function of the new parameters.
        packed, report = ptq.quantize_weights(scaled, rules, solver="gptq")(params, batches)
        y = jaxq.quantize_fn(scaled, rules)(packed, x)

    Args:
      fn: a function of the parameters and the inputs, as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`.
      method: an input scaler, or its name in `jaxq.ptq.INPUT_SCALERS`.
      mask: as in `jaxq.ptq.quantize_weights`.

    Returns:
      A function `(params, batches) -> (params, InputScales)`, with the arguments of
      `jaxq.ptq.quantize_weights`. The new parameters have the dtypes of the old ones. Convolutions,
      ragged products, products in `while` loops or under a custom derivative, and products that
      share their weight with another product are not scaled; `InputScales.skipped` lists them.

    Raises:
      TypeError: if `fn` is a pytree, such as a module.
      ValueError: as in `jaxq.ptq.quantize_weights`; if no product can be scaled; or if the outputs
        of the scaled function differ from those of `fn`, because a weight is also used elsewhere.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq import ptq
      >>> model = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (8, 16)),
      ...           "down": jax.random.normal(keys[1], (16, 4))}
      >>> x = jax.random.normal(keys[2], (32, 8))
      >>> new, scales = ptq.scale_inputs(model, "int4_channel")(params, [x])
      >>> sorted(scales.factors), scales.factors["down"].shape
      (['down', 'up'], (16,))
      >>> bool(jnp.allclose(scales.apply(model)(new, x), model(params, x), atol=1e-4))
      True
    """
    record = get_input_scaler(method)
    check_function(_OWNER, fn)

    def scaled(*args: Any) -> tuple[Any, InputScales]:
        calls = read_calls(_OWNER, fn, mask, args)
        model = calls.plan(rules)
        if not record.needs_hessian:
            model = Model(model.planned, find_targets(model.planned, hessian=False))
        scaling = _ScalingRun(model, record)
        runner = model_runner(calls, model, scaling.leaves, scaling.solve)
        root = runner.root()
        envs = calls.environments(model, root.flat.body.invars)
        runner.solve_together(root, runner.observe_all(root, envs))
        params, scales = scaling.result()
        check_equal_outputs(calls, scales.apply(calls.fn), params)
        return params, scales

    return scaled


class _Reader(NamedTuple):
    """A product that reads an input, with its weight."""

    occurrence: Occurrence
    view: WeightView


class _WeightSpec(NamedTuple):
    """The static description of a weight: its layout, and its recipe with explicit axes."""

    layout: MatrixLayout
    recipe: Recipe


class _ScalingRun:
    """The factors and the scaled leaves in one call of the function.

    Args:
      model: the planned model.
      method: the input scaler.
    """

    def __init__(self, model: Model, method: InputScaler) -> None:
        self._model, self._planned, self._targets = model, model.planned, model.targets
        self._method = method
        self.leaves = Leaves(model.planned)
        self._unscaled_reasons = {  # The reasons why products are not scaled.
            n: reason
            for n in (*model.targets.matrices, *model.targets.reasons)
            if (reason := reason_of(model, model.planned.products[n]))
        }
        # The readers of each input so far, and their expected number. None stands for a reader that
        # cannot be scaled.
        self._readers: dict[tuple[int, tuple[int, ...]], list[_Reader | None]] = {}
        self._expected = collections.Counter(
            model.targets.first[n]
            for n in model.targets.matrices
            if n not in self._unscaled_reasons
        )
        self._factors: dict[str, np.ndarray] = {}
        self._arrays: dict[int, np.ndarray] = {}

    def solve(self, occurrence: Occurrence, observe: Callable[[], Statistics]) -> None:
        """Adds a product; after the last product that reads an input, chooses the input's scales.

        Args:
          occurrence: the product.
          observe: a function that returns the statistics of its input.

        Raises:
          ValueError: if an input, a sum over it, or a weight is not finite.
        """
        statistics = observe()
        occurrence.check_finite(_OWNER, statistics)
        number = occurrence.product.number
        if number in self._unscaled_reasons:
            return
        first = self._targets.first[number]
        readers = self._readers.setdefault((first, occurrence.iterations), [])
        view, reason = trace_weight(occurrence.frame, occurrence.variable)
        if view is None:
            self._unscaled_reasons[number] = reason
        else:
            occurrence.check_weight(_OWNER, view.x)
        readers.append(None if view is None else _Reader(occurrence, view))
        if len(readers) == self._expected[first]:
            scalable = [reader for reader in readers if reader is not None]
            if scalable:
                self._scale(first, occurrence.iterations, scalable, statistics)
            del self._readers[first, occurrence.iterations]

    def _scale(
        self,
        first: int,
        iterations: tuple[int, ...],
        readers: Sequence[_Reader],
        statistics: Statistics,
    ) -> None:
        """Chooses the scales of one input and multiplies the weights by them."""
        specs = tuple(self._spec(reader) for reader in readers)
        stacked = specs[0].layout.flatten_batches(statistics)
        weights = tuple(reader.view.x for reader in readers)
        scales = _choose_scales(weights, stacked, specs, self._method)
        product = self._planned.products[first]
        batch = statistics.amax.shape
        name, stacks = product.name, product.stacks
        factors = self._factors.setdefault(name, np.ones((*stacks, *batch), np.float32))
        factors[iterations] = np.asarray(1 / scales).reshape(batch)
        for reader, spec in zip(readers, specs, strict=True):
            per_element = jnp.broadcast_to(scales[..., None], spec.layout.sizes)
            ones = [np.float32(1)] * len(reader.view.keys)
            factors_by_leaf = reader.view.move_back(spec.layout.weight(per_element), ones)
            for key, factor in factors_by_leaf.items():
                self._multiply(key, factor)
                self.leaves.forget(key)

    def _spec(self, reader: _Reader) -> _WeightSpec:
        product = reader.occurrence.product
        assigned = self._planned.chosen[product.number]
        assert assigned is not None
        weight = weight_of(product, assigned)
        assert weight is not None
        axes: Axes = self._targets.matrices[product.number].axes
        granularity = placed(weight.recipe.granularity, reader.view.x.shape, axes)
        recipe = dataclasses.replace(weight.recipe, granularity=granularity)
        return _WeightSpec(MatrixLayout(axes, reader.view.x.shape), recipe)

    def _multiply(self, key: LeafKey, factor: jax.Array) -> None:
        """Multiplies a leaf, or one row of it, by a factor."""
        if key.leaf not in self._arrays:
            self._arrays[key.leaf] = np.array(host_array(self._planned.traced.arrays[key.leaf]))
        array = self._arrays[key.leaf]
        array[key.slice_index] = array[key.slice_index].astype(np.float32) * np.asarray(factor)

    def result(self) -> tuple[Any, InputScales]:
        """Returns the scaled parameters and the scales.

        Raises:
          ValueError: if no product has scales.
        """
        named = named_inputs(_OWNER, self._model, self._unscaled_reasons, self._factors)
        params = replace_parameters(
            self._planned, {leaf: jnp.asarray(x) for leaf, x in self._arrays.items()}
        )
        factors = {name: jnp.asarray(x) for name, x in self._factors.items()}
        return params, InputScales(factors, *named)


@functools.partial(jax.jit, static_argnames=("specs", "method"))
def _choose_scales(
    weights: tuple[jax.Array, ...],
    statistics: Statistics,
    specs: tuple[_WeightSpec, ...],
    method: InputScaler,
) -> jax.Array:
    """Returns the scales of one input, `[matrices, inputs]`."""

    def quantized(matrices: Sequence[jax.Array]) -> list[jax.Array]:
        return [
            spec.layout.matrices(fake_quant(spec.layout.weight(x), spec.recipe))
            for x, spec in zip(matrices, specs, strict=True)
        ]

    matrices = [spec.layout.matrices(x) for x, spec in zip(weights, specs, strict=True)]
    return method.scales(InputProblem(matrices, statistics, quantized))
