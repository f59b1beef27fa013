"""A function traced with its arguments: what is an array in them, what a parameter, what static."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq.quantized import Quantized
from jaxq.transforms import compat
from jaxq.transforms.origins import Origin

__all__ = ["Traced", "trace"]


@dataclasses.dataclass
class Traced:
    """A function's program, and the arguments that it was traced with.

    Attributes:
      jaxpr: from the arguments' arrays to the results'.
      arrays: the arguments' arrays, `Quantized` among them, in the order of the leaves.
      origins: of each, None where it is no parameter.
      parameters: the tree of the parameters and, for each of its leaves, its place in `arrays` or
        None.
      paths: the paths of these leaves, and the leaves.
      rebuild: from the results' arrays to the results.
    """

    jaxpr: Any
    arrays: list[Any]
    origins: list[Origin | None]
    parameters: tuple[Any, list[int | None]]
    paths: dict[str, Any]
    rebuild: Callable[[Sequence[Any]], Any]


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def trace(
    owner: str,
    fn: Callable[..., Any],
    argnums: int | Sequence[int],
    args: tuple,
    kwargs: dict[str, Any],
) -> Traced:
    """Traces a function.

    Args:
      owner: what errors call the caller.
      fn: the function; its own leaves are the parameters if it is a pytree.
      argnums: which arguments are, otherwise.
      args: positional arguments.
      kwargs: arguments by name.

    Raises:
      TypeError: the function cannot be traced.
      ValueError: `argnums` names no argument.
    """
    module = not jax.tree_util.all_leaves([fn])
    which = [] if module else [argnums] if isinstance(argnums, int) else list(argnums)
    for n in which:
        if not -len(args) <= n < len(args):
            raise ValueError(
                f"{owner}: `argnums` names argument {n}, got {len(args)} positional arguments. "
                "The parameters are to be given by position."
            )
    which = [n % len(args) for n in which]
    call = (fn if module else None, args, kwargs)
    leaves, structure = jax.tree_util.tree_flatten_with_path(call, is_leaf=_is_quantized)
    places, arrays, origins, own, paths = [], [], [], [], {}
    for i, (path, leaf) in enumerate(leaves):
        where = path[0].idx, getattr(path[1], "idx", None) if len(path) > 1 else None
        is_own = where[0] == 0 if module else where[0] == 1 and where[1] in which
        traced = compat.is_array(leaf) or _is_quantized(leaf)
        name = jax.tree_util.keystr(path[1 if module else 2 :], simple=True, separator="/")
        if is_own:
            own.append(len(arrays) if traced else None)
            paths[name] = leaf
        if not traced:
            continue
        origin = Origin(name, len(arrays), leaf.shape, tuple(range(leaf.ndim))) if is_own else None
        origins.append(origin)
        places.append(i)
        arrays.append(leaf)
    results: dict[str, Any] = {}

    def flat(*arrays: Any) -> list[Any]:
        full = [leaf for _, leaf in leaves]
        for i, array in zip(places, arrays, strict=True):
            full[i] = array
        own, args, kwargs = jax.tree_util.tree_unflatten(structure, full)
        out, results["tree"] = jax.tree.flatten((own if module else fn)(*args, **kwargs))
        results["leaves"] = [None if compat.is_array(leaf) else leaf for leaf in out]
        return [leaf for leaf in out if compat.is_array(leaf)]

    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_quantized(leaf) else leaf
        for leaf in arrays
    ]
    try:
        jaxpr = jax.make_jaxpr(flat)(*shapes)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        said = str(error).split("\n")[0].rstrip(".")
        raise TypeError(
            f"{owner}: `fn` cannot be traced, as it needs the values of arrays in "
            f"{compat.source_of_error(error)}: {said}. Give what decides as a Python value, or use "
            "jax.lax.cond and jax.numpy."
        ) from error

    def rebuild(arrays: Sequence[Any]) -> Any:
        left = iter(arrays)
        static = results["leaves"]
        # None is what stands for an array; as a leaf of its own it does not occur.
        full = [next(left) if leaf is None else leaf for leaf in static]
        return jax.tree.unflatten(results["tree"], full)

    parameters = fn if module else [args[n] for n in which]
    return Traced(jaxpr, arrays, origins, (parameters, own), paths, rebuild)
