"""Registration of pytrees with JAX and, for serialization, with `jax.export` and Flax.

Static fields are serialized as JSON. Classes must be registered with Flax, which jaxq does not
import: if Flax is imported after jaxq, a finder on `sys.meta_path` registers them at that time.
"""

import dataclasses
import importlib
import importlib.abc
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import export

from jaxq._base.records import array_repr

__all__ = [
    "LAZY",
    "class_named",
    "from_json",
    "name_of",
    "named_tuple",
    "pytree",
    "static_text",
    "to_json",
    "with_static",
]

_C = TypeVar("_C", bound=type)

_FLAX = "flax.serialization"

_REMEDY = "Write the text by the matching function, such as rules_to_json, in this version."

LAZY = ("analysis", "lora", "optim", "ptq", "serving")  # Packages of jaxq that take long to import.


def to_json(owner: str, value: Any, kinds: Mapping[str, type]) -> str:
    """Returns nested records as JSON text; the arguments are those of `_to_plain`."""
    return json.dumps(_to_plain(owner, value, kinds))


def from_json(owner: str, text: str, kinds: Mapping[str, type], kind: type, noun: str) -> Any:
    """Returns the records that `to_json` wrote.

    Args:
      owner: the name of the caller in errors.
      text: the text.
      kinds: the dataclasses that may occur, by name.
      kind: the expected class; `tuple` for a list.
      noun: a name of the expected content for errors, such as "a recipe".

    Raises:
      ValueError: if the text is not JSON, names another class or other fields, or describes
        something else than the expected content.
    """
    try:
        value = _from_plain(owner, json.loads(text), kinds)
    except TypeError as error:  # Fields that a record lacks, or of other types.
        raise ValueError(
            f"{owner}: the text must describe {noun}, got other fields or types ({error}). "
            f"{_REMEDY}"
        ) from error
    if not isinstance(value, kind):
        raise ValueError(f"{owner}: the text must describe {noun}, got {text[:60]!r}. {_REMEDY}")
    return value


def _to_plain(owner: str, value: Any, kinds: Mapping[str, type]) -> Any:
    """Converts nested records to JSON-compatible dictionaries with the class under `"type"`.

    Args:
      owner: the name of the caller in errors.
      value: a record, tuple, dtype, number, string or None.
      kinds: the dataclasses that may occur, by name.

    Raises:
      TypeError: if the value contains anything else.
    """
    if dataclasses.is_dataclass(value) and type(value).__name__ in kinds:
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: _to_plain(owner, getattr(value, name), kinds) for name in names}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_to_plain(owner, item, kinds) for item in value]
    if isinstance(value, np.dtype):
        return {"type": "dtype", "name": value.name}
    if value is None or isinstance(value, str | int | float):
        return value
    what = "a function" if callable(value) else type(value).__name__
    remedy = "Use a registered name" if callable(value) else "Convert it to one of these types"
    raise TypeError(
        f"{owner}: values must be records of jaxq, tuples, dtypes, numbers, strings or None, got "
        f"{what}. {remedy}."
    )


def _from_plain(owner: str, value: Any, kinds: Mapping[str, type]) -> Any:
    """Converts the result of `_to_plain` back to records.

    Raises:
      ValueError: if the value names a class that is not in `kinds`.
    """
    if isinstance(value, list):
        return tuple(_from_plain(owner, item, kinds) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {k: _from_plain(owner, item, kinds) for k, item in value.items() if k != "type"}
    if value.get("type") == "dtype":
        return np.dtype(fields["name"])
    record_class = kinds.get(value.get("type", ""))
    if record_class is None:
        raise ValueError(
            f"{owner}: the text must name records of this version of jaxq, got "
            f"{value.get('type')!r:.60}. {_REMEDY}"
        )
    return record_class(**fields)


def pytree(
    *, static: Sequence[str] = (), kinds: Callable[[], Mapping[str, type]] = dict
) -> Callable[[_C], _C]:
    """Registers a dataclass as a pytree that can be exported and stored.

    Args:
      static: the names of the fields that are not arrays.
      kinds: a function that returns the record classes allowed in these fields, by name.

    Returns:
      A decorator.
    """

    def register(cls: _C) -> _C:
        names = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in names if name not in static]
        jax.tree_util.register_dataclass(cls, data, list(static))

        def write(values: Iterable[Any]) -> bytes:
            return to_json(cls.__name__, tuple(values), kinds()).encode()

        def read(text: bytes) -> tuple[Any, ...]:
            return _from_plain(cls.__name__, json.loads(text.decode()), kinds())

        export.register_pytree_node_serialization(
            cls, serialized_name=_name(cls), serialize_auxdata=write, deserialize_auxdata=read
        )

        def statics(x: Any) -> str | None:
            try:
                return write(getattr(x, name) for name in static).decode()
            except TypeError:  # User-defined functions cannot be serialized.
                return None

        _CLASSES[cls] = data, statics
        _READERS[cls] = static, write, read
        _NAMED[name_of(cls)] = cls
        if _FLAX in sys.modules:
            _register(sys.modules[_FLAX], cls)
        return cls

    return register


