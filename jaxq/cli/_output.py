"""Output of all commands: tables, JSON, CSV, files, and one-line errors."""

import contextlib
import csv
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from jaxq._base.tables import plain_figure
from jaxq.interop import atomic as complete

__all__ = [
    "UsageError",
    "atomic",
    "bad_input",
    "number",
    "one_line",
    "print_csv",
    "print_json",
    "print_table",
    "safe",
]


class UsageError(Exception):
    """An error in the user's input, reported in one line with exit code 2."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Converts TypeError and ValueError raised inside to `UsageError`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error


def one_line(error: object) -> str:
    """Returns the text of an error without line breaks."""
    return safe(" ".join(str(error).split()))


def safe(text: str) -> str:
    """Escapes characters that could control a terminal or break a line, for text from files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def number(value: object, digits: int = 4) -> str:
    """Formats a value as the text of a table cell; NaN and None become a dash."""
    if isinstance(value, float):
        return plain_figure(value, digits)
    return "-" if value is None else safe(str(value))


def print_table(
    rows: Sequence[Mapping[str, Any]],
    title: str = "",
    left: Sequence[str] = (),
    *,
    digits: int = 4,
) -> None:
    """Prints records, with rich on a terminal that is wide enough, else as aligned text.

    Args:
      rows: records with the same keys, which are the column heads.
      title: a line above the table.
      left: the columns that are left-aligned, in addition to the first.
      digits: the number of significant digits of floats. Default: 4.
    """
    if not rows:
        return
    heads = list(rows[0])
    cells = [[number(row[head], digits) for head in heads] for row in rows]
    to_left = [i == 0 or head in left for i, head in enumerate(heads)]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    if sys.stdout.isatty() and _rich_table(title, heads, cells, to_left, widths):
        return
    if title:
        print(title)
    for line in (heads, *cells):
        texts = zip(line, widths, to_left, strict=True)
        print("  ".join(t.ljust(w) if to else t.rjust(w) for t, w, to in texts).rstrip())


def _rich_table(
    title: str, heads: list[str], cells: list[list[str]], to_left: list[bool], widths: list[int]
) -> bool:
    """Prints the table with rich; returns False if rich is missing or the terminal too narrow."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # The caller then prints plain text.
        return False
    console = Console()
    if sum(widths) + 3 * len(widths) + 1 > console.width:  # Rich would truncate columns.
        return False
    table = Table(title=title or None, title_justify="left")
    for head, to in zip(heads, to_left, strict=True):
        table.add_column(head, justify="left" if to else "right", no_wrap=True)
    for line in cells:
        table.add_row(*map(Text, line))  # `Text` prevents names from being read as markup.
    console.print(table)
    return True


def print_json(value: Any) -> None:
    """Prints strict JSON.

    A number that is not finite becomes null, and `nonfinite` in the same object holds "inf", "-inf"
    or "nan", as in {"sqnr_db": null, "nonfinite": {"sqnr_db": "inf"}}.
    """
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item) for key, item in value.items()}
        lost = {
            str(key): str(item)
            for key, item in value.items()
            if isinstance(item, float) and not math.isfinite(item)
        }
        return {**plain, "nonfinite": lost} if lost else plain
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints records as comma-separated values with a header; text is escaped by `safe`."""
    if rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: safe(v) if isinstance(v, str) else v for k, v in row.items()})


@contextlib.contextmanager
def atomic(path: str | pathlib.Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yields a file that appears under its name only when it is complete.

    Args:
      path: the path of the file.
      mode: `"w"` or `"wb"`. Default: `"w"`.

    Raises:
      UsageError: if the path is not a regular file, or its folder is missing or not writable.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(complete(path, mode))
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
        yield file
