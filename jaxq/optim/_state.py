"""Optimizer state that is stored quantized between steps."""

import collections
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

from jaxq._base.arguments import described
from jaxq._jax.arithmetic import square_root
from jaxq._jax.serialization import named_tuple, pytree
from jaxq.models import (
    LeafRules,
    assign,
    leaf_rules,
    not_floating,
    prefix_leaf_errors,
    refuse_states,
)
from jaxq.numerics import as_dtype, widen
from jaxq.optim._common import RandomState, own_key
from jaxq.quantizers import Quantized, neighbors, quantize
from jaxq.recipes import PerBlock, Recipe

__all__ = ["ADAM8BIT", "QuantizedState", "quantize_state"]

_WRAPPERS = r"^(\d+/|\w*state/|\w*states/[^/]+/)*"  # Indices of chains and fields of wrappers.

SECOND_MOMENTS = (
    _WRAPPERS
    + r"(nu|nu_max|n|sum_of_squares|grad_sum_sq|exp_avg_sq|e_g|e_x|v_row|v_col|signed_nu)(/|$)"
)
"""A regular expression for the paths of optax's second moments and other divisors.

It matches the names of optax's fields, preceded only by the indices of a chain and the fields of
wrappers, so that a parameter called `nu` is not mistaken for a second moment. Before it matches
this pattern, `quantize_state` replaces the names in `optax.named_chain` by indices, `nu` in
`optax.contrib.sophia`, which may be negative, by `signed_nu`, and the names of other divisors by
`nu`: `v` in `optax.adafactor`, `mu` in `optax.sm3`, and `scale` in `optax.contrib.cocob`.
"""

_SIGNED = _WRAPPERS + r"signed_nu(/|$)"

_EXACT = _WRAPPERS + r"(params0|init_params|x0|init_particles|z|cache|exact_\w+)(/|$)"
"""A regular expression for the paths of arrays that the default rules do not quantize.

Optimizers subtract these from current values, or compute parameters from them, so a rounding error
may exceed the change of one step.
"""

_RENAMED_FIELDS = {
    "FactoredState": {"v": "nu"},  # Adafactor; `v` of Adan is not a second moment.
    "ScaleBySM3State": {"mu": "nu", "nu": "mu"},  # Here `nu` is the momentum of the updates.
    "SophiaState": {"nu": "signed_nu"},  # Estimates of the diagonal of the Hessian.
    "ScaleByLBFGSState": {"params": "exact_params", "updates": "exact_updates"},
    # The sums of gradients, from which each step computes the parameters.
    "MadgradState": {"s": "exact_s"},
    "COCOBState": {
        "cumulative_gradients": "exact_gradients",
        "subgradients": "exact_magnitudes",
        "reward": "exact_reward",
        "scale": "nu",  # The largest gradients, by which a step divides.
    },
    # The product of `exp_avg` and the parameters is compared with the mean of exact products.
    "MomoState": {"exp_avg": "exact_mean"},
    "MomoAdamState": {"exp_avg": "exact_mean"},
    # The variance of a centered RMSProp is the difference of its two moments.
    "ScaleByRStdDevState": {"mu": "exact_mu", "nu": "exact_nu"},
    "ScaleByRStdDevWithCountState": {"mu": "exact_mu", "nu": "exact_nu"},
    # Arrays that functions of optax return to the user.
    "ScaleByBacktrackingLinesearchState": {"grad": "exact_grad"},
    "ScaleByZoomLinesearchState": {"grad": "exact_grad"},
    "SnapshotState": {"measurement": "exact_measurement"},
    "MonitorState": {"measurements": "exact_measurements"},
    "PerElementMeanAndVarianceEMAState": {
        "mean_grads_ema": "exact_mean",
        "variance_grads_ema": "exact_variance",
    },
}
"""Unambiguous names of fields, by the names of optax's classes."""

ADAM8BIT: LeafRules = (
    (_EXACT, None),
    (_SIGNED, Recipe("dynamic8", PerBlock(256))),
    (SECOND_MOMENTS, Recipe("udynamic8", PerBlock(256))),
    ("", Recipe("dynamic8", PerBlock(256))),
)
"""The default rules of `quantize_state`: dynamic 8-bit codes, unsigned for second moments."""


