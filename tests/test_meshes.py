"""Meshes with explicit axes, and the collectives of compiled quantizers."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxq
from tests import data
from tests.oracle import assert_same, assert_same_trees
from tools.collectives import Collective, count_collectives

X = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)


def sharded(x, spec: tuple, kind: AxisType = AxisType.Explicit) -> jax.Array:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def collectives(function, x: jax.Array) -> list[Collective]:
    return list(count_collectives(jax.jit(function).lower(x).compile().as_text()).elements())


@pytest.mark.parametrize(
    "name", [data.slow("int8_tensor"), data.slow("int4_g128"), "nvfp4", "nf4_dq"]
)
def test_quantizers_keep_explicit_shardings(name: str):
    x = sharded(X, ("a", "b"))
    want = jaxq.fake_quant(X, name)
    y = jax.jit(lambda x: jaxq.fake_quant(x, name))(x)
    assert_same(y, want)
    assert jax.typeof(y).sharding.spec == PartitionSpec("a", "b")
    q = jaxq.quantize(x, name)
    assert jax.typeof(q.codes).sharding.spec == PartitionSpec("a", "b")
    assert_same(q.dequantize(), want)


@pytest.mark.parametrize("name", ["dynamic8", "float8_e8m0fnu"])
def test_casts_and_codes_work_on_explicit_axes(name: str):
    x = sharded(X, ("a", None))
    assert_same(jax.jit(lambda x: jaxq.cast(x, name))(x), jaxq.cast(X, name))
    assert_same(jaxq.decode(jaxq.encode(x, name), name), jaxq.cast(X, name))


@pytest.mark.parametrize("recipe", ["mxfp8_training", data.slow("fp8_training")])
def test_products_work_on_explicit_axes(recipe: str):
    x, w = sharded(X, ("a", None)), sharded(X.T, (None, "b"))

    def both(x, w, **more):
        def dot(x, w):
            return jaxq.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, **more)

        y, pull = jax.vjp(dot, x, w)
        return pull(jnp.ones_like(y))

    with jax.set_mesh(x.sharding.mesh):
        got = both(x, w, out_sharding=PartitionSpec("a", "b"))
    # The error bound of two summation orders of 128 terms, each at most amax and half a step.
    bound = 128 * 2.0**-23 * 128 * np.abs(X).max() * (1 + 2.0**-4)
    for a, b in zip(got, both(jnp.asarray(X), jnp.asarray(X.T)), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= bound


def test_packing_works_on_explicit_axes():
    codes = np.arange(128 * 256, dtype=np.uint8).reshape(128, 256) % 8
    packed = jaxq.numerics.pack(sharded(codes, ("a", "b")), bits=3)
    assert jax.typeof(packed).sharding.spec == PartitionSpec("a", "b")
    np.testing.assert_array_equal(packed, jaxq.numerics.pack(codes, bits=3))
    np.testing.assert_array_equal(jaxq.numerics.unpack(packed, bits=3, n=256), codes)


@pytest.mark.parametrize(
    "name", [data.slow("int4_g32"), data.slow("nvfp4"), "nf4_dq", "uint4_g128"]
)
def test_quantized_tensor_can_be_indexed_along_unsharded_axes(name: str):
    """Indexes rows along an axis that is not sharded."""
    q, whole = jaxq.quantize(sharded(X, (None, "b")), name), jaxq.quantize(X, name)
    np.testing.assert_array_equal(q.unpack(), whole.unpack())
    assert jax.typeof(q.unpack()).sharding.spec == PartitionSpec(None, "b")
    assert_same(q.scales, whole.scales)
    for index in (slice(0, 64),) if name == "nf4_dq" else (3, slice(0, 64)):
        assert_same(q[index].dequantize(), whole[index].dequantize())


def test_native_products_work_on_explicit_axes():
    x, w = sharded(X, ("a", None)), sharded(X.T, (None, "b"))
    recipe = jaxq.ProductRecipe("int8_token", "int8_channel", execution="native")
    numbers = (((1,), (0,)), ((), ()))
    y = jaxq.dot_general(x, w, numbers, recipe=recipe)
    assert jax.typeof(y).sharding.spec == PartitionSpec("a", "b")
    assert_same(y, jaxq.dot_general(X, X.T, numbers, recipe=recipe))


def test_products_after_a_hadamard_transform_work_on_explicit_axes():
    """Uses integers and power-of-two scales, so that sums are exact in any order."""
    rng = np.random.default_rng(1)
    x, w = (rng.integers(-30, 31, shape).astype(np.float32) for shape in ((64, 32), (32, 64)))
    one = jaxq.Recipe("int4", scaling=jaxq.MX("ceil"))
    both = jaxq.SingleProduct(one, one, hadamard=jaxq.Hadamard(16, (1, -1) * 8))
    recipe = jaxq.ProductRecipe(one, one, both.hadamard, dlhs=both, drhs=both, residuals="original")

    def gradients(x, w, **more):
        def dot(x, w):
            return jaxq.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, **more)

        y, pull = jax.vjp(dot, x, w)
        return y, *pull(y)

    parts = sharded(x, ("a", None)), sharded(w, (None, "b"))
    with jax.set_mesh(parts[0].sharding.mesh):
        got = jax.jit(functools.partial(gradients, out_sharding=PartitionSpec("a", "b")))(*parts)
    assert_same_trees(got, jax.jit(gradients)(x, w))


@pytest.mark.optimized
def test_optimizer_works_on_explicit_axes():
    optimizer = jaxq.optim.quantize_state(optax.adam(1e-3))

    @jax.jit
    def steps(x):
        params, state = {"w": x}, optimizer.init({"w": x})
        for _ in range(2):
            updates, state = optimizer.update(params, state, params)
        # Without the state among the results, XLA fuses optax's sums in another way, and the last
        # bits of updates differ between programs.
        return updates["w"], state

    x = sharded(X, ("a", "b"))
    with jax.set_mesh(x.sharding.mesh), jax.numpy_dtype_promotion("standard"):  # optax needs it.
        got = steps(x)
        assert jax.typeof(got[0]).sharding.spec == PartitionSpec("a", "b")
    with jax.numpy_dtype_promotion("standard"):
        assert_same_trees(got, steps(jnp.asarray(X)))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "int4_g128"])
def test_block_scales_need_no_collective(name: str):
    x = sharded(X, ("a", "b"), AxisType.Auto)
    assert not collectives(lambda x: jaxq.fake_quant(x, name), x)


@pytest.mark.parametrize(
    "spec", [("a", None), (None, "b"), (("a", "b"), None), ("a", "b")], ids=str
)
@pytest.mark.parametrize("name", [data.slow("int8_tensor"), "nvfp4"])
def test_tensor_scale_needs_one_number_per_device(name: str, spec: tuple):
    """Expects one collective for every sharded axis of the tensor."""
    x = sharded(X, spec, AxisType.Auto)
    sent = collectives(lambda x: jaxq.fake_quant(x, name), x)
    assert {c.kind for c in sent} == {"all-reduce maximum"}
    assert [math.prod(c.shape) for c in sent] == [1] * sum(entry is not None for entry in spec)


@pytest.mark.parametrize(
    ("name", "spec", "sizes"),
    [
        ("int8_channel", (None, "b"), []),
        ("int8_channel", ("a", "b"), [("maximum", 128)]),
        ("int8_token", ("a", None), []),
        ("int8_token", ("a", "b"), [("maximum", 32)]),
        ("uint8_channel", ("a", None), [("maximum", 256), ("maximum", 256)]),
    ],
)
def test_channel_scales_need_one_maximum_if_axis_is_sharded(name, spec, sizes):
    """Expects one collective, with two maxima for a two-sided range."""
    x = sharded(X, spec, AxisType.Auto)
    program = jax.jit(lambda x: jaxq.quantize(x, name).codes).lower(x).compile().as_text()
    assert program.count(" all-reduce(") == bool(sizes)
    sent = count_collectives(program).elements()
    want = [(f"all-reduce {what}", size) for what, size in sizes]
    assert sorted((c.kind, math.prod(c.shape)) for c in sent) == want
