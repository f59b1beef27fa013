"""The report of `jaxq compare` as one self-contained HTML page."""

import base64
import html as markup
from collections.abc import Mapping, Sequence

from jaxq.cli._measure import Row, Total
from jaxq.cli._output import number, safe

__all__ = ["html"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em;
       color: #222; }
table { border-collapse: collapse; margin: 1em 0 2em; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #666; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
img { max-width: 100%; }
.none { color: #666; }
"""


def html(
    name: str,
    rows: Sequence[Row],
    sums: Sequence[Total],
    left: Mapping[str, Sequence[str]],
    pictures: Sequence[tuple[str, bytes]],
    missing: str = "",
    convention: str = "",
) -> str:
    """Returns the HTML page.

    Args:
      name: the name of the compared file.
      rows: one row per tensor and recipe.
      sums: the totals of each recipe.
      left: the names of the tensors that are not compared, by reason.
      pictures: captions and SVG images as bytes.
      missing: the reason why there are no pictures; empty if there are some.
      convention: the sentence that says along which axis recipes are applied.
    """
    title = f"jaxq compare {_text(name)}"
    recipes = [total.recipe for total in sums]
    heads = ["recipe", "tensors", "kept", "SQNR dB", "bits", "bytes", "smaller by", "worst dB"]
    lines = [
        [
            _text(t.recipe),
            *(str(v) for v in (t.tensors, t.kept)),
            *(number(v, 4) for v in (t.sqnr_db, t.bits)),
            f"{t.bytes:,}",
            number(t.ratio, 3),
            f'<span title="{_text(t.worst)}">{number(t.worst_db, 4)}</span>',
        ]
        for t in sums
    ]
    tensors: dict[str, list[str]] = {}
    for row in rows:
        line = tensors.setdefault(row.tensor, [_text(row.tensor), row.shape, row.dtype])
        line.append(_cell(row))
    parts = [
        f"<h1>{title}</h1><p>{_text(convention)}</p>",
        "<h2>Totals</h2><p>Tensors that a recipe does not apply to are kept: their bytes count, "
        "and they have no error.</p>",
        _table(heads, lines),
        *(f"<h2>{_text(caption)}</h2>{_image(data)}" for caption, data in pictures),
        *([f"<p>{_text(missing)}</p>"] if missing else []),
        "<h2>SQNR in dB, tensor by tensor</h2>"
        "<p>A dash says why when the pointer rests on it; the color goes from 0 to 60 dB.</p>",
        _table(["tensor", "shape", "dtype", *map(_text, recipes)], list(tensors.values())),
    ]
    parts += [
        f"<p>Not compared, {_text(reason)}: {', '.join(map(_text, names))}</p>"
        for reason, names in left.items()
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return markup.escape(safe(text))


def _cell(row: Row) -> str:
    """Returns a table cell: the SQNR on a color scale, or a dash with the reason as its title."""
    if row.note:
        return f'<span class="none" title="{_text(row.note)}">-</span>'
    share = min(max(row.sqnr_db, 0), 60) / 60
    color = f"hsl({20 + 180 * share:.0f} 70% 85%)"
    title = f"{row.bits:.4g} bits, largest error {row.max_error:.3g}"
    return f'<span style="background:{color}" title="{title}">{row.sqnr_db:.2f}</span>'


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(data).decode()}">'


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table>\n<tr>{top}</tr>\n{body}\n</table>"
