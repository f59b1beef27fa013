"""The union type of all format classes."""

from typing import TypeAlias

from jaxq.formats._codebooks import CodebookFormat
from jaxq.formats._floats import FloatFormat
from jaxq.formats._integers import IntFormat
from jaxq.formats._tapered import TaperedFormat

__all__ = ["Format"]

Format: TypeAlias = FloatFormat | IntFormat | CodebookFormat | TaperedFormat
