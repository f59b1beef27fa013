"""Quantized tensors sharded over devices."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import jaxq
from tests import data
from tests.oracle import assert_same


def mesh():
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("name", "spec", "scale"),
    [
        data.slow("int4_g128", ("a", "b"), ("a", "b")),
        ("int4_g128", ("b", "a"), ("b", None)),  # Two blocks cannot be split into four shards.
        data.slow("int4_channel", ("a", "b"), (None, "b")),
        data.slow("int8_token", (("a", "b"),), (("a", "b"), None)),
        ("nvfp4", (None, ("a", "b")), (None, ("a", "b"))),
        data.slow("q4_1", ("a", "b"), ("a", "b")),
        data.slow("nf4_dq", ("a", "b"), ("a", "b")),
        data.slow("fp8_e4m3_tile128", ("a", "b"), (None, "b")),
    ],
)
def test_codes_and_scales_follow_sharding_of_tensor(name: str, spec: tuple, scale: tuple):
    x = data.normal((128, 256))
    tensor = NamedSharding(mesh(), PartitionSpec(*spec))
    shapes = jax.eval_shape(lambda x: jaxq.quantize(x, name), x)
    shardings = jaxq.quantized_sharding(shapes, tensor)
    assert shardings.scale.spec == PartitionSpec(*scale)
    placed = jax.device_put(jaxq.quantize(x, name), shardings)
    made = jax.jit(lambda x: jaxq.quantize(x, name), out_shardings=shardings)(
        jax.device_put(x, tensor)
    )
    want = jaxq.fake_quant(x, name)
    for q in (placed, made):
        assert q.codes.sharding.is_equivalent_to(tensor, 2)
        back = jax.jit(jaxq.dequantize, out_shardings=tensor)(q)
        assert_same(back, want)


def test_indivisible_shardings_raise():
    q = jaxq.quantize(jnp.ones((6, 12)), "int4_channel")
    with pytest.raises(ValueError, match="does not divide into 4 shards"):
        jaxq.quantized_sharding(q, NamedSharding(mesh(), PartitionSpec("a")))
    with pytest.raises(ValueError, match="whole bytes of 4-bit codes"):
        jaxq.quantized_sharding(q, NamedSharding(mesh(), PartitionSpec(None, "a")))
    with pytest.raises(ValueError, match="at most 2 axes"):
        jaxq.quantized_sharding(q, NamedSharding(mesh(), PartitionSpec(None, None, "a")))


def test_donated_tensors_are_reused():
    x = data.normal((8, 64))
    update = jax.jit(lambda q: jaxq.quantize(q.dequantize() * 2.0, q.recipe), donate_argnums=0)
    q = jaxq.quantize(x, "int8_token")
    doubled = update(q)
    assert q.codes.is_deleted()
    assert_same(doubled.dequantize(), np.asarray(jaxq.fake_quant(x, "int8_token")) * 2)
