"""Calibration over data: scales for a recipe from many tensors, as pure state.

    state = init(shape, recipe)
    state = update(state, x, recipe)         for each batch, in `jax.lax.scan` if you like
    state = merge(state, other, recipe)      for other batches, `gather` for other devices
    scale, zero_point = finalize(state, recipe)
    y = jaxq.fake_quant(x, recipe, scale=scale, zero_point=zero_point)

The recipe says everything: its `range` is the calibrator, its granularity which numbers share a
scale. What the state is, is the calibrator's business; it is a pytree of arrays.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from jaxq.calibrators import get_calibrator
from jaxq.casting import floats, widen
from jaxq.formats import Format
from jaxq.meshes import automatic, fitting, spec_of
from jaxq.presets import get_quantizer
from jaxq.quantizers import check_plain_scales
from jaxq.recipes import Quantizer
from jaxq.snapping import scales_of

__all__ = ["Calibrated", "finalize", "gather", "init", "merge", "update"]


class Calibrated(NamedTuple):
    """What `finalize` gives.

    Attributes:
      scale: float32, one a block.
      zero_point: float32, one a block; None for a symmetric recipe.
    """

    scale: jax.Array
    zero_point: jax.Array | None


def init(shape: tuple[int, ...], recipe: "str | Format | Quantizer") -> Any:
    """The state before any data.

    Args:
      shape: of the tensors to come. Axes that lie within one block, such as the batch of a recipe
        with one scale a tensor or a channel, may be of another length in each.
      recipe: a recipe, as `jaxq.get_quantizer` takes it.

    Returns:
      A pytree of arrays.

    Raises:
      ValueError: the recipe does not fit the shape, or its scales are not plain numbers.
    """
    recipe = _checked("init", recipe)
    cut = recipe.cut(shape)
    return get_calibrator(recipe.range).nothing(cut, recipe.zero_point is not None)


def update(state: Any, x: jax.typing.ArrayLike, recipe: "str | Format | Quantizer") -> Any:
    """The state after one more tensor.

    Args:
      state: what `init`, `update` or `merge` gave.
      x: float16, bfloat16 or float32, of the shape that `init` was told.
      recipe: as in `init`.

    Returns:
      A state of the same structure, shapes and dtypes.

    Raises:
      TypeError: x is of another dtype.
      ValueError: as in `init`; or x is not of the shape that the state is for.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq import calibration
      >>> state = calibration.init((2, 3), "int8_tensor")
      >>> for x in (jnp.ones((2, 3)), jnp.full((2, 3), -6.35)):
      ...     state = calibration.update(state, x, "int8_tensor")
      >>> round(float(calibration.finalize(state, "int8_tensor").scale[0, 0]), 6)
      0.05
    """
    recipe = _checked("update", recipe)
    x = floats("update", x)
    if x.dtype == jnp.float64:
        raise TypeError("update: `x` must be float16, bfloat16 or float32, got float64.")
    counts = recipe.cut(x.shape).counts
    known = jax.tree.leaves(state)[0].shape[: 2 * len(counts) : 2]
    if known != counts:
        raise ValueError(
            f"update: the state is for {known} blocks, got {counts}, those of `x` of shape "
            f"{x.shape}. Give `init` the shape of the data."
        )
    return _update(state, x, recipe)


def _of_state(mesh: Any, result: Any, state: Any, *others: Any) -> Any:
    """The layout of an updated state on a mesh with explicit axes: that which it had."""
    del mesh, result, others
    return jax.tree.map(spec_of, state)


def _of_blocks(mesh: Any, result: Any, state: Any, *others: Any) -> Any:
    """The layout of what `finalize` gives: a state's, without the axes within blocks."""
    del others
    entries = tuple(spec_of(jax.tree.leaves(state)[0]))
    spec = PartitionSpec(*entries[::2])
    return jax.tree.map(lambda leaf: fitting(mesh, spec, leaf.shape), result)


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(_of_state)
def _update(state: Any, x: jax.Array, recipe: Quantizer) -> Any:
    calibrator, cut = get_calibrator(recipe.range), recipe.cut(x.shape)
    wide = cut.split(widen(lax.stop_gradient(x)))
    measured = calibrator.measure(wide, cut, recipe.zero_point is not None)
    return calibrator.merge(state, measured)


def merge(first: Any, second: Any, recipe: "str | Format | Quantizer") -> Any:
    """The state of all that two states have seen. Associative.

    Args:
      first: a state.
      second: a state of the same recipe and shape; the later one, where order counts ("ema").
      recipe: as in `init`.

    Returns:
      A state of the same structure.
    """
    recipe = _checked("merge", recipe)
    return get_calibrator(recipe.range).merge(first, second)


def gather(state: Any, recipe: "str | Format | Quantizer", axis_name: str) -> Any:
    """The state of all devices along a mapped axis, merged in their order; the same on each.

    Args:
      state: each device's own.
      recipe: as in `init`.
      axis_name: the axis of `jax.shard_map` or `jax.vmap`. (Arrays that are sharded under
        `jax.jit` need none of this: they are one array.)

    Returns:
      A state of the same structure.
    """
    stacked = lax.all_gather(state, axis_name)
    size = jax.tree.leaves(stacked)[0].shape[0]
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(size)]
    return functools.reduce(lambda a, b: merge(a, b, recipe), parts)


def finalize(state: Any, recipe: "str | Format | Quantizer") -> Calibrated:
    """The scales, and zero points if the recipe has any, for what was seen.

    Args:
      state: a state.
      recipe: as in `init`.

    Returns:
      Scales for `jaxq.fake_quant` and `jaxq.quantize`. NaN for a block in which a NaN or an
      infinity was seen; 0, which makes zeros, for one that saw nothing but zeros or nothing at all.
    """
    return _finalize(state, _checked("finalize", recipe))


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(_of_blocks)
def _finalize(state: Any, recipe: Quantizer) -> Calibrated:
    two_sided = recipe.zero_point is not None
    low, high = get_calibrator(recipe.range).finalize(state, recipe.element, two_sided)
    scales = scales_of(low, high, recipe)
    counts = low.shape[::2]
    zero_point = scales.zero_point
    return Calibrated(
        scales.step.reshape(counts), None if zero_point is None else zero_point.reshape(counts)
    )


def _checked(name: str, recipe: "str | Format | Quantizer") -> Quantizer:
    recipe = get_quantizer(recipe)
    check_plain_scales(f"calibration.{name}", recipe)
    return recipe
