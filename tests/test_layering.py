"""The order of the modules, as data, and checked: each imports only from those above it."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxq"
LAYERS = [
    "tables",
    "meshes",
    "sealed",
    "formats",
    "catalog",
    "rounding",
    "bits",
    "draws",
    "grids",
    "binary",
    "codebooks",
    "tapered",
    "codecs",
    "attaching",
    "gradients",
    "casting",
    "blocks",
    "reductions",
    "scaling",
    "second_level",
    "ranges",
    "histograms",
    "calibrators",
    "outliers",
    "recipes",
    "presets",
    "snapping",
    "quantized",
    "sharding",
    "quantizers",
    "qat",
    "calibration",
    "gguf",
    "chains",
    "trees",
    "cotangents",
    "hadamard",
    "accumulation",
    "dot_recipes",
    "contractions",
    "execution",
    "histories",
    "products",
    "dots",
    "transforms",
    "optim",
    "analysis",
    "__init__",
    "cli",
    "__main__",
]
# Packages that only some modules may import, and only inside functions or for types.
OPTIONAL = {"matplotlib", "rich", "sklearn", "safetensors", "gfloat", "gguf", "gmpy2", "hypothesis"}
ALLOWED = {"analysis/plots": {"matplotlib"}, "cli": {"rich"}}


def files(module: str) -> list[pathlib.Path]:
    """The file of a module, or those of a package."""
    path = PACKAGE / f"{module}.py"
    return [path] if path.exists() else sorted((PACKAGE / module).rglob("*.py"))


def imports(path: pathlib.Path) -> tuple[set[str], set[str]]:
    """jaxq's modules and the top-level packages that a file imports, wherever it does."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            package, _, module = (node.module or "").partition(".")
            if package == "jaxq":
                ours |= {module.split(".")[0]} if module else {a.name for a in node.names}
            else:
                others.add(package)
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours, others


def test_every_module_has_its_layer():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.stem for path in PACKAGE.glob("*.py")} | packages == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_point_up(module: str):
    above = set(LAYERS[: LAYERS.index(module)])
    for path in files(module):
        ours, others = imports(path)
        ours -= {module} if path.parent != PACKAGE else set()
        assert ours <= above, f"{module} imports {sorted(ours - above)}, which are not above it"
        allowed = ALLOWED.get(path.parent.relative_to(PACKAGE).as_posix(), set())
        assert not others & (OPTIONAL - allowed)


def test_import_brings_no_optional_package():
    names = sorted(OPTIONAL | {"torch", "optax", "chex", "jaxq.analysis"})
    assert imported("jaxq", names) == "[]"


def test_import_of_the_analysis_brings_no_optional_package():
    assert imported("jaxq.analysis.plots", sorted(OPTIONAL)) == "[]"


def imported(module: str, names: list[str]) -> str:
    """Which packages a fresh interpreter has after the import of a module."""
    code = f"import sys, {module}; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
