"""A recipe for one product, applied to operands of known shapes."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from jaxq._jax.barriers import computed_once
from jaxq._jax.draws import one_of
from jaxq.numerics import cast
from jaxq.products import _execution
from jaxq.products._contractions import Axes, block_along, placed
from jaxq.products._hadamard import Hadamard
from jaxq.products._histories import Amax
from jaxq.products._operation import Operation, naming
from jaxq.products._recipe import SingleProduct, is_stochastic
from jaxq.quantizers import fake_quant
from jaxq.quantizers.calibration import Calibrated
from jaxq.recipes import Recipe

__all__ = ["Key", "Pair", "Plan", "Prepared"]

Key = jax.Array | None
Given = Calibrated | Amax | None
Pair = tuple[Given, Given]
_QUANTIZED = ("float16", "bfloat16", "float32")


class Prepared(NamedTuple):
    """Both operands of a product before and after quantization.

    Attributes:
      values: the operands after the Hadamard transform.
      quantized: the operands after fake quantization too.
      scales: the precomputed scales; None for those computed from the operands.
    """

    values: tuple[jax.Array, jax.Array]
    quantized: tuple[jax.Array, jax.Array]
    scales: tuple[Calibrated | None, Calibrated | None]


class Plan(NamedTuple):
    """A product's recipe resolved to the axes of its operands and validated.

    Attributes:
      quantizers: the recipes of the operands on their own axes.
      hadamard: the transform before quantization, or None.
      sizes: the block lengths of the transform by axis, for each operand.
      is_transposed: for each operand, whether XLA transposes it for the product.
    """

    quantizers: tuple[Recipe | None, Recipe | None]
    hadamard: Hadamard | None
    sizes: tuple[dict[int, int], dict[int, int]]
    is_transposed: tuple[bool, bool]

    @classmethod
    def of(cls, recipe: SingleProduct, operation: Operation, lhs: Any, rhs: Any) -> "Plan":
        """Returns the plan for two operands of known shapes and dtypes."""
        _execution.check(recipe.execution, operation.name, operation.contraction, operation.codes)
        hadamard = recipe.hadamard
        assert not isinstance(hadamard, int), "the recipe has made it a record"
        if hadamard is not None and operation.grouped:
            raise ValueError(
                f"{operation.name}: a Hadamard transform would mix the groups of a grouped "
                "product. Use hadamard=None, or one product per group."
            )
        if hadamard is not None and operation.contraction.contracts_ragged:
            raise ValueError(
                f"{operation.name}: a Hadamard transform along the ragged axis would mix rows of "
                "different groups. Use hadamard=None."
            )
        quantizers, sizes = [], []
        for i, x in enumerate((lhs, rhs)):
            with naming(operation, operation.operands[i]):
                quantizer, shared = recipe.operands[i], operation.contraction.shared[i]
                if (quantizer or hadamard) and str(x.dtype) not in _QUANTIZED:
                    raise TypeError(
                        f"must be of dtype {', '.join(_QUANTIZED)} to be quantized, got "
                        f"{x.dtype}. Convert it, or use None as its recipe."
                    )
                quantizers.append(_on_axes(quantizer, x.shape, operation.contraction.axes[i]))
                lengths = {} if hadamard is None else _along(hadamard, shared, x.shape)
                sizes.append(lengths)
        left, right = operation.contraction.axes
        orders = (
            (*left.batch, *left.free, *left.contract),
            (*right.batch, *right.contract, *right.free),
        )
        return cls(
            quantizers=(quantizers[0], quantizers[1]),
            hadamard=hadamard,
            sizes=(sizes[0], sizes[1]),
            is_transposed=(
                list(orders[0]) != sorted(orders[0]),
                list(orders[1]) != sorted(orders[1]),
            ),
        )

    def keys(self, keys: Key) -> tuple[Key, Key]:
        """Returns the keys of the two quantizers, None for one that draws no random bits."""
        left, right = (
            one_of(keys, i) if keys is not None and quantizer and is_stochastic(quantizer) else None
            for i, quantizer in enumerate(self.quantizers)
        )
        return left, right

    def prepare(self, lhs: jax.Array, rhs: jax.Array, keys: Key, scales: Pair) -> Prepared:
        """Returns the operands after the Hadamard transform and after fake quantization."""
        values = self.rotated(lhs, rhs, keys)
        given = self.given(*values, scales)
        return Prepared(values, self._quantized(*values, keys, given), given)

    def rotated(self, lhs: jax.Array, rhs: jax.Array, keys: Key) -> tuple[jax.Array, jax.Array]:
        """Returns the operands after the Hadamard transform."""
        if self.hadamard is None:
            return lhs, rhs
        signs = self.hadamard.draw(None if keys is None else one_of(keys, 2))
        rotated = []
        for x, sizes in zip((lhs, rhs), self.sizes, strict=True):
            y = self.hadamard.apply(x.astype(jnp.float32), sizes, signs)
            rotated.append(y if x.dtype == y.dtype else cast(y, x.dtype).astype(x.dtype))
        return rotated[0], rotated[1]

    def given(
        self, lhs: jax.Array, rhs: jax.Array, scales: Pair
    ) -> tuple[Calibrated | None, Calibrated | None]:
        """Returns the precomputed scales of the operands, with `Amax` converted to scales."""
        resolved = []
        for x, quantizer, scale in zip((lhs, rhs), self.quantizers, scales, strict=True):
            if isinstance(scale, Amax):
                scale = None if quantizer is None else scale.scale(x, quantizer)
            resolved.append(scale)
        return resolved[0], resolved[1]

    def _quantized(
        self, lhs: jax.Array, rhs: jax.Array, keys: Key, scales: tuple[Calibrated | None, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the operands after fake quantization."""
        quantized = []
        for x, quantizer, key, calibrated, is_transposed in zip(
            (lhs, rhs), self.quantizers, self.keys(keys), scales, self.is_transposed, strict=True
        ):
            if quantizer is not None:
                given = {} if calibrated is None else calibrated._asdict()
                # XLA on CPU would compute the operand for its scales and again for its codes, in
                # kernels that differ for each way to compute it.
                x = fake_quant(computed_once(x), quantizer, key=key, **given)
                # It would not vectorize a quantizer that is fused with a transpose.
                x = computed_once(x) if is_transposed else x
            quantized.append(x)
        return quantized[0], quantized[1]


def _on_axes(recipe: Recipe | None, shape: tuple[int, ...], axes: Axes) -> Recipe | None:
    """Returns a recipe whose granularity refers to the tensor's own axes."""
    if recipe is None:
        return None
    return dataclasses.replace(recipe, granularity=placed(recipe.granularity, shape, axes))


def _along(hadamard: Hadamard, axes: tuple[int, ...], shape: tuple[int, ...]) -> dict[int, int]:
    """Returns the lengths of a transform's blocks on the contracted axes of both operands."""
    return block_along(hadamard.size, axes, shape, f"Hadamard({hadamard.size})")
