"""Pictures of formats, of quantizers and of their errors: functions that return a figure.

They need matplotlib (`pip install 'jaxq[plots]'`), which is imported when one is drawn, and work
without a display: `figure.savefig("picture.png")`. All numbers come from jaxq and `jaxq.analysis`.

To add one: a function in the module of its theme, under `picture`, listed in `ALL`.
"""

import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxq.analysis.plots.errors import chain_errors, outliers
from jaxq.analysis.plots.layouts import bit_layouts
from jaxq.analysis.plots.machines import fits, memory, memory_by_size
from jaxq.analysis.plots.precision import range_and_precision, relative_error
from jaxq.analysis.plots.rates import compression, sqnr_by_bits
from jaxq.analysis.plots.tensors import channel_errors, quantized_values
from jaxq.analysis.plots.values import number_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ALL",
    "about",
    "bit_layouts",
    "chain_errors",
    "channel_errors",
    "compression",
    "fits",
    "memory",
    "memory_by_size",
    "number_line",
    "outliers",
    "quantized_values",
    "range_and_precision",
    "relative_error",
    "sqnr_by_bits",
]

ALL: "MappingProxyType[str, Callable[..., Figure]]" = MappingProxyType(
    {
        function.__name__: function
        for function in (
            bit_layouts,
            number_line,
            range_and_precision,
            relative_error,
            quantized_values,
            channel_errors,
            sqnr_by_bits,
            compression,
            outliers,
            chain_errors,
            memory,
            memory_by_size,
            fits,
        )
    }
)


def about(name: str) -> str:
    """One line that says what a picture shows.

    Example:
      >>> about("number_line")
      'The values of formats as ticks on one number line, a row for each.'
    """
    return (inspect.getdoc(ALL[name]) or "").partition("\n")[0]
