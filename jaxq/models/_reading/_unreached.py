"""Detection of products and marked arrays that receive no cotangent."""

from collections.abc import Iterator, Sequence
from typing import Any

from jax import numpy as jnp

from jaxq._jax import compat
from jaxq.models._reading._marks import Mark
from jaxq.models._reading._products import Node, Product

__all__ = ["find_unreached"]


def find_unreached(node: Node) -> list[Product | Mark]:
    """Returns the products and marks that no floating-point result depends on differentiably.

    Results of `stop_gradient`, integers and booleans end the search. All results of a loop or a
    branch are assumed to be needed.
    """
    return list(_iterate_unreached(node, [True] * len(compat.body(node.jaxpr).outvars)))


def _iterate_unreached(node: Node, needed: Sequence[bool]) -> Iterator[Product | Mark]:
    body = compat.body(node.jaxpr)
    pairs = zip(body.outvars, needed, strict=True)
    live = {v for v, need in pairs if need and not compat.is_literal(v) and _is_float(v)}
    for i, eqn in reversed(list(enumerate(body.eqns))):
        outs = [v in live for v in eqn.outvars]
        nodes = (*node.inner.get(i, ()), *node.marked.get(i, ()))
        if not any(outs):
            yield from (
                by_equation[i] for by_equation in (node.products, node.marks) if i in by_equation
            )
            for inside in nodes:
                yield from _iterate_unreached(
                    inside, [False] * len(compat.body(inside.jaxpr).outvars)
                )
            continue
        exact = eqn.primitive.name in compat.WRAPPED_CALLS
        for inside in nodes:
            count = len(compat.body(inside.jaxpr).outvars)
            yield from _iterate_unreached(inside, outs if exact else [True] * count)
        if eqn.primitive.name != "stop_gradient":
            live |= {v for v in eqn.invars if not compat.is_literal(v) and _is_float(v)}


def _is_float(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)
