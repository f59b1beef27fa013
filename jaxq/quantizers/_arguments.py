"""Argument checks shared by the functions that quantize tensors."""

from typing import NamedTuple

import jax
from jax import numpy as jnp

from jaxq._base.arguments import array as as_array
from jaxq._base.arguments import integer
from jaxq._base.cutting import axis_of_blocks
from jaxq._base.shapes import is_symbolic
from jaxq._jax.draws import checked_key
from jaxq.numerics import ROUNDINGS, Stochastic, floats, get_rounding
from jaxq.recipes import Recipe, get_recipe, title_of

__all__ = [
    "ErrorWeights",
    "Given",
    "check_takes_scales",
    "checked",
    "given_scales",
    "importance_of",
    "key_of",
]


_AXIS = "Use -1 for a weight [outputs, inputs], or -2 for a kernel [inputs, outputs]."


class Given(NamedTuple):
    """Given scales, and given zero points or minima; each broadcasts to one number per block."""

    scale: jax.Array
    zero_point: jax.Array | None


class ErrorWeights(NamedTuple):
    """Weights of the squared errors of elements, which broadcast to the tensor."""

    weights: jax.Array


def checked(
    name: str,
    x: jax.typing.ArrayLike,
    recipe: str | Recipe,
    axis: int | None,
    *,
    grids: bool = False,
) -> tuple[jax.Array, Recipe]:
    """Returns the array, and the recipe with its granularity on the array's own axes.

    A recipe with a `BinaryGrid` raises a TypeError unless `grids` is True.
    """
    if not (grids and isinstance(recipe, Recipe)):
        recipe = get_recipe(recipe)
    array = floats(name, x, float64=False)  # Scales are float32.
    if axis is not None:
        recipe = recipe.along(integer(name, "axis", axis, _AXIS), array.ndim)
    return array, recipe


def check_takes_scales(name: str, recipe: Recipe) -> None:
    """Raises ValueError if given scales cannot replace those that a recipe computes."""
    if not recipe.scaling.takes_scales:
        raise ValueError(
            f"{name}: given scales must be plain numbers, one per block, but a scaling with a "
            "second level, a search or stored=False computes its scales from the tensor, got a "
            f"recipe of {recipe.element.name}. Omit the scales, or use another recipe."
        )


def key_of(name: str, recipe: Recipe, key: jax.Array | None) -> jax.Array | None:
    """Returns the argument `key`, after checking that it is given exactly if a recipe needs it."""
    rounding = get_rounding(recipe.rounding)
    if checked_key(name, key) is None and isinstance(rounding, Stochastic):
        raise ValueError(
            f"{name}: `key` must be given, as stochastic rounding draws random bits, got None. "
            "Pass jax.random.key(seed)."
        )
    known = None if key is None else ROUNDINGS.name_of(rounding)
    if known is not None and not isinstance(rounding, Stochastic):
        raise ValueError(
            f"{name}: `key` must be None, as rounding {known!r} draws no random bits, got a key. "
            "Omit it, or use rounding='stochastic'."
        )
    return key


def given_scales(
    name: str,
    shape: tuple[int, ...],
    recipe: Recipe,
    scale: jax.typing.ArrayLike | None,
    zero_point: jax.typing.ArrayLike | None,
) -> Given | None:
    """Checks and returns the given scales and zero points."""
    if scale is None:
        if zero_point is not None:
            raise ValueError(f"{name}: `zero_point` was given without `scale`. Pass both.")
        return None
    check_takes_scales(name, recipe)
    two_sided = recipe.scaling.two_sided
    if two_sided != (zero_point is not None):
        requirement = "takes no `zero_point`. Omit it."
        if two_sided:
            requirement = "needs both `scale` and `zero_point`. Pass both."
        raise ValueError(f"{name}: a recipe with {recipe.scaling!r:.120} {requirement}")
    counts = recipe.cut(shape).counts
    result = []
    for label, value in (("scale", scale), ("zero_point", zero_point)):
        if value is None:
            result.append(None)
            continue
        requirement, remedy = "one number per block", "Omit it to compute it."
        array = as_array(name, label, value, requirement, remedy).astype(jnp.float32)
        missing_ndim = len(counts) - array.ndim
        fits = missing_ndim >= 0 and all(
            n in (1, m) for n, m in zip(array.shape, counts[missing_ndim:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name}: `{label}` must broadcast to one number per block, shape {counts}, got "
                f"{array.shape}. Use the scales of jaxq.calibration.finalize, or a scalar."
            )
        result.append(array.reshape((1,) * missing_ndim + array.shape))
    return Given(result[0], result[1])


def importance_of(
    name: str, shape: tuple[int, ...], recipe: Recipe, importance: jax.typing.ArrayLike
) -> ErrorWeights:
    """Checks and returns an importance: one weight per index of the axis of the blocks, or more."""
    if not recipe.scaling.takes_importance(recipe.element):
        raise ValueError(
            f"{name}: `importance` needs a recipe with a search of GGUF, such as 'q4_k' or 'q4_0', "
            f"got {title_of(recipe)}. Omit it, or use jaxq.ptq.ScaleSearch."
        )
    requirement, remedy = "one number per index of the axis of the blocks", "Or omit it."
    weights = as_array(name, "importance", importance, requirement, remedy).astype(jnp.float32)
    cut = recipe.cut(shape)
    block, axis = cut.block, axis_of_blocks(cut.block)
    several = [n for n in block if n != 1]
    if len(several) > 1 or is_symbolic(shape[axis]) or shape[axis] % block[axis]:
        raise ValueError(
            f"{name}: `importance` needs blocks along one axis, whose known length they divide, "
            f"got blocks of {block} for shape {shape}. Use PerBlock(32)."
        )
    if weights.ndim == 1:
        weights = weights.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    missing = len(shape) - weights.ndim
    fits = missing >= 0 and all(
        n in (1, m) for n, m in zip(weights.shape, shape[missing:], strict=True)
    )
    if not fits or axis < missing or weights.shape[axis - missing] != shape[axis]:
        raise ValueError(
            f"{name}: `importance` must have one weight for each of the {shape[axis]} indices of "
            f"axis {axis}, or broadcast to {shape} with them, got shape {jnp.shape(importance)}."
        )
    return ErrorWeights(weights.reshape((1,) * missing + weights.shape))
