"""Functions whose products scale or rotate their inputs, and input scales (`InputScales`)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import numpy as jnp

from jaxq._base.paths import leaf_path
from jaxq._base.registry import suggestion
from jaxq._base.tables import Table, Tabular
from jaxq._jax.serialization import pytree
from jaxq.models import (
    Product,
    ProductInputs,
    as_array,
    build_program,
    not_floating,
    plan,
    run_program,
    unassigned,
)
from jaxq.quantizers import Quantized

__all__ = ["InputScales", "with_changed_inputs"]


def with_changed_inputs(
    owner: str,
    fn: Callable[..., Any],
    inputs: Mapping[str, str],
    factors: Mapping[str, jax.Array],
    lengths: Mapping[str, int],
) -> Callable[..., Any]:
    """Returns a function whose products multiply their inputs by factors, and rotate them.

    Args:
      owner: the name of the calling method, for errors.
      fn: the function.
      inputs: the input of each changed product, by the product's name.
      factors: the factors of each input, as in `InputScales`.
      lengths: the lengths of the blocks that are then Hadamard transformed, by input.

    Raises:
      ValueError: when called, if `fn` lacks one of the products.
    """

    @functools.wraps(fn, updated=())
    def run_changed(*args: Any, **kwargs: Any) -> Any:
        planned = plan(owner, fn, [], 0, args, kwargs)
        missing = inputs.keys() - {product.name for product in planned.products}
        if missing:
            raise ValueError(
                f"{owner}: `fn` must contain all changed products, but lacks "
                f"{sorted(missing)[0]!r}. Pass the function for which they were computed."
            )
        chosen = [
            dataclasses.replace(
                unassigned(product),
                swapped=product.name in inputs and _has_weight_first(product),
                factor_name=inputs.get(product.name),
                rotation_block=lengths.get(inputs.get(product.name, "")),
            )
            for product in planned.products
        ]
        runnable = build_program(planned.node, chosen, bool(planned.packed))
        arrays = [planned.packed.get(i, x) for i, x in enumerate(planned.traced.arrays)]
        results, _ = run_program(runnable, ProductInputs(None, {}, {}, {}, vectors=factors), arrays)
        return planned.traced.rebuild(list(map(as_array, results)))

    return run_changed


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the printed table."""

    product: str
    input: str
    note: str


