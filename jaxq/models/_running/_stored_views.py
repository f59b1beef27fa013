"""Views of stored weights between the arguments of a program and its products."""

import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp

from jaxq.numerics import converted
from jaxq.quantizers import Quantized, dequantize

__all__ = ["StoredView", "as_array"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["dtype", "permutation"]
)
@dataclasses.dataclass(frozen=True)
class StoredView:
    """A view of stored weights between the arguments and a product. A pytree.

    The stored values already include the model's conversions, so a conversion in the program only
    changes `dtype`.

    Attributes:
      data: the stored values, packed or as an array, in the dtype in which products need them.
      dtype: the dtype of the value at this point of the program.
      permutation: the transposition of packed values, which are dequantized only where a product
        or another operation needs them; None if they are not transposed.
    """

    data: Quantized | jax.Array
    dtype: Any
    permutation: tuple[int, ...] | None = None

    @property
    def array(self) -> jax.Array:
        """The values as an array; each stacked layer is dequantized separately."""
        data = self.data
        if not isinstance(data, Quantized):
            return data
        function = dequantize
        for _ in range(data.ndim - len(data.block)):
            function = jax.vmap(function)
        array = function(data)
        return array if self.permutation is None else array.transpose(self.permutation)

    def transpose(self, permutation: tuple[int, ...]) -> "StoredView":
        """Returns the view with its axes in another order; packed values stay packed."""
        if not isinstance(self.data, Quantized):
            return dataclasses.replace(self, data=self.data.transpose(permutation))
        if self.permutation is not None:
            permutation = tuple(self.permutation[axis] for axis in permutation)
        return dataclasses.replace(self, permutation=tuple(permutation))


def as_array(x: Any) -> Any:
    """Returns a stored weight as the array that the program has at this point."""
    if not isinstance(x, StoredView):
        return x
    array = x.array
    return array if array.dtype == x.dtype else converted(array.astype(jnp.float32), x.dtype)
