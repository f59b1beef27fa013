"""Analysis of a function without running it: its products, and the weights that these multiply.

`_tracing` traces the function, and `_products` finds its products. `_operations` lists the
primitives that count as products, and `_origins` and `_views` follow parameters to them.
"""

from jaxq.models._reading._marks import MARK, Mark
from jaxq.models._reading._operations import (
    LEFT_ALONE,
    LOOK_UP,
    OPERATIONS,
    QUANTIZED,
    contraction_of,
    operation_of,
)
from jaxq.models._reading._origins import Digit, Origin, Piece
from jaxq.models._reading._products import Node, Product, flops, read, table_axes
from jaxq.models._reading._tracing import Traced, trace
from jaxq.models._reading._unreached import find_unreached
from jaxq.models._reading._views import CONVERSIONS, JOINS, VIEWS

__all__ = [
    "CONVERSIONS",
    "JOINS",
    "LEFT_ALONE",
    "LOOK_UP",
    "MARK",
    "OPERATIONS",
    "QUANTIZED",
    "VIEWS",
    "Digit",
    "Mark",
    "Node",
    "Origin",
    "Piece",
    "Product",
    "Traced",
    "contraction_of",
    "find_unreached",
    "flops",
    "operation_of",
    "read",
    "table_axes",
    "trace",
]
