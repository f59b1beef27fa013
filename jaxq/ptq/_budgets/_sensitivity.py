"""Sensitivity analysis: the expected damage of candidate recipes to each weight of a model."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxq._base.arguments import items_of
from jaxq._base.tables import Table, Tabular
from jaxq.models import Rule
from jaxq.ptq._budgets._gradient_scores import gradient_scores
from jaxq.ptq._calibration_runs import model_runner, read_calls
from jaxq.ptq._solvers import Solver, get_solver
from jaxq.ptq._weight_quantization import SolverRun
from jaxq.recipes import RECIPES, Recipe, get_recipe

__all__ = ["Score", "Scores", "sensitivity"]

_OWNER = "ptq.sensitivity"


@dataclasses.dataclass(frozen=True)
class Score:
    """The expected damage of one recipe to one weight.

    Attributes:
      weight: the path of the weight.
      recipe: the recipe, or None for the float weight.
      nbytes: the bytes of the stored weight and its scales.
      loss: the squared error of the outputs of its products, `tr(E^T H E)`, summed over all tokens.
        If a product concatenates several weights, such as queries and keys, they have equal shares
        of its loss; the experts of a stack have their own losses.
      relative: the same loss relative to the power of the outputs, summed over products and layers.
      gradient: the sum of `(G dY)^2` over all outputs of its products, with their error dY and the
        gradient G of the loss with respect to them; NaN if it was not computed. Concatenated
        weights have equal shares. Outputs of masked tokens do not count.
      tokens: the number of tokens multiplied by the weight, in all layers. An expert that received
        no tokens has a loss of 0 with every recipe.

    Example:
      >>> import jaxq
      >>> from jaxq import ptq
      >>> recipe = jaxq.get_recipe("int4_channel")
      >>> ptq.Score("w", recipe, nbytes=48, loss=2.0, relative=0.01).name
      'int4_channel'
    """

    weight: str
    recipe: Recipe | None
    nbytes: int
    loss: float
    relative: float
    gradient: float = math.nan
    tokens: int | None = None

    @property
    def name(self) -> str:
        """The name of the recipe, or of its element format if the recipe has no name."""
        if self.recipe is None:
            return "float"
        return RECIPES.name_of(self.recipe) or self.recipe.element.name


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the printed table."""

    weight: str
    recipe: str
    nbytes: int
    loss: float
    relative: float
    gradient: float
    tokens: int | None


