"""Delayed scaling against Flax, and the amax values it records under loops and transformations."""

import functools

import chex
import jax
import numpy as np
import pytest
from flax.linen import fp8_ops
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

import jaxq
from tests.oracle import assert_same, assert_same_trees

FP8 = [("w", "fp8_training")]


def powers(seed: int, shape: tuple[int, ...], top: float) -> jax.Array:
    """Returns random numbers whose amax is a power of two, so that 448 / (448 / amax) is exact."""
    x = np.random.default_rng(seed).standard_normal(shape).clip(-0.9, 0.9)
    x[0, 0] = -1
    return jax.device_put(np.float32(x * top))


def weighted(params, x, g):
    """Returns a loss whose cotangent at the product is g."""
    return ((x @ params["w"]) * g).sum()


def seen_by(fn, state, *args):
    """Returns the value, the gradient of the parameters and the recorded state."""

    def objective(params, state):
        return jaxq.quantize_fn(fn, state)(params, *args[1:])

    return jax.value_and_grad(objective, (0, 1))(args[0], state)


def amaxes(state, name="w"):
    """Returns the newest amax values of both operands and the cotangent."""
    return [history.amax[..., 0].tolist() for history in state.histories[name]]


def test_steps_match_flax():
    """Compares six steps with Flax's operations, which also return histories as gradients."""
    dtypes = (jnp.float8_e4m3fn, jnp.float8_e4m3fn, jnp.float8_e5m2)

    def theirs(x, w, metas, g):
        each = zip(dtypes[:2], (x, w), metas[:2], strict=True)
        q = [fp8_ops.in_qdq(jnp.float32, d, a, *m) for d, a, m in each]
        return (fp8_ops.out_qdq(jnp.float32, dtypes[2], q[0] @ q[1], *metas[2]) * g).sum()

    @jax.jit
    def step(params, state, metas, x, g):
        value, ((gradients, of_x), seen) = jax.value_and_grad(
            lambda p, s: jaxq.quantize_fn(weighted, s)(p[0], p[1], g), (0, 1)
        )((params, x), state)
        want = jax.value_and_grad(theirs, (0, 1, 2))(x, params["w"], metas, g)
        return (
            (value, (of_x, gradients["w"])),
            state.update(seen),
            (want[0], want[1][:2]),
            want[1][2],
        )

    params, shape = {"w": powers(0, (8, 4), 0.5)}, ((4, 8), (4, 4))
    state = jaxq.delayed_scaling(weighted, FP8, history=3)(params, *map(jnp.zeros, shape))
    first = seen_by(weighted, state, params, powers(1, shape[0], 2), powers(2, shape[1], 8))[1][1]
    state = state.update(first)
    assert amaxes(state) == [2.0, 0.5, 8.0]
    metas = [(jnp.ones(1), jnp.zeros((3, 1)).at[0].set(top)) for top in (2, 0.5, 8)]
    sizes = [(4, 8), (0.5, 0.5), (0.25, 1), (0.25, 0.125), (64, 2), (0.5, 4)]
    for n, (of_x, of_g) in enumerate(sizes):
        x, g = powers(n, shape[0], of_x), powers(9 - n, shape[1], of_g)
        got, state, want, metas = step(params, state, metas, x, g)
        assert_same_trees(got, want)
    for history, (_, amax) in zip(state.histories["w"], metas, strict=True):
        assert sorted(history.amax.tolist()) == sorted(amax[:, 0].tolist())
    assert state.histories["w"][0].amax.tolist() == [0.5, 64.0, 0.25], "newest first"


def test_first_step_uses_current_scaling():
    params, x = {"w": powers(0, (8, 4), 3)}, powers(1, (4, 8), 5)
    state = jaxq.delayed_scaling(weighted, FP8)(params, x, x[:, :4])
    value, (gradients, _) = seen_by(weighted, state, params, x, x[:, :4])
    plain = jax.value_and_grad(jaxq.quantize_fn(weighted, FP8))(params, x, x[:, :4])
    assert_same_trees((value, gradients), plain)


def test_microbatches_record_the_largest_amax():
    """Checks a case in which Flax sums the values and marin-community/marin#7659 keeps the last."""
    params, state = {"w": jnp.eye(4)}, None
    batches = [powers(n, (4, 4), top) for n, top in enumerate((1, 16, 2))]
    state = jaxq.delayed_scaling(weighted, FP8)(params, batches[0], batches[0])
    seen = [seen_by(weighted, state, params, x, x / 4)[1][1] for x in batches]
    assert amaxes(functools.reduce(lambda a, b: a.merge(b), seen)) == [16.0, 1.0, 4.0]


