"""Rules for products and leaves: their records, the forms in which they are given, and states.

A state is a pytree of rules and arrays, such as static scales, that can be passed as rules.
"""

from jaxq.models._rules._adapters import Adapted, LoRA, adapter_product, can_adapt_ragged
from jaxq.models._rules._forms import (
    LeafRules,
    PlainRules,
    Rules,
    as_rules,
    describe_recipe,
    hidden_message,
    leaf_rules,
    pairs,
    rules_from_json,
    rules_to_json,
    unmatched_message,
)
from jaxq.models._rules._monitored import Monitored
from jaxq.models._rules._rule import Rule, check_pattern
from jaxq.models._rules._states import Delayed, Frozen, Switch, Switched, refuse_states

__all__ = [
    "Adapted",
    "Delayed",
    "Frozen",
    "LeafRules",
    "LoRA",
    "Monitored",
    "PlainRules",
    "Rule",
    "Rules",
    "Switch",
    "Switched",
    "adapter_product",
    "as_rules",
    "can_adapt_ragged",
    "check_pattern",
    "describe_recipe",
    "hidden_message",
    "leaf_rules",
    "pairs",
    "refuse_states",
    "rules_from_json",
    "rules_to_json",
    "unmatched_message",
]
