"""Support for meshes with explicit axes, by functions that leave partitioning to the compiler.

Under `jax.sharding.AxisType.Explicit`, the type of every array contains its sharding, and
operations with several possible result shardings are errors. Kernels and block reductions contain
many such operations, all of which have one sensible sharding: that of the tensor. A function
decorated with `automatic` therefore sees explicit axes as automatic ones, and its results get a
sharding given to the decorator. Without explicit axes, and inside such a function, the decorator
has no effect.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import jax
from jax.sharding import NamedSharding, PartitionSpec

__all__ = [
    "ResultShardings",
    "as_first",
    "automatic",
    "axes_of",
    "fitting",
    "like",
    "spec_of",
    "varying",
]

ResultShardings: TypeAlias = Callable[..., Any]

_F = TypeVar("_F", bound=Callable[..., Any])


def automatic(shardings: ResultShardings) -> Callable[[_F], _F]:
    """Runs a function of arrays with all explicit axes of their mesh made automatic.

    The decorated function must be called inside `jax.jit`, where arrays are traced.

    Args:
      shardings: a function `(mesh, result, *arguments)` that returns the `PartitionSpec`s or
        `NamedSharding`s of the result, as a tree with its structure or a prefix of it. It is only
        called if there are explicit axes.

    Returns:
      A decorator.
    """

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def wrapped(*arguments: Any) -> Any:
            mesh = _explicit(arguments)
            if mesh is None:
                return function(*arguments)
            inner = mesh.update_axis_types(
                dict.fromkeys(mesh.explicit_axes, jax.sharding.AxisType.Auto)
            )
            with jax.sharding.use_abstract_mesh(inner):
                free = NamedSharding(inner, PartitionSpec())
                result = function(*(jax.tree.map(lambda a: _moved(a, free), arguments)))
            with jax.sharding.use_abstract_mesh(mesh):
                return jax.sharding.reshard(result, shardings(mesh, result, *arguments))

        return cast(_F, wrapped)

    return decorate


def as_first(mesh: Any, result: Any, first: Any, *others: Any) -> Any:
    """Returns shardings that give every array of the result the layout of the first argument.

    Axes that the argument lacks, and axes that the mesh does not divide evenly, are replicated.
    """
    del others
    spec = spec_of(first)
    return jax.tree.map(lambda leaf: fitting(mesh, spec, leaf.shape), result)


def fitting(mesh: Any, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
    """Returns a sharding without the entries that a shape lacks or that do not divide it evenly."""
    entries = [
        name if n % math.prod(mesh.shape[axis] for axis in axes_of(name)) == 0 else None
        for name, n in zip(spec, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*entries))


def spec_of(x: Any) -> PartitionSpec:
    """Returns the partition spec over explicit axes in the type of an array."""
    return jax.typeof(x).sharding.spec


def axes_of(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes named by an entry of a partition spec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _explicit(arguments: Any) -> Any:
    """Returns the abstract mesh of the first array on a mesh with explicit axes, or None."""
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def _moved(x: Any, sharding: NamedSharding) -> Any:
    """Reshards an array to automatic axes; returns arrays without a mesh and others unchanged."""
    if not isinstance(x, jax.Array) or jax.typeof(x).sharding.mesh.empty:
        return x
    return jax.sharding.reshard(x, sharding)


def varying(x: jax.Array) -> frozenset:
    """Returns the `shard_map` axes along which an array varies, as far as `shard_map` checks."""
    return jax.typeof(x).manual_axis_type.varying


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding of an array."""
    aval = jax.typeof(x)
    mesh = aval.sharding.mesh
    known = aval.sharding if mesh.explicit_axes or mesh.manual_axes else None
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, sharding=known, manual_axis_type=aval.manual_axis_type
    )
