"""Transforms of functions, which the package exports, and the plan that all of them start from."""

from jaxq.models._transforms._calibration import Observed, freeze, observe
from jaxq.models._transforms._delayed_scaling import delayed_scaling
from jaxq.models._transforms._explain import ProductRow, explain
from jaxq.models._transforms._initial_states import make_monitored, make_switched, switch
from jaxq.models._transforms._planning import ModelPlan, plan
from jaxq.models._transforms._quantize import quantize_fn, quantize_weights

__all__ = [
    "ModelPlan",
    "Observed",
    "ProductRow",
    "delayed_scaling",
    "explain",
    "freeze",
    "make_monitored",
    "make_switched",
    "observe",
    "plan",
    "quantize_fn",
    "quantize_weights",
    "switch",
]
