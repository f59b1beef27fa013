"""The choice of recipes: the expected damage of each, and the best choice under a budget."""

from jaxq.ptq._budgets._budget import Budget, FrontRow, budget
from jaxq.ptq._budgets._sensitivity import Score, Scores, sensitivity

__all__ = ["Budget", "FrontRow", "Score", "Scores", "budget", "sensitivity"]
