"""Training steps over eight devices in every layout: their bits and their collectives.

The model, its layouts and the parser of XLA's programs come from `tools/collectives.py`.

The order of float sums depends on the layout, so the tests use data whose sums are exact in any
order: small integers, 4-bit elements, power-of-two scales, and cotangents that are quantized alike.
A difference in any bit then means that something other than sums depends on the layout.
"""

import functools
import itertools
import math
from collections import Counter

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxq
from tests import data
from tests.oracle import assert_same, assert_same_trees
from tools import collectives
from tools.collectives import LAYOUTS, Collective, Layout, count_collectives, stack, step

pytestmark = pytest.mark.unoptimized
TOKENS, MODEL, HIDDEN, LAYERS, STEPS = 256, 64, 64, 4, 7


def recipe_of(granularity) -> jaxq.ProductRecipe:
    """Returns a recipe that quantizes all operands to 4-bit integers with power-of-two scales."""
    one = jaxq.Recipe("int4", granularity, jaxq.MX("ceil"))
    both = jaxq.SingleProduct(one, one)
    return jaxq.ProductRecipe(one, one, dlhs=both, drhs=both, residuals="original")


RECIPES = {
    "block": recipe_of(jaxq.PerBlock(8)),
    "tensor": recipe_of(jaxq.PerTensor()),
    "token": recipe_of(jaxq.PerToken()),
}


def integers(seed: int, largest: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-largest, largest + 1, shape).astype(np.float32)


X = integers(0, 30, TOKENS, MODEL)
PARAMS = {
    "up": integers(1, 30, LAYERS, MODEL, HIDDEN),
    "down": integers(2, 30, LAYERS, HIDDEN, MODEL),
}
WEIGHTS = integers(3, 3, TOKENS, MODEL)
NORMAL = np.random.default_rng(6).standard_normal((64, 64)).astype(np.float32)
PRESETS = ("int8_tensor", "uint8_channel", "mxfp4", "nvfp4")
CALIBRATED = [("", jaxq.ProductRecipe(RECIPES["tensor"].lhs, RECIPES["tensor"].rhs))]


def loss(y, weights):
    """Returns a loss of 8-bit integers, whose sum is exact."""
    return (jaxq.cast(y * 2.0**-12, "int8", overflow="saturate") * weights).sum()


@functools.cache
def on_one_device(recipe: str, pipelined: bool):
    layout = LAYOUTS["pipeline" if pipelined else "data"]
    return step(layout, RECIPES[recipe], loss, sharded=False)(PARAMS, X, WEIGHTS)


@functools.cache
def compiled(recipe: str | None, name: str):
    """Returns a compiled step, its arguments and its collectives."""
    layout = LAYOUTS[name]
    of_params, of_data = layout.shardings
    arguments = jax.device_put((PARAMS, X, WEIGHTS), (of_params, of_data, of_data))
    program = step(layout, recipe and RECIPES[recipe], loss).lower(*arguments).compile()
    return program, arguments, count_collectives(program.as_text())


