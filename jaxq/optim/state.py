"""Optimizer state held quantized between steps."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax import numpy as jnp

from jaxq.blocks import PerBlock
from jaxq.optim.common import RandomState, Recipe, as_rules, own_key
from jaxq.quantizers import Quantized, quantize
from jaxq.recipes import Quantizer
from jaxq.trees import Rules, assign, is_floating, path_name

__all__ = ["ADAM8BIT", "QuantizedState", "quantize_state"]

# The paths of optax's second moments, which are never negative: `nu` behind nothing but a chain's
# indices and the fields of wrappers, so that no parameter of that name is one.
_SECOND_MOMENTS = r"^(\d+/|\w*state/|\w*states/[^/]+/)*nu(/|$)"

ADAM8BIT: Rules = (
    (_SECOND_MOMENTS, Quantizer("udynamic8", PerBlock(256))),
    ("", Quantizer("dynamic8", PerBlock(256))),
)
"""The rules of `quantize_state` by default: dynamic 8-bit codes, unsigned for second moments."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["inner", "key"], meta_fields=["shapes"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedState:
    """What `quantize_state` keeps between steps; a pytree of arrays.

    Attributes:
      inner: the optimizer's own state, with `jaxq.Quantized` in the place of its large arrays.
      key: the numbers of a `jax.random` key, or None.
      shapes: the shape of each array that is quantized.
    """

    inner: Any
    key: jax.Array | None
    shapes: tuple[tuple[int, ...], ...]


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
    more; all else stays as it is. `jaxq.tree_report(state)` says what became what. A `PerBlock`
    along the last axis alone runs through the array as one row, so that it suits any shape and its
    last block is shorter; every other granularity sees the array in its own shape.

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
      >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
      >>> tx = jaxq.optim.quantize_state(optax.adam(1e-3))
      >>> print(jaxq.tree_report(tx.init(params).inner))  # doctest: +NORMALIZE_WHITESPACE
      path      shape    dtype     format  bytes_before  bytes_after     bits
      0/count  scalar    int32          -             4            4       32
      0/mu/b       64  float32          -           256          256       32
      0/mu/w     4096  float32   dynamic8         16384         4160    8.125
      0/nu/b       64  float32          -           256          256       32
      0/nu/w     4096  float32  udynamic8         16384         4160    8.125
      total                                       33284         8836  8.49513

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
        leaves, structure = jax.tree.flatten(inner)
        later, now = random.split(random.data)
        return _held(leaves, structure, recipes, now, later)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        held, structure = jax.tree.flatten(state.inner, is_leaf=_is_quantized)
        shapes = iter(state.shapes)
        leaves = [
            leaf.dequantize().reshape(next(shapes)) if _is_quantized(leaf) else leaf
            for leaf in held
        ]
        updates, inner = tx.update(updates, structure.unflatten(leaves), params, **extra)
        recipes = [leaf.recipe if _is_quantized(leaf) else None for leaf in held]
        later, now = random.split(state.key)
        return updates, _held(structure.flatten_up_to(inner), structure, recipes, now, later)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _held(
    leaves: list[Any],
    structure: Any,
    recipes: list[Quantizer | None],
    now: jax.Array | None,
    later: jax.Array | None,
) -> QuantizedState:
    """A state with the leaves quantized that have a recipe."""
    held = list(leaves)
    for i, (leaf, recipe) in enumerate(zip(leaves, recipes, strict=True)):
        if recipe is None:
            continue
        blocks = recipe.granularity
        if isinstance(blocks, PerBlock) and blocks.axes == (-1,):
            recipe = dataclasses.replace(recipe, granularity=dataclasses.replace(blocks, pad=True))
            leaf = leaf.reshape(-1)
        try:
            held[i] = quantize(leaf, recipe, key=own_key(recipe, now, i))
        except (TypeError, ValueError) as error:
            path, _ = jax.tree_util.tree_leaves_with_path(structure.unflatten(leaves))[i]
            raise type(error)(f"quantize_state: leaf {path_name(path)!r}: {error}") from error
    shapes = tuple(leaf.shape for leaf, r in zip(leaves, recipes, strict=True) if r is not None)
    return QuantizedState(structure.unflatten(held), later, shapes)
