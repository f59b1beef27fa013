"""Every Python block of the README and the docs runs; notebooks run when the site is built.

A page of the docs with a kernel in its header is a notebook, and has no plain Python block.
"""

import importlib
import pathlib
import re
from typing import get_origin

import pytest

import jaxq

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if DOCS / "_build" not in page.parents]
DOCUMENTS = [ROOT / "README.md", *PAGES]
PROJECT = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PUBLIC = (
    "jaxq",
    *(
        f"jaxq.{name}"
        for name in jaxq.__all__
        if hasattr(getattr(jaxq, name), "__path__") or hasattr(getattr(jaxq, name), "__spec__")
    ),
    "jaxq.analysis",
    "jaxq.analysis.distributions",
    "jaxq.analysis.machines",
    "jaxq.analysis.plots",
)


def blocks(path: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def is_notebook(path: pathlib.Path) -> bool:
    return path.read_text().startswith("---\n") and "\nkernelspec:\n" in path.read_text()


def identifier(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_readme_has_code():
    assert blocks(ROOT / "README.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=identifier)
def test_blocks_run(path: pathlib.Path):
    assert not (is_notebook(path) and blocks(path)), "a notebook's code stands in {code-cell}s"
    assert is_notebook(path) or "{code-cell}" not in path.read_text(), "cells need a kernel"
    namespace: dict[str, object] = {}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", [*DOCUMENTS, *PROJECT], ids=identifier)
def test_links_within_the_project_lead_somewhere(path: pathlib.Path):
    for target in links(path):
        page, _, heading = target.partition("#")
        there = path.parent / page if page else path
        assert there.exists(), f"{path.name} links to {target}"
        assert not heading or heading in headings(there), f"{path.name} links to {target}"


def links(path: pathlib.Path) -> list[str]:
    """What a page links to within the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(path))
    return [target for target in found if "://" not in target]


def headings(path: pathlib.Path) -> set[str]:
    """The headings of a page as GitHub and MyST name them in links."""
    found = re.findall(r"^#+ (.*)$", without_code(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def without_code(path: pathlib.Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_picture_is_shown():
    shown = {(path.parent / target).resolve() for path in DOCUMENTS for target in links(path)}
    assert set((DOCS / "images").rglob("*.png")) <= shown


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str):
    module = importlib.import_module(name)
    assert module.__doc__
    reference = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    described = set(
        re.findall(r"^(?:\.\. auto\w+::|```\{py:\w+\}) (\S+)$", reference, re.MULTILINE)
    )
    objects = {id(_find(path)) for path in described}
    for public in module.__all__:
        thing = getattr(module, public)
        known = f"{name}.{public}" in described or id(thing) in objects
        assert known, f"no page in docs/api describes {name}.{public}"
        if callable(thing) and get_origin(thing) is None:
            assert thing.__doc__, f"{name}.{public} has no docstring"


def _find(path: str) -> object:
    """What a dotted name stands for; it must exist."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)
