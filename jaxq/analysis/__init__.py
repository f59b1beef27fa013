"""Analysis of number formats: tensor and tree errors, theory, bounds, memory, and plots.

`import jaxq` loads this package at the first use of `jaxq.analysis`. To add an error metric, add a
field to `Comparison` and its sum to `measure` (`_metrics.py`); to add a statistic of `monitor`,
list it in `STATISTICS` (`_monitoring.py`).
"""

from jaxq.analysis import distributions, machines, plots
from jaxq.analysis._arguments import (
    format_or_recipe,
    rounding_limits,
    significant_bits,
    spacing_exponent,
)
from jaxq.analysis._blame import BlameRow, blame
from jaxq.analysis._bounds import Clip, LloydMax, lloyd_max, optimal_clip, shannon_sqnr_db
from jaxq.analysis._chains import chain, chain_table
from jaxq.analysis._codes import CodeUsage, code_usage, ulp_error
from jaxq.analysis._diagnostics import Diagnostics, diagnostics
from jaxq.analysis._divergences import kl_of_logits, kl_of_values
from jaxq.analysis._live import LiveRow, LiveTable
from jaxq.analysis._logs import Log, LoggedRecipe, StatisticsLog, read_log
from jaxq.analysis._memory import Memory, fits_table, memory, memory_table
from jaxq.analysis._metrics import (
    Comparison,
    Energies,
    compare,
    measure,
    total,
)
from jaxq.analysis._monitoring import Monitoring, monitor
from jaxq.analysis._quantization import QuantizationError, quantization_error
from jaxq.analysis._sqnr import bounds_table, pareto, sqnr_table
from jaxq.analysis._steps import (
    GradientError,
    UpdateStatistics,
    gradient_errors,
    update_statistics,
)
from jaxq.analysis._theory import Expected, NoTheoryError, expected_error
from jaxq.analysis._trees import tree_errors
from jaxq.analysis.distributions import Gaussian, Laplace, StudentT, Uniform
from jaxq.analysis.machines import Device, Model

__all__ = [
    "BlameRow",
    "Clip",
    "CodeUsage",
    "Comparison",
    "Device",
    "Diagnostics",
    "Expected",
    "Gaussian",
    "GradientError",
    "Laplace",
    "LiveRow",
    "LiveTable",
    "LloydMax",
    "Log",
    "LoggedRecipe",
    "Memory",
    "Model",
    "Monitoring",
    "NoTheoryError",
    "QuantizationError",
    "StatisticsLog",
    "StudentT",
    "Uniform",
    "UpdateStatistics",
    "blame",
    "bounds_table",
    "chain",
    "chain_table",
    "code_usage",
    "compare",
    "diagnostics",
    "distributions",
    "expected_error",
    "fits_table",
    "gradient_errors",
    "kl_of_logits",
    "kl_of_values",
    "lloyd_max",
    "machines",
    "memory",
    "memory_table",
    "monitor",
    "optimal_clip",
    "plots",
    "quantization_error",
    "read_log",
    "shannon_sqnr_db",
    "sqnr_table",
    "tree_errors",
    "ulp_error",
    "update_statistics",
]
