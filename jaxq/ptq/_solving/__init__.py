"""Quantization of the weights of a model by a solver.

`_quantize_weights` uses `_solver_run` for each product, that `_solve_weight` for the weight of one
product, and that `_solve_matrices` for its matrices.
"""

from jaxq.ptq._solving._quantize_weights import quantize_weights
from jaxq.ptq._solving._solver_run import SolverRun

__all__ = ["SolverRun", "quantize_weights"]