@pytree(static=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class Flattened:
    """An array quantized as one row because its last axis does not hold whole blocks.

    Attributes:
      row: the flattened array, quantized.
      shape: the shape of the array.
    """

    row: Quantized
    shape: tuple[int, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the row."""
        return self.row.recipe

    def dequantize(self) -> jax.Array:
        """Returns the dequantized array in its own shape."""
        return self.row.dequantize().reshape(self.shape)


@pytree(static=("dtype",))
@dataclasses.dataclass(frozen=True, eq=False)
class Squared:
    """An array of squares stored as its quantized square roots.

    Attributes:
      root: the quantized square roots, with the signs of the array's elements.
      dtype: the dtype of the array.
    """

    root: Quantized | Flattened
    dtype: np.dtype

    @property
    def recipe(self) -> Recipe:
        """The recipe of the square roots."""
        return self.root.recipe

    def dequantize(self) -> jax.Array:
        """Returns the dequantized array, the signed squares of the roots."""
        root = self.root.dequantize()
        return as_dtype(root * jnp.abs(root), self.dtype)


@named_tuple
class QuantizedState(NamedTuple):
    """The state of `quantize_state`, a pytree of arrays.

    Attributes:
      inner: the optimizer's own state, with its large arrays replaced by `jaxq.Quantized`,
        `Flattened` or `Squared` ones.
      key: the key data of a `jax.random` key, or None.
    """

    inner: Any
    key: jax.Array | None


def quantize_state(
    tx: optax.GradientTransformation,
    rules: LeafRules = ADAM8BIT,
    *,
    min_size: int = 4096,
    second_moments: str | None = SECOND_MOMENTS,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stores an optimizer's state quantized between steps.

    A step dequantizes the state, runs the optimizer in the state's own dtype, and quantizes the new
    state. The updates are therefore computed from moments that this step has not rounded yet, and
    memory is saved between steps, not within a step.

    The floating arrays that have the shape of some parameter and at least `min_size` elements are
    quantized; all other arrays are unchanged. `jaxq.tree_report(state)` lists the result. If blocks
    along the last axis, such as those of `PerBlock(256)`, do not divide that axis, the array is
    quantized as one flattened row whose last block may be shorter, so such blocks suit any shape.
    Every other granularity is applied to the array in its own shape.

    The default rules do not quantize four kinds of arrays, because rounding errors may exceed the
    change of one step. Rules of your own can exclude them by a pair such as `("params0", None)`.

    - Copies of parameters and gradients that are compared with current ones: `params0` of
      `optax.contrib.prodigy`, `x0` of `mechanize`, `z` of `schedule_free`, the previous parameters
      and gradients of `optax.scale_by_lbfgs`.
    - Sums of gradients from which each step computes the parameters: `s` of `madgrad`,
      `cumulative_gradients`, `subgradients` and `reward` of `cocob`. With rounding to nearest,
      parameters stopped moving.
    - Moments in a difference: those of `optax.rmsprop(centered=True)`, and `exp_avg` of `momo` and
      `momo_adam`.
    - Arrays that you read from the state: the gradients of a line search, for
      `optax.value_and_grad_from_state`, and measurements of `optax.snapshot` and `optax.monitor`.

    `quantize_state(optax.MultiSteps(tx, n).gradient_transformation())` quantizes the accumulated
    gradients at every micro-step; `optax.MultiSteps(quantize_state(tx), n)` does not.

    Optimizers divide by the square roots of second moments, so second moments are treated specially
    under every recipe. First, the square root is quantized instead of the square, which covers
    twice the range of exponents and spends the levels on the number that is used. Second, a
    positive element never becomes 0: it is at least the smallest positive level of its block. A
    weight whose gradients are much smaller than the largest of its block therefore takes smaller
    steps, not larger ones.

    The default is 8-bit Adam in blocks of 256, with one byte per element and one float32 scale per
    block: 2.03 bytes per parameter instead of Adam's 8. With `udynamic8`, the smallest level of the
    square root is 3.25e-7 of the block's largest. Unquantized Adam with b1=0.9 and b2=0.999 moves
    no weight by more than 7.3 times the learning rate. No such bound is proven for the quantized
    state: over gradients chosen to be difficult, the largest update found was 23 times the learning
    rate, and tests allow 30.

    If second moments are quantized as squares that may become 0, a step may divide by 0. Measured
    on CPU over 150 steps of a small network on handwritten digits, three seeds, in multiples of the
    learning rate: the largest update of torchao 0.18's `Adam8bit` was 1.4e3 to 1.6e5, that of
    bitsandbytes 0.50.2 was 2 to 4, and that of float32 Adam was 2.

    Rounding to nearest has two more effects. First, a moment that changes by less than half a
    level per step keeps its code until the block's scale changes; stochastic rounding preserves the
    change in the mean. Second, the lowest value of `dynamic8` is -0.993, so a negative extreme of a
    block loses 0.7% of its magnitude per step.

    Args:
      tx: any optimizer.
      rules: as in `jaxq.quantize_tree`: one recipe, a mapping, or a sequence, with patterns for
        paths in the state, such as `"mu/.*kernel"`. Recipes refer to an array's own axes: blocks
        lie along the last one.
      min_size: the smallest number of elements of a quantized array; 4096 by default.
      second_moments: a regular expression that is searched for in the paths of the state and
        selects the arrays that are stored as square roots. The default matches the fields by which
        optimizers of optax divide; `v` is one in `optax.adafactor`, but not in `optax.adan`, and
        `nu` is none in `optax.sm3`. None stores every array directly, which is safe only if no
        optimizer divides by one.
      key: a `jax.random` key, required if a recipe rounds stochastically. The state carries it from
        step to step as key data; each array and step draws different bits.

    Returns:
      A transformation with the updates of `tx`. Its state is a pytree of arrays, without the
      variables of Flax NNX, so that `flax.nnx.Optimizer` accepts it.

    Raises:
      ValueError: if a key is missing or not needed; on `init`, if a rule matches no array, or a
        recipe does not fit an array.

    Example:
      >>> import jax, jaxq, optax, jax.numpy as jnp
      >>> params = {"w": jnp.ones((64, 256)), "b": jnp.ones(256)}
      >>> tx = jaxq.optim.quantize_state(optax.adam(1e-3))
      >>> print(jaxq.tree_report(tx.init(params).inner))  # doctest: +NORMALIZE_WHITESPACE
      path          shape    dtype     format  bytes_before  bytes_after   bits
      0/count      scalar    int32          -             4            4     32
      0/mu/b          256  float32          -          1024         1024     32
      0/mu/w       64x256  float32   dynamic8         65536        16640  8.125
      0/nu/b          256  float32          -          1024         1024     32
      0/nu/w/root  64x256  float32  udynamic8         65536        16640  8.125
      total                                          133124        35332  8.493

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022); Li et al., "Memory
      Efficient Optimizers with 4-bit States" (2023), on second moments that become 0.
    """
    recipe_rules, strict = leaf_rules("quantize_state", rules), rules is not ADAM8BIT
    random = RandomState.of("quantize_state", recipe_rules, key)
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"quantize_state: `tx` must be an optimizer of optax, got {described(tx)}. Pass, for "
            "example, optax.adam(1e-3)."
        )
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> Any:
        refuse_states("quantize_state", params)
        shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(params)}

        def unfit(leaf: Any) -> str:
            if not_floating(leaf):
                return not_floating(leaf)
            if leaf.shape not in shapes:
                return f"has the shape {leaf.shape} of no parameter"
            is_small = leaf.size < min_size
            return f"has {leaf.size} elements, fewer than min_size={min_size}" if is_small else ""

        inner = tx.init(_without_variables(params))
        indexed = _with_standard_names(inner)  # For the default patterns.
        named = inner if strict else indexed
        recipes = assign("quantize_state", named, recipe_rules, unfit=unfit, strict=strict)
        squares = [] if second_moments is None else [(second_moments, True)]
        named = indexed if second_moments == SECOND_MOMENTS else inner
        roots = assign("quantize_state", named, squares, strict=False)
        later, now = random.split(random.data)
        return QuantizedState(_stored(inner, recipes, roots, now), later)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        stored, structure = jax.tree.flatten(state.inner, is_leaf=_is_quantized)
        leaves = [leaf.dequantize() if _is_quantized(leaf) else leaf for leaf in stored]
        given, pure = jax.tree.structure(updates), _without_variables(updates)
        moments, params = structure.unflatten(leaves), _without_variables(params)
        new, inner = tx.update(pure, moments, params, **extra)
        if given != jax.tree.structure(pure):
            new = given.unflatten(jax.tree.leaves(new))
        recipes = [leaf.recipe if _is_quantized(leaf) else None for leaf in stored]
        roots = [isinstance(leaf, Squared) for leaf in stored]
        later, now = random.split(state.key)
        return new, QuantizedState(_stored(inner, recipes, roots, now), later)

    return optax.GradientTransformationExtraArgs(init, update)


