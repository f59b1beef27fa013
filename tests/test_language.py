"""The language rules of CONTRIBUTING.md that a program can check."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest

import jaxq

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("jaxq", "tests", "examples", "benchmarks", "tools", "docs")
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_build" not in path.parts
]
QUESTION = re.compile(r"(What|Whether|Where|How|Which|That|Who|Whose|When|Why)\b")
VERB = re.compile(r"[A-Z][a-z]+s\b")


def documented(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yields the nodes that have a docstring, each with the docstring's first line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text.splitlines()[0]


def is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_start_with_a_verb_or_a_noun(folder: str):
    bad = []
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        for node, line in documented(ast.parse(path.read_text())):
            function = isinstance(node, ast.FunctionDef) and not is_property(node)
            if QUESTION.match(line) or (function and not VERB.match(line)):
                bad.append(f"{path.relative_to(ROOT)}: {line}")
    assert not bad, "\n".join(bad)


# The first letters of words that American English spells in another way.
BRITISH = re.compile(
    r"\b(catalogue|colour|behaviour|neighbour|favour|centre\b|centred|analys(e|ed|ing)\b|grey\b"
    r"|(quanti|normali|optimi|seriali|initiali|recogni|summari|organi|minimi|maximi|generali)s(e|ing)"
    r"|(label|model|cancel|travel)l(ed|ing)\b|artefact|licence|programme\b|learnt\b|spelt\b|judgement)",
    re.IGNORECASE,
)


def test_spelling_is_american():
    texts = [*SOURCES, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("*.toml")]
    bad = []
    for path in texts:
        if "_build" in path.parts or path.name == pathlib.Path(__file__).name:
            continue
        words = {found[0] for found in BRITISH.finditer(path.read_text())}
        if words:
            bad.append(f"{path.relative_to(ROOT)}: {', '.join(sorted(words))}")
    assert not bad, "\n".join(bad)


def public_modules() -> Iterator[str]:
    """Yields the modules with public names: those whose path has no underscore."""
    yield "jaxq"
    for module in pkgutil.walk_packages(jaxq.__path__, "jaxq."):
        if not any(part.startswith("_") for part in module.name.split(".")[1:]):
            yield module.name


def omissions(value: Any) -> list[str]:
    """Returns the parts that the docstring of a public function or class lacks."""
    text = inspect.getdoc(value) or ""
    if is_error(value):
        return [] if text else ["a docstring"]
    missing = [] if ">>> " in text else ["an example"]
    parameters = [name for name in inspect.signature(value).parameters if name != "self"]
    missing += [f"`{name}`" for name in parameters if not re.search(rf"\b{name}\b", text)]
    if isinstance(value, types.FunctionType):
        missing += ["Args"] * (bool(parameters) and "Args:" not in text)
        returns = inspect.signature(value).return_annotation not in (None, "None")
        missing += ["Returns"] * (returns and not re.search(r"(Returns|Yields):", text))
    return missing


def is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


@pytest.mark.parametrize("name", list(public_modules()))
def test_public_docstrings_are_complete(name: str):
    module = importlib.import_module(name)
    bad = []
    for public in getattr(module, "__all__", []):
        value = inspect.unwrap(getattr(module, public))
        is_protocol = getattr(value, "_is_protocol", False)
        if isinstance(value, type | types.FunctionType) and not is_protocol:
            bad += [f"{name}.{public} lacks {part}" for part in omissions(value)]
    assert not bad, "\n".join(bad)
