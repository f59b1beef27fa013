"""Storage of parameter trees with quantized arrays in one safetensors file.

Every array is a tensor of the file, named by its path in the tree. The file's metadata has one key,
`jaxq`, with JSON text: the version of this layout, and the tree with the name of its tensor in
place of each array. It also contains static fields, such as the recipe of a `Quantized`.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax import numpy as jnp

from jaxq._jax.serialization import class_named, name_of, static_text, with_static
from jaxq.interop._entries import FileError
from jaxq.interop._files import TensorFile, open_tensors
from jaxq.interop._safetensors import DTYPES, Tensor, write_tensors
from jaxq.interop._tree_checks import check_array, check_key, check_text
from jaxq.interop._writing import atomic

__all__ = ["VERSION", "load", "save", "save_streamed"]

VERSION = 1

_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}
_TYPES = {name: kind for name, kind in vars(ml_dtypes).items() if isinstance(kind, type)}
_EXTENSIONS = (name for name, kind in _TYPES.items() if issubclass(kind, np.generic))
_DTYPES = {*_NAMES, *_EXTENSIONS, "complex128"}  # Those that safetensors lacks are stored as bytes.
# The kinds of random keys, by the names in their dtypes.
_KEYS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}


class _TreeError(ValueError):
    """An error about the argument `like` or the class of a node in a valid file."""


class _Leaf(NamedTuple):
    """A leaf of a tree that is being saved, with the name of its tensor."""

    name: str
    value: Any


class _Stored(NamedTuple):
    """A reference to an array in a file: its tensor's name, its dtype, and its random key type."""

    name: str
    dtype: str
    key_type: str | None


def save(path: str | pathlib.Path, tree: Any) -> None:
    """Writes a tree of arrays and quantized arrays to one safetensors file.

    The file holds the packed codes, the scales and the recipes, so that `load` returns the same
    tree bit for bit. Each array is a tensor named by its path, such as `layers/0/kernel/codes`,
    which any safetensors reader can list. An existing file is replaced only when the new one is
    complete. A killed process leaves a hidden file `.NAME.*.tmp`, which a later `save` removes.

    Args:
      path: the path of the file, which should end in `.safetensors`.
      tree: a pytree of arrays, random keys, Python numbers, strings and jaxq's own pytrees:
        `Quantized`, frozen rules, and the states of observers and optimizers. Other node classes,
        such as optax states, are allowed if `like` is passed to `load`.

    Raises:
      TypeError: if a leaf cannot be stored, or a recipe holds a user-defined function.
      ValueError: if an array is not wholly addressable by this process.
      OSError: if the file cannot be written.

    Example:
      >>> import jax.numpy as jnp, jaxq, tempfile
      >>> tree = {"w": jaxq.quantize(jnp.ones((4, 32)), "q4_0"), "bias": jnp.ones(4)}
      >>> path = tempfile.mkdtemp() + "/model.safetensors"
      >>> jaxq.save(path, tree)
      >>> jaxq.load(path)["w"].dequantize().shape
      (4, 32)
    """
    leaves: list[_Leaf] = []
    plain = _describe(tree, (), leaves, set())
    tensors = [_tensor(leaf) for leaf in leaves if _is_array(leaf.value)]
    text = json.dumps({"version": VERSION, "tree": plain}, separators=(",", ":"))
    with atomic(path) as file:
        write_tensors(file, tensors, {"jaxq": text})


def save_streamed(
    path: str | pathlib.Path, shapes: Mapping[str, Any], read: Callable[[str], Any]
) -> None:
    """Writes the file that `save` would write for a dictionary, with one value in memory at a time.

    Args:
      path: the path of the file.
      shapes: the dictionary, with `jax.ShapeDtypeStruct` in place of arrays.
      read: a function that returns the value of a key; called once per key.
    """
    tensors, children, names = [], [], set()
    for key, shape in sorted(shapes.items()):  # In the order of JAX.
        leaves: list[_Leaf] = []
        children.append([key, _describe(shape, (key,), leaves, names)])
        parts: list[Any] = []

        def part(
            i: int, key: str = key, parts: list[Any] = parts, count: int = len(leaves)
        ) -> np.ndarray:
            if not parts:
                parts.extend(jax.tree.leaves(read(key)))
            array = np.asarray(parts[i])
            if i == count - 1:
                parts.clear()
            return array

        tensors += [
            _tensor(leaf)._replace(read=functools.partial(part, i)) for i, leaf in enumerate(leaves)
        ]
    plain = {"type": "dict", "children": children}
    text = json.dumps({"version": VERSION, "tree": plain}, separators=(",", ":"))
    with atomic(path) as file:
        write_tensors(file, tensors, {"jaxq": text})


