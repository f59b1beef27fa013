"""The structure of the library: rooms, dependencies and private modules."""

import ast
import functools
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxq"
# Each room imports only from rooms before it.
ROOMS = [
    "_base",
    "_jax",
    "formats",
    "gradients",
    "numerics",
    "recipes",
    "quantizers",
    "qat",
    "products",
    "models",
    "ptq",
    "serving",
    "lora",
    "interop",
    "optim",
    "analysis",
    "cli",
]
# Rooms without public names, whose private modules all other rooms may import.
INTERNAL = {"_base", "_jax"}
# Packages that only some rooms may import, and only inside functions or for types.
OPTIONAL = {"matplotlib", "rich", "sklearn", "safetensors", "gfloat", "gguf", "gmpy2", "hypothesis"}
ALLOWED = {"jaxq.analysis.plots": {"matplotlib"}, "jaxq.cli": {"rich"}}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """Returns the room of a module, which is empty for `jaxq` itself."""
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


def test_all_rooms_are_listed():
    found = {room_of(module) for module in MODULES}
    assert found == {*ROOMS, "", "__main__"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_from_rooms_before_them(room: str):
    before = {*ROOMS[: ROOMS.index(room)], room}
    for module, path in MODULES.items():
        if room_of(module) == room:
            rooms = {room_of(name) for name in imports(path) if name.split(".")[0] == "jaxq"}
            assert rooms <= before, f"{module} imports from {sorted(rooms - before)}"


@pytest.mark.parametrize("room", ROOMS)
def test_modules_of_a_room_import_each_other_without_cycles(room: str):
    mine = {module for module in MODULES if room_of(module) == room}
    graph = {module: imports(MODULES[module]) & mine for module in mine}
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError, which names the cycle.


def test_no_room_imports_private_modules_of_another():
    for module, path in MODULES.items():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "jaxq" or len(parts) < 3 or parts[1] in {room_of(module), *INTERNAL}:
                continue
            assert not any(part.startswith("_") for part in parts[2:]), f"{module} imports {name}"


def test_optional_packages_are_imported_only_where_allowed():
    for module, path in MODULES.items():
        allowed = set().union(*(v for k, v in ALLOWED.items() if module.startswith(k)))
        packages = {name.split(".")[0] for name in imports(path)}
        assert not packages & (OPTIONAL - allowed), module


def test_public_names_are_listed():
    import jaxq

    assert dir(jaxq) == sorted(jaxq.__all__)
    for room in ROOMS:
        package = sys.modules.get(f"jaxq.{room}")
        if package is not None and room not in INTERNAL:
            assert all(hasattr(package, name) for name in package.__all__), room


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