@dataclasses.dataclass(frozen=True, repr=False)
class Scores(Tabular):
    """The scores of all weights and candidates. Prints as a table.

    Attributes:
      rows: the scores, ordered by weight and then by candidate.

    Example:
      >>> from jaxq import ptq
      >>> scores = ptq.Scores((ptq.Score("w", None, nbytes=64, loss=0.0, relative=0.0),))
      >>> scores.weights, scores.of("w")[0].nbytes
      (('w',), 64)
    """

    rows: tuple[Score, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The paths of the weights."""
        return tuple(dict.fromkeys(row.weight for row in self.rows))

    def of(self, weight: str) -> tuple[Score, ...]:
        """Returns the scores of one weight."""
        return tuple(row for row in self.rows if row.weight == weight)

    def _table(self) -> Table:
        lines = [
            _Line(r.weight, r.name, r.nbytes, r.loss, r.relative, r.gradient, r.tokens)
            for r in self.rows
        ]
        return Table(tuple(lines))


def sensitivity(
    fn: Callable[..., Any],
    candidates: Sequence[str | Recipe | None],
    *,
    weights: str = "",
    solver: str | Solver = "rtn",
    gradient: bool = False,
    mask: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns a function that scores candidate recipes for every weight of a model.

    The score of a weight is the squared error of the outputs of its products on the float model's
    inputs, `tr(E^T H E)`, if only this weight is quantized. One run over the data is enough for all
    candidates.

    This score compares the recipes of one weight. It does not say how much the outputs of different
    products matter for the model, so a budget over several weights needs more. With
    `gradient=True`, weights also have the score `sum (G dY)^2`, which measures the effect on a
    loss: dY is the error of a product's outputs, and G is the gradient of the loss with respect to
    them. The sum is over all outputs and batches. It approximates the Hessian of the loss by
    squared gradients (the diagonal of the empirical Fisher information), and costs one backward
    pass per batch. The cross-entropy with labels sampled from the model's own predictions needs no
    labels in the data, and its score estimates twice the divergence from the float model.

    Layers that are stacked for a scan are one weight with one recipe. Pass the parameters of layers
    as a list, and the model as a loop, to score each layer.

    Args:
      fn: as in `jaxq.ptq.quantize_weights`.
      candidates: recipes or their names; None stands for the float weight.
      weights: a regular expression that is searched for in the paths of weights; "" (the default)
        matches all.
      solver: the solver that chooses the codes: `"rtn"` (the default) rounds to the nearest levels;
        `"gptq"` scores the losses that remain after GPTQ, and takes longer.
      gradient: True to compute gradient scores too; `fn` must then return a scalar loss. Gradient
        scores always measure rounding to nearest, whatever the solver.
      mask: as in `jaxq.ptq.quantize_weights`.

    Returns:
      A function `(params, batches) -> Scores`, with the arguments of `jaxq.ptq.quantize_weights`.
      Weights that are not stored, or only looked up, have no score.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.ptq.quantize_weights`; if there are no candidates; or if `gradient` is
        True and `fn` does not return a scalar, or a gradient score is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq import ptq
      >>> model = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (8, 16)),
      ...           "down": jax.random.normal(keys[1], (16, 4))}
      >>> batches = [jax.random.normal(keys[2], (32, 8))]
      >>> scores = ptq.sensitivity(model, ["int8_channel", "int4_channel"])(params, batches)
      >>> [(row.weight, row.name, row.nbytes) for row in scores.rows[:2]]
      [('down', 'int8_channel', 80), ('down', 'int4_channel', 48)]
      >>> scores.rows[0].relative < scores.rows[1].relative
      True
    """
    candidates = items_of(_OWNER, "candidates", candidates)
    recipes = [None if candidate is None else get_recipe(candidate) for candidate in candidates]
    record = get_solver(solver)
    if not any(recipes):
        raise ValueError(
            f"{_OWNER}: `candidates` must contain at least one recipe, got {list(candidates)}. "
            "Pass, for example, ['int8_channel', 'int4_g128']."
        )

    def scored(*args: Any) -> Scores:
        calls = read_calls(_OWNER, fn, mask, args)
        states, solved, data = None, [], []
        for recipe in filter(None, recipes):
            model = calls.plan([Rule(weights, recipe)])
            solving = SolverRun(_OWNER, model, record)
            runner = model_runner(calls, model, solving.leaves, solving.solve)
            root = runner.root()
            if states is None:
                invars = root.flat.body.invars
                envs = calls.environments(model, invars)
                data = [[env.get(v) for v in invars] for env in envs] if gradient else []
                states = runner.observe_all(root, envs)
            runner.solve_together(root, states)
            solved.append((recipe, solving))
        plans = [solving.planned for _, solving in solved]
        gradients = gradient_scores(_OWNER, plans, data, calls.masks) if gradient else {}
        return Scores(tuple(_rows(solved, None in recipes, gradients)))

    return scored


def _rows(
    solved: Sequence[tuple[Recipe, SolverRun]], floats: bool, gradients: Mapping[int, np.ndarray]
) -> list[Score]:
    """Returns the scores of all weights, by weight.

    Args:
      solved: the recipes with the weights that were solved with them.
      floats: True to add the scores of float weights.
      gradients: the gradient scores of each leaf, one per recipe; empty if not computed.
    """
    rows: list[Score] = []
    _, first = solved[0]
    for leaf, array in enumerate(first.planned.traced.arrays):
        nans = np.full(len(solved), math.nan)
        pairs = zip(solved, gradients.get(leaf, nans), strict=True)
        scores = [_score(leaf, *run, float(gradient)) for run, gradient in pairs]
        present = [score for score in scores if score is not None]
        rows += present
        if floats and present:
            rows.append(
                Score(
                    weight=present[-1].weight,
                    recipe=None,
                    nbytes=array.nbytes,
                    loss=0.0,
                    relative=0.0,
                    gradient=0.0 if gradients else math.nan,
                    tokens=present[-1].tokens,
                )
            )
    return rows


def _score(leaf: int, recipe: Recipe, solving: SolverRun, gradient: float) -> Score | None:
    """Returns the score of a leaf with one recipe, or None if no product was solved with it."""
    outcomes = [outcome for outcome in solving.outcomes if leaf in outcome.leaf_losses]
    if not outcomes:
        return None
    traced, storage = solving.planned.traced, solving.planned.stored.leaves[leaf]
    origin, shape = traced.origins[leaf], traced.arrays[leaf].shape
    assert origin is not None, "only parameters are solved"
    stack, shape = shape[: storage.leading], shape[storage.leading :]
    return Score(
        weight=next(iter(origin.paths)),
        recipe=recipe,
        nbytes=math.prod(stack) * storage.recipe.nbytes(shape),
        loss=sum(o.leaf_losses[leaf].loss for o in outcomes),
        relative=sum(o.relative(o.leaf_losses[leaf].loss) for o in outcomes),
        gradient=gradient,
        tokens=sum(o.leaf_losses[leaf].tokens for o in outcomes),
    )