def load(path: str | pathlib.Path, *, like: Any = None, sharding: Any = None) -> Any:
    """Returns the tree that `save` wrote, bit for bit.

    Tensors are read one by one, so memory never holds a second copy of the whole file.

    Args:
      path: the path of the file.
      like: a tree of the same structure, whose leaves may be `jax.ShapeDtypeStruct`, for example
        from `jax.eval_shape`. Arrays, numbers and texts come from the file. It is needed if the
        tree has nodes other than dictionaries, lists, tuples and jaxq's own. Default: None.
      sharding: a `jax.sharding.Sharding` or device for all arrays, or a tree of them that is a
        prefix of the result, for example from `jaxq.quantized_sharding`. Default: None, which
        places arrays on the default device.

    Returns:
      The tree, with JAX arrays; NumPy arrays for dtypes that JAX represents only with x64.

    Raises:
      FileError: if the file is damaged, was not written by `jaxq.save`, or has an unknown version.
      ValueError: if `like` is needed but was not passed, or differs from the stored tree.

    Example:
      >>> import collections, jax, jax.numpy as jnp, jaxq, tempfile
      >>> State = collections.namedtuple("State", "mean")
      >>> path = tempfile.mkdtemp() + "/state.safetensors"
      >>> jaxq.save(path, State(jnp.ones(2)))
      >>> jaxq.load(path, like=State(jax.ShapeDtypeStruct((2,), jnp.float32)))
      State(mean=Array([1., 1.], dtype=float32))
    """
    with open_tensors(path, raw=True) as file:
        plain = _plain_tree(file)
        try:
            tree = _build_tree(plain) if like is None else _fill_tree(like, plain)
        except _TreeError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FileError(
                f"{path}: the description of its tree is damaged: {error}. Save the tree again."
            ) from error
        entries = {entry.name: entry for entry in file.entries}

        def read(stored: Any, target: Any) -> Any:
            if not isinstance(stored, _Stored):
                return stored
            if stored.name not in entries:
                raise FileError(
                    f"{path}: the tensor {stored.name!r} is missing. Save the tree again."
                )
            array = file.raw(entries[stored.name])
            return _restore_array(path, array, stored, target)

        def read_all(target: Any, part: Any) -> Any:
            return jax.tree.map(lambda stored: read(stored, target), part, is_leaf=_is_stored)

        return jax.tree.map(read_all, sharding, tree, is_leaf=lambda x: x is None)


def _is_stored(x: Any) -> bool:
    return isinstance(x, _Stored)


def _restore_array(
    path: Any, array: np.ndarray, stored: _Stored, target: Any
) -> jax.Array | np.ndarray:
    """Returns an array in its original dtype, on a device or sharding."""
    dtype = np.dtype(stored.dtype)
    if array.dtype != dtype:  # A dtype that safetensors lacks, stored as bytes.
        if array.dtype != np.uint8 or array.shape[-1:] != (dtype.itemsize,):
            raise FileError(
                f"{path}: {stored.name!r} must hold {stored.dtype}, got {array.dtype} of shape "
                f"{array.shape}. Save the tree again."
            )
        array = array.view(dtype)[..., 0]
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return array
    if stored.key_type is None:
        return jax.device_put(array, target)
    return jax.device_put(
        jax.random.wrap_key_data(jnp.asarray(array), impl=stored.key_type), target
    )


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Returns the keys and children of a node of a tree; None for a leaf."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if len(pairs) == 1 and not pairs[0][0]:
        return None
    return [(_key(path[0]), child) for path, child in pairs]


def _key(entry: Any) -> Any:
    """Returns the key of a dictionary, the index of a sequence or the name of a field."""
    names = (name for name in ("key", "idx", "name") if hasattr(entry, name))
    key = getattr(entry, next(names, "key"), entry)
    check_key(key)
    return key


def _describe(node: Any, path: tuple[Any, ...], leaves: list[_Leaf], names: set[str]) -> Any:
    """Returns the description of a tree in JSON, and collects its leaves in JAX's order."""
    children = _children(node)
    if children is None:
        return _describe_leaf(node, path, leaves, names)
    if node is None:
        return None
    inner = [[key, _describe(child, (*path, key), leaves, names)] for key, child in children]
    kind = type(node)
    if kind in (dict, list, tuple):
        return {"type": kind.__name__, "children": inner}
    if kind.__module__.startswith("jaxq.") and class_named(name_of(kind)) is kind:
        return {"type": name_of(kind), "static": static_text(node), "children": inner}
    return {"type": "other", "class": kind.__name__, "children": inner}


