"""Post-training quantization: calibration statistics, solvers, sensitivity and byte budgets.

A solver is a frozen, hashable dataclass with the method of `Solver`; pass an instance as `solver=`.
To add one to jaxq, also list it in `SOLVERS` (`_solvers.py`). The contract tests then include it.
"""

from jaxq.ptq._budget import Budget, FrontRow, budget
from jaxq.ptq._correct_biases import BiasChange, BiasReport, correct_biases
from jaxq.ptq._fold_rotation import Norm, fold_rotation, random_rotation
from jaxq.ptq._gptq import gptq
from jaxq.ptq._hqq import HQQ
from jaxq.ptq._importance_matrix import ImportanceMatrix
from jaxq.ptq._input_scalers import (
    AWQ,
    INPUT_SCALERS,
    InputProblem,
    InputScaler,
    SmoothQuant,
    get_input_scaler,
)
from jaxq.ptq._learn_rounding import learn_rounding
from jaxq.ptq._observe import ObservedInputs, observe
from jaxq.ptq._owq import owq
from jaxq.ptq._quantize_weights import quantize_weights
from jaxq.ptq._reports import LearnedBlock, Report, RoundingReport, SolvedProduct
from jaxq.ptq._rotate_inputs import InputRotations, rotate_inputs
from jaxq.ptq._rounding_methods import (
    ROUNDING_METHODS,
    AdaRound,
    Rounded,
    RoundingMethod,
    RoundingProblem,
    SignRound,
    get_rounding_method,
)
from jaxq.ptq._scale_inputs import scale_inputs
from jaxq.ptq._scale_search import ScaleSearch
from jaxq.ptq._scaled_functions import InputScales
from jaxq.ptq._search import Blocks, Search, SearchOptions, SearchProblem
from jaxq.ptq._sensitivity import Score, Scores, sensitivity
from jaxq.ptq._solvers import GPTQ, OWQ, RTN, SOLVERS, Problem, Solution, Solver, get_solver
from jaxq.ptq._statistics import Statistics, collect

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "INPUT_SCALERS",
    "OWQ",
    "ROUNDING_METHODS",
    "RTN",
    "SOLVERS",
    "AdaRound",
    "BiasChange",
    "BiasReport",
    "Blocks",
    "Budget",
    "FrontRow",
    "ImportanceMatrix",
    "InputProblem",
    "InputRotations",
    "InputScaler",
    "InputScales",
    "LearnedBlock",
    "Norm",
    "ObservedInputs",
    "Problem",
    "Report",
    "Rounded",
    "RoundingMethod",
    "RoundingProblem",
    "RoundingReport",
    "ScaleSearch",
    "Score",
    "Scores",
    "Search",
    "SearchOptions",
    "SearchProblem",
    "SignRound",
    "SmoothQuant",
    "Solution",
    "SolvedProduct",
    "Solver",
    "Statistics",
    "budget",
    "collect",
    "correct_biases",
    "fold_rotation",
    "get_input_scaler",
    "get_rounding_method",
    "get_solver",
    "gptq",
    "learn_rounding",
    "observe",
    "owq",
    "quantize_weights",
    "random_rotation",
    "rotate_inputs",
    "scale_inputs",
    "sensitivity",
]
