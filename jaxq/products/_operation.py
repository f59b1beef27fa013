"""The record of a bilinear function with the labels of its axes."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxq.products._contractions import Contraction
from jaxq.products._execution import Codes, DotOfCodes

__all__ = ["Operation", "naming"]


@dataclasses.dataclass(frozen=True)
class Operation:
    """A bilinear function of two arrays, with the labels of its axes.

    Attributes:
      name: the name of the operation in error messages.
      operands: the names of the operands in error messages.
      function: the bilinear function, `(lhs, rhs, *arguments) -> out`.
      contraction: the labels of the axes.
      codes: the same product for arrays of codes, `(lhs, rhs, preferred_element_type) -> out`; None
        (the default) if there is none.
      grouped: True if the contraction falls into groups, as in a grouped convolution.
      arguments: further array arguments of the function, such as group sizes.
    """

    name: str
    operands: tuple[str, str]
    function: Callable[..., jax.Array]
    contraction: Contraction
    codes: Codes | None = None
    grouped: bool = False
    arguments: tuple[jax.Array, ...] = ()

    def gradient(self, of: int, aval: Any) -> "Operation":
        """Returns the product of the cotangent and one operand that gives the other's gradient.

        Args:
          of: 0 for the gradient of `lhs`, 1 for the gradient of `rhs`.
          aval: the shape and dtype of the operand whose gradient is computed.
        """

        def function(cotangent: jax.Array, residual: jax.Array, *arguments: jax.Array) -> jax.Array:
            def linear(x: jax.Array) -> jax.Array:
                operands = (x, residual) if of == 0 else (residual, x)
                return self.function(*operands, *arguments)

            return jax.linear_transpose(linear, aval)(cotangent)[0]

        contraction = (self.contraction.dlhs, self.contraction.drhs)[of]
        plain = isinstance(self.codes, DotOfCodes)
        return Operation(
            f"{self.name}, gradient of `{self.operands[of]}`",
            ("the cotangent", f"the residual of `{self.operands[1 - of]}`"),
            function,
            contraction,
            DotOfCodes(contraction) if plain else None,
            self.grouped,
            self.arguments,
        )


@contextlib.contextmanager
def naming(operation: Operation, operand: str) -> Iterator[None]:
    """Prefixes errors with the names of the operation and the operand."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{operation.name}: {operand}: {error}") from error
