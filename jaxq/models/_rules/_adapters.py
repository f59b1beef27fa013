"""Low-rank adapters of a model's products, as pytrees."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from jaxq._base.records import state_repr
from jaxq._jax.serialization import pytree
from jaxq.models._rules._rule import Rule, rule_records
from jaxq.products import Contraction

__all__ = ["Adapted", "LoRA", "adapter_product", "can_adapt_ragged"]


@pytree(static=("scaling",))
@dataclasses.dataclass(frozen=True)
class LoRA:
    """A low-rank adapter of one weight. A pytree. It adds `scaling * (x a) b` to a product `x w`.

    Attributes:
      a: float `[..., inputs, rank]`; the inputs are the contracted axes of the weight, merged.
        Leading axes are those of stacked layers, then those of batch axes of the product.
      b: float `[..., rank, outputs]`.
      scaling: the factor of the adapter, `alpha / rank` in the paper; 1 by default.

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import lora
      >>> adapter = lora.LoRA(jnp.ones((4, 1)), jnp.full((1, 2), 0.5), scaling=2.0)
      >>> adapter(jnp.ones((3, 4))).shape, adapter.rank, adapter.nbytes
      ((3, 2), 1, 24)
    """

    a: jax.Array
    b: jax.Array
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """The rank of the adapter."""
        return self.a.shape[-1]

    @property
    def nbytes(self) -> int:
        """The number of bytes of both matrices."""
        return self.a.nbytes + self.b.nbytes

    @property
    def delta(self) -> jax.Array:
        """The change of the weight, `scaling * a b`, `[..., inputs, outputs]`."""
        return self.a @ self.b * jnp.asarray(self.scaling, self.a.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `scaling * (x a) b`, computed in the adapter's dtype, in x's dtype."""
        y = x.astype(self.a.dtype) @ self.a @ self.b * jnp.asarray(self.scaling, self.a.dtype)
        return y.astype(x.dtype)

    def copies_for_loop(self, count: int) -> "LoRA":
        """Copies the adapter for `count` products; its gradient is the sum of theirs."""
        a, b = (jnp.broadcast_to(x, (count, *x.shape)) for x in (self.a, self.b))
        return dataclasses.replace(self, a=a, b=b)


@pytree(static=("rules",), kinds=rule_records)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """Rules with low-rank adapters, from `jaxq.lora.adapt`. A pytree.

    It is passed in place of rules to `jaxq.quantize_fn`, and differentiated to train the adapters.

    Attributes:
      adapters: the adapters, by the products' names. Products in a scan over layers have a leading
        axis, one adapter per layer.
      rules: the rules.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import lora
      >>> Adapted({"w": lora.LoRA(jnp.ones((4, 1)), jnp.ones((1, 2)))}, ()).nbytes
      24
    """

    adapters: Mapping[str, LoRA]
    rules: tuple[Rule, ...]

    def __repr__(self) -> str:
        return state_repr(self, self.adapters)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all adapters."""
        return sum(adapter.nbytes for adapter in self.adapters.values())


def adapter_product(
    contraction: Contraction, adapter: LoRA, x: jax.Array, weight: Any, arguments: Sequence[Any]
) -> Any:
    """Returns the result of an adapter, which is added to a product.

    Args:
      contraction: the labels of the product, with the weight as its second operand.
      adapter: the adapter of one layer.
      x: the other operand.
      weight: an array or its shape, the second operand.
      arguments: the group sizes of a ragged product; () for other products.
    """
    if contraction.group is not None:
        return _ragged(contraction, adapter, x, weight, *arguments)
    batch, free, contract = contraction.axes[1]
    rank = max(*contraction.lhs, *contraction.rhs, *contraction.out) + 1

    def unmerge(
        matrix: jax.Array, axes: tuple[int, ...], first: bool
    ) -> tuple[jax.Array, list[int]]:
        lengths = [weight.shape[i] for i in axes]
        labels = [contraction.rhs[i] for i in axes]
        lengths = [*lengths, adapter.rank] if first else [adapter.rank, *lengths]
        labels = [*labels, rank] if first else [rank, *labels]
        leading = [weight.shape[i] for i in batch]
        batch_labels = [contraction.rhs[i] for i in batch]
        return matrix.reshape(*leading, *lengths), [*batch_labels, *labels]

    a, a_labels = unmerge(adapter.a, contract, True)
    b, b_labels = unmerge(adapter.b, free, False)
    inner = [label for label in contraction.lhs if label in contraction.out] + [rank]
    narrow = jnp.einsum(x.astype(a.dtype), list(contraction.lhs), a, a_labels, inner)
    y = jnp.einsum(narrow, inner, b, b_labels, list(contraction.out))
    return y * jnp.asarray(adapter.scaling, y.dtype)


def can_adapt_ragged(contraction: Contraction) -> bool:
    """Returns whether a ragged product multiplies rows `[rows, inputs]` by matrices of groups."""
    x, weight = contraction.axes
    rows = tuple(contraction.lhs[axis] for axis in x.free) == (contraction.ragged,)
    one_group = tuple(contraction.rhs[axis] for axis in weight.batch) == (contraction.group,)
    return rows and one_group and not x.batch and len(x.contract) == len(weight.contract) == 1


def _ragged(
    contraction: Contraction, adapter: LoRA, x: jax.Array, weight: Any, sizes: jax.Array
) -> jax.Array:
    """Returns the result of the adapters of a ragged product's groups."""
    rows, free = contraction.axes[0].free[0], contraction.axes[1].free
    tokens = jnp.moveaxis(x, rows, 0).astype(adapter.a.dtype)
    y = lax.ragged_dot(lax.ragged_dot(tokens, adapter.a, sizes), adapter.b, sizes)
    y = y.reshape(-1, *(weight.shape[axis] for axis in free))
    labels = [contraction.lhs[rows], *(contraction.rhs[axis] for axis in free)]
    y = y.transpose([labels.index(label) for label in contraction.out])
    return y * jnp.asarray(adapter.scaling, y.dtype)
