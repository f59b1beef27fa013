"""Statistics of the inputs of products.

`_statistics` defines the sums, `_collectors` takes them from the products of a model, and
`_observe` does so for all products.
"""

from jaxq.ptq._statistics._collectors import Collector, MatrixLayout, shared_inputs
from jaxq.ptq._statistics._observe import ObservedInputs, Targets, find_targets, observe
from jaxq.ptq._statistics._statistics import Statistics, collect, empty_statistics

__all__ = [
    "Collector",
    "MatrixLayout",
    "ObservedInputs",
    "Statistics",
    "Targets",
    "collect",
    "empty_statistics",
    "find_targets",
    "observe",
    "shared_inputs",
]
