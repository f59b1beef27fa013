"""Quantization of the weights of a model by a solver.

For each product, `_quantize_weights` calls `_solver_run`, which solves the product's weight
(`_solve_weight`) matrix by matrix (`_solve_matrices`).
"""

from jaxq.ptq._weight_quantization._quantize_weights import quantize_weights
from jaxq.ptq._weight_quantization._solver_run import SolverRun

__all__ = ["SolverRun", "quantize_weights"]
