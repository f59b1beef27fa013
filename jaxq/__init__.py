"""jaxq: low-precision number formats and quantizers for JAX, bit-exact and differentiable."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxq import (
    calibration,
    calibrators,
    catalog,
    dot_recipes,
    gguf,
    gradients,
    presets,
    qat,
    rounding,
)
from jaxq.accumulation import Accumulation
from jaxq.blocks import PerBlock, PerChannel, PerTensor, PerToken
from jaxq.casting import cast, encode
from jaxq.catalog import fixed_point, formats_table, get_format, p3109
from jaxq.chains import chain, chain_table
from jaxq.codecs import decode, pack, unpack
from jaxq.cotangents import grad_cast
from jaxq.dot_recipes import DotRecipe, ProductRecipe, get_dot_recipe
from jaxq.dots import conv_general_dilated, dot_general, einsum
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat
from jaxq.grids import BinaryGrid, float_grid, int_grid
from jaxq.hadamard import Hadamard
from jaxq.outliers import Outliers
from jaxq.presets import get_quantizer
from jaxq.quantized import Quantized, dequantize
from jaxq.quantizers import fake_quant, neighbours, quantize
from jaxq.recipes import Quantizer
from jaxq.rounding import HalfUp, Stochastic
from jaxq.second_level import DoubleScale, TensorScale
from jaxq.sharding import quantized_sharding
from jaxq.tables import Table
from jaxq.transforms import (
    Rule,
    delayed_scaling,
    explain,
    freeze,
    observe,
    quantize_fn,
    quantize_weights,
)
from jaxq.trees import dequantize_tree, quantize_tree, tree_report

if TYPE_CHECKING:
    from jaxq import optim

__version__ = "0.1.0"

__all__ = [
    "Accumulation",
    "BinaryGrid",
    "CodebookFormat",
    "DotRecipe",
    "DoubleScale",
    "FloatFormat",
    "Format",
    "Hadamard",
    "HalfUp",
    "IntFormat",
    "Outliers",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PerToken",
    "ProductRecipe",
    "Quantized",
    "Quantizer",
    "Rule",
    "Stochastic",
    "Table",
    "TaperedFormat",
    "TensorScale",
    "calibration",
    "calibrators",
    "cast",
    "catalog",
    "chain",
    "chain_table",
    "conv_general_dilated",
    "decode",
    "delayed_scaling",
    "dequantize",
    "dequantize_tree",
    "dot_general",
    "dot_recipes",
    "einsum",
    "encode",
    "explain",
    "fake_quant",
    "fixed_point",
    "float_grid",
    "formats_table",
    "freeze",
    "get_dot_recipe",
    "get_format",
    "get_quantizer",
    "gguf",
    "grad_cast",
    "gradients",
    "int_grid",
    "neighbours",
    "observe",
    "optim",
    "p3109",
    "pack",
    "presets",
    "qat",
    "quantize",
    "quantize_fn",
    "quantize_tree",
    "quantize_weights",
    "quantized_sharding",
    "rounding",
    "tree_report",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name == "optim":  # At its first use, as it imports optax.
        return importlib.import_module("jaxq.optim")
    raise AttributeError(f"module 'jaxq' has no attribute {name!r}")
