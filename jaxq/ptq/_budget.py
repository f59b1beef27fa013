"""The best recipes for the weights of a model under a budget of bytes.

A multiple-choice knapsack: one recipe for every group of weights, with the least sum of damages.
Groups are added one by one, and of all partial choices only those are kept that no other one beats
in both bytes and damage (the Pareto front), so the result is optimal.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxq._base.tables import Table
from jaxq.models import Rule
from jaxq.ptq._sensitivity import Score, Scores
from jaxq.recipes import Recipe

__all__ = ["Budget", "FrontRow", "budget"]

_MOST = 200_000  # Longer fronts are thinned out.


@dataclasses.dataclass(frozen=True)
class FrontRow:
    """One point of the Pareto front: no choice has both fewer bytes and less damage.

    Attributes:
      nbytes: the bytes of all weights.
      damage: the sum of their damages.
    """

    nbytes: int
    damage: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """The recipes that `budget` chose; its `str` is a table.

    Attributes:
      rules: rules for `jaxq.ptq.quantize_weights`, `jaxq.quantize_weights` and `jaxq.quantize_fn`,
        one per weight.
      nbytes: the bytes of all weights with these recipes.
      damage: the sum of their damages.
      choices: the chosen scores.
      front: the Pareto front over all budgets, at most 200 points of it.
      is_exact: False if the front was too long and was thinned out, so that slightly better choices
        may exist.
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
    """A recipe for a group, with its bytes, its damage, and the scores of its weights."""

    nbytes: int
    damage: float
    scores: tuple[Score, ...]


class _Front(NamedTuple):
    """Partial choices, by increasing bytes.

    Attributes:
      nbytes: the bytes of each.
      damage: the damage of each.
      before: the index of the partial choice of the groups before.
      option: the index of the option of the last group.
    """

    nbytes: np.ndarray
    damage: np.ndarray
    before: np.ndarray
    option: np.ndarray


def budget(
    scores: Scores, nbytes: float, *, groups: Sequence[str] = (), by: str = "relative"
) -> Budget:
    r"""Returns the recipes with the least sum of damages whose stored bytes fit a budget.

    Args:
      scores: the scores of `jaxq.ptq.sensitivity`.
      nbytes: the largest number of bytes of all scored weights together, with their scales.
      groups: regular expressions; weights that match the same one share a recipe, such as
        `"/(q|k|v)$"`. If an expression has capture groups, only weights with equal captures share:
        `"(layers/\d+)/(?:q|k|v)$"`.
      by: the damage that is summed: `"relative"`, `"loss"` or `"gradient"` of a `Score`. Scores by
        gradients need a loss (see `sensitivity`) and gave much better language models.

    Returns:
      The best choice, optimal unless `is_exact` is False.

    Raises:
      ValueError: if no choice fits, with the least possible bytes; a group has no common recipe; an
        expression matches nothing; or `by` is unknown.

    Example:
      >>> import jaxq
      >>> from jaxq import ptq
      >>> int8, int4 = jaxq.get_recipe("int8_channel"), jaxq.get_recipe("int4_channel")
      >>> scores = ptq.Scores((
      ...     ptq.Score("a", int8, 100, 0.0, 0.0), ptq.Score("a", int4, 50, 0.0, 0.1),
      ...     ptq.Score("b", int8, 100, 0.0, 0.0), ptq.Score("b", int4, 50, 0.0, 0.3)))
      >>> best = ptq.budget(scores, 160)
      >>> [(row.weight, row.name) for row in best.choices], best.nbytes
      ([('a', 'int4_channel'), ('b', 'int8_channel')], 150)
    """
    if by not in ("relative", "loss", "gradient"):
        raise ValueError(f"budget: `by` must be 'relative', 'loss' or 'gradient', got {by!r}.")
    if any(math.isnan(getattr(score, by)) for score in scores.rows):
        raise ValueError(
            f"budget: `scores` must have numbers in {by!r}, got NaN. Pass gradient=True to "
            "ptq.sensitivity, and leave out weights without such a score."
        )
    options = [_options(scores, members, by) for members in _members(scores, groups)]
    if not options:
        raise ValueError("budget: `scores` must hold at least one weight, got none.")
    fronts, is_exact = _fronts(options)
    last = fronts[-1]
    fitting = int(np.searchsorted(last.nbytes, nbytes, side="right"))
    if not fitting:
        raise ValueError(
            f"budget: `nbytes` must be at least {int(last.nbytes[0])}, which the smallest "
            f"candidates need, got {nbytes:g}. Add candidates with fewer bits."
        )
    at, choices = fitting - 1, []
    for front, own in zip(reversed(fronts), reversed(options), strict=True):
        choices[:0] = own[front.option[at]].scores
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
    """Returns the weights of each group; a weight in none is a group by itself."""
    found: dict[object, list[str]] = {}
    used = set()
    for weight in scores.weights:
        key: object = weight
        for pattern in groups:
            match = re.search(pattern, weight)
            if match is not None:
                key = pattern, match.groups()
                used.add(pattern)
                break
        found.setdefault(key, []).append(weight)
    for pattern in groups:
        if pattern not in used:
            raise ValueError(
                f"budget: `groups` must match weights, got {pattern!r}, which matches none that "
                f"an earlier group leaves. Weights are {', '.join(scores.weights[:4])}."
            )
    return [*found.values()]


def _options(scores: Scores, members: Sequence[str], by: str) -> list[_Option]:
    """Returns the recipes that all weights of a group have scores for."""
    by_recipe: dict[Recipe | None, list[Score]] = {}
    for weight in members:
        for score in scores.of(weight):
            by_recipe.setdefault(score.recipe, []).append(score)
    options = [
        _Option(sum(s.nbytes for s in own), sum(getattr(s, by) for s in own), tuple(own))
        for own in by_recipe.values()
        if len(own) == len(members)
    ]
    if not options:
        raise ValueError(f"budget: `groups` must have a common recipe, but {members} have none.")
    return options


def _fronts(options: Sequence[Sequence[_Option]]) -> tuple[list[_Front], bool]:
    """Returns the Pareto fronts after each group, and False if one was thinned out."""
    fronts, is_exact = [], True
    nbytes, damage = np.zeros(1, np.int64), np.zeros(1)
    for own in options:
        all_bytes = nbytes[:, None] + np.array([o.nbytes for o in own], np.int64)
        all_damage = damage[:, None] + np.array([o.damage for o in own])
        order = np.lexsort((all_damage.ravel(), all_bytes.ravel()))
        ordered = all_damage.ravel()[order]
        least = np.minimum.accumulate(ordered)
        better = np.concatenate([[True], ordered[1:] < least[:-1]])
        kept = order[better]
        if len(kept) > _MOST:
            kept, is_exact = kept[np.linspace(0, len(kept) - 1, _MOST).astype(int)], False
        nbytes, damage = all_bytes.ravel()[kept], all_damage.ravel()[kept]
        fronts.append(_Front(nbytes, damage, kept // len(own), kept % len(own)))
    return fronts, is_exact
