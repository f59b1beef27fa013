"""The choice of a recipe for each weight of a model under a budget of bytes (`budget`).

This is a multiple-choice knapsack problem: choose one recipe for each group of weights so that the
sum of damages is smallest. Groups are added one by one. After each group, only the partial choices
on the Pareto front of bytes and damage remain, so the result is optimal.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxq._base.arguments import choice, described, integer, names_of
from jaxq._base.registry import suggestion
from jaxq._base.tables import Table
from jaxq.models import Rule
from jaxq.ptq._budgets._sensitivity import Score, Scores
from jaxq.recipes import Recipe

__all__ = ["Budget", "FrontRow", "budget"]

_MAX_FRONT = 200_000  # Longer fronts are subsampled to this length.


@dataclasses.dataclass(frozen=True)
class FrontRow:
    """One point of the Pareto front: no other choice has both fewer bytes and less damage.

    Attributes:
      nbytes: the total bytes of all weights.
      damage: the sum of the damages of all weights.

    Example:
      >>> from jaxq import ptq
      >>> ptq.FrontRow(nbytes=150, damage=0.1)
      FrontRow(nbytes=150, damage=0.1)
    """

    nbytes: int
    damage: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """The recipes that `budget` chose. Prints as a table.

    Attributes:
      rules: one rule per weight, for `jaxq.ptq.quantize_weights`, `jaxq.quantize_weights` and
        `jaxq.quantize_fn`.
      nbytes: the total bytes of all weights with these recipes.
      damage: the sum of the damages of all weights.
      choices: the score of the chosen recipe for each weight.
      front: at most 200 points of the Pareto front over all budgets.
      is_exact: False if the front was too long and was subsampled, so that a slightly better choice
        may exist.

    Example:
      >>> from jaxq import ptq
      >>> scores = ptq.Scores((ptq.Score("w", None, nbytes=64, loss=0.0, relative=0.0),))
      >>> best = ptq.budget(scores, 100, by="loss")
      >>> best.nbytes, best.is_exact
      (64, True)
    """

    rules: tuple[Rule, ...]
    nbytes: int
    damage: float
    choices: tuple[Score, ...]
    front: Table
    is_exact: bool

    def __repr__(self) -> str:
        total = f"{self.nbytes} bytes, damage {self.damage:.6g}"
        return f"{Scores(self.choices)}\n{total}"


class _Option(NamedTuple):
    """A recipe for a group: its total bytes and damage, and the score of each weight."""

    nbytes: int
    damage: float
    scores: tuple[Score, ...]


class _Front(NamedTuple):
    """The Pareto front of choices for the groups so far, sorted by bytes, as arrays `[points]`.

    Attributes:
      nbytes: the total bytes.
      damage: the total damage.
      before: the index of the point on the previous front that each choice extends.
      option: the index of the option chosen for the last group.
    """

    nbytes: np.ndarray
    damage: np.ndarray
    before: np.ndarray
    option: np.ndarray


def budget(
    scores: Scores, nbytes: float, *, groups: Sequence[str] = (), by: str = "gradient"
) -> Budget:
    r"""Returns the recipes with the smallest total damage whose stored bytes fit a budget.

    Args:
      scores: the result of `jaxq.ptq.sensitivity`.
      nbytes: the largest allowed number of bytes for all scored weights and their scales.
      groups: regular expressions. Weights that match the same expression get the same recipe, such
        as `"/(?:q|k|v)$"`. If the expression has capture groups, only weights with equal captures
        form a group: `"(layers/\d+)/(?:q|k|v)$"` makes one group per layer.
      by: the field of `Score` that is used as the damage: `"gradient"` (the default), `"loss"` or
        `"relative"`. Gradient scores require a loss (see `sensitivity`). The others say little
        about the model: the best choices by `"relative"` were worse than one recipe for all weights
        in every transformer that we measured. `"loss"` compares the experts of one product.

    Returns:
      The best choice, optimal unless `is_exact` is False.

    Raises:
      TypeError: if `groups` is a string.
      ValueError: if no choice fits (the message states the smallest possible budget); a group has
        no common recipe; an expression is not valid or matches nothing; `by` is unknown; or a
        score is not finite.

    Example:
      >>> import jaxq
      >>> from jaxq import ptq
      >>> int8, int4 = jaxq.get_recipe("int8_channel"), jaxq.get_recipe("int4_channel")
      >>> scores = ptq.Scores((
      ...     ptq.Score("a", int8, 100, 0.0, 0.0), ptq.Score("a", int4, 50, 0.0, 0.1),
      ...     ptq.Score("b", int8, 100, 0.0, 0.0), ptq.Score("b", int4, 50, 0.0, 0.3)))
      >>> best = ptq.budget(scores, 160, by="relative")
      >>> [(row.weight, row.name) for row in best.choices], best.nbytes
      ([('a', 'int4_channel'), ('b', 'int8_channel')], 150)
    """
    remedy = "Use 'gradient' with scores of ptq.sensitivity(loss, ..., gradient=True), or 'loss'."
    choice("budget", "by", by, ("gradient", "loss", "relative"), remedy)
    if not isinstance(scores, Scores):
        raise TypeError(
            f"budget: `scores` must be the result of ptq.sensitivity(...)(params, batches), got "
            f"{described(scores)}. Call the function that ptq.sensitivity returns."
        )
    if not isinstance(nbytes, float | np.floating):
        nbytes = integer("budget", "nbytes", nbytes, "Pass a number of bytes, such as 4e9.")
    unknown = next((row for row in scores.rows if not math.isfinite(getattr(row, by))), None)
    if unknown is not None:
        is_missing = math.isnan(getattr(unknown, by))
        remedies = ["remove weights without such a score"]
        if by == "gradient" and is_missing:
            remedies[:0] = ["pass a loss and gradient=True to ptq.sensitivity"]
        if all(math.isfinite(row.loss) for row in scores.rows):
            remedies.append("use by='loss'")
        remedy = ", or ".join(remedies)
        raise ValueError(
            f"budget: `scores` must have finite numbers in {by!r}, got "
            f"{'NaN' if is_missing else 'an infinity'} for {unknown.weight!r}. "
            f"{remedy[0].upper()}{remedy[1:]}."
        )
    options = [_options(scores, members, by) for members in _members(scores, groups)]
    if not options:
        raise ValueError(
            "budget: `scores` must contain at least one weight, got none. Score other weights."
        )
    fronts, is_exact = _fronts(options)
    last = fronts[-1]
    fitting = int(np.searchsorted(last.nbytes, nbytes, side="right"))
    if math.isnan(nbytes) or not fitting:
        raise ValueError(
            f"budget: `nbytes` must be at least {int(last.nbytes[0])}, the size with the smallest "
            f"candidates, got {nbytes:g}. Add candidates with fewer bits."
        )
    at, choices = fitting - 1, []
    for front, candidates in zip(reversed(fronts), reversed(options), strict=True):
        choices[:0] = candidates[front.option[at]].scores
        at = front.before[at]
    order = {weight: i for i, weight in enumerate(scores.weights)}
    choices.sort(key=lambda score: order[score.weight])
    shown = np.unique(np.linspace(0, len(last.nbytes) - 1, 200).astype(int))
    rows = tuple(FrontRow(int(last.nbytes[i]), float(last.damage[i])) for i in shown)
    return Budget(
        rules=tuple(Rule(f"^{re.escape(score.weight)}$", score.recipe) for score in choices),
        nbytes=int(last.nbytes[fitting - 1]),
        damage=float(last.damage[fitting - 1]),
        choices=tuple(choices),
        front=Table(rows),
        is_exact=is_exact,
    )


def _members(scores: Scores, groups: Sequence[str]) -> list[list[str]]:
    """Returns the weights of each group; a weight that matches no expression is its own group."""
    names_of("budget", "groups", groups)
    for pattern in groups:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"budget: `groups` must be regular expressions, got {pattern!r:.80}: {error}. "
                "Escape special characters with a backslash."
            ) from error
    members: dict[object, list[str]] = {}
    used = set()
    for weight in scores.weights:
        key: object = weight
        for pattern in groups:
            match = re.search(pattern, weight)
            if match is not None:
                key = pattern, match.groups()
                used.add(pattern)
                break
        members.setdefault(key, []).append(weight)
    for pattern in groups:
        if pattern not in used:
            raise ValueError(
                f"budget: `groups` must match weights that no earlier group matches, got "
                f"{pattern!r}. {suggestion(pattern, scores.weights, most=3)}"
            )
    return [*members.values()]


def _options(scores: Scores, members: Sequence[str], by: str) -> list[_Option]:
    """Returns one option for each recipe that was scored for all weights of a group."""
    by_recipe: dict[Recipe | None, list[Score]] = {}
    for weight in members:
        for score in scores.of(weight):
            by_recipe.setdefault(score.recipe, []).append(score)
    options = [
        _Option(sum(s.nbytes for s in rows), sum(getattr(s, by) for s in rows), tuple(rows))
        for rows in by_recipe.values()
        if len(rows) == len(members)
    ]
    if not options:
        raise ValueError(
            "budget: the weights of a group must have a scored recipe in common, but "
            f"{', '.join(members[:4])} have none. Score the same candidates for all of them."
        )
    return options


def _fronts(options: Sequence[Sequence[_Option]]) -> tuple[list[_Front], bool]:
    """Returns the Pareto front after each group, and False if one was subsampled."""
    fronts, is_exact = [], True
    nbytes, damage = np.zeros(1, np.int64), np.zeros(1)
    for candidates in options:
        all_bytes = nbytes[:, None] + np.array([o.nbytes for o in candidates], np.int64)
        all_damage = damage[:, None] + np.array([o.damage for o in candidates])
        order = np.lexsort((all_damage.ravel(), all_bytes.ravel()))
        ordered = all_damage.ravel()[order]
        least = np.minimum.accumulate(ordered)
        better = np.concatenate([[True], ordered[1:] < least[:-1]])
        points = order[better]
        if len(points) > _MAX_FRONT:
            sample = np.linspace(0, len(points) - 1, _MAX_FRONT).astype(int)
            points, is_exact = points[sample], False
        nbytes, damage = all_bytes.ravel()[points], all_damage.ravel()[points]
        fronts.append(
            _Front(
                nbytes=nbytes,
                damage=damage,
                before=points // len(candidates),
                option=points % len(candidates),
            )
        )
    return fronts, is_exact
