"""Gradient estimators, which define the derivative of rounding to a grid.

To add one, write a function or a frozen record in `_estimators.py` and list it in `ESTIMATORS`.
"""

from jaxq.gradients._attaching import GivenScales, Snap, attach, passed, wants_neighbors
from jaxq.gradients._estimators import (
    DSQ,
    ESTIMATORS,
    LSQ,
    PACT,
    Gradient,
    TrustRegion,
    get_gradient,
)

__all__ = ["DSQ", "ESTIMATORS", "LSQ", "PACT", "GivenScales", "Snap", "TrustRegion", "get_gradient"]
