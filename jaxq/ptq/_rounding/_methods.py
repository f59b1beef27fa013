"""Methods that learn the rounding of weights by gradients: SignRound and AdaRound."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import flags, integer, number
from jaxq._base.registry import Registry
from jaxq._jax.arithmetic import rounded
from jaxq.qat import adaround_init, adaround_penalty, rectified_sigmoid
from jaxq.quantizers import (
    Levels,
    Quantized,
    enclosing_grid_values,
    ends_of,
    levels,
    per_element,
    rescaled,
    snap,
)
from jaxq.recipes import Recipe, in_units

__all__ = [
    "ROUNDING_METHODS",
    "AdaRound",
    "Rounded",
    "RoundingMethod",
    "RoundingProblem",
    "SignRound",
    "get_rounding_method",
]


class RoundingProblem(NamedTuple):
    """A leaf whose rounding is learned.

    Attributes:
      weight: the values that its products multiply, float32, in the shape of the leaf.
      start: the leaf quantized to the nearest levels.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> weight = jnp.array([[0.4, 1.0], [0.4, -0.3]])
      >>> ptq.RoundingProblem(weight, jaxq.quantize(weight, jaxq.Recipe("int2"))).start.shape
      (2, 2)
    """

    weight: jax.Array
    start: Quantized


class Rounded(NamedTuple):
    """A choice of levels for a leaf.

    Attributes:
      start: the leaf with the chosen scales; its codes are ignored.
      grid_values: the chosen grid values minus the zero points.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> start = jaxq.quantize(jnp.array([[0.4, 1.0], [0.4, -0.3]]), jaxq.Recipe("int2"))
      >>> ptq.Rounded(start, grid_values=jnp.ones((2, 2))).grid_values.shape
      (2, 2)
    """

    start: Quantized
    grid_values: jax.Array


class RoundingMethod(Protocol):
    """A frozen record that learns the rounding of weights by gradients.

    All methods are traced by JAX. The trained variables of a leaf are any pytree of arrays.
    """

    @property
    def steps(self) -> int:
        """The number of steps for each block, at least 1."""
        ...

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer of the variables."""
        ...

    def variables(self, problem: RoundingProblem, recipe: Recipe) -> Any:
        """Returns the initial variables of a leaf."""
        ...

    def soft(self, variables: Any, problem: RoundingProblem, recipe: Recipe) -> jax.Array:
        """Returns the values of a leaf in a training step, differentiable in the variables."""
        ...

    def rounded(self, variables: Any, problem: RoundingProblem, recipe: Recipe) -> Rounded:
        """Returns the levels that the variables select."""
        ...

    def clipped(self, variables: Any) -> Any:
        """Returns variables within their bounds, after a step."""
        ...

    def penalty(self, variables: Any, step: jax.Array) -> jax.Array:
        """Returns the term that a leaf adds to the loss of a step."""
        ...


