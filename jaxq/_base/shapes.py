"""Axis lengths, which may be symbolic in functions that are exported with `jax.export`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

__all__ = ["as_number", "holds", "is_symbolic"]


def is_symbolic(n: Any) -> bool:
    """Returns whether a length is symbolic, as in `jax.export.symbolic_shape("b")`."""
    return not isinstance(n, (int, np.integer))


def as_number(n: Any, dtype: Any) -> Any:
    """Returns a length as a NumPy scalar, or as a traced scalar if it is symbolic."""
    dtype = np.dtype(dtype)
    return jnp.asarray(n).astype(dtype) if is_symbolic(n) else dtype.type(n)


def holds(condition: Callable[[], Any]) -> bool | None:
    """Evaluates a condition on lengths; returns None if their constraints do not decide it."""
    try:
        return bool(condition())
    except jax.errors.InconclusiveDimensionOperation:
        return None
