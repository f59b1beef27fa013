"""Low-rank adapters (LoRA) of quantized weights: initialization, training and merging.

To add a method of initialization, write a frozen dataclass with the methods of `Method` and list it
in `METHODS` (`_methods.py`).
"""

from jaxq.lora._matrices import Factors, low_rank
from jaxq.lora._methods import METHODS, EoRA, LoftQ, Method, PiSSA, QLoRA, get_method
from jaxq.lora._models import adapt, merge
from jaxq.lora._results import AdaptedModel, Merged, MergeError
from jaxq.models import Adapted, LoRA

__all__ = [
    "METHODS",
    "Adapted",
    "AdaptedModel",
    "EoRA",
    "Factors",
    "LoRA",
    "LoftQ",
    "MergeError",
    "Merged",
    "Method",
    "PiSSA",
    "QLoRA",
    "adapt",
    "get_method",
    "low_rank",
    "merge",
]
