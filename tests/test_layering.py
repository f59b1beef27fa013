"""The order of the modules, as data, and checked: each imports only from those above it.

A package stands as its modules, `package.module`; what is below `__init__` jaxq does not import.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxq"
LAYERS = [
    "tables",
    "formats",
    "catalog",
    "rounding",
    "grids",
    "codebooks",
    "tapered",
    "codecs",
    "gradients",
    "casting",
    "blocks",
    "scaling",
    "second_level",
    "ranges",
    "histograms",
    "calibrators",
    "outliers",
    "recipes",
    "presets",
    "snapping",
    "quantizers",
    "calibration",
    "gguf",
    "sharding",
    "chains",
    "trees",
    "__init__",
    "analysis.distributions",
    "analysis.machines",
    "analysis.specs",
    "analysis.reductions",
    "analysis.metrics",
    "analysis.codes",
    "analysis.quantization",
    "analysis.diagnostics",
    "analysis.trees",
    "analysis.integrals",
    "analysis.theory",
    "analysis.bounds",
    "analysis.sqnr",
    "analysis.memory",
    "analysis.__init__",
]
OPTIONAL = {"matplotlib", "rich", "sklearn", "safetensors", "gfloat", "gguf", "gmpy2", "hypothesis"}


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def layer_of(name: str) -> str:
    """The layer of a module or a package."""
    return name if name in LAYERS else f"{name}.__init__".lstrip(".")


def imports(path: pathlib.Path) -> tuple[set[str], set[str]]:
    """jaxq's modules and the top-level packages that a file imports, wherever it does."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            package, _, module = (node.module or "").partition(".")
            if package != "jaxq":
                others.add(package)
                continue
            for alias in node.names:  # A module of the package, or something in one.
                inner = layer_of(f"{module}.{alias.name}".lstrip("."))
                ours.add(inner if inner in LAYERS else layer_of(module))
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours, others


def test_every_module_has_its_layer():
    assert sorted(map(name_of, PACKAGE.rglob("*.py"))) == sorted(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_up(layer: str):
    ours, others = imports(PACKAGE / f"{layer.replace('.', '/')}.py")
    above = set(LAYERS[: LAYERS.index(layer)])
    assert ours <= above, f"{layer} imports {sorted(ours - above)}, which are not above it"
    assert not others & OPTIONAL


def test_import_brings_no_optional_package():
    names = sorted(OPTIONAL | {"torch", "optax", "chex", "jaxq.analysis", "scipy"})
    code = f"import sys, jaxq; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
