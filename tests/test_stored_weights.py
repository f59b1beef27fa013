"""Stored weights, bitwise against weights that are quantized in each call.

The tests multiply by an identity matrix, which returns the bits of a weight, because every sum has
one nonzero term.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq.recipes import Outliers
from tests import data
from tests.oracle import assert_same

TENSOR = jaxq.Recipe("int4")
BLOCKS = jaxq.Recipe("int4", jaxq.PerBlock(4))
PADDED = jaxq.Recipe("int4", jaxq.PerBlock(5, pad=True))
TILES = jaxq.Recipe("int4", jaxq.PerBlock((4, 4)))
NVFP4 = jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(4), jaxq.TwoLevel())
DOUBLE = jaxq.Recipe("int4", jaxq.PerBlock(4), jaxq.DoubleQuant("int8", 4))
OUTLIERS = jaxq.Recipe("int4", outliers=Outliers(0.1))
APART = jaxq.Recipe("int4", jaxq.PerBlock(4), outliers=Outliers(0.1))
SIGMA = jaxq.Recipe("int4", outliers=Outliers(0.1, sigma=2.0))
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


class Case(NamedTuple):
    """A function from parameters to the weight that a product multiplies.

    Attributes:
      leaves: the shapes of the parameters.
      view: a function from the parameters to the weight `[inputs, outputs]`.
      stored: True if the parameters are stored, else the reason that `explain` gives.
      recipe: the recipe of the weight. Default: "int4_channel".
      dtype: the dtype of the parameters. Default float32.
    """

    leaves: tuple[tuple[int, ...], ...]
    view: Callable[..., jax.Array]
    stored: bool | str
    recipe: Any = "int4_channel"
    dtype: Any = F32


W, HEADS, PAIR = ((8, 12),), ((8, 3, 4),), ((8, 4), (8, 8))
CASES = {
    "transposed": Case(W, lambda w: w.T, True, BLOCKS),
    "split along outputs": Case(W, lambda w: jnp.split(w, 3, 1)[1], True),
    "split along outputs, per tensor": Case(W, lambda w: jnp.split(w, 3, 1)[1], True, TENSOR),
    "split unevenly, per tensor": Case(W, lambda w: w[:, 2:7], "do not coincide", TENSOR),
    "split along inputs": Case(W, lambda w: jnp.split(w, 2, 0)[1], True),
    "split along inputs, unevenly": Case(W, lambda w: w[3:8], "do not coincide"),
    "split through blocks": Case(W, lambda w: w[2:6], "do not coincide", BLOCKS),
    "split between blocks": Case(W, lambda w: w[4:8], True, BLOCKS),
    "split with a second level": Case(W, lambda w: w[4:8], "not multiplied whole", NVFP4),
    "the short last block": Case(((12, 8),), lambda w: w[5:], True, PADDED),
    "strided": Case(W, lambda w: w[::2], "not multiplied in whole blocks"),
    "reversed": Case(W, lambda w: w[::-1], True, BLOCKS),
    "reversed, short last block": Case(W, lambda w: w[::-1], "do not coincide", PADDED),
    "merged outputs": Case(HEADS, lambda w: w.reshape(8, 12), True, BLOCKS),
    "merged inputs": Case(HEADS, lambda w: w.reshape(24, 4), "blocks of 3 do not", BLOCKS),
    "split axis": Case(W, lambda w: w.reshape(2, 4, 12)[1], True),
    "swapped merged axes": Case(HEADS, lambda w: w.swapaxes(0, 1).reshape(24, 4), True, TENSOR),
    "blocks across merged axes": Case(
        HEADS, lambda w: w.swapaxes(0, 1).reshape(24, 4).T, True, TILES
    ),
    "minor part of an axis": Case(
        W, lambda w: w.reshape(2, 4, 12)[:, 1], "do not coincide", TENSOR
    ),
    "one of stacked": Case(((3, 8, 12),), lambda w: w[1], True, NVFP4),
    "one of stacked, double": Case(((3, 8, 12),), lambda w: w[1], True, DOUBLE),
    "stacked in the middle": Case(((8, 3, 12),), lambda w: w[:, 1], True, BLOCKS),
    "repeated": Case(
        ((8, 3, 4),), lambda w: jnp.repeat(w[:, :, None], 2, 2).reshape(8, 24), True, BLOCKS
    ),
    "another order, double": Case(W, lambda w: w.T, "in another order", DOUBLE),
    "another order, sigma": Case(W, lambda w: w.T, "in another order", SIGMA),
    # Many weights have equal magnitudes, so the choice of outliers must not depend on their order.
    "another order, apart": Case(
        W, lambda w: lax.reduce_precision(w, 5, 1)[::-1].T, True, APART
    ),
    "repeated, apart": Case(
        HEADS, lambda w: jnp.repeat(w, 2, 1).reshape(8, 24), "is repeated", OUTLIERS
    ),
    "whole, apart": Case(HEADS, lambda w: w.reshape(24, 4), True, OUTLIERS),
    "concatenated outputs": Case(PAIR, lambda v, w: jnp.concatenate([w, v, w], 1), True),
    "concatenated inputs": Case(PAIR, lambda v, w: jnp.concatenate([v.T, w.T]), "other weights"),
    "concatenated blocks": Case(PAIR, lambda v, w: jnp.concatenate([v.T, w.T]), True, BLOCKS),
    "part of a concatenation": Case(PAIR, lambda v, w: jnp.concatenate([v, w], 1)[:, 2:], True),
    "stacked and merged": Case(
        ((4, 6), (4, 6)), lambda v, w: jnp.stack([v, w], 1).reshape(4, 12), True
    ),
    "scanned stack": Case(
        ((8, 12), (8, 12)),
        lambda v, w: lax.scan(lambda c, w: (c, jnp.eye(8) @ w), 0, jnp.stack([v, w]))[1][1],
        True,
        NVFP4,
    ),
    "bfloat16 read as float32": Case(W, lambda w: w.astype(F32), True, dtype=BF16),
    "float32 read as bfloat16": Case(W, lambda w: w.astype(BF16), True),
    "through bfloat16": Case(W, lambda w: w.astype(BF16).astype(F32).T, True, BLOCKS),
    "through two dtypes": Case(W, lambda w: w.astype(F16).astype(BF16).astype(F32), True),
    "reshaped between conversions": Case(
        HEADS, lambda w: w.astype(BF16).reshape(24, 4).astype(F32), True
    ),
    "reduce_precision": Case(W, lambda w: lax.reduce_precision(w, 5, 4), True),
    "int8": Case(W, lambda w: w.astype(F32), True, dtype=jnp.int8),
    "int8 through int32": Case(
        W, lambda w: w.astype(jnp.int32).astype(F32), "whole blocks", dtype=jnp.int8
    ),
    "float8": Case(W, lambda w: w.astype(F32), True, dtype=jnp.float8_e4m3fn),
    "inside jit": Case(W, jax.jit(lambda w: w.astype(BF16)), True),
    "converted around jit": Case(W, lambda w: jax.jit(lambda w: w.T)(w.astype(BF16)), True),
    "computed": Case(W, lambda w: w * 0.3, "computed from"),
    "drawn anew": Case(
        W, lambda w: w, "draws new random bits", jaxq.Recipe("int4", rounding="stochastic")
    ),
}  # fmt: skip


def leaves_of(case: Case, seed: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    scale = 40 if case.dtype == jnp.int8 else 1
    arrays = (scale * rng.standard_normal(shape) for shape in case.leaves)
    return [jax.device_put(array.astype(case.dtype)) for array in arrays]


def by_identity(w: jax.Array) -> jax.Array:
    return jnp.eye(w.shape[0], dtype=w.dtype) @ w


def model(params: dict[str, list[jax.Array]]) -> dict[str, jax.Array]:
    return {name: by_identity(CASES[name].view(*leaves)) for name, leaves in params.items()}


PARAMS = {name: leaves_of(case, i) for i, (name, case) in enumerate(CASES.items())}
RULES = [(f"^{name}/", case.recipe) for name, case in CASES.items()]
KEY = jax.random.key(0)


STORED = [name for name, case in CASES.items() if case.stored is True]
# Each combines a view, a recipe and a conversion that other cases have, too.
COMBINATIONS = {
    "split along outputs, per tensor",
    "split along inputs",
    "split between blocks",
    "swapped merged axes",
    "one of stacked",
    "part of a concatenation",
    "through two dtypes",
    "merged outputs",
    "split axis",
    "stacked in the middle",
    "concatenated blocks",
    "float32 read as bfloat16",
    "reshaped between conversions",
    "float8",
    "converted around jit",
}


@pytest.fixture(scope="module")
def packed() -> Any:
    """Returns the shapes of all stored weights, for tests of which weights are stored."""
    with pytest.warns(UserWarning, match="quantize_weights: weights stay unpacked: .* and .* more"):
        return jax.eval_shape(jaxq.quantize_weights(model, RULES), PARAMS)


@pytest.mark.parametrize(
    "names", [[n for n in STORED if n not in COMBINATIONS], data.slow(STORED)], ids=["fast", "all"]
)
def test_stored_weights_match_weights_quantized_in_call(names: list[str]):
    params = {name: PARAMS[name] for name in names}
    rules = [(f"^{name}/", CASES[name].recipe) for name in names]
    packed = jax.jit(jaxq.quantize_weights(model, rules, strict=True))(params)
    quantized = jax.jit(jaxq.quantize_fn(model, rules))
    want, got = quantized(params), quantized(packed)
    for name in names:
        np.testing.assert_array_equal(bits(got[name]), bits(want[name]), err_msg=name)
    for name in ("split along outputs", "concatenated outputs", "through bfloat16"):
        w, recipe = CASES[name].view(*PARAMS[name]), jaxq.ProductRecipe(None, CASES[name].recipe)
        by_hand = jaxq.dot_general(jnp.eye(len(w)), w, (((1,), (0,)), ((), ())), recipe=recipe)
        np.testing.assert_array_equal(bits(want[name]), bits(by_hand), err_msg=name)


def bits(x: jax.Array) -> np.ndarray:
    return (np.asarray(x, np.float32) + 0).view(np.uint32)  # Adding 0 maps -0 to 0.


def test_leaves_with_whole_blocks_are_stored(packed):
    for table in (jaxq.explain(model, RULES)(PARAMS), jaxq.explain(model, RULES)(packed)):
        rows = {
            re.split(r"/|\(", row.product.removeprefix("computed("))[0]: row for row in table.rows
        }
        for name, case in CASES.items():
            packs = [isinstance(leaf, jaxq.Quantized) for leaf in packed[name]]
            assert all(packs) if case.stored is True else not any(packs), name
            assert "yes" if case.stored is True else case.stored in rows[name].stored, name
            dtype = packed[name][0].dtype
            integer = case.dtype in (jnp.int8, jnp.float8_e4m3fn) and case.stored is True
            assert dtype == (F32 if integer else case.dtype), name


def test_strict_raises_for_unstorable_weight():
    rules = [("w", jaxq.Recipe("int4", rounding="stochastic"))]
    pack = jaxq.quantize_weights(lambda p: p["w"] @ p["w"], rules, strict=True)
    with pytest.raises(ValueError, match=r"^quantize_weights: .*'w' \(.*py:\d+ .*its recipe draws"):
        pack({"w": jnp.eye(4)})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda p, x: x @ p["w"] @ p["w"].T, "w and w#2 need different blocks"),
        (
            lambda p, x: (x @ p["w"]).astype(BF16) @ p["w"].astype(BF16),
            "w and w#2 need different conversions",
        ),
        (
            lambda p, x: jnp.hstack([x, x]) @ jnp.concatenate([p["w"], p["v"]]) @ p["v"],
            "'w' shares a scale with other weights",
        ),
        (lambda p, x: x @ p["w"] @ (p["w"] * 2), "computed from w"),
    ],
    ids=["other axes", "other values", "one of two is multiplied alone", "computed, too"],
)
def test_leaf_with_conflicting_uses_is_not_stored(model, reason):
    params, x = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}, jnp.ones((2, 8))
    rules = [("", "int4_channel")]
    with pytest.warns(UserWarning, match=reason):
        packed = jaxq.quantize_weights(model, rules)(params, x)
    assert not any(isinstance(leaf, jaxq.Quantized) for leaf in packed.values())


def test_one_stored_leaf_is_read_in_two_dtypes():
    """Uses a bfloat16 leaf, which has the same values in float32."""

    def model(p: Any) -> Any:
        return by_identity(p["w"]), by_identity(p["w"].astype(F32)), by_identity(p["w"].T).T

    w = jax.random.normal(KEY, (8, 8), BF16)
    packed = jaxq.quantize_weights(model, [("w", "int8_tensor")], strict=True)({"w": w})
    assert (packed["w"].dtype, packed["w"].dequantize().dtype) == (BF16, BF16)
    quantized = jaxq.quantize_fn(model, [("w", "int8_tensor")])
    for got, want in zip(quantized(packed), quantized({"w": w}), strict=True):
        assert_same(got, want)


def in_loop(w: jax.Array) -> jax.Array:
    return lax.while_loop(lambda c: c[1] < 1, lambda c: (c[0], 1, by_identity(c[0].T)), (w, 0, w))[
        2
    ]


@jax.custom_jvp
def own_rule(w: jax.Array) -> jax.Array:
    return by_identity(w.astype(F32).T)


own_rule.defjvp(lambda primals, tangents: (own_rule(*primals), tangents[0]))

PROGRAMS = {
    "scan": lambda w: lax.scan(
        lambda c, _: (c, by_identity(c.T.astype(F32))), w.astype(BF16), None, length=1
    )[1][0],
    "scan over rows": lambda w: lax.scan(
        lambda c, w: (c, by_identity(w.astype(F32))), 0, w.reshape(2, 4, 8).astype(BF16)
    )[1],
    "while": in_loop,
    "cond": lambda w: lax.cond(
        w[0, 0] < 9, lambda w: by_identity(w.astype(F32)), lambda w: w.T.astype(F32), w.astype(BF16)
    ),
    "checkpoint": lambda w: jax.checkpoint(by_identity)(jax.checkpoint(jnp.transpose)(w)),
    "custom_jvp": lambda w: own_rule(w.astype(BF16)),
    "optimization_barrier": lambda w: by_identity(
        lax.optimization_barrier(w.astype(BF16)).astype(F32)
    ),
}


def test_stored_weights_pass_through_programs():
    def model(params: Any) -> Any:
        return {name: PROGRAMS[name](w) for name, w in params.items()}

    params = {name: jax.random.normal(KEY, (8, 8)) for name in PROGRAMS}
    rules = [("", jaxq.Recipe("int4", jaxq.PerBlock(4)))]
    packed = jaxq.quantize_weights(model, rules, strict=True)(params)
    assert all(isinstance(leaf, jaxq.Quantized) for leaf in packed.values())
    quantized = jax.jit(jaxq.quantize_fn(model, rules))
    want, got = quantized(params), quantized(packed)
    for name in PROGRAMS:
        np.testing.assert_array_equal(bits(got[name]), bits(want[name]), err_msg=name)
