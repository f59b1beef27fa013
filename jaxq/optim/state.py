"""Optimizer state held quantized between steps."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

from jaxq.blocks import PerBlock
from jaxq.optim.common import RandomState, Recipe, as_rules, own_key
from jaxq.quantized import Quantized
from jaxq.quantizers import quantize
from jaxq.recipes import Quantizer
from jaxq.trees import Rules, assign, is_floating, naming

__all__ = ["ADAM8BIT", "QuantizedState", "quantize_state"]

# The paths of optax's second moments, which are never negative: `nu` behind nothing but a chain's
# indices and the fields of wrappers, so that no parameter of that name is one.
_SECOND_MOMENTS = r"^(\d+/|\w*state/|\w*states/[^/]+/)*nu(/|$)"

ADAM8BIT: Rules = (
    (_SECOND_MOMENTS, Quantizer("udynamic8", PerBlock(256))),
    ("", Quantizer("dynamic8", PerBlock(256))),
)
"""The rules of `quantize_state` by default: dynamic 8-bit codes, unsigned for second moments."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["row"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True, eq=False)
class Flattened:
    """An array that is quantized as one row, as its last axis does not hold whole blocks.

    Attributes:
      row: the array, flattened.
      shape: its shape.
    """

    row: Quantized
    shape: tuple[int, ...]

    @property
    def recipe(self) -> Quantizer:
        """The recipe of the row."""
        return self.row.recipe

    def dequantize(self) -> jax.Array:
        """The array."""
        return self.row.dequantize().reshape(self.shape)


class QuantizedState(NamedTuple):
    """What `quantize_state` keeps between steps; a pytree of arrays.

    Attributes:
      inner: the optimizer's own state, with `jaxq.Quantized` in the place of its large arrays, or
        `Flattened` ones.
      key: the numbers of a `jax.random` key, or None.
    """

    inner: Any
    key: jax.Array | None


def quantize_state(
    tx: optax.GradientTransformation,
    recipe: "Recipe | Rules" = ADAM8BIT,
    *,
    min_size: int = 4096,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Holds an optimizer's state quantized between steps.

    A step dequantizes the state, lets the optimizer take its step in the state's own dtype, and
    quantizes the new state. So the updates come from moments that this step has not rounded yet,
    and the state is small between steps, not within one.

    Quantized are the floating arrays that have some parameter's shape and `min_size` elements or
    more; all else stays as it is. `jaxq.tree_report(state)` says what became what. Blocks along the
    last axis, as `PerBlock(256)` has them, run on through the array as one row where they do not
    divide that axis, and the last one is shorter; so they suit any shape. Every other granularity
    sees the array in its own shape.

    The default is that of 8-bit Adam: in blocks of 256, a byte an element and a float32 scale,
    2.03 bytes a parameter where Adam has 8. It has traits that bitsandbytes' has too. A second
    moment below 1.6e-7 of its block's largest becomes 0, and the next step of that weight may be
    large. A moment that moves by less than half a level a step keeps its code until the block's
    scale has moved (stochastic rounding moves it in the mean). And as `dynamic8` ends at -0.993, a
    negative extreme of a block loses 0.7 % of its magnitude a step.

    Args:
      tx: any optimizer.
      recipe: a recipe as `jaxq.get_quantizer` takes it, or rules as `jaxq.quantize_tree` has them:
        pairs of a pattern of paths in the state, such as `"mu/.*kernel"`, and a recipe or None.
      min_size: smaller arrays stay as they are.
      key: a key of `jax.random`, if a recipe rounds stochastically. The state carries it on, as
        numbers; each array and step has bits of its own.

    Returns:
      A transformation with the updates of `tx`. Its state is a pytree of arrays.

    Raises:
      ValueError: a key missing or not needed; on `init`, a rule that holds for no array, or a
        recipe that does not fit one.

    Example:
      >>> import jax, jaxq, optax, jax.numpy as jnp
      >>> params = {"w": jnp.ones((64, 256)), "b": jnp.ones(256)}
      >>> tx = jaxq.optim.quantize_state(optax.adam(1e-3))
      >>> print(jaxq.tree_report(tx.init(params).inner))  # doctest: +NORMALIZE_WHITESPACE
      path      shape    dtype     format  bytes_before  bytes_after     bits
      0/count  scalar    int32          -             4            4       32
      0/mu/b      256  float32          -          1024         1024       32
      0/mu/w   64x256  float32   dynamic8         65536        16640    8.125
      0/nu/b      256  float32          -          1024         1024       32
      0/nu/w   64x256  float32  udynamic8         65536        16640    8.125
      total                                      133124        35332  8.49301

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022).
    """
    rules, strict = as_rules(recipe, strict=recipe is not ADAM8BIT)
    random = RandomState.of("quantize_state", rules, key)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> Any:
        shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(params)}

        def takes(leaf: Any) -> bool:
            return is_floating(leaf) and leaf.shape in shapes and leaf.size >= min_size

        inner = tx.init(params)
        others = f"not floating, of no parameter's shape, of fewer than {min_size} elements"
        recipes = assign("quantize_state", inner, rules, takes=takes, others=others, strict=strict)
        later, now = random.split(random.data)
        return QuantizedState(_held(inner, recipes, now), later)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        held, structure = jax.tree.flatten(state.inner, is_leaf=_is_held)
        leaves = [leaf.dequantize() if _is_held(leaf) else leaf for leaf in held]
        updates, inner = tx.update(updates, structure.unflatten(leaves), params, **extra)
        recipes = [leaf.recipe if _is_held(leaf) else None for leaf in held]
        later, now = random.split(state.key)
        return updates, QuantizedState(_held(inner, recipes, now), later)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_held(leaf: Any) -> bool:
    return isinstance(leaf, Quantized | Flattened)


def _held(inner: Any, recipes: list[Quantizer | None], key: jax.Array | None) -> Any:
    """A state with the leaves quantized that have a recipe."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(inner)
    held = []
    for i, ((path, leaf), recipe) in enumerate(zip(leaves, recipes, strict=True)):
        if recipe is None:
            held.append(leaf)
            continue
        with naming("quantize_state", path):
            held.append(_quantized(leaf, recipe, own_key(recipe, key, i)))
    return structure.unflatten(held)


def _quantized(leaf: jax.Array, recipe: Quantizer, key: jax.Array | None) -> Quantized | Flattened:
    """An array in the blocks of a recipe, flattened where it says."""
    blocks = recipe.granularity
    if isinstance(blocks, PerBlock) and blocks.axes == (-1,):
        recipe = dataclasses.replace(recipe, granularity=dataclasses.replace(blocks, pad=True))
        if leaf.ndim != 1 and math.prod(leaf.shape[-1:]) % np.prod(blocks.sizes):
            return Flattened(quantize(leaf.reshape(-1), recipe, key=key), leaf.shape)
    return quantize(leaf, recipe, key=key)
