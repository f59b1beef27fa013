"""A version-independent interface to jaxprs.

A traced function is a jaxpr, a list of equations. The contents of a jaxpr are not a public
interface of JAX and differ between versions, so all code that depends on them is in this module.
"""

import contextlib
import os
import pathlib
import re
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax._src import source_info_util  # The name stack and the user's line have no public name.
from jax.sharding import PartitionSpec

__all__ = [
    "LAYOUTS",
    "WRAPPED_CALLS",
    "Body",
    "Variable",
    "bind",
    "bodies",
    "body",
    "call_inside",
    "devices_of",
    "is_array",
    "is_literal",
    "layout_of",
    "loop_counts",
    "rewired",
    "scope_of",
    "source_of",
    "source_of_error",
    "varying_of",
    "within",
]

_HERE, _JAXQ = (str(folder) + os.sep for folder in pathlib.Path(__file__).parents[:2])
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
# The file name that ipykernel gives a notebook cell. Its numbers differ in every run.
_CELL = re.compile(r".*\bipykernel_\d+[/\\]\d+\.py$")


class Body(NamedTuple):
    """A program: equations from inputs to outputs, and the arrays that it closes over.

    Attributes:
      jaxpr: the jaxpr, which identifies the program.
      consts: the arrays that the program closes over.
      constvars: the variables of `consts`.
      invars: the variables of the arguments.
      outvars: the variables or literals of the results.
      eqns: the equations, in order.
    """

    jaxpr: Any
    consts: Sequence[Any]
    constvars: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    eqns: Sequence[Any]


def body(jaxpr: Any) -> Body:
    """Returns the body of a jaxpr, closed or not; a `Body` is returned unchanged."""
    if isinstance(jaxpr, Body):
        return jaxpr
    inner, consts = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr, getattr(jaxpr, "consts", ())
    constvars = inner.constvars if consts else ()
    invars = inner.invars if consts else (*inner.constvars, *inner.invars)
    return Body(jaxpr, consts, constvars, invars, inner.outvars, inner.eqns)


def is_array(x: Any) -> bool:
    """Returns whether a leaf of a function's arguments is an array; other leaves are static."""
    return isinstance(x, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic))


def is_literal(variable: Any) -> bool:
    """Returns whether an operand is a literal."""
    return hasattr(variable, "val")


def bodies(eqn: Any) -> list[Any]:
    """Returns the jaxprs contained in an equation of any primitive."""
    jaxprs = []
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                jaxprs.append(part)
    return jaxprs


def loop_counts(eqn: Any) -> tuple[int, int]:
    """Returns the numbers of constant and of carried operands of a scan."""
    if "num_consts" in eqn.params:  # JAX 0.10.
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def scope_of(eqn: Any) -> str:
    """Returns the named scopes of an equation, joined by slashes."""
    return str(eqn.source_info.name_stack)


def source_of(eqn: Any, around: str = "") -> str:
    """Returns the line of user code from which an equation comes.

    Args:
      eqn: the equation.
      around: the line of the enclosing equation, which is returned if no user code is found.
    """
    frames = source_info_util.user_frames(eqn.source_info.traceback)
    return _line(((f.file_name, f.start_line, f.function_name) for f in frames), around)


def source_of_error(error: BaseException) -> str:
    """Returns the line of user code at which tracing a function failed."""
    frames = traceback.extract_tb(error.__traceback__)
    return _line((frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames))


def _line(frames: Iterable[tuple[str, int, str]], around: str = "") -> str:
    """Returns the innermost line that is not in an installed package, from frames innermost first.

    For a Flax layer this is the line of the user's code that calls the layer. Programs that JAX
    caches, such as that of `jnp.take`, contain only their own lines, for which `around` is used.
    """
    packages = []
    for file, line, function in frames:
        if file.startswith(_HERE):  # Frames outside the tracing code are not part of the function.
            break
        if not source_info_util.is_user_filename(file):
            continue
        text = f"{_CELL.sub('notebook cell', file)}:{line} ({function})"
        if not (file.startswith(_JAXQ) or any(folder in file for folder in _INSTALLED)):
            return text
        packages.append(text)
    return around or (packages or ["unknown line"])[0]


