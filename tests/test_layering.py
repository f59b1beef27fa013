"""The structure of the library: packages, dependencies and private modules."""

import ast
import functools
import graphlib
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxq"
# Each package imports only from packages before it.
PACKAGES = [
    "_base",
    "_jax",
    "formats",
    "gradients",
    "numerics",
    "_ggml",
    "recipes",
    "quantizers",
    "qat",
    "products",
    "models",
    "interop",
    "ptq",
    "serving",
    "lora",
    "optim",
    "analysis",
    "cli",
]
# The sub-packages and modules of large packages. Each imports only from those before it.
SUB_PACKAGES = {
    "models": ["_reading", "_rules", "_trees", "_assigning", "_running", "_transforms"],
    "ptq": [
        "_statistics",
        "_solvers",
        "_calibration_runs",
        "_results",
        "_weight_quantization",
        "_rounding",
        "_transformations",
        "_budgets",
    ],
}
# Packages without public names, whose private modules all other packages may import.
INTERNAL = {"_base", "_jax", "_ggml"}
# Tests that replace or call what is private: a failing write, compilations, places of labels,
# parts of algorithms.
LOOKING_INSIDE = {"test_cli.py", "test_cli_streaming.py", "test_platforms.py", "test_plots.py"}
# Functions with the parameters of the functions of JAX with the same names.
SIGNATURES_OF_JAX = {"conv_general_dilated", "ragged_dot", "ragged_dot_general"}
# Other libraries that only some packages may import, and only inside functions or for types.
OPTIONAL = {"matplotlib", "rich", "sklearn", "safetensors", "gfloat", "gguf", "gmpy2", "hypothesis"}
ALLOWED = {
    "jaxq.analysis._live": {"rich"},
    "jaxq.analysis.plots": {"matplotlib"},
    "jaxq.cli": {"rich"},
}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def package_of(module: str) -> str:
    """Returns the package of a module, which is empty for `jaxq` itself."""
    return module.split(".")[1] if "." in module else ""


@functools.cache
def imports(path: pathlib.Path) -> frozenset[str]:
    """Returns the modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports must be absolute"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in MODULES else module)
    return frozenset(found)


def test_all_packages_are_listed():
    found = {package_of(module) for module in MODULES}
    assert found == {*PACKAGES, "", "__main__"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_from_packages_before_them(package: str):
    before = {*PACKAGES[: PACKAGES.index(package)], package}
    for module, path in MODULES.items():
        if package_of(module) == package:
            used = {package_of(name) for name in imports(path) if name.split(".")[0] == "jaxq"}
            assert used <= before, f"{module} imports from {sorted(used - before)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_of_a_package_import_each_other_without_cycles(package: str):
    mine = {module for module in MODULES if package_of(module) == package}
    graph = {module: imports(MODULES[module]) & mine for module in mine}
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError, which names the cycle.


@pytest.mark.parametrize("package", SUB_PACKAGES)
def test_sub_packages_import_only_from_those_before_them(package: str):
    """Checks also that modules import from other sub-packages only what those export."""
    order = SUB_PACKAGES[package]
    prefix = f"jaxq.{package}."
    modules = {m.removeprefix(prefix): MODULES[m] for m in MODULES if m.startswith(prefix)}
    assert {module.split(".")[0] for module in modules} == set(order)
    for module, path in modules.items():
        mine = module.split(".")[0]
        used = {name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix)}
        others = {name for name in used if name.split(".")[0] != mine}
        assert others <= set(order[: order.index(mine)]), f"{module} imports {sorted(others)}"
    inside = imports(MODULES[f"jaxq.{package}"])
    names = {name.removeprefix(prefix) for name in inside if name.startswith(prefix)}
    assert names <= set(order), f"jaxq.{package} imports {sorted(names - set(order))}"


def test_no_package_imports_private_modules_of_another():
    for module, path in MODULES.items():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "jaxq" or len(parts) < 3 or parts[1] in {package_of(module), *INTERNAL}:
                continue
            assert not any(part.startswith("_") for part in parts[2:]), f"{module} imports {name}"


@pytest.mark.parametrize("folder", ["tests", "docs", "examples", "benchmarks", "tools"])
def test_no_other_file_imports_private_modules(folder: str):
    root = PACKAGE.parent / folder
    for path in root.rglob("*.py"):
        if path.name in LOOKING_INSIDE:
            continue
        for name in imports(path):
            assert not is_private(name), f"{path.name} imports {name}"
    for path in root.rglob("*.md"):
        for name in re.findall(r"(?:from|import) (jaxq[\w.]*)", path.read_text()):
            assert not is_private(name), f"{path.name} imports {name}"


def is_private(name: str) -> bool:
    """Returns whether a module or name of jaxq is private to a package."""
    top, *parts = name.split(".")
    return top == "jaxq" and bool({p for p in parts if p.startswith("_")} - INTERNAL)


def test_no_module_is_longer_than_400_lines():
    for module, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 400, f"{module}: split it by its concerns"


def test_no_function_takes_more_than_six_positional_parameters():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in SIGNATURES_OF_JAX:
                names = [a.arg for a in node.args.posonlyargs + node.args.args]
                count = len([name for name in names if name not in ("self", "cls")])
                assert count <= 6, f"{module}.{node.name}: group the parameters in a record"


def test_optional_packages_are_imported_only_where_allowed():
    for module, path in MODULES.items():
        allowed = set().union(*(v for k, v in ALLOWED.items() if module.startswith(k)))
        packages = {name.split(".")[0] for name in imports(path)}
        assert not packages & (OPTIONAL - allowed), module


def test_public_names_are_listed():
    import jaxq

    assert dir(jaxq) == sorted(jaxq.__all__)
    for package in PACKAGES:
        module = sys.modules.get(f"jaxq.{package}")
        if module is not None and package not in INTERNAL:
            assert all(hasattr(module, name) for name in module.__all__), package


def test_import_loads_no_optional_package():
    names = sorted(OPTIONAL | {"torch", "optax", "chex", "jaxq.analysis", "jaxq.optim", "jaxq.ptq"})
    assert imported("jaxq", names) == "[]"


def test_import_of_plots_loads_no_optional_package():
    assert imported("jaxq.analysis.plots", sorted(OPTIONAL)) == "[]"


def imported(module: str, names: list[str]) -> str:
    """Returns which packages a new interpreter loads when it imports a module, as text."""
    code = f"import sys, {module}; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_listed_workarounds_exist():
    """Checks the names in the list of workarounds for JAX and XLA."""
    workarounds = importlib.import_module("jaxq._jax")
    names = re.findall(r"^- `([\w.]+)`", workarounds.__doc__ or "", re.MULTILINE)
    assert len(names) > 10
    for name in names:
        module, *attribute = name.split(".")
        found = importlib.import_module(f"jaxq._jax.{module}")
        assert all(hasattr(found, part) for part in attribute), name
