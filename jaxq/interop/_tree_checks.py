"""Checks of the keys and leaves of a tree that `save` writes."""

from typing import Any

import numpy as np
from jax.core import Tracer

__all__ = ["check_array", "check_key", "check_text"]


def check_key(key: Any) -> None:
    """Raises an error for a key of a tree that a file cannot hold."""
    if not isinstance(key, str | int):
        raise TypeError(
            f"save: keys of a tree must be strings or integers, got {key!r:.60}. Rename them."
        )
    check_text("keys of a tree", key)


def check_text(what: str, value: Any) -> None:
    """Raises a ValueError for a string that UTF-8 cannot encode."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"save: {what} must be Unicode text, got {value!a:.80}, which has a lone surrogate. "
            "Replace it."
        ) from None


def check_array(name: str, value: Any) -> None:
    """Raises a TypeError for a masked array, whose mask would be lost, and for a traced value."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"save: {name!r:.80} must be an array without a mask, got a masked array of NumPy. "
            "Save its `data` and its `mask`, or `filled(value)`."
        )
    if isinstance(value, Tracer):
        raise TypeError(
            f"save: {name!r:.80} must be an array, got a traced value. Call save outside jax.jit "
            "and other transformations."
        )
