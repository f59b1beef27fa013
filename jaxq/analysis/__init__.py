"""Seeing what number formats do: errors of tensors and trees, theory, bounds, memory, pictures.

`from jaxq import analysis`: importing jaxq does not import this.
"""

from jaxq.analysis import distributions, machines, plots
from jaxq.analysis.bounds import Clip, LloydMax, lloyd_max, optimal_clip, shannon_sqnr_db
from jaxq.analysis.codes import CodeUsage, code_usage, ulp_error
from jaxq.analysis.diagnostics import Diagnostics, diagnostics
from jaxq.analysis.distributions import Gaussian, Laplace, StudentT, Uniform
from jaxq.analysis.machines import Device, Model
from jaxq.analysis.memory import Memory, fits_table, memory, memory_table
from jaxq.analysis.metrics import Comparison, compare, kl_of_logits, kl_of_values
from jaxq.analysis.quantization import QuantizationError, quantization_error
from jaxq.analysis.sqnr import bounds_table, sqnr_table
from jaxq.analysis.theory import Expected, NoTheoryError, expected_error
from jaxq.analysis.trees import tree_errors

__all__ = [
    "Clip",
    "CodeUsage",
    "Comparison",
    "Device",
    "Diagnostics",
    "Expected",
    "Gaussian",
    "Laplace",
    "LloydMax",
    "Memory",
    "Model",
    "NoTheoryError",
    "QuantizationError",
    "StudentT",
    "Uniform",
    "bounds_table",
    "code_usage",
    "compare",
    "diagnostics",
    "distributions",
    "expected_error",
    "fits_table",
    "kl_of_logits",
    "kl_of_values",
    "lloyd_max",
    "machines",
    "memory",
    "memory_table",
    "optimal_clip",
    "plots",
    "quantization_error",
    "shannon_sqnr_db",
    "sqnr_table",
    "tree_errors",
    "ulp_error",
]