def count_maxima(layout: Layout, by_tensor: bool) -> Counter:
    """Counts the all-reduced maxima of scales by their number of elements.

    Every sharded axis within a scale needs one maximum: of one number for a tensor scale, or of
    one number per vector. Every iteration of a loop counts.
    """
    shards = {None: 1, **layout.axes}
    # A pipeline shards the layer axis, which no scale spans.
    up, down = (
        [shards[axis] for axis in (*spec, None, None, None)[1:3]]
        for spec in (layout.up, layout.down)
    )
    batches = 4 if layout.pipelined else 1
    tokens, hidden = (TOKENS // batches, shards[(*layout.x, None)[0]]), (HIDDEN, up[1])
    model, of_up, of_down = (MODEL, 1), (MODEL, up[0]), (MODEL, down[1])
    operands = [  # The free and the contracted axis of each operand of the six products.
        *[(tokens, model), (hidden, of_up)],
        *[(tokens, hidden), (of_up, hidden)],
        *[(hidden, tokens), (model, tokens)],
        *[(tokens, hidden), (of_down, hidden)],
        *[(tokens, model), (hidden, of_down)],
        *[(model, tokens), (hidden, tokens)],
    ]
    count: Counter = Counter()
    for (length, free), (_, contract) in operands:
        cuts = (free > 1) + (contract > 1) if by_tensor else contract > 1
        count[1 if by_tensor else length // free] += cuts * (STEPS if layout.pipelined else LAYERS)
    return +count


# The layout that cuts every axis, with scales that devices share.
FAST = [("tensor", "FSDP and tensor")]


@pytest.mark.parametrize(
    ("recipe", "name"),
    [case if case in FAST else data.slow(*case) for case in itertools.product(RECIPES, LAYOUTS)],
)
def test_sharded_step_matches_bits_and_adds_only_amax_collectives(recipe: str, name: str):
    """Checks also that block scales need no collectives if shards contain whole blocks."""
    program, arguments, sent = compiled(recipe, name)
    layout, of_floats = LAYOUTS[name], compiled(None, name)[2]
    added, sizes = sent - of_floats, Counter()
    assert sent == of_floats + added
    for collective, times in added.items():
        assert collective[:2] == ("all-reduce maximum", "s32")
        sizes[math.prod(collective.shape)] += times
    assert sizes == ({} if recipe == "block" else count_maxima(layout, recipe == "tensor"))
    got, want = program(*arguments), on_one_device(recipe, layout.pipelined)
    assert_same_trees(got, want)
    assert all(np.any(part) for part in jax.tree.leaves(want))


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("block", AxisType.Auto),
        *(data.slow(recipe, AxisType.Auto) for recipe in ("tensor", "token")),
        *(data.slow(recipe, AxisType.Explicit) for recipe in ("block", "tensor", "token")),
    ],
    ids=str,
)
def test_stored_weights_are_gathered_packed(recipe: str, kind: AxisType):
    """Checks that the model gathers packed weights and dequantizes them afterward."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    layout, rules = LAYOUTS["FSDP"], [("", RECIPES[recipe])]
    whole, of_data, of_down, of_up = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), layout.x, layout.down, layout.up)
    )
    store = jaxq.quantize_weights(stack, rules)
    shapes = jax.eval_shape(store, PARAMS, X)
    shardings = {
        "down": jaxq.quantized_sharding(shapes["down"], of_down),
        "up": jaxq.quantized_sharding(shapes["up"], of_up),
    }
    packed, x = jax.jit(store, out_shardings=shardings)(PARAMS, X), jax.device_put(X, of_data)
    leaves = jax.tree.leaves(packed)
    assert [leaf.sharding for leaf in leaves] == jax.tree.leaves(shardings)
    model = jaxq.quantize_fn(functools.partial(stack, gathered=whole), rules)
    program = jax.jit(model).lower(packed, x).compile()
    sent = [c for c in count_collectives(program.as_text()).elements() if c.kind == "all-gather"]
    assert {c.dtype for c in sent} == {"u8"}
    cut = [leaf.nbytes for leaf in leaves if not leaf.is_fully_replicated]
    assert sum(c.nbytes for c in sent) == sum(cut)
    assert_same(program(packed, x), jax.jit(jaxq.quantize_fn(stack, rules))(PARAMS, X))


def test_layout_that_splits_bytes_unpacks_codes():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, "model")
    sharding = NamedSharding(mesh, spec)

    def model(params, x):
        return x @ lax.with_sharding_constraint(params["w"], sharding)

    params, x = {"w": integers(4, 7, 8, 24)}, integers(5, 7, 4, 8)
    rules = [("w", RECIPES["tensor"])]
    packed = jaxq.quantize_weights(model, rules)(params, x)
    want = jaxq.quantize_fn(model, rules)(params, x)
    assert_same(jax.jit(jaxq.quantize_fn(model, rules))(packed, x), want)


def test_integer_sums_and_random_bits_match_one_device():
    """Checks integer sums and random bits on numbers whose float sums are inexact."""
    layout = LAYOUTS["FSDP and tensor"]
    params = jax.tree.map(lambda w: np.random.default_rng(7).standard_normal(w.shape), PARAMS)
    params, x = jax.tree.map(np.float32, (params, NORMAL))
    sharded = jax.device_put((params, x), layout.shardings)
    native = jaxq.ProductRecipe("int8_token", "int8_channel", execution="native")
    model = jax.jit(jaxq.quantize_fn(stack, [("", native)]))
    assert_same(model(*sharded), model(params, x))
    recipe, key = jaxq.Recipe("int4", rounding="stochastic"), jax.random.key(0)
    got = jaxq.fake_quant(sharded[0]["up"], recipe, key=key)
    assert_same(got, jaxq.fake_quant(params["up"], recipe, key=key))


def test_static_scales_need_no_collectives():
    layout = LAYOUTS["data"]
    arguments = jax.device_put((PARAMS, X), layout.shardings)

    def sent(rules):
        compiled = jax.jit(jaxq.quantize_fn(stack, rules)).lower(*arguments).compile()
        return count_collectives(compiled.as_text())

    _, state = jax.jit(jaxq.observe(stack, CALIBRATED))(*arguments)
    assert sum(sent(CALIBRATED).values()) == 2 * LAYERS
    assert not sent(jaxq.freeze(CALIBRATED, state))


def test_tables_in_guide_are_current():
    page = collectives.PAGE.read_text()
    row = next(line for line in page.splitlines() if line.startswith("| tensor | 8 all-reduce add"))
    names = ["layout", "float32", *(f"{recipe} adds" for recipe in collectives.RECIPES)]
    assert f"| {' | '.join(names)} |" in page
    cells = row.strip("| ").split(" | ")
    assert cells[1] == collectives.summary(collectives.step_collectives("tensor", None))
    assert cells[names.index("fp8_training adds")] == collectives.added_collectives(
        "tensor", "fp8_training"
    )


def test_count_collectives_in_loops_and_tuples():
    """Parses a collective of several tensors inside a loop, and one outside of it."""
    text = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %both = (f32[8,2]{1,0}, bf16[3]{0}) all-reduce(%x, %y), replica_groups={}, to_apply=%sum
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %g = u8[4,6]{1,0} all-gather(%q), dimensions={0}
}
"""
    both = {
        Collective("all-reduce add", "f32", (8, 2)): 5,
        Collective("all-reduce add", "bf16", (3,)): 5,
    }
    gather = Collective("all-gather", "u8", (4, 6))
    assert count_collectives(text) == {**both, gather: 1}
    assert [c.nbytes for c in (*both, gather)] == [64, 6, 24]


@pytest.mark.slow
def test_two_processes_match_one(tmp_path):
    """Runs two processes of two devices each, and merges their calibration states."""
    got, _ = data.run_two("layouts", tmp_path)
    states = jax.jit(jaxq.observe(stack, CALIBRATED))(PARAMS, X)[1].states
    want = {
        "step": on_one_device("tensor", False),
        "fake_quant": [jaxq.fake_quant(NORMAL, name) for name in PRESETS],
        "whole": states,
        "hosts": states,
    }
    for one, other in zip(got, jax.tree.leaves(want), strict=True):
        assert_same(one, other)
