"""Input scales for all products of a model."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.models import Rules, weight_of
from jaxq.products import Axes, placed
from jaxq.ptq._calibration_calls import Model, read_calls
from jaxq.ptq._collectors import Layout
from jaxq.ptq._input_changes import check_equal_outputs, named_inputs, reason_of, replace_leaves
from jaxq.ptq._input_scalers import InputProblem, InputScaler, get_input_scaler
from jaxq.ptq._leaf_states import LeafKey, Leaves, WeightView, trace_weight
from jaxq.ptq._observe import find_targets
from jaxq.ptq._program_parts import Place
from jaxq.ptq._quantize_weights import stages_of
from jaxq.ptq._scaled_functions import InputScales
from jaxq.ptq._statistics import Statistics
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
      share their weight with another product are not scaled; `InputScales.left` lists them.

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
    if not jax.tree_util.all_leaves([fn]):
        raise TypeError(
            f"{_OWNER}: `fn` must be a function of the parameters, got a pytree, "
            f"{type(fn).__name__}. Pass lambda module, x: module(x)."
        )

    def scaled(*args: Any) -> tuple[Any, InputScales]:
        calls = read_calls(_OWNER, fn, mask, args)
        model = calls.plan(rules)
        if not record.needs_hessian:
            model = Model(model.planned, find_targets(model.planned, hessian=False))
        scaling = _ScalingRun(model, record)
        stages = stages_of(calls, model, scaling.leaves, scaling.solve)
        root = stages.root()
        envs = calls.environments(model, root.flat.body.invars)
        stages.solve_together(root, stages.observed(root, envs))
        params, scales = scaling.result()
        check_equal_outputs(calls, scales.apply(calls.fn), params)
        return params, scales

    return scaled


class _Member(NamedTuple):
    """A product that reads an input, with its weight."""

    place: Place
    view: WeightView


class _WeightSpec(NamedTuple):
    """The static description of a weight: its layout, and its recipe with explicit axes."""

    layout: Layout
    recipe: Recipe


class _ScalingRun:
    """The factors chosen and the leaves scaled so far in one call of the function.

    Args:
      model: the planned model.
      method: the input scaler.
    """

    def __init__(self, model: Model, method: InputScaler) -> None:
        self._model, self._planned, self._targets = model, model.planned, model.targets
        self._method = method
        self.leaves = Leaves(model.planned)
        self._left = {
            n: reason
            for n in (*model.targets.matrices, *model.targets.reasons)
            if (reason := reason_of(model, model.planned.products[n]))
        }
        self._waiting: dict[tuple[int, tuple[int, ...]], list[_Member | None]] = {}
        self._members = collections.Counter(
            model.targets.first[n] for n in model.targets.matrices if n not in self._left
        )
        self._factors: dict[str, np.ndarray] = {}
        self._arrays: dict[int, np.ndarray] = {}

    def solve(self, place: Place, observed: Callable[[], Statistics]) -> None:
        """Adds a product; once all products of an input are known, chooses the input's scales.

        Raises:
          ValueError: if an input is not finite.
        """
        statistics = observed()
        number = place.product.number
        if not bool(jnp.all(jnp.isfinite(statistics.amax))):
            raise ValueError(
                f"{_OWNER}: inputs must be finite, but {place.product.where} has a NaN or an "
                "infinity in its input. Look for it in the batches, or mask the padding."
            )
        if number in self._left:
            return
        first = self._targets.first[number]
        waiting = self._waiting.setdefault((first, place.iterations), [])
        view = trace_weight(place.frame, place.variable)
        if isinstance(view, str):
            self._left[number] = view
        waiting.append(None if isinstance(view, str) else _Member(place, view))
        if len(waiting) == self._members[first]:
            members = [member for member in waiting if member is not None]
            if members:
                self._scale(first, place.iterations, members, statistics)
            del self._waiting[first, place.iterations]

    def _scale(
        self,
        first: int,
        iterations: tuple[int, ...],
        members: Sequence[_Member],
        statistics: Statistics,
    ) -> None:
        """Chooses the scales of one input and multiplies the weights by them."""
        specs = tuple(self._spec(member) for member in members)
        own = specs[0].layout.stacked(statistics)
        scales = _chosen(tuple(m.view.x for m in members), own, specs, self._method)
        product = self._planned.products[first]
        batch = statistics.amax.shape
        name, stacks = product.name, product.stacks
        factors = self._factors.setdefault(name, np.ones((*stacks, *batch), np.float32))
        factors[iterations] = np.asarray(1 / scales).reshape(batch)
        for member, spec in zip(members, specs, strict=True):
            spread = jnp.broadcast_to(scales[..., None], spec.layout.sizes)
            ones = [np.float32(1)] * len(member.view.keys)
            for key, factor in member.view.back(spec.layout.weight(spread), ones).items():
                self._multiply(key, factor)
                self.leaves.forget(key)

    def _spec(self, member: _Member) -> _WeightSpec:
        product = member.place.product
        assigned = self._planned.chosen[product.number]
        assert assigned is not None
        weight = weight_of(product, assigned)
        assert weight is not None
        axes: Axes = self._targets.matrices[product.number].axes
        granularity = placed(weight.recipe.granularity, member.view.x.shape, axes)
        recipe = dataclasses.replace(weight.recipe, granularity=granularity)
        return _WeightSpec(Layout(axes, member.view.x.shape), recipe)

    def _multiply(self, key: LeafKey, factor: jax.Array) -> None:
        """Multiplies a leaf, or one row of it, by a factor."""
        if key.leaf not in self._arrays:
            self._arrays[key.leaf] = np.array(self._planned.traced.arrays[key.leaf])
        array = self._arrays[key.leaf]
        array[key.rows] = array[key.rows].astype(np.float32) * np.asarray(factor)

    def result(self) -> tuple[Any, InputScales]:
        """Returns the scaled parameters and the scales.

        Raises:
          ValueError: if no product has scales.
        """
        named = named_inputs(_OWNER, self._model, self._left, self._factors)
        params = replace_leaves(self._planned, self._arrays)
        factors = {name: jnp.asarray(x) for name, x in self._factors.items()}
        return params, InputScales(factors, *named)


@functools.partial(jax.jit, static_argnames=("specs", "method"))
def _chosen(
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

    own = [spec.layout.matrices(x) for x, spec in zip(weights, specs, strict=True)]
    return method.scales(InputProblem(own, statistics, quantized))
