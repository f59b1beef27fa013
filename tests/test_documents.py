"""Runs the Python blocks of the README and the docs, and checks links and names.

Pages with a kernel in their header are notebooks, which run when the site is built.
"""

import ast
import importlib
import inspect
import pathlib
import re
import types
from typing import get_origin

import pytest

import jaxq
from tests import data

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if DOCS / "_build" not in page.parents]
DOCUMENTS = [ROOT / "README.md", *PAGES]
PROJECT = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FOLDERS = ("jaxq", "examples", "tools", "benchmarks", "docs")
PUBLIC = (
    "jaxq",
    *(
        getattr(jaxq, name).__name__
        for name in jaxq.__all__
        if isinstance(getattr(jaxq, name), types.ModuleType)
    ),
    "jaxq.interop.gguf",
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


def cells(path: pathlib.Path) -> list[str]:
    """Returns the code of a page, which readers see in a column of 80 characters."""
    found = re.findall(
        r"^```(?:python|py|\{code-cell\})[^\n]*\n(.*?)^```",
        path.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return [re.sub(r"\A---\n.*?\n---\n", "", code, flags=re.DOTALL) for code in found]


@pytest.mark.parametrize("path", DOCUMENTS, ids=identifier)
def test_code_fits_into_column_of_page(path: pathlib.Path):
    long = [line for code in cells(path) for line in code.splitlines() if len(line) > 80]
    assert not long, f"{path.name}: `ruff format --line-length 80` formats code of documents"


def test_readme_has_code():
    assert blocks(ROOT / "README.md")


# Slow, because doctests draw the same pictures, and other tests compile such programs.
SLOW = {DOCS / "pictures.md", DOCS / "guides" / "diverged.md"}


@pytest.mark.parametrize("path", data.each(DOCUMENTS, {*DOCUMENTS} - SLOW), ids=identifier)
def test_code_of_pages_runs(
    path: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    assert not (is_notebook(path) and blocks(path)), (
        "the code of a notebook must be in {code-cell} blocks"
    )
    assert is_notebook(path) or "{code-cell}" not in path.read_text(), (
        "a page with cells needs a kernel in its header"
    )
    monkeypatch.chdir(tmp_path)  # Pages write files.
    namespace: dict[str, object] = {}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", [*DOCUMENTS, *PROJECT], ids=identifier)
def test_links_within_project_resolve(path: pathlib.Path):
    for target in links(path):
        page, _, heading = target.partition("#")
        linked = path.parent / page if page else path
        assert linked.exists(), f"{path.name} links to {target}"
        assert not heading or heading in headings(linked), f"{path.name} links to {target}"


def links(path: pathlib.Path) -> list[str]:
    """Returns the targets of a page's links and pictures within the project."""
    text = without_code(path)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r' src(?:set)?="([^"]+)"', text)
    return [target for target in found if "://" not in target]


def headings(path: pathlib.Path) -> set[str]:
    """Returns the anchors that GitHub and MyST give to a page's headings."""
    found = re.findall(r"^#+ (.*)$", without_code(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def without_code(path: pathlib.Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_picture_is_a_small_svg_and_shown():
    shown = {(path.parent / target).resolve() for path in DOCUMENTS for target in links(path)}
    drawn = {path for path in (DOCS / "images").rglob("*") if path.is_file()}
    assert drawn <= shown
    assert {path.suffix for path in drawn} == {".svg"}
    assert max(path.stat().st_size for path in drawn) < 300_000


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
    """Returns the object with a dotted name, or None for a field of a record."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            is_field = isinstance(found, type) and part in inspect.get_annotations(found)
            found = None if is_field else getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


# The style sheet `jaxq.css` is not a name.
NAME = re.compile(r"\bjaxq(?:\.(?!css\b)[A-Za-z_]\w*)+")


def texts(path: pathlib.Path) -> list[str]:
    """Returns the strings of a Python file, or the text of a page."""
    if path.suffix == ".md":
        return [path.read_text()]
    constants = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    return [constant.value for constant in constants if isinstance(constant.value, str)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_dotted_names_in_texts_exist(folder: str):
    pages = [*DOCUMENTS, PROJECT[0]] if folder == "docs" else []
    bad = []
    for path in [*sorted((ROOT / folder).rglob("*.py")), *pages]:
        for name in sorted({name for text in texts(path) for name in NAME.findall(text)}):
            try:
                _find(name)
            except (AttributeError, ModuleNotFoundError):
                bad.append(f"{identifier(path)}: {name}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", DOCS / "architecture.md"], ids=identifier
)
def test_named_files_exist(path: pathlib.Path):
    folders = "jaxq|tests|docs|tools|examples|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w./]+)`", path.read_text())
    built = "docs/_build/"
    assert not [n for n in named if not n.startswith(built) and not (ROOT / n).exists()]


def test_architecture_names_modules_that_exist():
    modules = {path.stem for path in (ROOT / "jaxq").rglob("*.py")}
    packages = {path.name for path in (ROOT / "jaxq").rglob("*") if path.is_dir()}
    named = re.findall(
        r"`(?:\w+\.)*(_[a-z]\w*)(?:\.[A-Z]\w+)?`", (DOCS / "architecture.md").read_text()
    )
    assert {*named} <= modules | packages
