"""Number formats as frozen, hashable records: floats, integers, codebooks and tapered formats.

A record stores the minimum (widths, bias, which special values exist) and derives the rest. To
add a format, describe it with one of these classes and list it in `_FORMATS` (`_catalog.py`).
"""

from jaxq.formats._catalog import FORMATS, fixed_point, formats_table, get_format, p3109
from jaxq.formats._codebooks import CodebookFormat
from jaxq.formats._floats import FloatFormat
from jaxq.formats._format import Format
from jaxq.formats._integers import IntFormat
from jaxq.formats._tapered import TaperedFormat

__all__ = [
    "FORMATS",
    "CodebookFormat",
    "FloatFormat",
    "Format",
    "IntFormat",
    "TaperedFormat",
    "fixed_point",
    "formats_table",
    "get_format",
    "p3109",
]