def _describe_leaf(
    value: Any, path: tuple[Any, ...], leaves: list[_Leaf], names: set[str]
) -> dict[str, Any]:
    name = "/".join(map(str, path)) or "array"
    if isinstance(value, bool | int | float | str) and not isinstance(value, np.generic):
        check_text("strings of a tree", value)
        leaves.append(_Leaf(name, value))
        return {"value": value}
    check_array(name, value)
    if not (_is_array(value) or isinstance(value, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"save: leaves must be arrays, numbers or strings, got {type(value).__name__} at "
            f"{name!r:.80}. Leave it out of the tree."
        )
    base, count = name, 1
    while name in names or name == "__metadata__":
        count += 1
        name = f"{base}#{count}"  # {"a/b": x, "a": {"b": y}} has one path twice.
    names.add(name)
    leaves.append(_Leaf(name, value))
    shape = list(value.shape)
    if _is_key(value):
        data = jax.eval_shape(jax.random.key_data, value)
        kind = value.dtype.name.removeprefix("key<").removesuffix(">")
        if kind not in _KEYS:
            raise TypeError(
                f"save: {name!r} is a random key of an unsupported type, {value.dtype}. Store "
                "jax.random.key_data(key) instead."
            )
        return {"array": name, "dtype": data.dtype.name, "shape": shape, "key": _KEYS[kind]}
    return {"array": name, "dtype": value.dtype.name, "shape": shape}


def _tensor(leaf: _Leaf) -> Tensor:
    """Returns the tensor that holds an array."""
    value = leaf.value
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise ValueError(
            f"save: {leaf.name!r} has parts on other hosts. Gather it first, for example by "
            "jax.experimental.multihost_utils.process_allgather."
        )
    value = jax.random.key_data(value) if _is_key(value) else value
    dtype = np.dtype(value.dtype)
    if dtype.name not in _DTYPES:
        raise TypeError(
            f"save: {leaf.name!r} must have a dtype of JAX, got {dtype}. Convert it first."
        )

    def read() -> np.ndarray:
        return np.asarray(value)

    name = _NAMES.get(dtype.name)
    if name is not None:
        return Tensor(leaf.name, name, value.shape, read)
    return Tensor(leaf.name, "U8", (*value.shape, dtype.itemsize), read)


def _plain_tree(file: TensorFile) -> Any:
    """Returns the description of the tree in a file."""
    text = file.metadata.get("jaxq")
    if text is None:
        raise FileError(
            f"{file.path}: it was not written by jaxq.save. `jaxq.interop.open_tensors` reads any "
            "safetensors file."
        )
    try:
        content = json.loads(text)
        version, tree = content["version"], content["tree"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileError(
            f"{file.path}: its jaxq metadata are damaged ({error}). Save the tree again."
        ) from error
    if version != VERSION:
        raise FileError(
            f"{file.path}: its layout has version {version!r:.20}, but this jaxq reads version "
            f"{VERSION}. Use the version of jaxq that wrote it, or a newer one."
        )
    return tree


def _build_tree(plain: Any) -> Any:
    """Returns the tree of a description, with `_Stored` in place of arrays."""
    if plain is None:
        return None
    if "value" in plain:
        return plain["value"]
    if "array" in plain:
        return _parse_stored(plain)
    kind = plain["type"]
    if kind == "other":
        raise _TreeError(
            f"load: the tree has a node of class {plain['class']!r:.80}, which a file cannot "
            "restore. Pass `like`, a tree of the same structure."
        )
    fields = [(key, _build_tree(child)) for key, child in plain["children"]]
    if kind == "dict":
        return dict(fields)
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(child for _, child in fields)
    cls = class_named(kind)
    if cls is None:
        raise _TreeError(
            f"load: this version of jaxq has no class {kind!r:.80}. Use the version that wrote the "
            "file, or pass `like`."
        )
    return with_static(cls, dict(fields), plain.get("static", ""))


def _parse_stored(plain: dict[str, Any]) -> _Stored:
    name, key = plain["dtype"], plain.get("key")
    if name not in _DTYPES:
        raise ValueError(f"{plain['array']!r:.80} has the unknown dtype {name!r:.40}")
    if key not in (None, *_KEYS.values()):
        raise ValueError(f"{plain['array']!r:.80} is a key of the unknown kind {key!r:.40}")
    return _Stored(plain["array"], name, key)


def _fill_tree(like: Any, plain: Any) -> Any:
    """Rebuilds the tree of a description, with the node classes of `like`."""
    leaves: list[_Leaf] = []
    wanted, found = [*_lines(_describe(like, (), leaves, set()))], [*_lines(plain)]
    for ours, theirs in zip(wanted, found, strict=False):
        if ours != theirs:
            raise _TreeError(
                f"load: `like` must have the structure of the file, {theirs:.100}, got "
                f"{ours:.100}. Pass a tree of the structure that was saved."
            )
    if len(wanted) != len(found):
        raise _TreeError(
            "load: `like` must have as many leaves as the file, got more or fewer. Pass a tree of "
            "the structure that was saved."
        )
    arrays = [node for node in _nodes(plain) if node and ("array" in node or "value" in node)]
    stored = [_parse_stored(node) if "array" in node else node["value"] for node in arrays]
    return jax.tree.unflatten(jax.tree.structure(like), stored)


def _nodes(plain: Any) -> Iterator[Any]:
    """Yields all nodes of a description, parents first."""
    yield plain
    for _, child in (plain or {}).get("children", ()):
        yield from _nodes(child)


def _lines(plain: Any) -> Iterator[str]:
    """Yields one line of text per node, for comparisons, without the values of Python leaves."""
    for node in _nodes(plain):
        short = {k: v for k, v in (node or {}).items() if k != "children"}
        if "value" in short:
            short["value"] = "text" if isinstance(short["value"], str) else "number"
        keys = [key for key, _ in (node or {}).get("children", ())]
        yield f"{short} with {keys}" if keys else f"{short}"