@dataclasses.dataclass(frozen=True)
class SignRound:
    r"""Learns rounding offsets by signed gradient descent, as AutoRound does.

    A weight w with the scale s becomes `s round(w / s + v)` with a learned v in [-1/2, 1/2], so it
    is rounded to one of the two adjacent levels. On nonuniform grids, v is relative to the distance
    of these two levels. With `scales=True` each block also learns a factor in [0, 1] for its scale,
    which is rounded to the recipe's scale format; zero points and minima do not change. Gradients
    are straight-through, and each step changes a variable by the learning rate, which decays
    linearly to 0.

    Attributes:
      steps: the number of steps, each on one batch.
      learning_rate: the initial learning rate; None (the default) means `1 / steps`.
      scales: True (the default) to learn the factors of the scales.

    Raises:
      ValueError: if `steps` or `learning_rate` is not positive.
      TypeError: if a field has another type.

    Example:
      >>> from jaxq import ptq
      >>> ptq.SignRound() == ptq.get_rounding_method("signround")
      True

    References:
      Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
      LLMs" (2024).
    """

    steps: int = 200
    learning_rate: float | None = None
    scales: bool = True

    def __post_init__(self) -> None:
        flags("SignRound", "Omit it to use the default.", scales=self.scales)
        _check_steps("SignRound", self.steps, 1.0 if self.learning_rate is None else self._rate)

    @property
    def _rate(self) -> float:
        return 1 / self.steps if self.learning_rate is None else self.learning_rate

    def optimizer(self) -> optax.GradientTransformation:
        """Returns signed gradient descent with a linearly decaying learning rate."""
        return optax.sign_sgd(optax.linear_schedule(self._rate, 0.0, self.steps))

    def variables(self, problem: RoundingProblem, recipe: Recipe) -> dict[str, jax.Array]:
        """Returns offsets of 0 and factors of 1."""
        variables = {"offset": jnp.zeros_like(problem.weight)}
        if self.scales and recipe.scaling.second_level != "blocks":
            variables["factor"] = jnp.ones(problem.start.scale.shape, jnp.float32)
        return variables

    def soft(
        self, variables: dict[str, jax.Array], problem: RoundingProblem, recipe: Recipe
    ) -> jax.Array:
        """Returns the rounded values, with a straight-through gradient."""
        start, grid_values, gap = self._choice(variables, problem, recipe)
        step, zero_point, minimum, _ = levels(start)
        if "factor" in variables:
            factor = per_element(problem.start, variables["factor"])
            step = step * factor / lax.stop_gradient(_nonzero(factor))
        low = np.float32(0) if minimum is None else minimum
        units = (problem.weight - low) / _nonzero(step) + variables["offset"] * gap
        # The gradient passes where the rounded value is on the grid without clipping.
        lowest, highest = ends_of(zero_point, recipe)
        inside = (units >= lowest - gap / 2) & (units <= highest + gap / 2)
        units = jnp.where(inside, units, lax.stop_gradient(grid_values))
        return (units + lax.stop_gradient(grid_values - units)) * step + low

    def rounded(
        self, variables: dict[str, jax.Array], problem: RoundingProblem, recipe: Recipe
    ) -> Rounded:
        """Returns the nearest levels of the weights plus their offsets."""
        start, grid_values, _ = self._choice(variables, problem, recipe)
        return Rounded(start, grid_values)

    def clipped(self, variables: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns offsets in [-1/2, 1/2] and factors in [0, 1]."""
        bounds = {"offset": (-0.5, 0.5), "factor": (0.0, 1.0)}
        return {name: jnp.clip(x, *bounds[name]) for name, x in variables.items()}

    def penalty(self, variables: dict[str, jax.Array], step: jax.Array) -> jax.Array:
        """Returns 0."""
        del variables, step
        return jnp.zeros(())

    def _choice(
        self, variables: dict[str, jax.Array], problem: RoundingProblem, recipe: Recipe
    ) -> tuple[Quantized, jax.Array, jax.Array]:
        """Returns the rescaled leaf, the chosen grid values, and the gaps between the levels."""
        variables = lax.stop_gradient(variables)
        start = problem.start
        if "factor" in variables:
            start = rescaled(start, variables["factor"])
        grid, below, above = _adjacent_levels(problem.weight, start, recipe)
        gap = above - below
        shifted = problem.weight + rounded(variables["offset"] * gap * grid.step)
        chosen = snap(shifted, grid, recipe)[0]
        # On nonuniform grids, the level after these two may be nearer than half their distance.
        chosen = jnp.where(chosen < below, below, jnp.where(chosen > above, above, chosen))
        return start, chosen, gap


@dataclasses.dataclass(frozen=True)
class AdaRound:
    r"""Learns for each weight whether it is rounded up or down, as AdaRound does.

    A weight is interpolated between its two adjacent levels with the fraction
    `h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)`, which initially reproduces the float weight. A
    penalty `weight mean(1 - |2 h - 1|^beta)` for each leaf then drives h to 0 or 1. It starts after
    the fraction `warm_up` of the steps, and beta falls linearly from 20 to 2. Scales do not change.
    The published objective adds 0.01 times a sum to an absolute error, so its balance depends on
    the size of the weights and outputs; here both terms are relative.

    Attributes:
      steps: the number of Adam steps, each on one batch. The paper uses 10,000.
      learning_rate: the learning rate. The paper's code uses 1e-3; fewer steps need a larger one.
      weight: the weight of the penalty, relative to the squared error divided by the power of the
        outputs.
      warm_up: the fraction of the steps without the penalty, in [0, 1).

    Raises:
      ValueError: if a number is out of range.
      TypeError: if a field has another type.

    Example:
      >>> from jaxq import ptq
      >>> ptq.AdaRound(steps=500).weight
      10.0

    References:
      Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020).
    """

    steps: int = 1000
    learning_rate: float = 1e-2
    weight: float = 10.0
    warm_up: float = 0.2

    def __post_init__(self) -> None:
        _check_steps("AdaRound", self.steps, self.learning_rate)
        requirement = "a number in [0, 1)"
        number("AdaRound", "warm_up", self.warm_up, requirement, lambda v: 0 <= v < 1, "Use 0.2.")
        requirement = "a number of at least 0"
        number("AdaRound", "weight", self.weight, requirement, lambda v: v >= 0, "Use 10.0.")

    def optimizer(self) -> optax.GradientTransformation:
        """Returns Adam."""
        return optax.adam(self.learning_rate)

    def variables(self, problem: RoundingProblem, recipe: Recipe) -> jax.Array:
        """Returns the variables with which `soft` reproduces the float weights."""
        grid, below, above = _adjacent_levels(problem.weight, problem.start, recipe)
        weight = problem.weight if grid.minimum is None else problem.weight - grid.minimum
        return adaround_init(in_units(weight, grid.step, recipe.scale_format), below, above)

    def soft(self, variables: jax.Array, problem: RoundingProblem, recipe: Recipe) -> jax.Array:
        """Returns the values interpolated between the two levels adjacent to each weight."""
        grid, below, above = _adjacent_levels(problem.weight, problem.start, recipe)
        y = (below + (above - below) * rectified_sigmoid(variables)) * grid.step
        return y if grid.minimum is None else y + grid.minimum

    def rounded(self, variables: jax.Array, problem: RoundingProblem, recipe: Recipe) -> Rounded:
        """Returns the upper level where the variable is not negative, else the lower one."""
        _, below, above = _adjacent_levels(problem.weight, problem.start, recipe)
        return Rounded(problem.start, jnp.where(variables >= 0, above, below))

    def clipped(self, variables: jax.Array) -> jax.Array:
        """Returns the variables."""
        return variables

    def penalty(self, variables: jax.Array, step: jax.Array) -> jax.Array:
        """Returns the weighted penalty, 0 in the warm-up."""
        first = self.warm_up * self.steps
        remaining = jnp.clip((self.steps - step) / (self.steps - first), 0, 1)
        term = adaround_penalty(variables, 2 + 18 * remaining) * (self.weight / variables.size)
        return jnp.where(step < first, 0, term)


def _check_steps(owner: str, steps: int, learning_rate: float) -> None:
    remedy, requirement = "Omit it to use the default.", "a positive number"
    integer(owner, "steps", steps, remedy, least=1)
    number(owner, "learning_rate", learning_rate, requirement, lambda v: v > 0, remedy)


def _adjacent_levels(
    weight: jax.Array, start: Quantized, recipe: Recipe
) -> tuple[Levels, jax.Array, jax.Array]:
    """Returns the levels of a leaf and the grid values below and above each weight."""
    grid = levels(start)
    return grid, *enclosing_grid_values(weight, grid, recipe)


def _nonzero(x: jax.Array) -> jax.Array:
    """Replaces zeros by 1, for use as a divisor."""
    return jnp.where(x == 0, 1, x)


ROUNDING_METHODS: Registry[Any] = Registry(
    "rounding method",
    {"signround": SignRound(), "adaround": AdaRound()},
    suggestions={"autoround": "signround", "auto_round": "signround"},
)


def get_rounding_method(method: str | RoundingMethod) -> RoundingMethod:
    """Returns the rounding method with a name.

    Args:
      method: a name in `jaxq.ptq.ROUNDING_METHODS`, or a record, which is returned unchanged.

    Returns:
      The record.

    Raises:
      ValueError: if no rounding method has that name. The message suggests similar names.
      TypeError: if the argument is neither a name nor a rounding method.

    Example:
      >>> from jaxq import ptq
      >>> ptq.get_rounding_method("adaround") == ptq.AdaRound()
      True
    """
    return ROUNDING_METHODS.resolve(method, "method", "soft")
