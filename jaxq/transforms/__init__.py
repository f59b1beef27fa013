"""Models as functions: any JAX function with its products quantized by rules."""

from jaxq.histories import History
from jaxq.transforms.delaying import delayed_scaling
from jaxq.transforms.functions import quantize_fn, quantize_weights
from jaxq.transforms.observing import Observed, freeze, observe
from jaxq.transforms.reports import ProductRow, explain
from jaxq.transforms.rules import Delayed, Frozen, Rule, Rules

__all__ = [
    "Delayed",
    "Frozen",
    "History",
    "Observed",
    "ProductRow",
    "Rule",
    "Rules",
    "delayed_scaling",
    "explain",
    "freeze",
    "observe",
    "quantize_fn",
    "quantize_weights",
]
