"""JAX's programs, in words that do not change with its version.

A traced function is a jaxpr, a list of equations. What JAX keeps in one is no public interface and
differs between versions; all that jaxq knows of it stands here.
"""

import contextlib
import functools
import os
import pathlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax._src import source_info_util  # The name stack and the user's line have no public name.
from jax.sharding import PartitionSpec

__all__ = [
    "AROUND",
    "LAYOUTS",
    "Body",
    "bind",
    "bodies",
    "body",
    "call_inside",
    "devices_of",
    "is_array",
    "is_literal",
    "layout_of",
    "loop_counts",
    "scope_of",
    "source_of",
    "source_of_error",
    "varying_of",
    "within",
]

_HERE, _JAXQ = (str(folder) + os.sep for folder in pathlib.Path(__file__).parents[:2])
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


class Body(NamedTuple):
    """A program: equations from inputs to outputs, and the arrays that it closes over.

    Attributes:
      jaxpr: what identifies it.
      consts: arrays.
      constvars: their variables.
      invars: variables of its arguments.
      outvars: variables or literals of its results.
      eqns: its equations, in order.
    """

    jaxpr: Any
    consts: Sequence[Any]
    constvars: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    eqns: Sequence[Any]


def body(jaxpr: Any) -> Body:
    """A jaxpr of JAX, closed or not."""
    inner, consts = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr, getattr(jaxpr, "consts", ())
    constvars = inner.constvars if consts else ()
    invars = inner.invars if consts else (*inner.constvars, *inner.invars)
    return Body(jaxpr, consts, constvars, invars, inner.outvars, inner.eqns)


def is_array(x: Any) -> bool:
    """Whether a leaf of a function's arguments is an array; all else is static."""
    return isinstance(x, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic))


def is_literal(variable: Any) -> bool:
    """Whether an operand is a number in the program itself."""
    return hasattr(variable, "val")


def bodies(eqn: Any) -> list[Any]:
    """The jaxprs within an equation, whatever it is."""
    found = []
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                found.append(part)
    return found


def loop_counts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "num_consts" in eqn.params:  # JAX 0.10.
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def scope_of(eqn: Any) -> str:
    """The named scopes that an equation stands in, joined by slashes."""
    return str(eqn.source_info.name_stack)


def source_of(eqn: Any, around: str = "") -> str:
    """The line of the user's code that an equation comes from.

    Args:
      eqn: the equation.
      around: that of the equation whose program it is in, if any.
    """
    frames = source_info_util.user_frames(eqn.source_info.traceback)
    return _line(((f.file_name, f.start_line, f.function_name) for f in frames), around)


def source_of_error(error: BaseException) -> str:
    """The line of the user's code at which a function could not be traced."""
    frames = traceback.extract_tb(error.__traceback__)
    return _line((frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames))


def _line(frames: Iterable[tuple[str, int, str]], around: str = "") -> str:
    """Of a traced function's lines, innermost first, the first that is in no installed package.

    A layer of Flax multiplies in Flax's code, but the user's is what calls it; a program that JAX
    keeps, such as that of `jnp.take`, has no lines but its own.
    """
    packages = []
    for file, line, function in frames:
        if file.startswith(_HERE):  # What traces the function; around that is none of it.
            break
        if not source_info_util.is_user_filename(file):
            continue
        text = f"{file}:{line} ({function})"
        if not (file.startswith(_JAXQ) or any(folder in file for folder in _INSTALLED)):
            return text
        packages.append(text)
    return around or (packages or ["unknown line"])[0]


@contextlib.contextmanager
def within(eqn: Any) -> Iterator[None]:
    """What is traced within it stands where the equation stood: scopes, source line, mesh."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of an equation as it is."""
    with within(eqn):
        result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(result) if eqn.primitive.multiple_results else [result]


def varying_of(eqn: Any) -> frozenset:
    """The axes of a `shard_map` along which an equation's operands differ, as far as it checks."""
    return frozenset().union(*(v.aval.manual_axis_type.varying for v in eqn.invars))


def layout_of(eqn: Any) -> tuple[Callable[..., Any], Any]:
    """What lays a tree of arrays out as an equation of `LAYOUTS` does, and its sharding."""
    function, name = LAYOUTS[eqn.primitive.name]
    return function, eqn.params[name]


def call_inside(eqn: Any, function: Callable[..., Any], specs: Any = None) -> Callable[..., Any]:
    """A function of an equation's operands under what the equation puts around its body.

    Args:
      eqn: a `jit`, a `checkpoint`, or a `shard_map`.
      function: hashable; `(extra, *operands) -> (results, more)`, the new body. `extra` and `more`
        are pytrees; in a `shard_map`, `more` is the same on all its devices.
      specs: for a `shard_map`, how `extra` lies on its devices.

    Returns:
      The function with that around it.
    """
    around = AROUND[eqn.primitive.name]
    return around(eqn.params, function) if specs is None else around(eqn.params, function, specs)


def devices_of(eqn: Any) -> dict[str, int]:
    """The axes of the mesh over which a `shard_map` maps, and their sizes."""
    names = eqn.params["newly_manual_axes"]
    return {name: n for name, n in eqn.params["mesh"].shape.items() if name in names}


def _jit(params: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    def known(name: str) -> tuple:
        return tuple(None if "Unspecified" in type(s).__name__ else s for s in params[name])

    if str(params["inline"]) in ("True", "Inline.ALWAYS"):
        return function
    shardings = known("in_shardings"), known("out_shardings")
    return _jitted(function, params["name"], *shardings, params["compiler_options_kvs"])


@functools.lru_cache(maxsize=1024)
def _jitted(function: Any, name: str, ins: tuple, outs: tuple, options: tuple) -> Any:
    """A jitted function, the same one for the same program, so that it is compiled once."""

    def call(extra: Any, *operands: Any) -> Any:
        return function(extra, *operands)

    call.__name__ = name
    shardings: dict[str, Any] = {}
    if any(s is not None for s in ins):
        shardings["in_shardings"] = (None, *ins)
    if any(s is not None for s in outs):
        shardings["out_shardings"] = (list(outs), None)
    return jax.jit(call, compiler_options=dict(options) or None, **shardings)


def _checkpoint(params: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.checkpoint(function, prevent_cse=params["prevent_cse"], policy=params["policy"])


def _shard_map(params: Any, function: Callable[..., Any], specs: Any) -> Callable[..., Any]:
    return jax.shard_map(
        function,
        mesh=params["mesh"],
        in_specs=(specs, *params["in_specs"]),
        out_specs=(list(params["out_specs"]), PartitionSpec()),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )


AROUND: MappingProxyType[str, Callable[..., Callable[..., Any]]] = MappingProxyType(
    {
        "jit": _jit,
        "checkpoint": _checkpoint,
        "remat2": _checkpoint,
        "shard_map": _shard_map,
    }
)

# The function behind an equation that lays an array out, and the parameter with the sharding.
LAYOUTS: MappingProxyType[str, tuple[Callable[..., Any], str]] = MappingProxyType(
    {
        "reshard": (jax.sharding.reshard, "dst_sharding"),
        "sharding_constraint": (lax.with_sharding_constraint, "sharding"),
    }
)