def named_tuple(cls: _C) -> _C:
    """Registers a named tuple with `jax.export`, and gives it a short text form.

    JAX and Flax already support named tuples.
    """
    changed: Any = cls
    changed.__repr__ = array_repr
    _NAMED[name_of(cls)] = cls
    return export.register_namedtuple_serialization(cls, serialized_name=_name(cls))


def _name(cls: type) -> str:
    return f"jaxq.{cls.__name__}"


# For each class, the names of its array fields and a function that serializes the static fields.
_CLASSES: dict[type, tuple[list[str], Callable[[Any], str | None]]] = {}


# For each class, the names of its static fields, and functions that write and read them.
_READERS: dict[type, tuple[Sequence[str], Callable[..., bytes], Callable[..., tuple]]] = {}

_NAMED: dict[str, type] = {}  # All registered classes, by `name_of`.


def name_of(cls: type) -> str:
    """Returns the name of a class of jaxq in files: its package and its own name."""
    return f"{cls.__module__.split('.')[1]}.{cls.__name__}"


def class_named(name: str) -> type | None:
    """Returns the registered class that has a name in `name_of`; None if there is none.

    A package in `LAZY` is imported. No other module is, because names come from files.
    """
    package = name.partition(".")[0]
    if name not in _NAMED and package in LAZY:
        importlib.import_module(f"jaxq.{package}")
    return _NAMED.get(name)


def static_text(x: Any) -> str:
    """Returns the static fields of an instance of a registered class as JSON; "" without any.

    Raises:
      TypeError: if a field holds a user-defined function.
    """
    if type(x) not in _READERS:
        return ""
    names, write, _ = _READERS[type(x)]
    return write(getattr(x, name) for name in names).decode()


def with_static(cls: type, fields: Mapping[str, Any], text: str) -> Any:
    """Returns an instance of a registered class from its array fields and `static_text`."""
    if cls not in _READERS:
        return cls(**fields)
    names, _, read = _READERS[cls]
    return cls(**fields, **dict(zip(names, read(text.encode()), strict=True)))


def _register(flax: Any, cls: type) -> None:
    """Registers a class with the module `flax.serialization`.

    As for Flax dataclasses, the restored object has the static fields of the target. The static
    fields are also stored, so that codes cannot be restored with a different recipe.
    """
    data, statics = _CLASSES[cls]

    def to_state_dict(x: Any) -> dict[str, Any]:
        return {
            **{name: flax.to_state_dict(getattr(x, name)) for name in data},
            "static": statics(x),
        }

    def from_state_dict(target: Any, state: Mapping[str, Any]) -> Any:
        if state["static"] != statics(target):
            others = [f.name for f in dataclasses.fields(cls) if f.name not in data]
            raise ValueError(
                f"from_state_dict: the target {cls.__name__} must have the {', '.join(others)} "
                f"that were stored, got others. Create the target in the same way as the stored "
                f"{cls.__name__}."
            )
        fields = {
            name: flax.from_state_dict(getattr(target, name), state[name], name=name)
            for name in data
        }
        return dataclasses.replace(target, **fields)

    flax.register_serialization_state(cls, to_state_dict, from_state_dict, override=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the classes as soon as `flax.serialization` is imported."""

    _is_searching = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Finds the module by the other finders, and adds the registration to its loader."""
        # Two versions of jaxq in one process, as in benchmarks, have two finders that call each
        # other.
        if fullname != _FLAX or self._is_searching:
            return None
        self._is_searching = True
        try:
            specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._is_searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for cls in _CLASSES:
                _register(module, cls)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        vars(spec.loader)["exec_module"] = exec_module
        return spec


if _FLAX not in sys.modules:
    sys.meta_path.insert(0, _Finder())
