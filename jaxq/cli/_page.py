"""Self-contained HTML pages: the frame, tables and images that the reports share."""

import base64
import html
from collections.abc import Sequence

from jaxq.cli._output import safe

__all__ = ["escaped", "page", "picture", "table"]

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #e0e0e0; --dim: #666;
        --chroma: 75%; --light: 82%; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --page: #16181b; --line: #3a3d42; --dim: #a0a0a0;
          --chroma: 60%; --light: 27%; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em;
       color: var(--text); background: var(--page); overflow-wrap: anywhere; }
.wide { overflow: auto; max-height: 90vh; margin: 1em 0 2em; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums;
        overflow-wrap: normal; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--page); border-bottom: 2px solid var(--dim); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25b4"; }
th[aria-sort=descending] button::after { content: " \\25be"; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
td:first-child { min-width: min(10em, 40vw); max-width: 40vw; overflow-wrap: anywhere; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
.none { color: var(--dim); }
.legend .level { display: inline-block; margin-right: .3em; }
.level { display: block; padding: 0 .4em; border-radius: 3px;
         background: hsl(var(--hue) var(--chroma) var(--light)); }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => {
      const text = row.cells[column].textContent;
      const numbers = {"-": NaN, "inf": Infinity, "-inf": -Infinity};
      return {text, none: text === "-", value: numbers[text] ?? Number(text.replaceAll(",", ""))};
    };
    const order = (a, b) =>
      Number.isNaN(a.value) || Number.isNaN(b.value)
        ? a.text.localeCompare(b.text, "en", {numeric: true})
        : a.value < b.value ? -1 : a.value > b.value ? 1 : 0;
    const rows = [...table.rows].slice(1).map(row => [key(row), row]);
    rows.sort(([a], [b]) => (a.none - b.none) || (up ? order(a, b) : order(b, a)));
    rows.forEach(([, row]) => table.tBodies[0].append(row));
  }));
}
"""
_TYPES = {"png": "image/png", "svg": "image/svg+xml"}


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a page with a title, which is escaped here, and the markup of its parts."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([f"<h1>{escaped(title)}</h1>", *parts])
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def escaped(text: str) -> str:
    """Returns text as markup that shows it."""
    return html.escape(safe(text))


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns the markup of a table, whose heads and cells are markup themselves.

    A click on a head sorts the table by that column.
    """
    top = "".join(f'<th scope="col"><button>{head}</button></th>' for head in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f'<div class="wide" tabindex="0"><table>\n<tr>{top}</tr>\n{body}\n</table></div>'


def picture(data: bytes, kind: str, caption: str) -> str:
    """Returns the markup of an image with a heading.

    Args:
      data: the bytes of the image file.
      kind: `"png"` or `"svg"`.
      caption: the heading, which is also the alternative text.
    """
    source = f"data:{_TYPES[kind]};base64,{base64.b64encode(data).decode()}"
    return f'<h2>{escaped(caption)}</h2><img alt="{escaped(caption)}" src="{source}">'
