"""Matrix products and convolutions with quantized operands and quantized gradients.

To add a named product recipe, add a line to `PRODUCT_RECIPES` (`_catalog.py`).
"""

from jaxq.products._accumulation import Accumulation
from jaxq.products._catalog import PRODUCT_RECIPES, get_product_recipe
from jaxq.products._contractions import (
    Axes,
    Contraction,
    of_conv,
    of_dot,
    of_einsum,
    of_ragged_dot,
    placed,
)
from jaxq.products._cotangents import grad_cast, with_transpose
from jaxq.products._dots import (
    conv_general_dilated,
    dot_general,
    einsum,
    ragged_dot,
    ragged_dot_general,
)
from jaxq.products._execution import Codes, DotOfCodes
from jaxq.products._hadamard import Hadamard
from jaxq.products._histories import History, can_delay, record
from jaxq.products._layouts import PassLayouts, Scaled, Tally
from jaxq.products._operation import Operation
from jaxq.products._plan import Pair
from jaxq.products._products import NO_SCALES, check, check_gradients, keys_of, product
from jaxq.products._recipe import (
    PerProduct,
    ProductRecipe,
    SingleProduct,
    is_stochastic,
    product_records,
)
from jaxq.products._rows import Probe, Row, array_layouts, layouts_of, record_array, record_row
from jaxq.products._stored import in_parts, stored_dot_general
from jaxq.products._tensors import Gradient, Operands, Results, Running, Tensor

__all__ = [
    "PRODUCT_RECIPES",
    "Accumulation",
    "Hadamard",
    "History",
    "ProductRecipe",
    "SingleProduct",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "get_product_recipe",
    "grad_cast",
    "is_stochastic",
    "ragged_dot",
    "ragged_dot_general",
    "stored_dot_general",
]
