"""Tables of records, formatted as plain text and, in notebooks, as HTML."""

import dataclasses
import html
import math
from typing import Any

__all__ = ["Table", "Tabular", "binary_size", "figure", "plain_figure"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True, repr=False)
class Table:
    """A table whose rows are records of one dataclass.

    Its `str` and `repr` are aligned text, and notebooks show it as an HTML table without empty
    columns. Both round floats to four significant digits; the records hold the exact values.

    Attributes:
      rows: the records, one per row.

    Example:
      >>> import jaxq
      >>> table = jaxq.formats_table(["float16", "bfloat16"])
      >>> [(row.name, row.max) for row in table.rows]
      [('float16', 65504.0), ('bfloat16', 3.3895313892515355e+38)]
    """

    rows: tuple[Any, ...]

    def __str__(self) -> str:
        cells = [[_cell(value) for value in row] for row in self._values]
        widths = [max(map(len, column)) for column in zip(self._heads, *cells, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (self._heads, *cells)
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self) if self.rows else "Table(rows=())"

    def _repr_html_(self) -> str:
        columns = {
            head: [getattr(row, head) for row in self.rows]
            for head in self._heads
            if any(getattr(row, head) != "" for row in self.rows)
        }
        aligned = [
            "right" if all(_is_number(value) or value == "" for value in column) else "left"
            for column in columns.values()
        ]
        head = "".join(
            f'<th style="text-align: {side}">{html.escape(name.replace("_", " "))}</th>'
            for name, side in zip(columns, aligned, strict=True)
        )
        body = "\n".join(
            "<tr>"
            + "".join(
                f'<td style="text-align: {side}">{html.escape(_shown(value))}</td>'
                for value, side in zip(row, aligned, strict=True)
            )
            + "</tr>"
            for row in zip(*columns.values(), strict=True)
        )
        return (
            f'<table class="jaxq-table">\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table>"
        )

    @property
    def _heads(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self.rows[0])] if self.rows else []

    @property
    def _values(self) -> list[list[Any]]:
        return [[getattr(row, head) for head in self._heads] for row in self.rows]


class Tabular:
    """A record that is shown as a table and lines of text below it.

    Subclasses are dataclasses with `repr=False`.
    """

    def _table(self) -> Table:
        raise NotImplementedError

    def _notes(self) -> list[str]:
        """Returns the lines below the table."""
        return []

    def __repr__(self) -> str:
        return "\n".join([str(self._table()), *self._notes()])

    def _repr_html_(self) -> str:
        notes = "".join(f"\n<p>{html.escape(note)}</p>" for note in self._notes())
        return self._table()._repr_html_() + notes


def figure(value: float, digits: int = 4) -> str:
    """Returns a number for people to read, rounded to `digits` significant digits.

    Args:
      value: the number; NaN becomes a dash.
      digits: the number of significant digits; numbers below a million keep all digits before the
        point.

    Example:
      >>> figure(7e9), figure(3.38953e38), figure(0.0078125), figure(65504), figure(1.5)
      ('7 × 10⁹', '3.39 × 10³⁸', '0.007812', '65,504', '1.5')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if _has_no_fraction(value, digits):
        return f"{value:,.0f}".replace("-", "−")
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    power = f" × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}" if exponent else ""
    return mantissa.replace("-", "−") + power


def binary_size(nbytes: int) -> str:
    """Returns a number of bytes in the largest unit of which it has at least one.

    Example:
      >>> binary_size(640), binary_size(8650752), binary_size(7 * 2**30)
      ('640 B', '8.25 MiB', '7 GiB')
    """
    power = max((i for i in range(5) if nbytes >= 1024**i), default=0)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{nbytes / 1024**power:.4g} {unit}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    return plain_figure(value) if isinstance(value, float) else str(value)


def plain_figure(value: float, digits: int = 4) -> str:
    """Returns a number for people to read as ASCII text, rounded to `digits` significant digits.

    Args:
      value: the number; NaN becomes a dash. Numbers below a million keep all digits before the
        point, and numbers that six digits represent exactly are not rounded.
      digits: the number of significant digits.

    Example:
      >>> plain_figure(147.3081), plain_figure(65504.0), plain_figure(0.015625)
      ('147.3', '65504', '0.015625')
    """
    if math.isnan(value):
        return "-"
    if _has_no_fraction(value, digits):
        return f"{value:.0f}"
    exact = f"{value:.6g}"
    return exact if float(exact) == value else f"{value:.{digits}g}"


def _has_no_fraction(value: float, digits: int) -> bool:
    """Returns whether a number is shown with all digits before the point and none after it."""
    return abs(value) < 1e6 and (float(value).is_integer() or abs(value) >= 10**digits)


def _shown(value: Any) -> str:
    """Returns the text of an HTML cell, in which bytes and other counts keep all their digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return figure(value) if isinstance(value, float) else str(value)
