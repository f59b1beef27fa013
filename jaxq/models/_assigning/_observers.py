"""Observers, which collect states of the operands of products."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jaxq.quantizers import calibration
from jaxq.recipes import Recipe

__all__ = ["Observable", "Observer"]


class Observer(Protocol):
    """A hashable object that collects the state of one operand of a product.

    A state is a pytree of arrays with the same shapes and dtypes for all data.
    """

    def empty(self) -> Any:
        """Returns the state before any data."""
        ...

    def measure(self, x: jax.Array, others: Sequence[jax.Array], mask: jax.Array | None) -> Any:
        """Returns the state of one operand.

        Args:
          x: the operand.
          others: the operands of the equation after the first two.
          mask: the mask of the tokens that count, or None.
        """
        ...

    def merge(self, first: Any, second: Any) -> Any:
        """Returns the state of both data sets together."""
        ...


class Observable(NamedTuple):
    """The observer of an operand whose range may come from calibration: its shape and recipe."""

    shape: tuple[int, ...]
    recipe: Recipe

    def empty(self) -> Any:
        """Returns the state before any data."""
        return calibration.init(self.shape, self.recipe)

    def measure(self, x: jax.Array, others: Sequence[jax.Array], mask: jax.Array | None) -> Any:
        """Returns the state of one operand."""
        del others, mask
        return calibration.update(self.empty(), x, self.recipe)

    def merge(self, first: Any, second: Any) -> Any:
        """Returns the state of both data sets together."""
        return calibration.merge(first, second, self.recipe)
