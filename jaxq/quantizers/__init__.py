"""Quantization of tensors by a recipe: stored as codes and scales, or simulated."""

from jaxq.quantizers import calibration
from jaxq.quantizers._arguments import check_takes_scales
from jaxq.quantizers._levels import (
    Levels,
    block_indices,
    enclosing_grid_values,
    grid_values_of,
    levels,
    per_element,
    rescaled,
    snap,
    values_of,
    with_levels,
    with_minima,
)
from jaxq.quantizers._quantized import WHOLE_BYTES, Quantized, QuantizedArrays, dequantize
from jaxq.quantizers._quantizers import fake_quant, neighbors, quantize
from jaxq.quantizers._sharding import quantized_sharding
from jaxq.quantizers._simulation import simulate
from jaxq.quantizers._slices import Slices, slices
from jaxq.quantizers._snapping import ends_of, grid_values, measured, restored, units_of

__all__ = [
    "Levels",
    "Quantized",
    "calibration",
    "dequantize",
    "enclosing_grid_values",
    "fake_quant",
    "neighbors",
    "quantize",
    "quantized_sharding",
    "rescaled",
    "snap",
    "values_of",
    "with_minima",
]
