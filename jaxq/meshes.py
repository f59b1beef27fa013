"""Meshes with explicit axes: bodies that leave the partitioning to the compiler.

Under `jax.sharding.AxisType.Explicit` every array's type says how it is laid out, and operations
whose result could lie in several ways are errors. Kernels and reductions of blocks are full of
those, and all of them have one sensible layout: that of the tensor. So a function decorated with
`automatic` sees explicit axes as automatic ones, and what it returns gets the layout that is said
here. Without explicit axes, and inside of such a function, it is the function itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import jax
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["Layout", "as_first", "automatic", "axes_of", "fitting", "spec_of", "varying"]

Layout: TypeAlias = Callable[..., Any]

_F = TypeVar("_F", bound=Callable[..., Any])


def automatic(layout: Layout) -> Callable[[_F], _F]:
    """Makes a function of arrays run with every explicit axis of their mesh as an automatic one.

    To be used below `jax.jit`, where arrays are traced.

    Args:
      layout: `(mesh, result, *arguments)` to the results' `PartitionSpec`s or `NamedSharding`s, a
        tree like the result's or a prefix of it; only called where there are explicit axes.

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
                return jax.sharding.reshard(result, layout(mesh, result, *arguments))

        return cast(_F, wrapped)

    return decorate


def as_first(mesh: Any, result: Any, first: Any, *others: Any) -> Any:
    """The layout in which every array of the result lies as the first argument does.

    Axes beyond the argument's, and axes that do not divide, are whole on every device.
    """
    del others
    spec = spec_of(first)
    return jax.tree.map(lambda leaf: fitting(mesh, spec, leaf.shape), result)


def fitting(mesh: Any, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
    """A layout of which those axes are left out that a shape lacks or that do not divide it."""
    entries = [
        name if n % math.prod(mesh.shape[axis] for axis in axes_of(name)) == 0 else None
        for name, n in zip(spec, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*entries))


def spec_of(x: Any) -> PartitionSpec:
    """The layout over explicit axes that an array's type has."""
    return jax.typeof(x).sharding.spec


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a spec names."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _explicit(arguments: Any) -> Any:
    """The abstract mesh of the arrays that lie over explicit axes; None without such."""
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def _moved(x: Any, sharding: NamedSharding) -> Any:
    """An array as an automatic one; what has no mesh, or is no array, as it is."""
    if not isinstance(x, jax.Array) or jax.typeof(x).sharding.mesh.empty:
        return x
    return jax.sharding.reshard(x, sharding)


def varying(x: jax.Array) -> frozenset:
    """The axes of a `shard_map` along which devices have different arrays, as far as it checks."""
    return jax.typeof(x).manual_axis_type.varying