def _without_variables(tree: Any) -> Any:
    """Returns a tree with the values of Flax NNX's variables in place of the variables.

    `flax.nnx.Optimizer` cannot update a variable whose value is a pytree.
    """
    nnx = sys.modules.get("flax.nnx")
    return tree if nnx is None else nnx.as_pure(tree)


def _with_standard_names(state: Any) -> Any:
    """Returns a state with the names that the default patterns match.

    Tuples replace the dictionaries of `optax.named_chain`, and the fields in `_RENAMED_FIELDS` have
    their new names. The order of the leaves is unchanged.
    """
    if isinstance(state, dict) and all(isinstance(value, tuple) for value in state.values()):
        return tuple(_with_standard_names(state[name]) for name in sorted(state))
    if not isinstance(state, tuple):
        return state
    if not hasattr(state, "_fields"):
        return tuple(map(_with_standard_names, state))
    record: Any = state
    inner = [name for name in record._fields if name.endswith(("state", "states"))]
    record = record._replace(**{name: _with_standard_names(getattr(state, name)) for name in inner})
    renamed = _RENAMED_FIELDS.get(type(record).__name__)
    if renamed is None:
        return record
    names: tuple[str, ...] = record._fields
    return collections.namedtuple("Renamed", [renamed.get(name, name) for name in names])(*record)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized | Flattened | Squared)


