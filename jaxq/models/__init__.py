"""Whole models: rules for parameter trees and for the products of any JAX function.

To add a condition to rules, add a field to `Rule` (`_rule.py`) and its test to `_matching.py`. To
quantize another primitive of JAX, add it to the tables in `_operations.py`.
"""

from jaxq.models._adapting import Adapted, LoRA, can_adapt_ragged
from jaxq.models._assigning import Assigned, WeightToQuantize, axes_of, unassigned, weight_of
from jaxq.models._delaying import delayed_scaling
from jaxq.models._experts import expert_axis
from jaxq.models._functions import quantize_fn, quantize_weights
from jaxq.models._monitored import Monitored
from jaxq.models._monitoring import make_monitored, make_switched, switch
from jaxq.models._observing import Observed, freeze, observe
from jaxq.models._operations import LEFT_ALONE, LOOK_UP, QUANTIZED, contraction_of
from jaxq.models._planning import Planned, plan
from jaxq.models._programs import ProductInputs, Program, build_program
from jaxq.models._reading import Node, Product
from jaxq.models._reports import ProductRow, explain
from jaxq.models._rule import Rule, check_pattern
from jaxq.models._rules import (
    LeafRules,
    Rules,
    as_rules,
    leaf_rules,
    pairs,
    rules_from_json,
    rules_to_json,
)
from jaxq.models._running import run_program
from jaxq.models._states import Delayed, Frozen, Switched, refuse_states
from jaxq.models._stored_views import StoredView, as_array
from jaxq.models._storing import Storage
from jaxq.models._trees import (
    assign,
    dequantize_tree,
    not_floating,
    prefix_leaf_errors,
    quantize_tree,
    tree_report,
)
from jaxq.models._views import CONVERSIONS, VIEWS

__all__ = [
    "Adapted",
    "Delayed",
    "Frozen",
    "LoRA",
    "Monitored",
    "Observed",
    "ProductRow",
    "Rule",
    "Rules",
    "Switched",
    "delayed_scaling",
    "dequantize_tree",
    "explain",
    "freeze",
    "observe",
    "quantize_fn",
    "quantize_tree",
    "quantize_weights",
    "rules_from_json",
    "rules_to_json",
    "switch",
    "tree_report",
]
