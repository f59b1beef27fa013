"""The commands `jaxq formats` and `jaxq show`: formats, and numbers encoded in them."""

import argparse
import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.analysis import spacing_exponent
from jaxq.cli._output import UsageError, bad_input, number, print_json, print_table
from jaxq.formats import FloatFormat, Format, IntFormat, formats_table, get_format
from jaxq.numerics import code_dtype, decode, encode

__all__ = ["describe", "fields", "list_formats", "neighbors", "show"]

_LISTED_BITS = 8


def list_formats(args: argparse.Namespace) -> None:
    """Prints the properties of formats, or all of their values."""
    with bad_input():
        chosen = [get_format(name) for name in args.names] or None
        rows = [dataclasses.asdict(row) for row in formats_table(chosen).rows]
    if not args.values:
        return print_json(rows) if args.json else print_table(rows)
    if chosen is None:
        raise UsageError("formats: --values needs the names of formats")
    wide = [fmt.name for fmt in chosen if fmt.bits > _LISTED_BITS]
    if wide:
        raise UsageError(
            f"formats: --values lists formats of at most {_LISTED_BITS} bits, not {wide[0]}"
        )
    listed = {fmt.name: _codes(fmt) for fmt in chosen}
    if args.json:
        return print_json(listed)
    for name, lines in listed.items():
        print_table(lines, name, digits=12)
    return None


def _codes(fmt: Format) -> list[dict[str, Any]]:
    """Returns every code of a format with its value."""
    codes = np.arange(2**fmt.bits, dtype=code_dtype(fmt))
    values = np.asarray(decode(codes, fmt), np.float64)
    return [
        {"hex": _hex(code, fmt), "binary": " ".join(_bits(code, fmt)), "value": float(value)}
        for code, value in zip(codes.tolist(), values, strict=True)
    ]


def fields(fmt: Format) -> tuple[tuple[str, int], ...]:
    """Returns the names and widths of a code's fields, from the highest bit down."""
    if isinstance(fmt, FloatFormat):
        parts = [("sign", int(fmt.signed)), ("exponent", fmt.exponent_bits)]
        parts.append(("mantissa", fmt.mantissa_bits))
        return tuple((name, width) for name, width in parts if width)
    if isinstance(fmt, IntFormat):
        behind = min(max(fmt.fraction_bits, 0), fmt.bits)
        parts = [("integer", fmt.bits - behind), ("fraction", behind)]
        return tuple((name, width) for name, width in parts if width)
    return (("code", fmt.bits),)


def _bits(code: int, fmt: Format) -> list[str]:
    """Returns a code's bits as one string per field."""
    text, parts = f"{code:0{fmt.bits}b}", []
    for _, width in fields(fmt):
        parts.append(text[:width])
        text = text[width:]
    return parts


def _hex(code: int, fmt: Format) -> str:
    return f"0x{code:0{-(-fmt.bits // 4)}x}"


def neighbors(value: float, code: int, fmt: Format) -> tuple[float, float]:
    """Returns a format's next lower and next higher values; NaN if there is none.

    Args:
      value: a value of the format.
      code: the code of `value`.
      fmt: the format.
    """
    if math.isnan(value):
        return math.nan, math.nan
    if fmt.bits <= 16:
        values = fmt.values
        below, above = values[values < value], values[values > value]
        return (
            float(below[-1]) if len(below) else math.nan,
            float(above[0]) if len(above) else math.nan,
        )
    assert isinstance(fmt, FloatFormat)  # The codes of floats are ordered by magnitude.
    magnitude = code & (2 ** (fmt.bits - 1) - 1)
    out = fmt.magnitude(magnitude + 1) if magnitude < fmt.max_code else math.nan
    inner = -fmt.min_positive if magnitude == 0 else fmt.magnitude(magnitude - 1)
    return (-out, -inner) if value < 0 else (inner, out)


def show(args: argparse.Namespace) -> None:
    """Prints numbers as encoded in formats, or the values of codes."""
    with bad_input():
        chosen = [get_format(name) for name in args.formats]
    rows = []
    for text in args.numbers:
        for fmt in chosen:
            rows.append(_from_code(text, fmt) if args.bits else describe(text, fmt, args))
    if args.json:
        return print_json(rows)
    for i, row in enumerate(rows):
        if i:
            print()
        _print(row)
    return None


def describe(text: str, fmt: Format, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the code, value, neighbors and error of a number in a format.

    Args:
      text: the number as text, parsed as float64.
      fmt: the format.
      args: the parsed arguments, with `rounding`, `overflow` and `seed`.
    """
    try:
        x = float(text)
    except ValueError:
        raise UsageError(
            f"show: {text.strip()!r} is not a number (for a bit pattern: --bits {text.strip()})"
        ) from None
    key = jax.random.key(args.seed) if args.rounding == "stochastic" else None
    with jax.enable_x64(True), bad_input():
        code = int(
            encode(np.float64(x), fmt, rounding=args.rounding, overflow=args.overflow, key=key)
        )
    row = _of_code(code, fmt)
    value = row["value"]
    error = 0.0 if value == x else value - x
    ulp = row["ulp"]
    relative = 0.0 if error == 0 else abs(error / x) if x else math.nan
    return {
        "number": x,
        **row,
        "error": error,
        "relative_error": relative,
        "error_ulp": abs(error) / ulp if ulp else math.nan,
    }


def _from_code(text: str, fmt: Format) -> dict[str, Any]:
    """Returns the description of a bit pattern in a format."""
    try:
        code = int(text, 0)
    except ValueError:
        raise UsageError(
            f"show: a bit pattern is 0x…, 0b… or an integer, got {text.strip()!r}"
        ) from None
    digits = 2 + -(-fmt.bits // 4)  # With the prefix 0x.
    if not 0 <= code < 2**fmt.bits:
        raise UsageError(
            f"show: {text.strip()} is not a code of {fmt.name}; codes are "
            f"{0:#0{digits}x} to {2**fmt.bits - 1:#0{digits}x}"
        )
    return _of_code(code, fmt)


def _of_code(code: int, fmt: Format) -> dict[str, Any]:
    with jax.enable_x64(True):
        value = float(decode(code_dtype(fmt).type(code), fmt, dtype=jnp.float64))
    below, above = neighbors(value, code, fmt)
    ulp = math.nan
    if math.isfinite(value):
        ulp = 2.0 ** int(spacing_exponent(jnp.asarray(np.float32(value)), fmt))
    parts = [
        {"field": name, "bits": bits}
        for (name, _), bits in zip(fields(fmt), _bits(code, fmt), strict=True)
    ]
    return {
        "format": fmt.name,
        "code": _hex(code, fmt),
        "fields": parts,
        "value": value,
        "below": below,
        "above": above,
        "ulp": ulp,
    }


def _print(row: dict[str, Any]) -> None:
    """Prints the description of one number in one format, one property per line."""
    head = f"{row['number']!r} in {row['format']}" if "number" in row else row["format"]
    print(head)
    lines = [
        ("bits", " ".join(part["bits"] for part in row["fields"])),
        ("", " | ".join(f"{part['field']} {len(part['bits'])}" for part in row["fields"])),
        ("code", row["code"]),
        ("value", f"{row['value']:.12g}"),
        ("below", number(row["below"], 12)),
        ("above", number(row["above"], 12)),
        ("ulp", number(row["ulp"], 12)),
    ]
    if "error" in row:
        lines += [
            ("error", f"{number(row['error'])} ({number(row['error_ulp'])} ulp)"),
            ("relative", number(row["relative_error"])),
        ]
    for name, text in lines:
        print(f"  {name:<9}{text}")
