"""Weights that vLLM fuses into one matrix, which must share the tensor scale."""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import items_of
from jaxq.quantizers import Quantized, quantize
from jaxq.recipes import Recipe, get_recipe

__all__ = ["fused_with", "quantize_together"]

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_NAME = re.compile(r"(.*\.)(\w+)\.weight")


def fused_with(name: str) -> tuple[str, ...]:
    """Returns the names of the weights that vLLM fuses with a weight, itself included.

    Args:
      name: a name of Hugging Face, such as `"model.layers.0.mlp.up_proj.weight"`.

    Returns:
      The names in the order in which they are fused; only `name` if it is not fused.

    Example:
      >>> fused_with("layers.0.mlp.up_proj.weight")
      ('layers.0.mlp.gate_proj.weight', 'layers.0.mlp.up_proj.weight')
    """
    match = _NAME.fullmatch(name)
    if match is not None:
        for modules in _FUSED:
            if match[2] in modules:
                return tuple(f"{match[1]}{module}.weight" for module in modules)
    return (name,)


def quantize_together(
    weights: Sequence[jax.typing.ArrayLike], recipe: str | Recipe
) -> tuple[Quantized, ...]:
    """Quantizes weights with one common tensor scale, as NVFP4 requires for fused weights.

    Args:
      weights: weights `[outputs, inputs]` with equal numbers of inputs.
      recipe: a recipe with blocks along the last axis, such as `"nvfp4"`.

    Returns:
      The quantized weights. Their block scales are relative to the same tensor scale.

    Raises:
      ValueError: if the numbers of inputs differ, or the blocks of the recipe span several weights.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = quantize_together([jnp.ones((2, 16)), 3 * jnp.ones((4, 16))], "nvfp4")
      >>> a.shape, b.shape, bool(a.second[0] == b.second[0])
      ((2, 16), (4, 16), True)
    """
    weights = items_of("quantize_together", "weights", weights)
    if any(np.ndim(w) != 2 for w in weights) or len({np.shape(w)[-1] for w in weights}) != 1:
        shapes = [tuple(np.shape(w)) for w in weights]
        raise ValueError(
            "quantize_together: `weights` must be matrices with equal numbers of inputs, got "
            f"shapes {shapes}. Transpose kernels [inputs, outputs]."
        )
    whole = quantize(jnp.concatenate([jnp.asarray(w) for w in weights]), get_recipe(recipe))
    ends = np.cumsum([np.shape(w)[0] for w in weights])
    return tuple(whole[end - np.shape(w)[0] : end] for w, end in zip(weights, ends, strict=True))
