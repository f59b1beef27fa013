"""A Sphinx extension that offers every executed page as a notebook that plain Jupyter shows well.

The notebook has the outputs of the build. Sentences contain the computed numbers instead of
`{eval}`, admonitions are quotations, solutions are folded, and captions follow their pictures.
"""

import json
import pathlib
import re
from typing import Any

from myst_nb.ext.eval import EvalRoleAny
from sphinx.application import Sphinx

FOLDER = "notebooks"
_EVAL = re.compile(r"\{eval\}(`+)(.+?)\1", re.DOTALL)
_ADMONITION = re.compile(r"^:::\{(\w+)\}[ \t]*(.*)\n((?:.*\n)*?):::$", re.MULTILINE)
_DIRECTIVE = re.compile(r"^```\{(?!code-cell)[\w:-]+\}.*\n(?:.*\n)*?```$", re.MULTILINE)
_TARGET = re.compile(r"^\(([\w-]+)\)=\n", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:]+?)(#[\w-]+)?\)")
_INTRODUCTION = """\
*This notebook is a page of the jaxq documentation, with the results of its build. To run it, \
install jaxq from a clone: `pip install '.[docs]' jupyterlab`.*"""


class Evaluated(EvalRoleAny):
    """The role `{eval}`, which also records the text that it inserts."""

    def run(self) -> Any:
        """Returns the nodes of the value."""
        result, messages = super().run()
        env = self.inliner.document.settings.env
        texts = _values(env).setdefault(env.docname, {}).setdefault(self.text, [])
        texts.append("".join(node.astext() for node in result))
        return result, messages


def _values(env: Any) -> dict[str, dict[str, list[str]]]:
    """Returns the inserted texts by page and expression, in the order of the page."""
    if not hasattr(env, "jaxq_values"):
        env.jaxq_values = {}
    return env.jaxq_values


def _forget(app: Sphinx, env: Any, docname: str) -> None:
    del app
    _values(env).pop(docname, None)


def _merge(app: Sphinx, env: Any, docnames: Any, other: Any) -> None:
    del app
    own = _values(env)
    own |= {name: texts for name, texts in _values(other).items() if name in docnames}


def plain(
    text: str, values: dict[str, list[str]], pages: set[str], folder: pathlib.PurePath
) -> str:
    """Returns Markdown without MyST's extensions.

    Args:
      text: the text of a cell.
      values: the texts of the expressions, each removed when it is used.
      pages: the pages that are notebooks.
      folder: the folder of the page.
    """

    def value(match: re.Match) -> str:
        found = values.get(match[2].replace("\n", " "), [])
        return found.pop(0) if found else match[0]

    def admonition(match: re.Match) -> str:
        title = match[2] or match[1].capitalize()
        lines = ["", *match[3].strip().splitlines()]
        return "\n".join([f"> **{title}**", *(f"> {line}".rstrip() for line in lines)])

    def link(match: re.Match) -> str:
        image, label, target, _ = match.groups()
        page = target.removesuffix(".md")
        whole = pathlib.PurePath(_normal(folder / page)).as_posix()
        if image or not target.endswith(".md"):
            return match[0] if not image else f"*{label}*"
        return f"[{label}]({page}.ipynb)" if whole in pages else label

    text = _TARGET.sub("", _DIRECTIVE.sub("", _EVAL.sub(value, text)))
    return _LINK.sub(link, _ADMONITION.sub(admonition, text)).strip()


def _normal(path: pathlib.PurePath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def converted(
    notebook: dict[str, Any], values: dict[str, list[str]], pages: set[str], docname: str
) -> dict[str, Any]:
    """Returns a notebook for plain Jupyter from an executed one of MyST-NB."""
    folder = pathlib.PurePath(docname).parent
    left = {text: list(found) for text, found in values.items()}
    cells = [{"cell_type": "markdown", "metadata": {}, "source": _INTRODUCTION}]
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "markdown":
            cell = {**cell, "metadata": {}, "source": plain(source, left, pages, folder)}
        else:
            caption = cell["metadata"].get("mystnb", {}).get("figure", {}).get("caption", "")
            hidden = "hide-cell" in tags
            short = hidden or not {"hide-input", "remove-input"}.isdisjoint(tags)
            folded = {"source_hidden": short, "outputs_hidden": hidden}
            cell = {**cell, "source": source, "metadata": {"jupyter": folded} if tags else {}}
            if caption:
                below = " ".join(caption.split())
                cells.append(cell)
                cell = {"cell_type": "markdown", "metadata": {}, "source": f"*{below}*"}
        cells.append(cell)
    cells = [{**cell, "id": f"cell-{i}"} for i, cell in enumerate(cells)]
    kept = ("kernelspec", "language_info")
    metadata = {key: notebook["metadata"][key] for key in kept if key in notebook["metadata"]}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _executed(app: Sphinx) -> dict[str, pathlib.Path]:
    """Returns the executed notebooks by page."""
    folder = pathlib.Path(app.outdir).parent / "jupyter_execute"
    found = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.ipynb")}
    return {name: path for name, path in found.items() if name in app.env.found_docs}


def _write(app: Sphinx, error: Exception | None) -> None:
    """Writes all notebooks beside the pages."""
    if error is not None or app.builder.name != "html":
        return
    executed = _executed(app)
    for docname, path in executed.items():
        values = _values(app.env).get(docname, {})
        made = converted(json.loads(path.read_text()), values, set(executed), docname)
        target = pathlib.Path(app.outdir) / FOLDER / f"{docname}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n")


def _offer(app: Sphinx, pagename: str, template: str, context: Any, doctree: Any) -> None:
    """Adds a link to the notebook below the heading of an executed page."""
    del template
    runs = doctree is not None and app.env.metadata.get(pagename, {}).get("kernelspec")
    if runs and app.builder.name == "html" and pagename.startswith(("course/", "guides/")):
        root = "../" * pagename.count("/")
        link = (
            f'<p class="notebook-link"><a href="{root}{FOLDER}/{pagename}.ipynb" download>'
            "Download this page as a notebook</a></p>"
        )
        context["body"] = context["body"].replace("</h1>", f"</h1>\n{link}", 1)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the role and the event handlers."""
    app.setup_extension("myst_nb")
    app.add_role("eval", Evaluated(), override=True)
    app.connect("env-purge-doc", _forget)
    app.connect("env-merge-info", _merge)
    app.connect("html-page-context", _offer)
    app.connect("build-finished", _write)
    return {"env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