@contextlib.contextmanager
def within(eqn: Any) -> Iterator[None]:
    """Traces the enclosed code with the scopes, the source line and the mesh of an equation."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Returns the results of an unchanged equation for given operands."""
    with within(eqn):
        result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(result) if eqn.primitive.multiple_results else [result]


class Variable(NamedTuple):
    """A variable of equations that `rewired` returns."""

    aval: Any
    number: int


def rewired(eqn: Any, invars: Sequence[Any], outvars: Sequence[Any]) -> Any:
    """Returns an equation with other variables."""
    return eqn.replace(invars=list(invars), outvars=list(outvars))


def varying_of(eqn: Any) -> frozenset:
    """Returns the `shard_map` axes along which operands vary, as far as `shard_map` checks."""
    return frozenset().union(*(v.aval.manual_axis_type.varying for v in eqn.invars))


def layout_of(eqn: Any) -> tuple[Callable[..., Any], Any]:
    """Returns the function that an equation of `LAYOUTS` applies to arrays, and its sharding."""
    function, name = LAYOUTS[eqn.primitive.name]
    return function, eqn.params[name]


def call_inside(eqn: Any, function: Callable[..., Any], specs: Any = None) -> Callable[..., Any]:
    """Wraps a new body in the transformation of an equation.

    Args:
      eqn: a `jit`, a `checkpoint`, or a `shard_map`.
      function: the new body, a hashable function `(extra, *operands) -> (results, more)`. `extra`
        and `more` are pytrees; in a `shard_map`, `more` must be the same on all devices. The method
        `function.of(jaxpr)` returns the same function for another jaxpr; `of(None)` returns it
        without a jaxpr.
      specs: for a `shard_map`, the partition specs of `extra`.

    Returns:
      The wrapped function.
    """
    around = WRAPPED_CALLS[eqn.primitive.name]
    return around(eqn.params, function) if specs is None else around(eqn.params, function, specs)


def devices_of(eqn: Any) -> dict[str, int]:
    """Returns the mesh axes over which a `shard_map` maps, with their sizes."""
    names = eqn.params["newly_manual_axes"]
    return {name: n for name, n in eqn.params["mesh"].shape.items() if name in names}


def _jit(params: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    def known(name: str) -> tuple:
        return tuple(None if "Unspecified" in type(s).__name__ else s for s in params[name])

    if str(params["inline"]) in ("True", "Inline.ALWAYS"):
        return function
    shardings = known("in_shardings"), known("out_shardings")
    key = function.of(None), params["name"], *shardings, params["compiler_options_kvs"]
    jitted = _JITTED.setdefault(params["jaxpr"], {})
    if key not in jitted:
        jitted[key] = _jitted(weakref.ref(params["jaxpr"]), *key)
    return jitted[key]


# The jitted functions of each program, cached so that each is compiled only once. They must not
# refer to the program, or it and the arrays that it closes over would never be freed.
_JITTED: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _jitted(jaxpr: Any, function: Any, name: str, ins: tuple, outs: tuple, options: tuple) -> Any:
    def call(extra: Any, *operands: Any) -> Any:
        return function.of(jaxpr())(extra, *operands)

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


# For each primitive that `call_inside` supports, a function that wraps the new body in it.
WRAPPED_CALLS: MappingProxyType[str, Callable[..., Callable[..., Any]]] = MappingProxyType(
    {
        "jit": _jit,
        "checkpoint": _checkpoint,
        "remat2": _checkpoint,
        "shard_map": _shard_map,
    }
)

# For each primitive that changes a layout, its function and the name of its sharding parameter.
LAYOUTS: MappingProxyType[str, tuple[Callable[..., Any], str]] = MappingProxyType(
    {
        "reshard": (jax.sharding.reshard, "dst_sharding"),
        "sharding_constraint": (lax.with_sharding_constraint, "sharding"),
    }
)
