"""The expected damage of candidate recipes to the weights of a model."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxq._base.tables import Table, Tabular
from jaxq.models import Rule
from jaxq.ptq._calls import read_calls
from jaxq.ptq._gradients import by_gradient
from jaxq.ptq._models import stages_of
from jaxq.ptq._solvers import Solver, get_solver
from jaxq.ptq._solving import Solving
from jaxq.recipes import RECIPES, Recipe, get_recipe

__all__ = ["Score", "Scores", "sensitivity"]

_OWNER = "ptq.sensitivity"


@dataclasses.dataclass(frozen=True)
class Score:
    """The expected damage of one recipe to one weight.

    Attributes:
      weight: the path of the weight.
      recipe: the recipe, or None for the float weight.
      nbytes: the bytes of the stored weight, with its scales.
      loss: the squared error of the outputs of its products, `tr(E^T H E)`, summed over all tokens.
        The experts of a stack have their own errors; any other product of several weights, such as
        joined queries and keys, gives each an equal share.
      relative: the same relative to the power of the outputs, summed over the products and layers.
      gradient: the sum of `(G dY)^2` over all outputs of its products, with dY their error and G
        the gradient of the loss with respect to them, in equal shares; NaN if it was not asked for.
      tokens: the number of tokens that its products multiplied by it, in all layers. An expert that
        saw no token has no loss, whatever its recipe.
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
        """The recipe's name; that of its element format if it has none."""
        if self.recipe is None:
            return "float"
        return RECIPES.name_of(self.recipe) or self.recipe.element.name


@dataclasses.dataclass(frozen=True)
class _Line:
    weight: str
    recipe: str
    nbytes: int
    loss: float
    relative: float
    gradient: float
    tokens: int | None


@dataclasses.dataclass(frozen=True, repr=False)
class Scores(Tabular):
    """The scores of all weights and candidates; its `str` is a table.

    Attributes:
      rows: the scores, by weight and then by candidate.
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
    inputs, `tr(E^T H E)`, if it alone is quantized. One run over the data serves all candidates.

    With `gradient`, errors count by their effect on a loss: the score is also `sum (G dY)^2`, with
    dY the error of the outputs of a product and G the gradient of the loss with respect to them,
    summed over all outputs and batches. This approximates the Hessian of the loss by squared
    gradients (the diagonal Fisher information), and costs one backward pass per batch.

    Args:
      fn: as in `jaxq.ptq.quantize_weights`.
      candidates: recipes or their names; None stands for the float weight.
      weights: a regular expression, searched for in the paths of weights; "" takes all.
      solver: the solver that chooses the codes: `"rtn"` (the default) rounds to the nearest levels;
        `"gptq"` gives the losses that remain after GPTQ, in more time.
      gradient: True to compute the score by gradients too; `fn` must then return a scalar loss.
        These scores are those of the nearest levels, whatever the solver.
      mask: as in `jaxq.ptq.quantize_weights`.

    Returns:
      `(params, batches) -> Scores`, with the arguments of `jaxq.ptq.quantize_weights`. Weights that
      are not stored, or only looked up, have no score.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.ptq.quantize_weights`; if there are no candidates; or if `gradient` is
        True and `fn` returns anything but a scalar.

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
    recipes = [None if candidate is None else get_recipe(candidate) for candidate in candidates]
    record = get_solver(solver)
    if not any(recipes):
        raise ValueError(
            f"{_OWNER}: `candidates` must hold at least one recipe, got {list(candidates)}. Pass, "
            "for example, ['int8_channel', 'int4_g128']."
        )

    def scored(*args: Any) -> Scores:
        calls = read_calls(_OWNER, fn, mask, args)
        states, found, data = None, [], []
        for recipe in filter(None, recipes):
            model = calls.plan([Rule(weights, recipe)])
            solving = Solving(_OWNER, model, record)
            stages = stages_of(calls, model, solving.leaves, solving.solve)
            root = stages.root()
            if states is None:
                invars = root.flat.body.invars
                envs = calls.environments(model, invars)
                data = [[env.get(v) for v in invars] for env in envs] if gradient else []
                states = stages.observed(root, envs)
            stages.together(root, states)
            found.append((recipe, solving))
        gradients = by_gradient(_OWNER, [own.planned for _, own in found], data) if gradient else {}
        return Scores(tuple(_rows(found, None in recipes, gradients)))

    return scored


def _rows(
    found: Sequence[tuple[Recipe, Solving]], floats: bool, gradients: Mapping[int, np.ndarray]
) -> list[Score]:
    """Returns the scores of all weights, by weight.

    Args:
      found: the recipes with the solved weights.
      floats: True to add the scores of float weights.
      gradients: the scores by gradients of each leaf, one per recipe; empty if not asked for.
    """
    rows = []
    _, first = found[0]
    for leaf, array in enumerate(first.planned.traced.arrays):
        nans = np.full(len(found), math.nan)
        own = [
            (recipe, solving, [o for o in solving.outcomes if leaf in o.leaves], float(score))
            for (recipe, solving), score in zip(found, gradients.get(leaf, nans), strict=True)
        ]
        own = [one for one in own if one[2]]
        if not own:
            continue
        path = next(iter(_paths(first, leaf)))
        for recipe, solving, outcomes, score in own:
            storage = solving.planned.stored.leaves[leaf]
            stack, shape = array.shape[: storage.leading], array.shape[storage.leading :]
            rows.append(
                Score(
                    weight=path,
                    recipe=recipe,
                    nbytes=math.prod(stack) * storage.recipe.nbytes(shape),
                    loss=sum(o.leaves[leaf].loss for o in outcomes),
                    relative=sum(o.relative(o.leaves[leaf].loss) for o in outcomes),
                    gradient=score,
                    tokens=sum(o.leaves[leaf].tokens for o in outcomes),
                )
            )
        if floats:
            tokens = rows[-1].tokens
            none = Score(path, None, array.nbytes, 0.0, 0.0, 0.0 if gradients else math.nan, tokens)
            rows.append(none)
    return rows


def _paths(solving: Solving, leaf: int) -> list[str]:
    origin = solving.planned.traced.origins[leaf]
    return [] if origin is None else [*origin.paths]
