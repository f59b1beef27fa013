"""Learned rounding of the weights of a model, block by block.

To add a method, list it in `ROUNDING_METHODS` (`_methods.py`).
"""

from jaxq.ptq._rounding._learn_rounding import learn_rounding
from jaxq.ptq._rounding._methods import (
    ROUNDING_METHODS,
    AdaRound,
    Rounded,
    RoundingMethod,
    RoundingProblem,
    SignRound,
    get_rounding_method,
)

__all__ = [
    "ROUNDING_METHODS",
    "AdaRound",
    "Rounded",
    "RoundingMethod",
    "RoundingProblem",
    "SignRound",
    "get_rounding_method",
    "learn_rounding",
]
