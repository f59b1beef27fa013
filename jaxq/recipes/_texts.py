"""The short text forms of recipes and of the records in them."""

from jaxq._base.records import short_repr
from jaxq.formats import FORMATS, CodebookFormat, Format
from jaxq.numerics import BinaryGrid

__all__ = ["field_text", "text_of"]


def text_of(record: object) -> str:
    """Returns the constructor call of a record: no defaults, and named formats by their names."""
    return short_repr(record, field_text)


def field_text(value: object) -> str:
    """Returns the text of a field; a codebook without a name in `FORMATS` omits its levels."""
    if isinstance(value, Format) and FORMATS.get(value.name) == value:
        return repr(value.name)
    if isinstance(value, CodebookFormat):
        return f"<CodebookFormat {value.name!r}>"
    return "<BinaryGrid>" if isinstance(value, BinaryGrid) else repr(value)
