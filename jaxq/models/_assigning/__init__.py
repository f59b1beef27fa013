"""Assignment of rules to the products of a function, and the stored form of its weights."""

from jaxq.models._assigning._assignments import (
    OPERANDS_OF_PRODUCT,
    Assigned,
    WeightToQuantize,
    assign,
    axes_of,
    prefix_errors,
    recipe_on_operand_axes,
    unassigned,
    weight_of,
)
from jaxq.models._assigning._experts import Experts, expert_axis
from jaxq.models._assigning._matching import first_match
from jaxq.models._assigning._observers import Observable, Observer
from jaxq.models._assigning._storage import Storage, Storages, storages, widest

__all__ = [
    "OPERANDS_OF_PRODUCT",
    "Assigned",
    "Experts",
    "Observable",
    "Observer",
    "Storage",
    "Storages",
    "WeightToQuantize",
    "assign",
    "axes_of",
    "expert_axis",
    "first_match",
    "prefix_errors",
    "recipe_on_operand_axes",
    "storages",
    "unassigned",
    "weight_of",
    "widest",
]
