"""The report of `jaxq compare` as one HTML page that needs no other file."""

import base64
import html as markup
from collections.abc import Mapping, Sequence

from jaxq.cli.measure import Row, Total
from jaxq.cli.output import number, safe

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
) -> str:
    """The page.

    Args:
      name: of the file.
      rows: every tensor by every recipe.
      sums: the totals.
      left: for each reason the names of tensors that are not compared.
      pictures: captions, and SVG as bytes.
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
        f"<h1>{title}</h1>",
        "<h2>Totals</h2><p>Tensors that a recipe does not apply to are kept: their bytes count, "
        "and they have no error.</p>",
        _table(heads, lines),
        *(f"<h2>{_text(caption)}</h2>{_image(data)}" for caption, data in pictures),
        "<h2>SQNR in dB, tensor by tensor</h2>"
        "<p>A dash says why when the pointer rests on it; the colour goes from 0 to 60 dB.</p>",
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
    """A ratio on a colour of its size, or a dash with the reason."""
    if row.note:
        return f'<span class="none" title="{_text(row.note)}">-</span>'
    share = min(max(row.sqnr_db, 0), 60) / 60
    colour = f"hsl({20 + 180 * share:.0f} 70% 85%)"
    title = f"{row.bits:.4g} bits, largest error {row.max_error:.3g}"
    return f'<span style="background:{colour}" title="{title}">{row.sqnr_db:.2f}</span>'


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(data).decode()}">'


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table>\n<tr>{top}</tr>\n{body}\n</table>"
