"""What every command does with its results: tables, JSON, CSV, files, and errors in one line."""

import contextlib
import csv
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

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
    """What the user gave cannot be used: one line, exit code 2."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Errors that jaxq raises within are about what the user gave."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error


def one_line(error: object) -> str:
    """The text of an error without line breaks."""
    return safe(" ".join(str(error).split()))


def safe(text: str) -> str:
    """Text from a file, with what could steer a terminal or break a line written as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def number(value: object, digits: int = 6) -> str:
    """A cell's text."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.{digits}g}"
    return "-" if value is None else safe(str(value))


def print_table(
    rows: Sequence[Mapping[str, Any]], title: str = "", left: Sequence[str] = ()
) -> None:
    """Prints records: with rich on a terminal that is wide enough, else as aligned text.

    Args:
      rows: records with the same keys, which are the heads.
      title: a line above.
      left: the columns that are set to the left beside the first.
    """
    if not rows:
        return
    heads = list(rows[0])
    cells = [[number(row[head]) for head in heads] for row in rows]
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
    """Whether rich is there and has the room, and then the table is printed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # Plain text says the same.
        return False
    console = Console()
    if sum(widths) + 3 * len(widths) + 1 > console.width:  # It would cut columns down to nothing.
        return False
    table = Table(title=title or None, title_justify="left")
    for head, to in zip(heads, to_left, strict=True):
        table.add_column(head, justify="left" if to else "right", no_wrap=True)
    for line in cells:
        table.add_row(*map(Text, line))  # Text: names are no markup.
    console.print(table)
    return True


def print_json(value: Any) -> None:
    """Prints strict JSON; numbers that it lacks are the strings "inf", "-inf" and "nan"."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints records as comma-separated values with a line of heads."""
    if rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def atomic(path: str | pathlib.Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that appears under its name when it is complete, or not at all.

    It is written beside its place and renamed at the end; an error in between removes it.

    Args:
      path: where it goes.
      mode: `"w"` or `"wb"`.

    Raises:
      UsageError: the folder is not there or cannot be written to.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        file = beside.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with file:
            yield file
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
