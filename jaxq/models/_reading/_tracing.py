"""Tracing of a function whose arguments are arrays, parameters and static values."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq._base.paths import leaf_path
from jaxq._jax import compat
from jaxq.models._reading._origins import Origin, of_leaf
from jaxq.quantizers import Quantized

__all__ = ["Traced", "trace"]


@dataclasses.dataclass
class Traced:
    """A function's program, and the arguments that it was traced with.

    Attributes:
      jaxpr: the program, from the arrays of the arguments to the arrays of the results.
      arrays: the arguments' arrays, including `Quantized`, in the order of the leaves.
      origins: the origin of each array, None if it is not a parameter.
      parameters: the tree of the parameters, and the index of each of its leaves in `arrays` or
        None.
      paths: the leaves of the parameters by their paths.
      rebuild: a function from the results' arrays to the results.
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
      owner: the name of the calling function, for errors.
      fn: the function; if it is a pytree, its own leaves are the parameters.
      argnums: the positions of the parameters among the arguments, if `fn` is not a pytree.
      args: the positional arguments.
      kwargs: the keyword arguments.

    Raises:
      TypeError: if the function cannot be traced.
      ValueError: if `argnums` names no argument.
    """
    module = not jax.tree_util.all_leaves([fn])
    positions = [] if module else [argnums] if isinstance(argnums, int) else list(argnums)
    for n in positions:
        if not -len(args) <= n < len(args):
            raise ValueError(
                f"{owner}: `argnums` must name positional arguments, got {n} for a call with "
                f"{len(args)}. Pass the parameters by position."
            )
    positions = [n % len(args) for n in positions]
    call = (fn if module else None, args, kwargs)
    leaves, structure = jax.tree_util.tree_flatten_with_path(call, is_leaf=_is_quantized)
    places, arrays, origins, of_leaves, paths = [], [], [], [], {}
    for i, (path, leaf) in enumerate(leaves):
        where = path[0].idx, getattr(path[1], "idx", None) if len(path) > 1 else None
        is_parameter = where[0] == 0 if module else where[0] == 1 and where[1] in positions
        traced = compat.is_array(leaf) or _is_quantized(leaf)
        name = leaf_path(path[1 if module else 2 :])
        if is_parameter:
            of_leaves.append(len(arrays) if traced else None)
            paths[name] = leaf
        if not traced:
            continue
        origin = of_leaf(name, len(arrays), leaf.shape, leaf.dtype) if is_parameter else None
        origins.append(origin)
        places.append(i)
        arrays.append(leaf)
    results: dict[str, Any] = {}

    def flat(*arrays: Any) -> list[Any]:
        full = [leaf for _, leaf in leaves]
        for i, array in zip(places, arrays, strict=True):
            full[i] = array
        function, args, kwargs = jax.tree_util.tree_unflatten(structure, full)
        out, results["tree"] = jax.tree.flatten((function if module else fn)(*args, **kwargs))
        results["leaves"] = [None if compat.is_array(leaf) else leaf for leaf in out]
        return [leaf for leaf in out if compat.is_array(leaf)]

    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_quantized(leaf) else leaf
        for leaf in arrays
    ]
    try:
        # `disable_jit` would unroll loops, which changes states and keys.
        with jax.disable_jit(False):
            jaxpr = jax.make_jaxpr(flat)(*shapes)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        message = str(error).split("\n")[0].rstrip(".")
        raise TypeError(
            f"{owner}: `fn` cannot be traced, as it needs the values of arrays in "
            f"{compat.source_of_error(error)}: {message}. Pass these values as Python values, or "
            "use jax.lax.cond and jax.numpy."
        ) from error

    def rebuild(arrays: Sequence[Any]) -> Any:
        remaining = iter(arrays)
        static = results["leaves"]
        # None marks an array here, because None is never a leaf itself.
        full = [next(remaining) if leaf is None else leaf for leaf in static]
        return jax.tree.unflatten(results["tree"], full)

    parameters = fn if module else [args[n] for n in positions]
    return Traced(jaxpr, arrays, origins, (parameters, of_leaves), paths, rebuild)