def layers(params, x):
    """Computes scanned layers with a shared weight, jit and checkpoint."""

    def layer(x, w):
        x = jax.jit(lambda x: x @ w)(x)
        return jax.checkpoint(lambda x: x @ params["shared"])(x), x

    return lax.scan(layer, x, params["w"])[0].sum()


def test_scans_have_histories_per_layer_or_record_the_largest():
    params = {"w": jnp.stack([jnp.eye(4) * k for k in (1, 2, 4)]), "shared": jnp.eye(4) * 0.5}
    state = jaxq.delayed_scaling(layers, [("", "fp8_training")], history=2)(
        params, jnp.ones((1, 4))
    )
    chex.assert_shape(state.histories["w"][0].amax, (3, 2))
    _, (_, seen) = jax.jit(functools.partial(seen_by, layers))(state, params, jnp.ones((1, 4)))
    # The inputs of layers are 1, 1, 0.5; 0.5, 1, 1; 1, 2, 2. A cotangent is the product of the
    # later weights.
    assert amaxes(seen) == [[1.0, 0.5, 0.5], [1.0, 2.0, 4.0], [1.0, 1.0, 0.5]]
    assert amaxes(seen, "shared") == [2.0, 0.5, 2.0]


@pytest.mark.slow
def test_vmap_records_the_largest():
    params = {"w": jnp.eye(4)}
    x = jnp.stack([powers(n, (4, 4), top) for n, top in enumerate((1, 8, 2))])
    many = lambda params, x, g: jax.vmap(weighted, (None, 0, 0))(params, x, g).sum()
    state = jaxq.delayed_scaling(weighted, FP8)(params, x[0], x[0])

    def outside(params, state):
        one = jaxq.quantize_fn(weighted, state)
        return jax.vmap(one, (None, 0, 0))(params, x, x / 4).sum()

    seen = jax.grad(outside, 1)(params, state)
    assert amaxes(seen) == [8.0, 1.0, 2.0]
    assert amaxes(seen_by(many, state, params, x, x / 4)[1][1]) == [8.0, 1.0, 2.0]
    each = jax.vmap(lambda x: seen_by(weighted, state, params, x, x / 4)[1][1])(x)
    assert amaxes(each) == [[1.0, 8.0, 2.0], [1.0] * 3, [0.25, 2.0, 0.5]]
    over = jax.vmap(
        lambda x: seen_by(weighted, state, params, x, x)[1][1].gather("i"), axis_name="i"
    )
    assert amaxes(over(x))[0] == [8.0] * 3


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_records_the_largest(check):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = {"w": jnp.eye(4)}, powers(3, (8, 4), 4)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check,
    )
    def total(params, x, g):
        return lax.psum(weighted(params, x, g), "data")

    state = jaxq.delayed_scaling(total, FP8)(params, x, x)
    _, (gradients, seen) = jax.jit(functools.partial(seen_by, total))(state, params, x, x / 2)
    assert amaxes(seen) == [4.0, 1.0, 2.0]
    # In an outer shard_map the gradient of replicated parameters is a sum over devices.
    if check:
        step = jax.shard_map(
            lambda *args: seen_by(weighted, *args)[1],
            mesh=mesh,
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=P(),
        )
        own, around = jax.jit(step)(state, params, x, x / 2)
        assert amaxes(around) == [4.0, 1.0, 2.0]
        assert_same_trees(own, gradients)


def test_forward_mode_uses_recorded_scales():
    params, x = {"w": powers(0, (4, 4), 1)}, powers(1, (4, 4), 1)
    state = jaxq.delayed_scaling(weighted, FP8)(params, x, x)
    state = state.update(seen_by(weighted, state, params, x / 4, x)[1][1])
    f = jaxq.quantize_fn(weighted, state)
    scale = state.histories["w"][0].amax.max() / 448
    lhs = jaxq.fake_quant(x, "fp8_e4m3_tensor", scale=scale)
    want = ((lhs @ jaxq.fake_quant(params["w"], "fp8_e4m3_tensor")) * x).sum()
    assert_same(f(params, x, x), want)
    value, moved = jax.jvp(lambda p: f(p, x, x), (params,), (params,))
    assert_same(value, want)
    np.testing.assert_allclose(moved, ((lhs @ params["w"]) * x).sum(), rtol=1e-6)
    # The derivative with respect to a history is zero.
    along = lambda s: jaxq.quantize_fn(weighted, s)(params, x, x)
    assert jax.jvp(along, (state,), (state,))[1] == 0


