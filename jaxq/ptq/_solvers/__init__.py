"""Solvers and searches, which choose the codes and the scales of one weight.

Everything here works on arrays; `_weight_quantization` applies it to the weights of a model. To add
a solver, list it in `SOLVERS` (`_catalog.py`).
"""

from jaxq.ptq._solvers._catalog import (
    GPTQ,
    OWQ,
    RTN,
    SOLVERS,
    Problem,
    Solution,
    Solver,
    check_recipe,
    check_search,
    get_solver,
    needs_drift,
    search_of,
)
from jaxq.ptq._solvers._gptq import gptq
from jaxq.ptq._solvers._gptq_algorithm import Settings, output_error
from jaxq.ptq._solvers._hqq import HQQ
from jaxq.ptq._solvers._importance_matrix import ImportanceMatrix
from jaxq.ptq._solvers._owq import owq, owq_leaf
from jaxq.ptq._solvers._scale_search import ScaleSearch
from jaxq.ptq._solvers._search_interface import (
    Blocks,
    Search,
    SearchOptions,
    SearchProblem,
    inputs_per_block,
    run_search,
)

__all__ = [
    "GPTQ",
    "HQQ",
    "OWQ",
    "RTN",
    "SOLVERS",
    "Blocks",
    "ImportanceMatrix",
    "Problem",
    "ScaleSearch",
    "Search",
    "SearchOptions",
    "SearchProblem",
    "Settings",
    "Solution",
    "Solver",
    "check_recipe",
    "check_search",
    "get_solver",
    "gptq",
    "inputs_per_block",
    "needs_drift",
    "output_error",
    "owq",
    "owq_leaf",
    "run_search",
    "search_of",
]
