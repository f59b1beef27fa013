"""Arrays that are spread over the devices of several processes."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["holds_on_all_processes", "host_array", "spans_processes"]


def spans_processes(x: Any) -> bool:
    """Returns whether an array has parts on devices of other processes."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def host_array(x: Any) -> np.ndarray:
    """Returns the values of an array, gathered from the processes that hold its parts.

    If an array has different parts on several processes, all of them must call this function.
    """
    if spans_processes(x) and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def holds_on_all_processes(condition: bool) -> bool:
    """Returns whether a condition holds on every process; all processes must call this function."""
    return bool(np.all(multihost_utils.process_allgather(np.array(condition))))
