"""Checks of Python numbers and names among arguments, whose errors all have one form.

They look at types and Python numbers only, so they cost no time in traced programs.
"""

import math
import numbers
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.registry import suggestion

__all__ = [
    "array",
    "choice",
    "described",
    "flags",
    "integer",
    "is_integer",
    "items_of",
    "names_of",
    "number",
    "numbers_of",
    "path",
    "shape_of",
]

_LONGEST = 40


def described(value: Any) -> str:
    """Returns a short text of a wrong argument, for the end of an error.

    Example:
      >>> import numpy as np
      >>> described("nearest"), described(np.ones((2, 3))), described([1] * 99)
      ("'nearest'", 'float64 of shape (2, 3)', 'list')
    """
    if "Tracer" in type(value).__name__:
        return "a traced value"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, int) and not -(10**_LONGEST) < value < 10**_LONGEST:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, str | numbers.Number | np.generic):
        text = repr(value.item() if isinstance(value, np.generic) else value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return type(value).__name__


def array(owner: str, argument: str, value: Any, requirement: str, remedy: str) -> jax.Array:
    """Returns an argument as an array; its dtype remains to be checked.

    Args:
      owner: the function or class, for the error.
      argument: the name of the argument.
      value: the argument.
      requirement: the words after "must be" in the error, such as "unsigned integers".
      remedy: the last sentence of the error.

    Raises:
      TypeError: if the argument cannot be an array of JAX, such as None or a string.

    Example:
      >>> array("unpack", "packed", None, "uint8", "Pass the result of jaxq.numerics.pack.")
      Traceback (most recent call last):
      ...
      TypeError: unpack: `packed` must be uint8, got None. Pass the result of jaxq.numerics.pack.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{owner}: `{argument}` must be an array without a mask, got a masked array of NumPy. "
            f"Pass {argument}.filled(value)."
        )
    try:
        if not isinstance(value, str):  # JAX 0.10 reads some strings as names of dtypes.
            return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(
        f"{owner}: `{argument}` must be {requirement}, got {described(value)}. {remedy}"
    )


def is_integer(value: Any) -> bool:
    """Returns whether a value is an integer of Python or NumPy and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def integer(
    owner: str,
    argument: str,
    value: Any,
    remedy: str,
    *,
    least: int | None = None,
    most: int | None = None,
) -> int:
    """Returns an argument as a Python integer.

    Args:
      owner: the function or class, for the error.
      argument: the name of the argument.
      value: the argument.
      remedy: the last sentence of the error.
      least: the smallest allowed value; None for no limit.
      most: the largest allowed value; None for no limit.

    Raises:
      TypeError: if the argument is not an integer of Python or NumPy, or is a bool.
      ValueError: if the integer is out of range.

    Example:
      >>> integer("pack", "bits", 17, "Use 16.", least=1, most=16)
      Traceback (most recent call last):
      ...
      ValueError: pack: `bits` must be an integer from 1 to 16, got 17. Use 16.
    """
    fits_type = is_integer(value)
    if fits_type and (least is None or value >= least) and (most is None or value <= most):
        return int(value)
    limits = f" from {least} to {most}" if most is not None else f" of at least {least}"
    raise (ValueError if fits_type else TypeError)(
        f"{owner}: `{argument}` must be an integer{'' if least is None else limits}, got "
        f"{described(value)}. {remedy}"
    )


def number(
    owner: str,
    argument: str,
    value: Any,
    requirement: str,
    holds: Callable[[float], bool],
    remedy: str,
) -> None:
    """Checks that an argument is a finite real number that meets a requirement.

    Args:
      owner: the function or class, for the error.
      argument: the name of the argument.
      value: the argument.
      requirement: the words after "must be" in the error, such as "a positive number".
      holds: returns whether a finite number meets the requirement.
      remedy: the last sentence of the error.

    Raises:
      TypeError: if the argument is not a real number of Python or NumPy, or is a bool.
      ValueError: if the number is infinite, NaN, or does not meet the requirement.

    Example:
      >>> number("EMA", "decay", 1.0, "a number in [0, 1)", lambda d: 0 <= d < 1, "Use 0.99.")
      Traceback (most recent call last):
      ...
      ValueError: EMA: `decay` must be a number in [0, 1), got 1.0. Use 0.99.
    """
    fits_type = is_integer(value) or isinstance(value, float | np.floating)
    try:
        as_float = float(value) if fits_type else math.nan
    except OverflowError:  # An integer beyond the range of floats.
        as_float = math.inf
    if not (math.isfinite(as_float) and holds(as_float)):
        raise (ValueError if fits_type else TypeError)(
            f"{owner}: `{argument}` must be {requirement}, got {described(value)}. {remedy}"
        )


def numbers_of(
    owner: str,
    argument: str,
    value: Any,
    requirement: str,
    holds: Callable[[float], bool],
    remedy: str,
) -> tuple[float, ...]:
    """Returns a tuple or list of numbers as a tuple, after checking each number with `number`.

    The requirement describes the sequence, such as "a tuple of positive numbers".

    Raises:
      TypeError: if the argument is not a tuple or list of real numbers.
      ValueError: if a number is infinite, NaN, or does not meet the requirement.
    """
    if not isinstance(value, tuple | list):
        raise TypeError(
            f"{owner}: `{argument}` must be {requirement}, got {described(value)}. {remedy}"
        )
    for item in value:
        number(owner, argument, item, requirement, holds, remedy)
    return tuple(value)


def items_of(owner: str, argument: str, value: Any) -> list[Any]:
    """Returns an iterable as a list; a string or a single item is an error.

    Raises:
      TypeError: if the argument is a string or not iterable.

    Example:
      >>> items_of("chain", "steps", "float16")
      Traceback (most recent call last):
      ...
      TypeError: chain: `steps` must be a list, got 'float16'. Write ['float16'].
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        remedy = "Pass a list."
        if value is not None:
            remedy = (
                f"Write [{value!r}]." if len(repr(value)) <= _LONGEST else "Put it into a list."
            )
        raise TypeError(f"{owner}: `{argument}` must be a list, got {described(value)}. {remedy}")
    return list(value)


def names_of(owner: str, argument: str, value: Any) -> tuple[str, ...]:
    """Returns a sequence of strings as a tuple; a single string is an error.

    Raises:
      TypeError: if the argument is not a sequence of strings.

    Example:
      >>> names_of("budget", "groups", "/q$")
      Traceback (most recent call last):
      ...
      TypeError: budget: `groups` must be a list of strings, got '/q$'. Write ['/q$'].
    """
    is_array = isinstance(value, np.ndarray | jax.Array)
    is_sequence = isinstance(value, Iterable) and not (is_array or isinstance(value, str))
    items: tuple[Any, ...] = tuple(value) if is_sequence else ()
    if not is_sequence or not all(isinstance(item, str) for item in items):
        remedy = f"Write [{value!r:.40}]." if isinstance(value, str) else "Pass a list of strings."
        raise TypeError(
            f"{owner}: `{argument}` must be a list of strings, got {described(value)}. {remedy}"
        )
    return items


def shape_of(owner: str, value: Any) -> tuple[int, ...]:
    """Returns the argument `shape` as a tuple; its lengths may be symbolic.

    Raises:
      TypeError: if the argument is not a sequence of integers.
      ValueError: if a length is negative.

    Example:
      >>> shape_of("init", 64)
      Traceback (most recent call last):
      ...
      TypeError: init: `shape` must be a tuple of lengths, got 64. Write (64,).
    """
    is_sequence = isinstance(value, tuple | list)
    lengths = tuple(value) if is_sequence else ()
    if not is_sequence or any(isinstance(n, bool | float | str) or n is None for n in lengths):
        remedy = f"Write ({value!r},)." if is_integer(value) else "Pass the shape of the tensor."
        raise TypeError(
            f"{owner}: `shape` must be a tuple of lengths, got {described(value)}. {remedy}"
        )
    if any(is_integer(n) and n < 0 for n in lengths):
        raise ValueError(
            f"{owner}: `shape` must have lengths of at least 0, got {lengths}. Pass the shape of "
            "the tensor."
        )
    return lengths


def path(owner: str, argument: str, value: Any) -> pathlib.Path:
    """Returns an argument as a path.

    Raises:
      TypeError: if the argument is neither a string nor a path.
      ValueError: if it is empty, which `pathlib` reads as the current folder, or has a null byte.

    Example:
      >>> path("load", "path", "")
      Traceback (most recent call last):
      ...
      ValueError: load: `path` must not be empty, got ''. Pass "." for the current folder.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(
            f"{owner}: `{argument}` must be a string or a pathlib.Path, got {described(value)}. "
            "Pass the path of a file or folder."
        )
    text = os.fspath(value)
    if not text:
        raise ValueError(
            f"{owner}: `{argument}` must not be empty, got ''. Pass \".\" for the current folder."
        )
    if "\0" in text:
        raise ValueError(
            f"{owner}: `{argument}` must not have null bytes, got {text!r:.40}. Remove them."
        )
    return pathlib.Path(text)


def flags(owner: str, remedy: str, **values: Any) -> None:
    """Checks that arguments, given by name, are bools of Python or NumPy.

    Raises:
      TypeError: if one is not.

    Example:
      >>> flags("IntFormat", "Omit it for the default.", signed="no")
      Traceback (most recent call last):
      ...
      TypeError: IntFormat: `signed` must be True or False, got 'no'. Omit it for the default.
    """
    for argument, value in values.items():
        if not isinstance(value, bool | np.bool):
            raise TypeError(
                f"{owner}: `{argument}` must be True or False, got {described(value)}. {remedy}"
            )


def choice(owner: str, argument: str, value: Any, names: Sequence[str | None], remedy: str) -> None:
    """Checks that an argument is one of several names.

    Args:
      owner: the function or class, for the error.
      argument: the name of the argument.
      value: the argument.
      names: the allowed names, and None if the argument may be None.
      remedy: the last sentence of the error if no name is similar.

    Raises:
      ValueError: if the argument is not one of the names. The message suggests a similar one.

    Example:
      >>> choice("GPTQ", "order", "statc", ("static", "group", None), "Use None.")
      Traceback (most recent call last):
      ...
      ValueError: GPTQ: `order` must be 'static', 'group' or None, got 'statc'. Did you mean static?
    """
    if value is None or isinstance(value, str):
        if value in names:
            return
        hint = suggestion(value or "", [name for name in names if name])
        remedy = hint if hint.startswith("Did") else remedy
    *first, last = map(repr, names)
    raise ValueError(
        f"{owner}: `{argument}` must be {', '.join(first)} or {last}, got {described(value)}. "
        f"{remedy}"
    )
