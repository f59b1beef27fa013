"""Calibration of the scales of a recipe over many tensors, with an explicit state.

    state = init(shape, recipe)
    state = update(state, x, recipe)         for each batch, also in `jax.lax.scan`
    state = merge(state, other, recipe)      for other batches, `gather` for other devices
    scale, zero_point = finalize(state, recipe)
    y = jaxq.fake_quant(x, recipe, scale=scale, zero_point=zero_point)

The `range` of the recipe's scaling is the calibrator (`jaxq.recipes.CALIBRATORS`), and the
granularity of the recipe defines the elements that share a scale. The state is a pytree of arrays,
whose structure depends on the calibrator.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jaxq._base.arguments import described, shape_of
from jaxq._base.cutting import Cut
from jaxq._jax.meshes import automatic, fitting, spec_of
from jaxq._jax.serialization import named_tuple
from jaxq.numerics import floats, widen
from jaxq.quantizers._arguments import check_takes_scales
from jaxq.recipes import Recipe, get_recipe

__all__ = ["Calibrated", "finalize", "gather", "init", "merge", "update"]


@named_tuple
class Calibrated(NamedTuple):
    """The scales and zero points that `finalize` returns.

    Attributes:
      scale: float32 scales, one per block.
      zero_point: float32 zero points, one per block; None for a symmetric recipe.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> scale = Calibrated(jnp.full((1, 1), 0.5), None).scale
      >>> jaxq.fake_quant(jnp.array([[0.7, 9.0]]), "int4_tensor", scale=scale).tolist()
      [[0.5, 3.5]]
    """

    scale: jax.Array
    zero_point: jax.Array | None


def init(shape: tuple[int, ...], recipe: "str | Recipe") -> Any:
    """Returns the state before any data.

    Args:
      shape: the shape of the tensors to come. Axes that lie within one block, such as the batch
        axis of a recipe with one scale per tensor or per channel, may differ in length.
      recipe: the recipe, as accepted by `jaxq.get_recipe`.

    Returns:
      A pytree of arrays.

    Raises:
      ValueError: if the recipe does not fit the shape, or its scales are not plain numbers.

    Example:
      >>> low, high = init((2, 3), "int8_tensor")  # A range per block, by `AbsMax`.
      >>> high.shape
      (1, 1, 1, 1)
    """
    recipe, shape = _checked("init", recipe), shape_of("init", shape)
    cut = recipe.cut(shape)
    return recipe.scaling.calibrator.nothing(cut, recipe.scaling.two_sided)


def update(state: Any, x: jax.typing.ArrayLike, recipe: "str | Recipe") -> Any:
    """Returns the state after one more tensor.

    Args:
      state: a state from `init`, `update` or `merge`.
      x: a float16, bfloat16 or float32 tensor of the shape given to `init`.
      recipe: as in `init`.

    Returns:
      A state of the same structure, shapes and dtypes.

    Raises:
      TypeError: if x has another dtype.
      ValueError: as in `init`; or if the shape of x does not fit the state.

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
    x = floats("update", x, float64=False)
    counts = recipe.cut(x.shape).counts
    _check_state("update", "state", state, recipe)
    state_counts = jax.tree.leaves(state)[0].shape[: 2 * len(counts) : 2]
    if state_counts != counts:
        raise ValueError(
            f"update: `x` must have {state_counts} blocks, as the state has, got {counts} from "
            f"shape {x.shape}. Pass the shape of the data to `init`."
        )
    return _update(state, x, recipe)


def _of_state(mesh: Any, result: Any, state: Any, *others: Any) -> Any:
    """Returns the sharding of an updated state on a mesh with explicit axes: the old state's."""
    del mesh, result, others
    return jax.tree.map(spec_of, state)


def _of_blocks(mesh: Any, result: Any, state: Any, *others: Any) -> Any:
    """Returns the sharding of `finalize`'s result: the state's, without the axes within blocks."""
    del others
    entries = tuple(spec_of(jax.tree.leaves(state)[0]))
    spec = PartitionSpec(*entries[::2])
    return jax.tree.map(lambda leaf: fitting(mesh, spec, leaf.shape), result)


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(_of_state)
def _update(state: Any, x: jax.Array, recipe: Recipe) -> Any:
    cut = recipe.cut(x.shape)
    measured = recipe.measure(cut.split(widen(lax.stop_gradient(x))), cut)
    return recipe.scaling.calibrator.merge(state, measured)


