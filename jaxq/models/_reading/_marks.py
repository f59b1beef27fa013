"""Arrays that a function marks by `jax.ad_checkpoint.checkpoint_name`."""

import dataclasses
from typing import Any

__all__ = ["MARK", "Mark"]

MARK = "name"  # The primitive of `jax.ad_checkpoint.checkpoint_name`.


@dataclasses.dataclass(eq=False)
class Mark:
    """An array that the function names by `jax.ad_checkpoint.checkpoint_name`.

    Attributes:
      out: the shape and dtype of the array.
      source: the line of the user's code.
      loops: the lengths of the surrounding scans, outermost first.
      stacked: the depths of the scans over layers, which slice parameters.
      is_differentiated: True if its cotangent is known, as in `Product`.
      name: the name in `checkpoint_name`, which `read` makes unique among marks and products.
    """

    out: Any
    source: str
    loops: tuple[int, ...]
    stacked: frozenset[int]
    is_differentiated: bool
    name: str

    @property
    def stacks(self) -> tuple[int, ...]:
        """The lengths of the scans over layers, outermost first."""
        return tuple(self.loops[depth] for depth in sorted(self.stacked))

    @property
    def where(self) -> str:
        """The name and source line, as errors show them."""
        return f"array {self.name!r} ({self.source})"
