"""jaxq: low-precision number formats and quantizers for JAX, bit-exact and differentiable."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxq import calibration, calibrators, catalog, gguf, gradients, presets, rounding
from jaxq.blocks import PerBlock, PerChannel, PerTensor, PerToken
from jaxq.casting import cast, encode
from jaxq.catalog import fixed_point, formats_table, get_format, p3109
from jaxq.chains import chain, chain_table
from jaxq.codecs import decode, pack, unpack
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat
from jaxq.grids import BinaryGrid, float_grid, int_grid
from jaxq.outliers import Outliers
from jaxq.presets import get_quantizer
from jaxq.quantizers import Quantized, dequantize, fake_quant, quantize
from jaxq.recipes import Quantizer
from jaxq.rounding import HalfUp, Stochastic
from jaxq.second_level import DoubleScale, TensorScale
from jaxq.sharding import quantized_sharding
from jaxq.tables import Table
from jaxq.trees import dequantize_tree, quantize_tree, tree_report

if TYPE_CHECKING:
    from jaxq import optim

__version__ = "0.1.0"

__all__ = [
    "BinaryGrid",
    "CodebookFormat",
    "DoubleScale",
    "FloatFormat",
    "Format",
    "HalfUp",
    "IntFormat",
    "Outliers",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PerToken",
    "Quantized",
    "Quantizer",
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
    "decode",
    "dequantize",
    "dequantize_tree",
    "encode",
    "fake_quant",
    "fixed_point",
    "float_grid",
    "formats_table",
    "get_format",
    "get_quantizer",
    "gguf",
    "gradients",
    "int_grid",
    "optim",
    "p3109",
    "pack",
    "presets",
    "quantize",
    "quantize_tree",
    "quantized_sharding",
    "rounding",
    "tree_report",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name == "optim":  # At its first use, as it imports optax.
        return importlib.import_module("jaxq.optim")
    raise AttributeError(f"module 'jaxq' has no attribute {name!r}")
