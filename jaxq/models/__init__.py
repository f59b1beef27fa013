"""Whole models: rules for parameter trees and for the products of any JAX function.

To add a condition to rules, add a field to `Rule` (`_rules/_rule.py`) and its test to
`_assigning/_matching.py`. To quantize another primitive of JAX, add it to the tables in
`_reading/_operations.py`.
"""

from jaxq.models._assigning import (
    Assigned,
    Storage,
    WeightToQuantize,
    axes_of,
    expert_axis,
    unassigned,
    weight_of,
)
from jaxq.models._reading import (
    CONVERSIONS,
    LEFT_ALONE,
    LOOK_UP,
    QUANTIZED,
    VIEWS,
    Node,
    Product,
    contraction_of,
)
from jaxq.models._rules import (
    Adapted,
    Delayed,
    Frozen,
    LeafRules,
    LoRA,
    Monitored,
    Rule,
    Rules,
    Switched,
    as_rules,
    can_adapt_ragged,
    check_pattern,
    leaf_rules,
    pairs,
    refuse_states,
    rules_from_json,
    rules_to_json,
)
from jaxq.models._running import (
    ProductInputs,
    Program,
    StoredView,
    as_array,
    build_program,
    run_program,
)
from jaxq.models._transforms import (
    ModelPlan,
    Observed,
    ProductRow,
    delayed_scaling,
    explain,
    freeze,
    make_monitored,
    make_switched,
    observe,
    plan,
    quantize_fn,
    quantize_weights,
    switch,
)
from jaxq.models._trees import (
    assign,
    dequantize_tree,
    not_floating,
    prefix_leaf_errors,
    quantize_tree,
    tree_report,
)

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
