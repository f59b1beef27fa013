"""The report of `jaxq compare` as one self-contained HTML page."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxq.cli._measure import Row, Total
from jaxq.cli._output import number
from jaxq.cli._page import escaped, page, picture, table

__all__ = ["Report", "html", "sorted_by_sqnr"]


class Report(NamedTuple):
    """The content of the page.

    Attributes:
      name: the name of the compared file.
      rows: one row per tensor and recipe.
      sums: the totals of each recipe.
      skipped: the names of the tensors that are not compared, by reason.
      convention: a sentence that states the axis along which recipes are applied.
      pictures: captions and SVG images as bytes.
      missing: the reason why there are no pictures; empty if there are some.
    """

    name: str
    rows: Sequence[Row]
    sums: Sequence[Total]
    skipped: Mapping[str, Sequence[str]]
    convention: str
    pictures: Sequence[tuple[str, bytes]]
    missing: str


def html(report: Report) -> str:
    """Returns the HTML page of a report."""
    recipes = [escaped(total.recipe) for total in report.sums]
    tensors: dict[str, list[str]] = {}
    for row in sorted_by_sqnr(report.rows):
        line = tensors.setdefault(row.tensor, [escaped(row.tensor), row.shape, row.dtype])
        line.append(_cell(row))
    parts = [
        f"<p>{escaped(report.convention)}</p>",
        "<h2>Totals</h2><p>Tensors that a recipe does not apply to are not quantized: their "
        "size in the file counts, and the SQNR is that of the others.</p>",
        _totals(report.sums),
        "<h2>SQNR in dB, tensor by tensor</h2><p>The tensors with the lowest SQNR come first. A "
        "click on a head sorts by that column. Hover over a dash to see the reason. "
        f"{_legend()}</p>",
        table(["tensor", "shape", "dtype", *recipes], list(tensors.values())),
        *(picture(data, "svg", caption) for caption, data in report.pictures),
        *([f"<p>{escaped(report.missing)}</p>"] if report.missing else []),
        *(
            f"<p>Not compared, {escaped(reason)}: {', '.join(map(escaped, names))}</p>"
            for reason, names in report.skipped.items()
        ),
    ]
    return page(f"jaxq compare {report.name}", parts)


def _totals(sums: Sequence[Total]) -> str:
    heads = ["recipe", "tensors", "kept", "SQNR dB", "bits", "bytes", "smaller by", "worst dB"]
    lines = [
        [
            escaped(t.recipe),
            *(str(v) for v in (t.tensors, t.kept)),
            *(number(v, 4) for v in (t.sqnr_db, t.bits)),
            f"{t.bytes:,}",
            number(t.ratio, 3),
            f'<span title="{escaped(t.worst)}">{number(t.worst_db, 4)}</span>',
        ]
        for t in sums
    ]
    return table(heads, lines)


def sorted_by_sqnr(rows: Sequence[Row]) -> list[Row]:
    """Sorts rows by the lowest SQNR of their tensor; tensors without an SQNR come last."""
    lowest: dict[str, float] = {}
    for row in rows:
        if not row.note:
            lowest[row.tensor] = min(lowest.get(row.tensor, math.inf), row.sqnr_db)
    return sorted(rows, key=lambda row: (row.tensor not in lowest, lowest.get(row.tensor, 0)))


# Hues of the color scale: red, orange, yellow, green, blue, violet.
_LEVELS = (0, 20, 30, 42, 52, 60)
_HUES = (0, 30, 60, 140, 205, 260)


def _level(sqnr_db: float, text: str, title: str = "") -> str:
    """Returns the markup of text on the background color of an SQNR."""
    hue = np.interp(sqnr_db, _LEVELS, _HUES)
    titled = f' title="{title}"' if title else ""
    return f'<span class="level" style="--hue:{hue:.0f}"{titled}>{text}</span>'


def _legend() -> str:
    shown = "".join(_level(db, f"{db} dB") for db in _LEVELS)
    return f'<span class="legend">{shown}</span>'


def _cell(row: Row) -> str:
    """Returns a table cell: the SQNR on a color scale, or a dash with the reason as its title."""
    if row.note:
        return f'<span class="none" title="{escaped(row.note)}">-</span>'
    title = f"{row.bits:.4g} bits, largest error {row.max_error:.3g}"
    return _level(row.sqnr_db, f"{row.sqnr_db:.2f}", title)
