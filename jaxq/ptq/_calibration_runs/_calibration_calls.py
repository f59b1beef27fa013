"""The calls of a model on its calibration batches, and the plan of the model for them."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._jax import compat
from jaxq.models import Assigned, ModelPlan, Product, Rules, plan, weight_of
from jaxq.products import ProductRecipe
from jaxq.ptq._solvers import check_recipe
from jaxq.ptq._statistics import Collector, Targets, find_targets
from jaxq.quantizers import Quantized

__all__ = ["Calls", "Model", "read_calls", "without_weight"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A planned model and the products to solve.

    Attributes:
      planned: the plan, of float parameters.
      targets: the products to solve.
    """

    planned: ModelPlan
    targets: Targets


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls of a function on all calibration batches.

    Attributes:
      owner: the name of the public function that was called, for errors.
      fn: the function of the model, or a module.
      calls: the arguments of each call, with the parameters first unless `fn` is a module.
      masks: the mask of each batch, or None.
      validation: the number of calls at the end that are not calibration data.
    """

    owner: str
    fn: Callable[..., Any]
    calls: Sequence[tuple[Any, ...]]
    masks: Sequence[jax.Array | None]
    validation: int = 0

    @property
    def training(self) -> int:
        """The number of calls of calibration data."""
        return len(self.calls) - self.validation

    def plan(self, rules: Rules) -> Model:
        """Plans the model by the given rules.

        Raises:
          ValueError: if no weight is quantized, or a recipe is not supported.
        """
        planned = plan(self.owner, self.fn, rules, 0, self.calls[0], {})
        model = Model(planned, find_targets(planned))
        self._check(model)
        return model

    def environments(self, model: Model, invars: Sequence[Any]) -> list[dict[Any, Any]]:
        """Returns the arrays of each call that are not parameters, by their variable.

        Args:
          model: the planned model.
          invars: the variables of all arrays among the arguments, including the parameters.

        Raises:
          ValueError: if the calls differ in anything but the values of their arrays.
        """
        expected = [(x.shape, x.dtype) for x in model.planned.traced.arrays]
        module = None if jax.tree_util.all_leaves([self.fn]) else self.fn
        result, first = [], None
        for n, call in enumerate(self.calls):
            leaves, structure = jax.tree.flatten((module, call), is_leaf=_is_quantized)
            is_data = [compat.is_array(x) or _is_quantized(x) for x in leaves]
            arrays = [x for x, yes in zip(leaves, is_data, strict=True) if yes]
            static = structure, [x for x, yes in zip(leaves, is_data, strict=True) if not yes]
            first = static if first is None else first
            if [(x.shape, x.dtype) for x in arrays] != expected or static != first:
                past = n - self.training
                where = f"batch {n}" if past < 0 else f"batch {past} of `validation`"
                raise ValueError(
                    f"{self.owner}: all batches must have the same structure, shapes, dtypes and "
                    f"Python values, but {where} differs from the first. Pad all batches to one "
                    "length and pass `mask`; pass Python values that differ as arrays."
                )
            triples = zip(invars, arrays, model.planned.traced.origins, strict=True)
            result.append({v: jnp.asarray(x) for v, x, origin in triples if origin is None})
        return result

    def _check(self, model: Model) -> None:
        planned, targets = model.planned, model.targets
        if not targets.matrices and not planned.stored.leaves:
            raise ValueError(
                f"{self.owner}: `rules` must quantize the weight of some product, but match none. "
                "Add a rule for a kernel; jaxq.explain(fn, rules)(params, batch) lists products."
            )
        if planned.packed:
            raise ValueError(
                f"{self.owner}: `params` must be floats, got packed weights. Pass the original "
                "parameters."
            )
        for product, assigned in zip(planned.products, planned.chosen, strict=True):
            if assigned is not None and assigned.needs_key:
                raise ValueError(
                    f"{self.owner}: {product.where} must not use stochastic rounding. Use a recipe "
                    "with deterministic rounding."
                )
            if assigned is not None and product.number in targets.matrices:
                self._check_product(product, assigned, targets.matrices[product.number].collector)

    def _check_product(self, product: Product, assigned: Assigned, collector: Collector) -> None:
        weight = weight_of(product, assigned)
        assert weight is not None
        for recipe in filter(None, weight.recipes):
            check_recipe(f"{self.owner}: {product.where}", recipe)
        mask = self.masks[0]
        if mask is not None:
            shape = product.operands[1 - weight.operand].shape
            free = () if collector.patches else collector.axes.free
            collector.check_mask(self.owner, mask.shape, tuple(shape[axis] for axis in free))


def read_calls(
    owner: str,
    fn: Any,
    mask: Callable[..., Any] | None,
    args: tuple[Any, ...],
    validation: Any = None,
) -> Calls:
    """Reads the arguments `(params, batches)`, or `(batches,)` for a module, as calls of `fn`.

    `validation` is None, or batches whose calls follow those of `batches`.

    Raises:
      ValueError: if arguments are missing, there are no batches, or masks differ in shape.
    """
    is_module = not jax.tree_util.all_leaves([fn])
    if len(args) != (1 if is_module else 2):
        raise ValueError(
            f"{owner}: must be called with {'batches' if is_module else 'params and batches'}, got "
            f"{len(args)} arguments. If `fn` takes (params, x, y), make each batch a tuple (x, y)."
        )
    *params, batches = args
    data = _batches(owner, "batches", batches)
    held_out = [] if validation is None else _batches(owner, "validation", validation)
    data += held_out
    masks = [None if mask is None else jnp.asarray(mask(*batch)) for batch in data]
    shapes = {batch_mask.shape for batch_mask in masks if batch_mask is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"{owner}: `mask` must return the same shape for all batches, got {sorted(shapes)}. "
            "Pad the batches to one length."
        )
    calls = [(*params, *batch) for batch in data]
    return Calls(owner, fn, calls, masks, validation=len(held_out))


def _batches(owner: str, name: str, batches: Any) -> list[tuple[Any, ...]]:
    """Returns the batches in an argument with a name, each as a tuple of arguments of the model."""
    if not isinstance(batches, Iterable) or isinstance(batches, (jax.Array, np.ndarray, dict)):
        raise ValueError(
            f"{owner}: `{name}` must be a sequence of batches, got a single "
            f"{type(batches).__name__}. Put it into a list."
        )
    data = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not data:
        raise ValueError(
            f"{owner}: `{name}` must contain at least one batch, got none. Pass a list of inputs, "
            "not an exhausted iterator."
        )
    return data


def without_weight(product: Product, assigned: Assigned | None) -> Assigned | None:
    """Returns the assignment of a product without its weight's recipe and without calibration."""
    if assigned is None:
        return None
    result = dataclasses.replace(assigned, observers=(None, None))
    if weight_of(product, assigned) is None:
        return result
    recipe = dataclasses.replace(assigned.recipe or ProductRecipe(), rhs=None)
    recipe = None if recipe.plain else recipe
    return dataclasses.replace(result, recipe=recipe, table_recipe=None, experts=None)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)
