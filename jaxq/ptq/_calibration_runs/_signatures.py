"""Comparison of programs, so that equal computations are compiled once."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxq._jax import compat
from jaxq.models import Assigned, Program

__all__ = ["signature", "without_names"]

_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call")  # A forward pass ignores their rules.


def without_names(program: Program, names: Mapping[str, str]) -> Program:
    """Returns a program with renamed products, without their numbers and source lines."""

    def renamed(assigned: Assigned) -> Assigned:
        collectors: Any = assigned.observers
        observers = tuple(collector and collector.shared() for collector in collectors)
        name = names[assigned.name]
        return dataclasses.replace(
            assigned, name=name, where=f"product {name}", number=0, observers=observers
        )

    return Program(
        program.jaxpr,
        tuple((i, renamed(assigned)) for i, assigned in program.products),
        tuple((i, tuple(without_names(p, names) for p in inner)) for i, inner in program.inner),
    )


def signature(program: Program) -> tuple[Any, ...]:
    """Returns a key that is equal for programs with the same computation."""
    return _jaxpr_signature(program.jaxpr), _assignments(program)


def _assignments(program: Program) -> tuple[Any, ...]:
    return program.products, tuple(
        (i, tuple(map(_assignments, programs))) for i, programs in program.inner
    )


def _jaxpr_signature(jaxpr: Any) -> tuple[Any, ...]:
    body = compat.body(jaxpr)
    indices: dict[Any, int] = {}

    def index(variable: Any) -> Any:
        if compat.is_literal(variable):
            return "literal", str(variable.aval), str(variable.val)
        return indices.setdefault(variable, len(indices))

    arguments = [(index(v), str(v.aval)) for v in (*body.constvars, *body.invars)]
    equations = [
        (
            eqn.primitive.name,
            _params_signature(eqn),
            *map(index, eqn.invars),
            *((index(v), str(v.aval)) for v in eqn.outvars),
        )
        for eqn in body.eqns
    ]
    # Keys outlive programs only together with them: whoever stores a key also holds the program, so
    # the `id` of a constant is never reused.
    consts = tuple(map(id, body.consts))
    return tuple(arguments), consts, tuple(equations), tuple(map(index, body.outvars))


def _params_signature(eqn: Any) -> tuple[Any, ...]:
    def hashable(value: Any) -> Any:
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            return _jaxpr_signature(value)
        if isinstance(value, (tuple, list)):
            return tuple(map(hashable, value))
        if callable(value) and eqn.primitive.name in _CUSTOM_CALLS:
            return "rule"
        try:
            hash(value)
        except TypeError:
            return id(value)  # The program keeps the value alive, as it does constants.
        return value

    return tuple((name, hashable(eqn.params[name])) for name in sorted(eqn.params))
