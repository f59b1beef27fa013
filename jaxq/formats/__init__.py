"""What a number format is: frozen, hashable records from which everything else is derived.

A record stores the minimum (widths, bias, which special values exist) and derives the rest. The
named formats are in `catalog`; the arithmetic that uses these records is in the kernels, `binary`,
`codebooks` and `tapered`, and in `codecs`.

To add a format: describe it with one of these classes and list it in `catalog`. To add a kind of
format: write its record on `derived.Derived`, and list it in `Format`.
"""

from typing import TypeAlias

from jaxq.formats.codebooks import CodebookFormat
from jaxq.formats.floats import FloatFormat
from jaxq.formats.integers import IntFormat
from jaxq.formats.tapered import TaperedFormat

__all__ = ["CodebookFormat", "FloatFormat", "Format", "IntFormat", "TaperedFormat"]

Format: TypeAlias = FloatFormat | IntFormat | CodebookFormat | TaperedFormat
