"""A step of training over eight devices in every layout: the same bits, and what it sends.

The model, its layouts and the reading of XLA's programs are those of `tools/collectives.py`.

Float sums have no order to rely on, so steps are compared on data whose sums are exact in any:
small integers, elements of 4 bits, powers of two for scales, and cotangents quantized likewise.
Every value of a step then has the same bits, or something beside the sums depends on the layout.
"""

import functools
import math
import os
import pathlib
import socket
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxq
from tests.oracle import assert_same
from tools import collectives
from tools.collectives import LAYOUTS, Collective, Layout, found, stack, step

TOKENS, MODEL, HIDDEN, LAYERS, TURNS = 256, 64, 64, 4, 7


def everywhere(granularity) -> jaxq.DotRecipe:
    """All operands of all three products in 4-bit integers with powers of two for scales."""
    one = jaxq.Quantizer("int4", granularity, scale="ceil", scale_format="float8_e8m0fnu")
    both = jaxq.ProductRecipe(one, one)
    return jaxq.DotRecipe(one, one, dlhs=both, drhs=both, residuals="original")


RECIPES = {
    "block": everywhere(jaxq.PerBlock(8)),
    "tensor": everywhere(jaxq.PerTensor()),
    "token": everywhere(jaxq.PerToken()),
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
CALIBRATED = [("", jaxq.DotRecipe(RECIPES["tensor"].lhs, RECIPES["tensor"].rhs))]


def loss(y, weights):
    """Of 8-bit integers, so that its sum is exact too."""
    return (jaxq.cast(y * 2.0**-12, "int8", overflow="saturate") * weights).sum()


@functools.cache
def on_one_device(recipe: str, pipelined: bool):
    layout = LAYOUTS["pipeline" if pipelined else "data"]
    return step(layout, RECIPES[recipe], loss, sharded=False)(PARAMS, X, WEIGHTS)


@functools.cache
def compiled(recipe: str | None, name: str):
    """A compiled step, its arguments, and its collectives."""
    layout = LAYOUTS[name]
    of_params, of_data = layout.shardings
    arguments = jax.device_put((PARAMS, X, WEIGHTS), (of_params, of_data, of_data))
    program = step(layout, recipe and RECIPES[recipe], loss).lower(*arguments).compile()
    return program, arguments, found(program.as_text())


def maxima(layout: Layout, by_tensor: bool) -> Counter:
    """The numbers of every maximum over devices that scales take, one a tensor or one a vector.

    There is one for every axis that lies within a scale and is cut. All turns of a loop count.
    """
    shards = {None: 1, **layout.axes}
    # A pipeline cuts its layers apart, and no scale has two of them.
    up, down = (
        [shards[axis] for axis in (*spec, None, None, None)[1:3]]
        for spec in (layout.up, layout.down)
    )
    batches = 4 if layout.pipelined else 1
    tokens, hidden = (TOKENS // batches, shards[(*layout.x, None)[0]]), (HIDDEN, up[1])
    model, of_up, of_down = (MODEL, 1), (MODEL, up[0]), (MODEL, down[1])
    operands = [  # Of the six products: what is free, what is contracted.
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
        count[1 if by_tensor else length // free] += cuts * (TURNS if layout.pipelined else LAYERS)
    return +count


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_has_the_same_bits_and_sends_only_maxima_more(recipe: str, name: str):
    """Blocks send nothing of their own, where shards and blocks begin together."""
    program, arguments, sent = compiled(recipe, name)
    layout, of_floats = LAYOUTS[name], compiled(None, name)[2]
    more, sizes = sent - of_floats, Counter()
    assert sent == of_floats + more
    for collective, times in more.items():
        assert collective[:2] == ("all-reduce maximum", "s32")
        sizes[math.prod(collective.shape)] += times
    assert sizes == ({} if recipe == "block" else maxima(layout, recipe == "tensor"))
    got, want = program(*arguments), on_one_device(recipe, layout.pipelined)
    jax.tree.map(assert_same, got, want)
    assert all(np.any(part) for part in jax.tree.leaves(want))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_stored_weights_are_gathered_packed(recipe: str, kind: AxisType):
    """Where the model gathers a layer's weights for its turn; the floats are made of them there."""
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
    sent = [c for c in found(program.as_text()).elements() if c.kind == "all-gather"]
    assert {c.dtype for c in sent} == {"u8"}
    cut = [leaf.nbytes for leaf in leaves if not leaf.is_fully_replicated]
    assert sum(c.nbytes for c in sent) == sum(cut)
    assert_same(program(packed, x), jax.jit(jaxq.quantize_fn(stack, rules))(PARAMS, X))


def test_a_layout_that_cuts_through_bytes_unpacks():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, "model")
    of = NamedSharding(mesh, spec)

    def model(params, x):
        return x @ lax.with_sharding_constraint(params["w"], of)

    params, x = {"w": integers(4, 7, 8, 24)}, integers(5, 7, 4, 8)
    rules = [("w", RECIPES["tensor"])]
    packed = jaxq.quantize_weights(model, rules)(params, x)
    want = jaxq.quantize_fn(model, rules)(params, x)
    assert_same(jax.jit(jaxq.quantize_fn(model, rules))(packed, x), want)


def test_what_the_guide_says_stays_the_same():
    """Sums of integers, and draws; of numbers whose float sums are not exact."""
    layout = LAYOUTS["FSDP and tensor"]
    params = jax.tree.map(lambda w: np.random.default_rng(7).standard_normal(w.shape), PARAMS)
    params, x = jax.tree.map(np.float32, (params, NORMAL))
    sharded = jax.device_put((params, x), layout.shardings)
    native = jaxq.DotRecipe("int8_token", "int8_channel", execution="native")
    model = jax.jit(jaxq.quantize_fn(stack, [("", native)]))
    assert_same(model(*sharded), model(params, x))
    recipe, key = jaxq.Quantizer("int4", rounding="stochastic"), jax.random.key(0)
    got = jaxq.fake_quant(sharded[0]["up"], recipe, key=key)
    assert_same(got, jaxq.fake_quant(params["up"], recipe, key=key))


def test_static_scales_send_nothing():
    layout = LAYOUTS["data"]
    arguments = jax.device_put((PARAMS, X), layout.shardings)

    def sent(rules):
        compiled = jax.jit(jaxq.quantize_fn(stack, rules)).lower(*arguments).compile()
        return found(compiled.as_text())

    _, state = jax.jit(jaxq.observe(stack, CALIBRATED))(*arguments)
    assert sum(sent(CALIBRATED).values()) == 2 * LAYERS
    assert not sent(jaxq.freeze(CALIBRATED, state))


def test_the_guide_has_the_tables():
    page = collectives.PAGE.read_text()
    row = next(line for line in page.splitlines() if line.startswith("| tensor | 8 all-reduce add"))
    names = ["layout", "float32", *(f"{recipe} adds" for recipe in collectives.RECIPES)]
    assert f"| {' | '.join(names)} |" in page
    cells = row.strip("| ").split(" | ")
    assert cells[1] == collectives.summary(collectives.of_step("tensor", None))
    assert cells[names.index("fp8 adds")] == collectives.beyond("tensor", "fp8")


def test_collectives_are_found_in_loops_and_in_company():
    """XLA may send several tensors at once, and a loop's body stands in its program once."""
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
    assert found(text) == {**both, gather: 1}
    assert [c.nbytes for c in (*both, gather)] == [64, 6, 24]


def test_two_processes_have_the_bits_of_one(tmp_path):
    """Two devices each, over the network's loopback; and calibration over hosts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = tmp_path / "results.npz"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    root = str(pathlib.Path(__file__).parent.parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.one_of_two", str(number), port, str(path)],
            **{"cwd": root, "env": os.environ | flags, "text": True},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    states = jax.jit(jaxq.observe(stack, CALIBRATED))(PARAMS, X)[1].states
    want = {
        "step": on_one_device("tensor", False),
        "fake_quant": [jaxq.fake_quant(NORMAL, name) for name in PRESETS],
        "whole": states,
        "hosts": states,
    }
    got = np.load(path)
    for one, other in zip(got.files, jax.tree.leaves(want), strict=True):
        assert_same(got[one], other)
