"""jaxq: low-precision number formats and quantizers for JAX, bit-exact and differentiable."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxq import formats, gradients, interop, models, numerics, products, qat, quantizers, recipes
from jaxq._base.tables import Table
from jaxq._jax.serialization import LAZY
from jaxq.formats import (
    CodebookFormat,
    FloatFormat,
    Format,
    IntFormat,
    TaperedFormat,
    formats_table,
    get_format,
)
from jaxq.interop import load, save
from jaxq.models import (
    Rule,
    delayed_scaling,
    dequantize_tree,
    explain,
    freeze,
    observe,
    quantize_fn,
    quantize_tree,
    quantize_weights,
    tree_report,
)
from jaxq.numerics import (
    Stochastic,
    cast,
    decode,
    encode,
    float_grid,
    int_grid,
)
from jaxq.products import (
    Accumulation,
    Hadamard,
    ProductRecipe,
    SingleProduct,
    conv_general_dilated,
    dot_general,
    einsum,
    get_product_recipe,
    grad_cast,
    ragged_dot,
)
from jaxq.quantizers import (
    Quantized,
    calibration,
    dequantize,
    fake_quant,
    neighbors,
    quantize,
    quantized_sharding,
)
from jaxq.recipes import (
    MX,
    Affine,
    DoubleQuant,
    Outliers,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    Recipe,
    Symmetric,
    TwoLevel,
    get_recipe,
)

if TYPE_CHECKING:
    from jaxq import analysis, lora, optim, ptq, serving

__version__ = "0.1.0"

__all__ = [
    "MX",
    "Accumulation",
    "Affine",
    "CodebookFormat",
    "DoubleQuant",
    "FloatFormat",
    "Format",
    "Hadamard",
    "IntFormat",
    "Outliers",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PerToken",
    "ProductRecipe",
    "Quantized",
    "Recipe",
    "Rule",
    "SingleProduct",
    "Stochastic",
    "Symmetric",
    "Table",
    "TaperedFormat",
    "TwoLevel",
    "analysis",
    "calibration",
    "cast",
    "conv_general_dilated",
    "decode",
    "delayed_scaling",
    "dequantize",
    "dequantize_tree",
    "dot_general",
    "einsum",
    "encode",
    "explain",
    "fake_quant",
    "float_grid",
    "formats",
    "formats_table",
    "freeze",
    "get_format",
    "get_product_recipe",
    "get_recipe",
    "grad_cast",
    "gradients",
    "int_grid",
    "interop",
    "load",
    "lora",
    "models",
    "neighbors",
    "numerics",
    "observe",
    "optim",
    "products",
    "ptq",
    "qat",
    "quantize",
    "quantize_fn",
    "quantize_tree",
    "quantize_weights",
    "quantized_sharding",
    "quantizers",
    "ragged_dot",
    "recipes",
    "save",
    "serving",
    "tree_report",
]


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return importlib.import_module(f"jaxq.{name}")
    raise AttributeError(f"module 'jaxq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
