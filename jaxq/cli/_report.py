"""The report of `jaxq compare` as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxq.cli._measure import Row, Total
from jaxq.cli._output import number
from jaxq.cli._page import escaped, page, picture, table

__all__ = ["Report", "html"]


class Report(NamedTuple):
    """The content of the page.

    Attributes:
      name: the name of the compared file.
      rows: one row per tensor and recipe.
      sums: the totals of each recipe.
      left: the names of the tensors that are not compared, by reason.
      convention: the sentence that says along which axis recipes are applied.
      pictures: captions and SVG images as bytes.
      missing: the reason why there are no pictures; empty if there are some.
    """

    name: str
    rows: Sequence[Row]
    sums: Sequence[Total]
    left: Mapping[str, Sequence[str]]
    convention: str
    pictures: Sequence[tuple[str, bytes]]
    missing: str


def html(report: Report) -> str:
    """Returns the HTML page of a report."""
    recipes = [escaped(total.recipe) for total in report.sums]
    tensors: dict[str, list[str]] = {}
    for row in report.rows:
        line = tensors.setdefault(row.tensor, [escaped(row.tensor), row.shape, row.dtype])
        line.append(_cell(row))
    parts = [
        f"<p>{escaped(report.convention)}</p>",
        "<h2>Totals</h2><p>Tensors that a recipe does not apply to are kept unquantized: their "
        "bytes count, and they have no error.</p>",
        _totals(report.sums),
        *(picture(data, "svg", caption) for caption, data in report.pictures),
        *([f"<p>{escaped(report.missing)}</p>"] if report.missing else []),
        "<h2>SQNR in dB, tensor by tensor</h2><p>Hover over a dash to see the reason; the color "
        "goes from 0 to 60 dB.</p>",
        table(["tensor", "shape", "dtype", *recipes], list(tensors.values())),
        *(
            f"<p>Not compared, {escaped(reason)}: {', '.join(map(escaped, names))}</p>"
            for reason, names in report.left.items()
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


def _cell(row: Row) -> str:
    """Returns a table cell: the SQNR on a color scale, or a dash with the reason as its title."""
    if row.note:
        return f'<span class="none" title="{escaped(row.note)}">-</span>'
    share = min(max(row.sqnr_db, 0), 60) / 60
    color = f"hsl({20 + 180 * share:.0f} 70% 85%)"
    title = f"{row.bits:.4g} bits, largest error {row.max_error:.3g}"
    return f'<span style="background:{color}" title="{title}">{row.sqnr_db:.2f}</span>'
