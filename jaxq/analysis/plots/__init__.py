"""Plots of formats, quantizers and their errors, as functions that return a matplotlib figure.

They need matplotlib (`pip install matplotlib`), which is imported when a plot is drawn. No display
is needed: `figure.savefig("picture.png")` writes a file. All numbers come from jaxq and
`jaxq.analysis`.

To add a plot, write a function in the module of its topic, decorate it with `picture`, and list it
in `PLOTS`, unless it draws a log. The first line of its docstring is its caption in `jaxq plot` and
in `about`.
"""

import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxq._base.registry import suggestion
from jaxq.analysis.plots._errors import chain_errors, outliers
from jaxq.analysis.plots._layouts import bit_layouts
from jaxq.analysis.plots._look import image
from jaxq.analysis.plots._machines import fits, memory, memory_by_size
from jaxq.analysis.plots._magnitudes import exponents_by_step, magnitudes_by_step
from jaxq.analysis.plots._precision import range_and_precision, relative_error
from jaxq.analysis.plots._rates import compression, sqnr_by_bits
from jaxq.analysis.plots._tensors import channel_errors, quantized_values
from jaxq.analysis.plots._training import gradient_cosines, statistic_by_step, statistics_map
from jaxq.analysis.plots._values import number_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PLOTS",
    "about",
    "bit_layouts",
    "chain_errors",
    "channel_errors",
    "compression",
    "exponents_by_step",
    "fits",
    "gradient_cosines",
    "magnitudes_by_step",
    "memory",
    "memory_by_size",
    "number_line",
    "outliers",
    "quantized_values",
    "range_and_precision",
    "relative_error",
    "sqnr_by_bits",
    "statistic_by_step",
    "statistics_map",
]

PLOTS: "MappingProxyType[str, Callable[..., Figure]]" = MappingProxyType(
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
    """Returns the caption of a plot, the first line of its docstring without the verb.

    Args:
      name: a name in `PLOTS`.

    Returns:
      The caption, which begins with a capital letter.

    Example:
      >>> about("number_line")
      'The values of formats as ticks on one number line, a row for each.'
    """
    if name not in PLOTS:
        raise ValueError(f"No plot is named {name!r:.80}. {suggestion(str(name), PLOTS)}")
    first = (inspect.getdoc(PLOTS[name]) or "").partition("\n")[0]
    caption = first.partition(" ")[2]
    return caption[:1].upper() + caption[1:]
