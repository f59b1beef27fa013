"""Runs of a model on its calibration batches, part by part and product by product.

`_runner` runs the model. The other modules divide its program into parts that are compiled once,
and follow each weight from the leaves to its product.
"""

from jaxq.ptq._calibration_runs._calibration_calls import Calls, Model, read_calls, without_weight
from jaxq.ptq._calibration_runs._leaves import LeafKey, Leaves, replace_parameters
from jaxq.ptq._calibration_runs._parts import BatchRun, Occurrence
from jaxq.ptq._calibration_runs._runner import model_runner
from jaxq.ptq._calibration_runs._signatures import signature, without_names
from jaxq.ptq._calibration_runs._stacked_weights import leaf_shares, levels_for, matrices_by_recipe
from jaxq.ptq._calibration_runs._weight_views import WeightView, trace_weight

__all__ = [
    "BatchRun",
    "Calls",
    "LeafKey",
    "Leaves",
    "Model",
    "Occurrence",
    "WeightView",
    "leaf_shares",
    "levels_for",
    "matrices_by_recipe",
    "model_runner",
    "read_calls",
    "replace_parameters",
    "signature",
    "trace_weight",
    "without_names",
    "without_weight",
]
