"""Short text forms of frozen records."""

import dataclasses
from collections.abc import Callable
from typing import Any

__all__ = ["short_repr"]


def short_repr(record: Any, show: Callable[[Any], str] = repr) -> str:
    """Returns the constructor call of a dataclass, without the fields that have their defaults.

    Args:
      record: an instance of a dataclass.
      show: a function that returns the text of a field's value.

    Example:
      >>> from jaxq.numerics import HalfUp
      >>> short_repr(HalfUp(8))
      'HalfUp(offset=8)'
    """
    parts = []
    for field in dataclasses.fields(record):
        value, default = show(getattr(record, field.name)), field.default
        if default is dataclasses.MISSING:
            parts.append(value)
        elif value != show(default):
            parts.append(f"{field.name}={value}")
    return f"{type(record).__name__}({', '.join(parts)})"
