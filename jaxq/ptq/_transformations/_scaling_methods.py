"""Methods that choose the scales of product inputs: SmoothQuant and AWQ.

A product `x W` is computed as `(x / s) (s W)`, with one positive scale for each input. The function
stays the same, but the quantization errors of both operands change.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer, number
from jaxq._base.registry import Registry
from jaxq.ptq._solvers import output_error
from jaxq.ptq._statistics import Statistics

__all__ = [
    "AWQ",
    "INPUT_SCALERS",
    "InputProblem",
    "InputScaler",
    "SmoothQuant",
    "get_input_scaler",
]

_MIN_MAGNITUDE = 1e-4  # The lower bound of AWQ's mean magnitudes, relative to their mean.
_MIN_AMAX = 1e-5  # The lower bound of SmoothQuant's absolute maxima.


@dataclasses.dataclass(frozen=True)
class InputProblem:
    """The weights of all products that read one input, as matrices.

    Attributes:
      weights: the weights, each float32 `[matrices, inputs, outputs]`.
      statistics: the statistics of the input, with a leading axis `[matrices]`.
      quantized: a function that fake-quantizes weights of these shapes, each with its recipe.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> weights, statistics = [jnp.ones((1, 4, 2))], ptq.collect(jnp.ones((1, 3, 4)))
      >>> ptq.InputProblem(weights, statistics, quantized=list).weights[0].shape
      (1, 4, 2)
    """

    weights: Sequence[jax.Array]
    statistics: Statistics
    quantized: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]

    def loss(self, scales: jax.Array) -> jax.Array:
        """Returns `tr(E^T H E)` summed over the weights, where E is the error of a scaled weight.

        Args:
          scales: the scales, `[matrices, inputs]`.

        Returns:
          The losses, `[matrices]`.
        """
        hessian, factors = self.statistics.hessian, scales[..., None]
        assert hessian is not None, "methods that call this need one"
        total = jnp.zeros(scales.shape[:-1], jnp.float32)
        rounded = self.quantized([weight * factors for weight in self.weights])
        for weight, value in zip(self.weights, rounded, strict=True):
            total += jax.vmap(output_error)(value / factors - weight, hessian)
        return total


class InputScaler(Protocol):
    """A frozen record that chooses the scales of an input."""

    @property
    def needs_hessian(self) -> bool:
        """True if the statistics must have Hessians."""
        ...

    def scales(self, problem: InputProblem) -> jax.Array:
        """Returns positive scales, float32 `[matrices, inputs]`; traced under `jax.jit`."""
        ...


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    r"""Moves the outliers of an input into the weights that multiply it.

    The scale of input i is `max|x_i|^alpha / max|W_i|^(1 - alpha)`. The first maximum is over all
    tokens, the second over the outputs of all products that read the input. The method is meant for
    recipes that also quantize activations, such as `"w8a8"`. An input that is always 0 has scale 1.

    Attributes:
      alpha: the migration strength, between 0 and 1 (0.5 by default); larger values move more of
        the range into the weights, which helps activations with large outliers.

    Raises:
      ValueError: if `alpha` is not between 0 and 1.
      TypeError: if a field has another type.

    Example:
      >>> from jaxq import ptq
      >>> ptq.SmoothQuant() == ptq.get_input_scaler("smoothquant")
      True

    References:
      Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
      Language Models" (2023).
    """

    alpha: float = 0.5
    needs_hessian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        requirement = "a number from 0 to 1"
        number("SmoothQuant", "alpha", self.alpha, requirement, lambda a: 0 <= a <= 1, "Use 0.5.")

    def scales(self, problem: InputProblem) -> jax.Array:
        """Returns `max|x_i|^alpha / max|W_i|^(1 - alpha)`, float32 `[matrices, inputs]`."""
        amax = problem.statistics.amax
        of_weights = [jnp.max(jnp.abs(weight), axis=-1) for weight in problem.weights]
        largest = jnp.max(jnp.stack(of_weights), axis=0)
        inputs, weights = (lax.max(x, np.float32(_MIN_AMAX)) for x in (amax, largest))
        scales = inputs ** np.float32(self.alpha) / weights ** np.float32(1 - self.alpha)
        return jnp.where(amax > 0, scales, np.float32(1))


@dataclasses.dataclass(frozen=True)
class AWQ:
    r"""Scales weights up where their inputs are large, which reduces the rounding error there.

    The scale of input i is `m_i^r`, divided by the geometric mean of the largest and the smallest
    scale, where `m_i` is the mean of `|x_i|` over the tokens. The exponent r is chosen from
    `steps + 1` equally spaced numbers in [0, 1] such that rounding to nearest gives the smallest
    output error `tr(E^T H E)`, summed over all products that read the input. r = 0 changes nothing,
    so this loss never grows. The published method estimates the loss from a sample of tokens.

    Attributes:
      steps: the number of exponents besides 0, at least 1.

    Raises:
      ValueError: if `steps` is less than 1.
      TypeError: if a field has another type.

    Example:
      >>> from jaxq import ptq
      >>> ptq.AWQ(steps=10)
      AWQ(steps=10)

    References:
      Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
      (2024).
    """

    steps: int = 20
    needs_hessian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        integer("AWQ", "steps", self.steps, "Use 20.", least=1)

    def scales(self, problem: InputProblem) -> jax.Array:
        """Returns the scales with the smallest loss."""
        magnitude = problem.statistics.magnitude
        mean = jnp.mean(magnitude, axis=-1, keepdims=True)
        relative = jnp.where(mean > 0, magnitude / jnp.where(mean > 0, mean, 1), 1)
        relative = lax.max(relative, np.float32(_MIN_MAGNITUDE))

        def scales_for(exponent: jax.Array) -> jax.Array:
            scales = relative**exponent
            ends = jnp.max(scales, -1, keepdims=True) * jnp.min(scales, -1, keepdims=True)
            return scales / jnp.sqrt(ends)

        exponents = jnp.arange(self.steps + 1, dtype=jnp.float32) / np.float32(self.steps)
        losses = lax.map(lambda exponent: problem.loss(scales_for(exponent)), exponents)
        best = exponents[jnp.argmin(losses, axis=0)]
        return scales_for(best[:, None])


INPUT_SCALERS: Registry[Any] = Registry(
    "input scaler",
    {"smoothquant": SmoothQuant(), "awq": AWQ()},
    suggestions={"smooth": "smoothquant"},
)


def get_input_scaler(method: str | InputScaler) -> InputScaler:
    """Returns the input scaler with a name.

    Args:
      method: a name in `jaxq.ptq.INPUT_SCALERS`, or a record, which is returned unchanged.

    Returns:
      The record.

    Raises:
      ValueError: if no input scaler has that name. The message suggests similar names.
      TypeError: if the argument is neither a name nor an input scaler.

    Example:
      >>> from jaxq import ptq
      >>> ptq.get_input_scaler("awq") == ptq.AWQ()
      True
    """
    return INPUT_SCALERS.resolve(method, "method", "scales")