def test_nan_is_not_recorded_and_functions_without_records_raise():
    """Checks NaN, a loop without reverse mode and a function with custom derivatives."""
    params, x = {"w": jnp.eye(4)}, powers(1, (4, 4), 1)
    state = jaxq.delayed_scaling(weighted, FP8, history=2, margin=1)(params, x, x)
    _, (_, seen) = seen_by(weighted, state, params, x.at[1, 1].set(jnp.nan), x)
    assert amaxes(seen) == [0.0, 1.0, 1.0]
    updated = state.update(seen_by(weighted, state, params, x, x)[1][1]).update(seen)
    assert updated.histories["w"][0].largest().value == 1.0
    assert updated.histories["w"][0].largest().margin == 1
    f = jax.custom_vjp(lambda x, w: x @ w)
    f.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))
    loop = lambda p, x: lax.while_loop(lambda c: c[0, 0] > 9, lambda c: c @ p["w"], f(x, p["w"]))
    with pytest.raises(ValueError, match="must give some product a recipe with one scale"):
        jaxq.delayed_scaling(loop, FP8)(params, x)
    with pytest.raises(ValueError, match="must give some product a recipe with one scale"):
        jaxq.delayed_scaling(weighted, [("w", "mxfp8_training")])(
            {"w": jnp.ones((32, 32))}, *[jnp.ones((32, 32))] * 2
        )
    with pytest.raises(ValueError, match="`history` must be an integer of at least 1"):
        jaxq.delayed_scaling(weighted, FP8, history=0)


def test_state_without_a_product_of_the_function_raises():
    params, x = {"w": jnp.eye(4), "v": jnp.eye(4)}, jnp.ones((4, 4))
    rules = [("", jaxq.ProductRecipe("int8_tensor", "int8_tensor"))]
    one, two = lambda p, x: x @ p["w"], lambda p, x: x @ p["w"] @ p["v"]
    delayed = jaxq.delayed_scaling(one, rules)(params, x)
    frozen = jaxq.freeze(rules, jaxq.observe(one, rules)(params, x)[1])
    for state in (delayed, frozen):
        with pytest.raises(ValueError, match=r"must have scales for dot_general 'v' .*, got w"):
            jaxq.quantize_fn(two, state)(params, x)
    more = jaxq.delayed_scaling(two, rules)(params, x)
    assert_same(jaxq.quantize_fn(one, more)(params, x), jaxq.quantize_fn(one, rules)(params, x))


def test_transformed_operands_have_no_recorded_scales():
    """Checks that operands of a Hadamard transform have current scales instead of recorded ones."""
    recipe = jaxq.ProductRecipe(
        "int8_tensor",
        "int8_tensor",
        hadamard=jaxq.Hadamard(4, (1, -1, 1, 1)),
        dlhs=jaxq.SingleProduct("fp8_e5m2_tensor"),
    )
    params, x = {"w": jnp.eye(4)}, jnp.ones((4, 4))
    state = jaxq.delayed_scaling(weighted, [("w", recipe)])(params, x, x)
    assert [h is None for h in state.histories["w"]] == [True, True, False]
    with pytest.raises(ValueError, match="must give some activation a recipe with one scale"):
        jaxq.observe(weighted, [("w", recipe)])(params, x, x)


def test_requantized_residuals_use_scales_of_their_tensors():
    """Uses integers and power-of-two scales, so that all sums are exact."""
    one = jaxq.Recipe("int4", scaling=jaxq.MX("ceil"))
    both = jaxq.SingleProduct(one, one)
    recipe = jaxq.ProductRecipe(one, one, dlhs=both, drhs=both, residuals="original")
    w, x, g = powers(0, (8, 4), 4), powers(1, (4, 8), 2), powers(2, (4, 4), 1)
    state = jaxq.delayed_scaling(weighted, [("w", recipe)], history=1)({"w": w}, x, g)
    state = state.update(seen_by(weighted, state, {"w": w * 2}, x * 2, g * 2)[1][1])

    def loss(x, w):
        return jaxq.quantize_fn(weighted, state)({"w": w}, x, g)

    got = jax.grad(loss, (0, 1))(x, w)
    lhs, rhs, cotangent = (
        jaxq.fake_quant(a, one, scale=scale) for a, scale in ((x, 1.0), (w, 2.0), (g, 0.5))
    )
    assert_same_trees(got, (cotangent @ rhs.T, lhs.T @ cotangent))
    assert not np.array_equal(lhs, jaxq.fake_quant(x, one))