def merge(first: Any, second: Any, recipe: "str | Recipe") -> Any:
    """Merges two states into the state of both data sets together. Associative.

    Args:
      first: a state.
      second: a state of the same recipe and shape; the later one if order matters ("ema").
      recipe: as in `init`.

    Returns:
      A state of the same structure.

    Example:
      >>> import jax.numpy as jnp
      >>> first, second = (init((2,), "int8_tensor") for _ in range(2))
      >>> second = update(second, jnp.array([1.0, -3.0]), "int8_tensor")
      >>> merge(first, second, "int8_tensor")[1].tolist()
      [[3.0]]
    """
    recipe = _checked("merge", recipe)
    _check_state("merge", "first", first, recipe)
    _check_state("merge", "second", second, recipe)
    return recipe.scaling.calibrator.merge(first, second)


def gather(state: Any, recipe: "str | Recipe", axis_name: str) -> Any:
    """Merges the states of all devices along a mapped axis, in order; each gets the same result.

    Args:
      state: the state of this device.
      recipe: as in `init`.
      axis_name: the name of the axis of `jax.shard_map` or `jax.vmap`. (Arrays that are sharded
        under `jax.jit` do not need `gather`: each is one array.)

    Returns:
      A state of the same structure.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def state(x):
      ...     low_high = update(init((1,), "int8_tensor"), x, "int8_tensor")
      ...     return gather(low_high, "int8_tensor", "device")[1][0, 0]
      >>> jax.vmap(state, axis_name="device")(jnp.array([[1.0], [-3.0]])).tolist()
      [3.0, 3.0]
    """
    stacked = lax.all_gather(state, axis_name)
    size = jax.tree.leaves(stacked)[0].shape[0]
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(size)]
    return functools.reduce(lambda a, b: merge(a, b, recipe), parts)


def finalize(state: Any, recipe: "str | Recipe") -> Calibrated:
    """Returns the scales for the data seen, and zero points if the recipe has any.

    Args:
      state: a state.
      recipe: as in `init`.

    Returns:
      Scales for `jaxq.fake_quant` and `jaxq.quantize`. The scale is NaN for a block that saw a NaN
      or an infinity, and 0, which gives zeros, for a block that saw only zeros or no data.

    Example:
      >>> import jax.numpy as jnp
      >>> state = update(init((2,), "int8_tensor"), jnp.array([127.0, 1.0]), "int8_tensor")
      >>> finalize(state, "int8_tensor").scale.tolist()
      [1.0]
    """
    recipe = _checked("finalize", recipe)
    _check_state("finalize", "state", state, recipe)
    return _finalize(state, recipe)


@functools.partial(jax.jit, static_argnames="recipe")
@automatic(_of_blocks)
def _finalize(state: Any, recipe: Recipe) -> Calibrated:
    scaling, fmt = recipe.scaling, recipe.element
    ends = scaling.calibrator.finalize(state, fmt, scaling.two_sided)
    scales = scaling.scales(ends, fmt)
    counts = scales.step.shape[::2]
    zero_point = None if scales.offset is None else scales.offset.reshape(counts)
    return Calibrated(scales.step.reshape(counts), zero_point)


def _check_state(name: str, argument: str, state: Any, recipe: Recipe) -> None:
    """Raises a TypeError unless a state has the structure of those of the recipe's calibrator."""
    scaling = recipe.scaling
    structure = _structure(scaling.calibrator, scaling.two_sided)
    if jax.tree.structure(state) != structure:
        raise TypeError(
            f"{name}: `{argument}` must be a state of `init` for this recipe, got "
            f"{described(state)}. Pass the recipe that made the state."
        )


@functools.cache
def _structure(calibrator: Any, two_sided: bool) -> Any:
    """Returns the structure of a calibrator's states."""
    nothing = functools.partial(calibrator.nothing, Cut((1,), (1,)), two_sided)
    return jax.tree.structure(jax.eval_shape(nothing))


def _checked(name: str, recipe: "str | Recipe") -> Recipe:
    recipe = get_recipe(recipe)
    check_takes_scales(f"calibration.{name}", recipe)
    return recipe
