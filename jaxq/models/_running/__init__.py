"""Evaluation of a function whose products have recipes.

`_interpreter` runs the program equation by equation, and `_multiply` computes one product.
"""

from jaxq.models._running._interpreter import run_program
from jaxq.models._running._programs import ProductInputs, ProductState, Program, build_program
from jaxq.models._running._stored_views import StoredView, as_array

__all__ = [
    "ProductInputs",
    "ProductState",
    "Program",
    "StoredView",
    "as_array",
    "build_program",
    "run_program",
]
