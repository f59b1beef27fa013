"""Rounding to the grid of a format, with its rounding modes, kernels, codes and packed bytes.

To add a rounding mode, write a function in `_rounding.py` and list it in `ROUNDINGS`.
"""

from jaxq.numerics._binary import nearest_magnitudes, rounds_magnitudes
from jaxq.numerics._casting import as_dtype, cast, converted, enclosing, encode, floats, widen
from jaxq.numerics._codecs import code_dtype, decode, integer_codes
from jaxq.numerics._grids import BinaryGrid, float_grid, int_grid
from jaxq.numerics._packing import pack, unpack
from jaxq.numerics._rounding import ROUNDINGS, HalfUp, Overflow, Rounding, Stochastic, get_rounding

__all__ = [
    "ROUNDINGS",
    "BinaryGrid",
    "HalfUp",
    "Overflow",
    "Rounding",
    "Stochastic",
    "cast",
    "decode",
    "encode",
    "float_grid",
    "get_rounding",
    "int_grid",
    "pack",
    "unpack",
]
