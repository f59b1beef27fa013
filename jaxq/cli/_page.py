"""Self-contained HTML pages: the frame, tables and images that the reports share."""

import base64
import html
from collections.abc import Sequence

from jaxq.cli._output import safe

__all__ = ["escaped", "page", "picture", "table"]

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
_TYPES = {"png": "image/png", "svg": "image/svg+xml"}


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a page with a title, which is escaped here, and the markup of its parts."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([f"<h1>{escaped(title)}</h1>", *parts])
        + "\n</body>\n</html>\n"
    )


def escaped(text: str) -> str:
    """Returns text as markup that shows it."""
    return html.escape(safe(text))


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns the markup of a table, whose heads and cells are markup themselves."""
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table>\n<tr>{top}</tr>\n{body}\n</table>"


def picture(data: bytes, kind: str, caption: str) -> str:
    """Returns the markup of an image with a heading.

    Args:
      data: the bytes of the image file.
      kind: `"png"` or `"svg"`.
      caption: the heading, which is also the alternative text.
    """
    source = f"data:{_TYPES[kind]};base64,{base64.b64encode(data).decode()}"
    return f'<h2>{escaped(caption)}</h2><img alt="{escaped(caption)}" src="{source}">'
