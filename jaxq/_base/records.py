"""Short text forms of frozen records and of states."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxq._base.tables import binary_size

__all__ = ["array_repr", "short_repr", "size_text", "state_repr"]


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


def array_repr(record: Any) -> str:
    """Returns the constructor call of a named tuple, with dtypes and shapes for large arrays.

    Example:
      >>> import numpy as np
      >>> from jaxq.quantizers.calibration import Calibrated
      >>> array_repr(Calibrated(np.ones((8, 1), np.float32), None))
      'Calibrated(scale=float32[8, 1], zero_point=None)'
    """
    fields = (f"{name}={_array_text(value)}" for name, value in record._asdict().items())
    return f"{type(record).__name__}({', '.join(fields)})"


def _array_text(value: Any) -> str:
    if type(value) is tuple:
        return f"({', '.join(map(_array_text, value))})"
    if hasattr(value, "dtype") and getattr(value, "shape", ()) and value.size > 4:
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return repr(value)


def size_text(tree: Any) -> str:
    """Returns the bytes of a pytree of arrays as text; "" if their sizes are unknown."""
    try:
        nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    except (AttributeError, TypeError):  # Leaves are not arrays, or their sizes are symbolic.
        return ""
    return binary_size(nbytes)


def state_repr(state: Any, entries: Any) -> str:
    """Returns the class of a state, the number of its products and its bytes.

    Args:
      state: a pytree.
      entries: the mapping from product names in the state.
    """
    count = f"{len(entries)} product{'s' if len(entries) != 1 else ''}"
    return f"{type(state).__name__}({', '.join(filter(None, [count, size_text(state)]))})"
