"""The records that adaptation and merging return."""

from typing import Any, NamedTuple

import jax

from jaxq._jax.serialization import named_tuple
from jaxq.models import Adapted

__all__ = ["AdaptedModel", "MergeError", "Merged"]


@named_tuple
class AdaptedModel(NamedTuple):
    """A model with stored weights and adapters.

    Attributes:
      params: the parameters, whose quantized weights are `jaxq.Quantized`.
      state: the rules with adapters, to pass to `jaxq.quantize_fn` in place of rules.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq import lora
      >>> adapters = {"w": lora.LoRA(jnp.ones((4, 1)), jnp.ones((1, 2)))}
      >>> model = lora.AdaptedModel({"w": jnp.ones((4, 2))}, lora.Adapted(adapters, rules=()))
      >>> [leaf.shape for leaf in jax.tree.leaves(model.state)]  # The arrays to train.
      [(4, 1), (1, 2)]
    """

    params: Any
    state: Adapted


@named_tuple
class MergeError(NamedTuple):
    """The error of one weight that an adapter was merged into. Norms are Frobenius norms.

    Attributes:
      relative: the norm of the merged weight's quantization error, relative to the norm of the
        weight.
      lost: the norm of the same error, relative to the norm of the adapter's change. If it exceeds
        1, the error is larger than the change.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import lora
      >>> error = lora.MergeError(relative=jnp.float32(0.125), lost=jnp.float32(2.0))
      >>> bool(error.lost > 1)  # The error is larger than the change.
      True
    """

    relative: jax.Array
    lost: jax.Array


class Merged(NamedTuple):
    """A model whose adapters were merged into its weights.

    Attributes:
      params: the merged parameters as floats.
      packed: the merged parameters, quantized again.
      errors: the quantization errors, by the products' names; one per layer for products in a scan
        over layers.

    Example:
      >>> from jaxq import lora
      >>> errors = {"up": lora.MergeError(0.1, lost=0.4), "down": lora.MergeError(0.1, lost=1.6)}
      >>> merged = lora.Merged(params={}, packed={}, errors=errors)
      >>> [name for name, error in merged.errors.items() if error.lost > 1]
      ['down']
    """

    params: Any
    packed: Any
    errors: dict[str, MergeError]