@pytree(static=("inputs", "skipped"))
@dataclasses.dataclass(frozen=True, repr=False)
class InputScales(Tabular):
    """The factors of the inputs of a model's products. A pytree that prints as a table.

    Attributes:
      factors: the factors by which inputs are multiplied, float32 `[inputs]`, under the name of the
        first product that reads the input. Products in a scan over layers have a leading axis with
        one entry per layer; batch axes follow it.
      inputs: pairs of a scaled product's name and its input's key in `factors`.
      skipped: pairs of the name of a product without factors and the reason.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> scales = ptq.InputScales({"w": jnp.array([0.5, 2.0])}, (("w", "w"),), ())
      >>> scales.factors["w"].tolist()
      [0.5, 2.0]
    """

    factors: Mapping[str, jax.Array]
    inputs: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]

    def apply(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function whose products multiply their inputs by the factors.

        With the parameters that `ptq.scale_inputs` returned, it equals `fn` with the original
        parameters up to rounding errors. It can be passed to `jaxq.quantize_fn`,
        `jaxq.ptq.quantize_weights` and all other transforms; product names are those of `fn`.

        Args:
          fn: the function that was passed to `ptq.scale_inputs`.

        Raises:
          ValueError: when called, if `fn` lacks a product that has factors.
        """
        return with_changed_inputs("InputScales.apply", fn, dict(self.inputs), self.factors, {})

    def fold(
        self, params: Any, into: Mapping[str, str | tuple[str, int] | list[Any]]
    ) -> tuple[Any, "InputScales"]:
        """Multiplies factors into leaves of the parameters, which removes their cost at run time.

        This is correct only if the input of the products is proportional to the leaf, and nothing
        else depends on the leaf. Such a leaf is the weight of the norm before the products, or the
        kernel of the preceding product if no nonlinear function is in between. If a bias is added,
        as in a LayerNorm, put both paths into a list. The output of a norm that multiplies by
        `1 + weight` is not proportional to the weight. Compare the model's outputs before and
        after.

        Args:
          params: the parameters that `ptq.scale_inputs` returned, not yet quantized.
          into: a mapping from a product's name to the path of a leaf. The factors are removed from
            all products with the same input. They are multiplied along the last axis of the leaf,
            or along another axis given as a pair (path, axis), such as -2 for a weight
            `[outputs, inputs]`; a list names several leaves. Layers of a scan are leading axes of
            both.

        Returns:
          The new parameters, and the remaining factors. Products without factors are in `skipped`.

        Raises:
          ValueError: if a product has no factors, a leaf does not exist or is not a float array, or
            their shapes do not fit.

        Example:
          >>> import jax.numpy as jnp
          >>> from jaxq import ptq
          >>> params = {"norm": jnp.ones(2), "w": jnp.eye(2)}
          >>> scales = ptq.InputScales({"w": jnp.array([0.5, 2.0])}, (("w", "w"),), ())
          >>> params, scales = scales.fold(params, {"w": "norm"})
          >>> params["norm"].tolist(), scales.inputs
          ([0.5, 2.0], ())
        """
        pairs, structure = jax.tree_util.tree_flatten_with_path(
            params, is_leaf=lambda x: isinstance(x, Quantized)
        )
        paths = [leaf_path(path) for path, _ in pairs]
        leaves = [leaf for _, leaf in pairs]
        groups, folded = dict(self.inputs), {}
        for name, target in into.items():
            if name not in groups:
                raise ValueError(_unknown_name("a product with factors", name, groups))
            targets = target if isinstance(target, list) else [target]
            destinations = [(entry, -1) if isinstance(entry, str) else entry for entry in targets]
            for path, axis in destinations:
                if path not in paths:
                    raise ValueError(_unknown_name("a leaf of `params`", path, paths))
                at = paths.index(path)
                leaves[at] = _scale_axis(path, leaves[at], self.factors[groups[name]], axis)
            folded[groups[name]] = f"folded into {' and '.join(path for path, _ in destinations)}"
        reasons = [(name, folded[first]) for name, first in self.inputs if first in folded]
        remaining = InputScales(
            factors={name: x for name, x in self.factors.items() if name not in folded},
            inputs=tuple((name, first) for name, first in self.inputs if first not in folded),
            skipped=(*self.skipped, *reasons),
        )
        return jax.tree.unflatten(structure, leaves), remaining

    def _table(self) -> Table:
        lines = [_Line(name, first, "") for name, first in self.inputs]
        lines += [_Line(name, "-", reason) for name, reason in self.skipped]
        return Table(tuple(lines))


def _has_weight_first(product: Product) -> bool:
    """Returns whether the weight of a product is its first operand."""
    return product.origins[0] is not None


def _unknown_name(noun: str, name: str, known: Iterable[str]) -> str:
    """Returns the error message for a name in `into` that does not exist."""
    hint = suggestion(name, sorted(known), most=3)
    return f"InputScales.fold: `into` must name {noun}, got {name!r}. {hint}"


def _scale_axis(path: str, leaf: Any, factor: jax.Array, axis: int) -> jax.Array:
    """Returns a leaf multiplied by factors along an axis."""
    reason = not_floating(leaf)
    if reason:
        raise ValueError(
            f"InputScales.fold: leaf {path!r} must be a float array, but it {reason}. Fold before "
            "quantization."
        )
    stacks, ndim = factor.shape[:-1], leaf.ndim
    at = axis % ndim if -ndim <= axis < ndim else ndim
    fits = len(stacks) <= at < ndim and leaf.shape[: len(stacks)] == stacks
    if not fits or leaf.shape[at] != factor.shape[-1]:
        raise ValueError(
            f"InputScales.fold: leaf {path!r} must match the factors of shape {factor.shape} in "
            f"its leading axes and axis {axis}, got the shape {leaf.shape}. Pass (path, axis), or "
            "remove it from `into`."
        )
    shape = [n if i < len(stacks) or i == at else 1 for i, n in enumerate(leaf.shape)]
    return (leaf.astype(jnp.float32) * factor.reshape(shape)).astype(leaf.dtype)
