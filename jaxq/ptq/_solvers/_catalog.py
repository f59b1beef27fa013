"""Solvers, which choose the codes of a weight from the statistics of its input.

A solver does not change scales. The recipe or a search computes them in the recipe's format, so the
result is a `jaxq.Quantized` on the recipe's grid.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import choice, described, number
from jaxq._base.registry import Registry
from jaxq.products import is_stochastic
from jaxq.ptq._solvers._gptq_algorithm import Settings, Solution, solve
from jaxq.ptq._solvers._hqq import HQQ
from jaxq.ptq._solvers._owq import check_owq_order
from jaxq.ptq._solvers._search_interface import Search
from jaxq.ptq._statistics import Statistics
from jaxq.quantizers import Levels
from jaxq.recipes import Recipe

__all__ = [
    "GPTQ",
    "OWQ",
    "RTN",
    "SOLVERS",
    "Problem",
    "Solution",
    "Solver",
    "check_recipe",
    "check_search",
    "get_solver",
    "needs_drift",
    "search_of",
]


class Problem(NamedTuple):
    """A weight to quantize, as a matrix `[inputs, outputs]`.

    Attributes:
      weight: the weight, float32.
      levels: the levels of its elements; see `jaxq.quantizers.snap`.
      nearest: the grid values nearest to the weight, minus the zero points.
      statistics: the statistics of its input.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> from jaxq.quantizers import Levels
      >>> weight, step = jnp.array([[0.4, 1.1]]), jnp.array([[0.5, 0.5]])
      >>> levels, tokens = Levels(step, None, None), ptq.collect(jnp.ones((4, 1)))
      >>> problem = ptq.Problem(weight, levels, jnp.array([[1.0, 2.0]]), tokens)
      >>> (problem.nearest * problem.levels.step).tolist()  # The nearest representable values.
      [[0.5, 1.0]]
    """

    weight: jax.Array
    levels: Levels
    nearest: jax.Array
    statistics: Statistics


class Solver(Protocol):
    """A frozen, hashable dataclass that chooses the codes of a weight.

    Pass an instance as `solver=`. It is a static argument of jitted functions. Two more attributes
    are optional: `search`, a `Search` that chooses the scales first, and `needs_drift`, True to
    receive statistics with the drift of inputs where it is known.
    """

    def solve(self, problem: Problem, recipe: Recipe) -> Solution:
        """Returns grid values for one matrix; traced under `jax.jit` and `jax.vmap`.

        Args:
          problem: the weight, its levels and the statistics of its inputs.
          recipe: the recipe of the weight.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RTN:
    """Rounds every element to the nearest level: the baseline, which needs no calibration data.

    Attributes:
      search: a search for the scales before rounding, which may use the statistics of the input;
        None (the default) keeps the recipe's scales.

    Example:
      >>> import jaxq
      >>> from jaxq import ptq
      >>> ptq.RTN() == ptq.get_solver("rtn")
      True
    """

    search: Search | None = None

    def __post_init__(self) -> None:
        _check_search("RTN", self.search)

    def solve(self, problem: Problem, recipe: Recipe) -> Solution:
        """Returns the nearest grid values."""
        del recipe
        return Solution(problem.nearest, jnp.float32(np.nan), jnp.bool_(True))


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Rounds the inputs of a weight one by one, so that each corrects the errors of earlier ones.

    With the Hessian `H = sum x x^T` of the calibration data and the error E of the weight
    `[inputs, outputs]`, the chosen codes make the output error `tr(E^T H E)` small. Scales are
    computed before and do not change (static groups). Every recipe with deterministic rounding is
    supported, and the stored form does not depend on `order`. Outliers of the recipe keep their
    values, and the other weights of their inputs are solved.

    Attributes:
      damping: the number added to the diagonal of H, relative to the diagonal's mean. If the damped
        H has no Cholesky factor, the damping is multiplied by 10, up to six times.
      order: `"static"` (the default) solves the inputs with the largest diagonal entries of H
        first, known as activation order. `"group"` solves the groups in the order of their largest
        entries, and the inputs of each group in activation order, known as group-aware order (GAR).
        A group consists of the inputs in a block of the recipe, or of all inputs if blocks do not
        divide them. None solves the inputs in the order of the weight.
      search: a search for the scales before the codes are solved; None (the default) keeps the
        recipe's scales.
      asymmetry: the factor of GPTAQ's correction, 0.25 in the paper. It aims at the outputs of the
        float model, although packed weights before the product change its input. 0 (the default)
        aims at the outputs of the float weight on the changed input.
      propagation: the factor of QEP's correction, 0.5 in the paper, which has the same aim. Before
        rounding, the weight moves by this fraction toward the least-squares solution. 0 by default.

    Raises:
      ValueError: if `damping` or a factor is negative, both factors are positive, or `order` is
        unknown.
      TypeError: if a field has another type.

    Example:
      >>> from jaxq import ptq
      >>> ptq.GPTQ(damping=0.05).order
      'static'

    References:
      Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
      Transformers" (2023). Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With
      Guarantees" (2023), for the form without an inverse (LDLQ). Li et al., "GPTAQ: Efficient
      Finetuning-Free Quantization for Asymmetric Calibration" (2025). Arai and Ichikawa,
      "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization" (2025).
    """

    damping: float = 0.01
    order: str | None = "static"
    search: Search | None = None
    asymmetry: float = 0.0
    propagation: float = 0.0

    def __post_init__(self) -> None:
        remedies = {
            "damping": "Use 0.01",
            "asymmetry": "Use 0 (off), or 0.25 for GPTAQ",
            "propagation": "Use 0 (off), or 0.5 for QEP",
        }
        for name, remedy in remedies.items():
            value, requirement = getattr(self, name), "a number of at least 0"
            number("GPTQ", name, value, requirement, lambda v: v >= 0, f"{remedy}.")
        if self.asymmetry and self.propagation:
            raise ValueError(
                "GPTQ: `asymmetry` and `propagation` must not both be positive, because they "
                f"correct the same error, got {self.asymmetry} and {self.propagation}. Use one."
            )
        _check_search("GPTQ", self.search)
        remedy = "Use 'static' for activation order with static groups."
        choice("GPTQ", "order", self.order, ("static", "group", None), remedy)

    @property
    def needs_drift(self) -> bool:
        """True if the statistics must have a drift, which only sequential solving measures."""
        return bool(self.asymmetry or self.propagation)

    def solve(self, problem: Problem, recipe: Recipe) -> Solution:
        """Returns grid values with a small output error."""
        weight, levels, _, statistics = problem
        assert statistics.hessian is not None, "all callers pass one"
        settings = Settings(self.damping, self.order, self.asymmetry, self.propagation)
        hessian, drift = statistics.hessian, statistics.drift
        solution = solve(weight, levels, hessian, drift, recipe, settings)
        return solution._replace(
            grid_values=jnp.where(solution.solved, solution.grid_values, problem.nearest)
        )


@dataclasses.dataclass(frozen=True)
class OWQ:
    """Stores the most sensitive inputs of each weight as outliers, and solves the others by GPTQ.

    The recipe must have `outliers` without `sigma`. As many inputs are stored as outliers as fit
    into their number. The scales are computed without these inputs, and their values are adjusted
    to the errors of the others. `ptq.owq` does the same for one weight.

    GPTQ with the outliers of the recipe is used instead for weights with batch axes, weights of
    convolutions, weights that consist of several leaves, and recipes with too few outliers for one
    input. The report notes these products.

    Attributes:
      damping: as in `GPTQ`.
      order: `"static"` or None, as in `GPTQ`. A group order is not supported, because the rounded
        inputs of a group are not contiguous.

    Raises:
      ValueError: if `damping` is negative or `order` is unknown.
      TypeError: if a field has another type.

    Example:
      >>> import jaxq
      >>> from jaxq import ptq
      >>> recipe = jaxq.Recipe("int3", jaxq.PerBlock(64), outliers=jaxq.Outliers(0.01))
      >>> model = lambda params, x: x @ params["kernel"]
      >>> quantize = ptq.quantize_weights(model, recipe, solver=ptq.OWQ())

    References:
      Lee et al., "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of
      Large Language Models" (2024).
    """

    damping: float = 0.01
    order: str | None = "static"

    def __post_init__(self) -> None:
        requirement = "a number of at least 0"
        number("OWQ", "damping", self.damping, requirement, lambda d: d >= 0, "Use 0.01.")
        check_owq_order("OWQ", self.order)

    def solve(self, problem: Problem, recipe: Recipe) -> Solution:
        """Returns the grid values of GPTQ, for weights that do not store inputs as outliers."""
        return GPTQ(self.damping, self.order).solve(problem, recipe)


def _check_search(owner: str, search: Search | None) -> None:
    if search is not None and (isinstance(search, type) or not hasattr(search, "leaves")):
        raise TypeError(
            f"{owner}: `search` must be a record such as ptq.ScaleSearch() or None, got "
            f"{described(search)}. Use None to keep the scales of the recipe."
        )


SOLVERS: Registry[Any] = Registry(
    "solver",
    {
        "rtn": RTN(),
        "gptq": GPTQ(),
        "gptaq": GPTQ(asymmetry=0.25),
        "qep": GPTQ(propagation=0.5),
        "hqq": RTN(HQQ()),
        "owq": OWQ(),
    },
    suggestions={
        "round": "rtn",
        "nearest": "rtn",
        "optq": "gptq",
        "ldlq": "gptq",
        "gptqv2": "gptaq",
    },
)


def get_solver(solver: str | Solver) -> Solver:
    """Returns the solver with a name.

    Args:
      solver: a name in `jaxq.ptq.SOLVERS`, or a record, which is returned unchanged.

    Returns:
      The record.

    Raises:
      ValueError: if no solver has that name. The message suggests similar names.
      TypeError: if the argument is neither a name nor a solver.

    Example:
      >>> from jaxq import ptq
      >>> ptq.get_solver("rtn")
      RTN(search=None)
    """
    return SOLVERS.resolve(solver, "solver", "solve")


def search_of(solver: Solver) -> Search | None:
    """Returns the scale search of a solver, or None."""
    return getattr(solver, "search", None)


def needs_drift(solver: Solver) -> bool:
    """Returns whether a solver needs the drift of inputs."""
    return getattr(solver, "needs_drift", False)


def check_search(owner: str, recipe: Recipe, solver: Solver) -> None:
    """Raises a ValueError if a solver's search cannot choose the scales of a recipe."""
    search = search_of(solver)
    if search is not None:
        search.check(owner, recipe)


def check_recipe(owner: str, recipe: Recipe) -> None:
    """Raises a ValueError if solvers cannot choose the codes of a recipe."""
    if is_stochastic(recipe):
        raise ValueError(
            f"{owner}: `recipe` must round deterministically, got a recipe of "
            f"{recipe.element.name} that rounds stochastically. Use rounding='nearest_even', or "
            "jaxq.quantize_weights."
        )
