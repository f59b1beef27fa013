"""jaxq: low-precision number formats and quantizers for JAX, bit-exact and differentiable."""

from jaxq import catalog, gradients, rounding
from jaxq.casting import cast, encode
from jaxq.catalog import fixed_point, formats_table, get_format, p3109
from jaxq.codecs import decode, pack, unpack
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat
from jaxq.grids import BinaryGrid, float_grid, int_grid
from jaxq.rounding import Stochastic

__version__ = "0.1.0"