def _stored(
    inner: Any, recipes: list[Recipe | None], roots: Sequence[bool | None], key: jax.Array | None
) -> Any:
    """Quantizes the leaves of a state that have a recipe, or the square roots of those leaves."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(inner)
    stored = []
    for i, ((path, leaf), recipe, root) in enumerate(zip(leaves, recipes, roots, strict=True)):
        if recipe is None:
            stored.append(leaf)
            continue
        with prefix_leaf_errors("quantize_state", path):
            stored.append(_quantized(leaf, recipe, own_key(recipe, key, i), bool(root)))
    return structure.unflatten(stored)


def _quantized(
    leaf: jax.Array, recipe: Recipe, key: jax.Array | None, root: bool
) -> Quantized | Flattened | Squared:
    """Quantizes an array, flattened first if the block length does not divide its last axis."""
    blocks, shape, dtype, flat = recipe.granularity, leaf.shape, leaf.dtype, False
    if isinstance(blocks, PerBlock) and blocks.axes == (-1,):
        recipe = dataclasses.replace(recipe, granularity=dataclasses.replace(blocks, pad=True))
        flat = leaf.ndim != 1 and math.prod(shape[-1:]) % np.prod(blocks.sizes) != 0
    leaf = leaf.reshape(-1) if flat else leaf
    leaf = _positive_roots(leaf, recipe) if root else leaf
    stored = quantize(leaf, recipe, key=key)
    stored = Flattened(stored, shape) if flat else stored
    return Squared(stored, dtype) if root else stored


def _positive_roots(leaf: jax.Array, recipe: Recipe) -> jax.Array:
    """Returns signed square roots, with positive ones raised so that none rounds to 0.

    Roots below the smallest positive value of their block become that value.
    """
    leaf = widen(leaf)
    root = jnp.sign(leaf) * square_root(jnp.abs(leaf))
    below, above = neighbors(root, recipe)
    return jnp.where((root > 0) & (below <= 0), above, root)
