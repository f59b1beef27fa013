"""Statistics of products against float64 NumPy, under every transformation."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.analysis import Monitoring, monitor
from tests import data
from tests.oracle import assert_same

FP8 = [("", "fp8_training")]
ALL = Monitoring(
    counterfactuals=["mxfp4", "bfloat16"],
    statistics=(
        *Monitoring().statistics,
        "exponents",
        "block_range_bits",
        "codes_used",
        "scale_amax",
        "scale_smallest",
        "scale_range_bits",
        "product",
    ),
)


def normal(seed: int, *shape: int, size: float = 1.0) -> jax.Array:
    return data.normal(shape, seed, size)


def weighted(params, x, g):
    """Returns a loss whose cotangent at the product is g."""
    return ((x @ params["w"]) * g).sum()


def observed(fn, state, *args):
    """Returns the value, the gradient of the parameters, and the statistics."""

    def objective(params, state):
        return jaxq.quantize_fn(fn, state)(params, *args[1:])

    value, (gradients, seen) = jax.value_and_grad(objective, (0, 1))(args[0], state)
    return value, gradients, seen


def watched(fn, rules, request, *args):
    state = monitor(fn, rules, request)(*args)
    return jax.jit(functools.partial(observed, fn))(state, *args)


def of_values(x) -> dict[str, Any]:
    """Returns the statistics of a tensor, in float64."""
    x = np.asarray(x, np.float64).reshape(-1)
    finite = x[np.isfinite(x)]
    size = np.abs(finite[finite != 0])
    exponents = np.frexp(size)[1] - 1
    return {
        "amax": size.max(),
        "smallest": size.min(),
        "rms": np.sqrt((finite**2).mean()),
        "mean": finite.mean(),
        "zeros": (finite == 0).mean(),
        "nonfinite": 1 - finite.size / x.size,
        "range_bits": np.log2(size.max() / size.min()),
        "exponents": np.bincount(exponents + 127, minlength=255),
    }


def of_errors(x, y) -> dict[str, Any]:
    """Returns the statistics of an error that are the same for every recipe, in float64."""
    x, y = (np.asarray(v, np.float64).reshape(-1) for v in (x, y))
    finite = np.isfinite(x)
    kept = finite & np.isfinite(y)
    a, b = x[kept], y[kept]
    return {
        "sqnr_db": 10 * np.log10((a**2).sum() / ((b - a) ** 2).sum()) if (a != b).any() else np.inf,
        "mse": ((b - a) ** 2).mean(),
        "bias": (b - a).mean(),
        "cosine": (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()),
        "lost": 1 - kept.sum() / finite.sum(),
    }


def assert_agree(got, want, prefix=""):
    """Compares statistics with expected ones of a subset of the names."""
    for name, value in want.items():
        scale = want["rms"] if name == "mean" else 1
        if name == "bias":
            scale = np.sqrt(want["mse"])
        np.testing.assert_allclose(
            got[prefix + name], value, rtol=2e-5, atol=2e-6 * scale, err_msg=prefix + name
        )


@pytest.mark.slow
def test_all_statistics_match_numpy():
    """Checks all three products of FP8 training, and two counterfactuals."""
    x = normal(0, 32, 64).at[0, :3].set(jnp.array([0.0, 1e-5, 3e4]))
    params, g = {"w": normal(1, 64, 32)}, normal(2, 32, 32, size=1e-12)
    value, gradients, seen = watched(weighted, FP8, ALL, params, x, g)
    plain = jax.jit(jax.value_and_grad(jaxq.quantize_fn(weighted, FP8)))(params, x, g)
    jax.tree.map(assert_same, (value, gradients), plain)
    got = seen.statistics()["w"]
    quantized = {
        "lhs": jaxq.fake_quant(x, "fp8_e4m3_tensor"),
        "rhs": jaxq.fake_quant(params["w"], "fp8_e4m3_tensor"),
        "cotangent": jaxq.fake_quant(g, "fp8_e5m2_tensor"),
    }
    y = quantized["lhs"] @ quantized["rhs"]
    tensors = {"lhs": x, "rhs": params["w"], "cotangent": g, "output": y}
    for name, tensor in tensors.items():
        assert_agree(got, of_values(tensor), f"{name}/")
    for name in ("lhs", "rhs"):
        assert_agree(got, of_errors(tensors[name], quantized[name]), f"{name}/")
    for name in ("dlhs/cotangent/", "drhs/cotangent/"):
        assert_agree(got, of_errors(g, quantized["cotangent"]), name)
    exact = {
        "output": (x @ params["w"], y),
        "dlhs": (g @ params["w"].T, quantized["cotangent"] @ quantized["rhs"].T),
        "drhs": (x.T @ g, quantized["lhs"].T @ quantized["cotangent"]),
    }
    for name, pair in exact.items():
        want = of_errors(*pair)
        for field in ("sqnr_db", "cosine"):
            np.testing.assert_allclose(got[f"{name}/product/{field}"], want[field], rtol=1e-4)
    axes = {"lhs": -1, "rhs": 0, "dlhs/cotangent": -1, "drhs/cotangent": 0}
    for name, axis in axes.items():
        tensor = tensors[name.rpartition("/")[2]]
        recipe = jaxq.get_recipe("mxfp4").along(axis, 2)
        want = of_errors(tensor, jaxq.fake_quant(tensor, recipe))
        assert_agree(got, want, f"{name}/mxfp4/")
        want = of_errors(tensor, np.asarray(tensor).astype(jnp.bfloat16))
        assert_agree(got, want, f"{name}/bfloat16/")


FEW = Monitoring(
    statistics=("amax", "smallest", "rms", "mean", "zeros", "sqnr_db", "flushed"),
    counterfactuals=["int8_tensor"],
)
VALUES = ("amax", "smallest", "rms", "mean", "zeros")


def assert_values(got, tensor, prefix):
    want = {name: value for name, value in of_values(tensor).items() if name in VALUES}
    assert_agree(got, want, prefix)


def test_default_statistics_match_numpy_and_change_nothing():
    x, params = normal(0, 8, 16).at[0, :2].set(jnp.array([0.0, 3e4])), {"w": normal(1, 16, 8)}
    g = normal(2, 8, 8, size=1e-12)
    value, gradients, seen = watched(weighted, FP8, Monitoring(), params, x, g)
    plain = jax.jit(jax.value_and_grad(jaxq.quantize_fn(weighted, FP8)))(params, x, g)
    jax.tree.map(assert_same, (value, gradients), plain)
    got = seen.statistics()["w"]
    for name, tensor, recipe in (
        ("lhs/", x, "fp8_e4m3_tensor"),
        ("rhs/", params["w"], "fp8_e4m3_tensor"),
        ("cotangent/", g, "fp8_e5m2_tensor"),
    ):
        values, y = of_values(tensor), jaxq.fake_quant(tensor, recipe)
        del values["exponents"]
        assert_agree(got, values, name)
        assert_agree(got, of_errors(tensor, y), f"drhs/{name}" if "cot" in name else name)


def layers(params, x):
    """Computes scanned layers with a shared weight, jit and checkpoint."""

    def layer(x, w):
        x = jax.jit(lambda x: x @ w)(x)
        return jax.checkpoint(lambda x: x @ params["shared"])(x), None

    return lax.scan(layer, x, params["w"])[0].sum()


def test_scanned_layers_have_rows_and_shared_weights_merge():
    params = {"w": normal(0, 3, 8, 8), "shared": normal(1, 8, 8)}
    x, steps = normal(2, 4, 8), 2
    delayed = jaxq.delayed_scaling(layers, [("shared", "fp8_training")], history=2)(params, x)
    state = monitor(layers, delayed, FEW)(params, x)

    @jax.jit
    def train(params, state):
        def step(state, x):
            value, _, seen = observed(layers, state, params, x)
            return state.update(seen), (value, seen.statistics())

        return lax.scan(step, state, jnp.stack([x] * steps))

    def plain(params, state):
        def step(state, x):
            def objective(state):
                return jaxq.quantize_fn(layers, state)(params, x)

            value, seen = jax.value_and_grad(objective)(state)
            return state.update(seen), value

        return lax.scan(step, state, jnp.stack([x] * steps))

    state, (values, rows) = train(params, state)
    scaling, want = jax.jit(plain)(params, delayed)
    assert_same(values, want)
    jax.tree.map(assert_same, state.scaling, scaling)
    quantize = functools.partial(jaxq.fake_quant, recipe="fp8_e4m3_tensor")
    inputs, others, shared = [], [], quantize(params["shared"])
    for w in params["w"]:
        inputs.append(x)
        others.append(x @ w)
        x = quantize(others[-1]) @ shared
    own = {name: values[0] for name, values in rows["w"].items()}
    for i, of_layer in enumerate(inputs):
        got = {name: values[i] for name, values in own.items()}
        assert_values(got, of_layer, "lhs/")
        assert_values(got, params["w"][i], "rhs/")
        want = of_errors(of_layer, jaxq.fake_quant(of_layer, "int8_tensor"))
        np.testing.assert_allclose(got["lhs/int8_tensor/sqnr_db"], want["sqnr_db"], rtol=1e-5)
    own = {name: values[0] for name, values in rows["shared"].items()}
    assert_values(own, jnp.stack(others), "lhs/")
    want = of_errors(jnp.stack(others), jnp.stack([quantize(x) for x in others]))
    np.testing.assert_allclose(own["lhs/sqnr_db"], want["sqnr_db"], rtol=1e-5)


def squared(params, x):
    return ((x @ params["w"]) ** 2).sum()


@pytest.mark.slow
def test_vmap_and_microbatches_merge_to_the_whole_batch():
    params, x = {"w": normal(0, 8, 4)}, normal(1, 6, 8).at[0, 0].set(0)
    request = Monitoring(statistics=("amax", "smallest", "rms", "mean", "zeros"))
    state = monitor(squared, [], request)(params, x)

    @jax.jit
    def mapped(params, state, x):
        def objective(state):
            run = jaxq.quantize_fn(squared, state)
            return jax.vmap(lambda row: run(params, row[None]))(x).sum()

        return jax.grad(objective)(state).statistics()

    @jax.jit
    def accumulated(params, state, x):
        parts = [observed(squared, state, params, part)[2] for part in jnp.split(x, 3)]
        return functools.reduce(lambda a, b: a.merge(b), parts).statistics()

    @jax.jit
    def copied(params, state, x):
        def objective(state):
            pairs = zip(state.copies(2), jnp.split(x, 2), strict=True)
            return sum(jaxq.quantize_fn(squared, own)(params, part) for own, part in pairs)

        return jax.grad(objective)(state).statistics()

    y = x @ params["w"]
    for run in (mapped, accumulated, copied):
        got = run(params, state, x)["w"]
        for name, tensor in {"lhs": x, "output": y, "cotangent": 2 * y}.items():
            assert_values(got, tensor, f"{name}/")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8_training", "mxfp8_training"])
def test_explicit_axes_of_a_mesh_do_not_change_statistics(recipe: str):
    params, x = {"w": normal(0, 64, 32)}, normal(1, 32, 64)
    want = watched(squared, recipe, Monitoring(), params, x)[2].flat()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        got = watched(squared, recipe, Monitoring(every=2), params, x)[2].flat()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_devices_share_statistics_of_the_whole_array():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = {"w": normal(0, 8, 4)}, normal(1, 8, 8)

    def local(w, x):
        return lax.psum(((x @ w) ** 2).sum(), "data")

    def inside(params, x):
        run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        return run(params["w"], x)

    request = Monitoring(statistics=VALUES)
    want = watched(squared, [], request, params, x)[2].statistics()
    placed = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
    for fn, batch in ((inside, x), (squared, placed)):
        got = watched(fn, [], request, params, batch)[2].statistics()
        (own,) = got.values()
        for name, value in want["w"].items():
            np.testing.assert_allclose(own[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
        assert own["cotangent/amax"] == want["w"]["cotangent/amax"]


def equations(jaxpr) -> int:
    """Returns the number of equations, without those in the branches of a `cond`."""
    count = 0
    for eqn in jaxpr.eqns:
        count += 1
        if eqn.primitive.name == "cond":
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            count += equations(inner) if hasattr(inner, "eqns") else 0
    return count


def test_steps_without_statistics_skip_their_computation():
    """Looks into programs. A failure means that off-steps cost time, or compilation does."""
    params, x, request = {"w": normal(0, 8, 4)}, normal(1, 4, 8), Monitoring(every=10)
    state = monitor(squared, FP8, request)(params, x)

    def step(state, n, params, x):
        return observed(squared, state.at(n), params, x)

    compiled = jax.jit(step).lower(state, 0, params, x).compile()
    on, off = (compiled(state, n, params, x)[2].statistics()["w"] for n in (20, 21))
    assert on["lhs/amax"] == jnp.abs(x).max()
    assert all(np.isnan(value).all() for value in off.values())
    plain = jax.jit(jax.value_and_grad(jaxq.quantize_fn(squared, FP8)))
    divisions = plain.lower(params, x).compile().as_text().count(" divide(")
    assert compiled.as_text().count(" divide(") == divisions, "a tensor is quantized twice"
    count = equations(jax.make_jaxpr(step)(state, 0, params, x).jaxpr)
    always = jax.make_jaxpr(functools.partial(observed, squared))(
        monitor(squared, FP8)(params, x), params, x
    )
    assert equations(always.jaxpr) > count + 200
    assert equations(always.jaxpr) < count + 800, "statistics take long to compile"


def test_nan_counts_only_in_its_own_tensor_and_layer():
    """Checks that a NaN in a block of a layer's weight counts there and in the layers after it."""
    params = {"w": normal(0, 3, 32, 32), "shared": jnp.eye(32)}
    request = Monitoring(tensors="rhs", counterfactuals=["mxfp4"])
    state = monitor(layers, [], request)(params, normal(2, 4, 32))
    broken = {**params, "w": params["w"].at[1, 3, 5].set(jnp.nan)}
    run = jax.jit(functools.partial(observed, layers))
    rows, clean = (run(state, p, normal(2, 4, 32))[2].statistics()["w"] for p in (broken, params))
    assert rows["rhs/nonfinite"].tolist() == [0, np.float32(1 / 1024), 0]
    np.testing.assert_allclose(rows["rhs/mxfp4/lost"], [0, 31 / 1023, 0], rtol=1e-6)
    for name, values in rows.items():
        assert np.isfinite(values).all(), name
        assert_same(values[::2], clean[name][::2])


@pytest.mark.slow
def test_planted_faults_are_found():
    """Plants cotangents that underflow, an outlier channel, and a stale delayed scale."""
    params = {"first": normal(0, 32, 32), "second": normal(1, 32, 32)}
    x, g = normal(2, 32, 32).at[:, 7].multiply(1e3), normal(3, 32, 32)
    g = g.at[1:].multiply(1e-11)

    def fn(params, x):
        return (x @ params["first"]).sum() * 0 + ((x @ params["second"]) * g).sum()

    rules = [
        (
            "",
            jaxq.ProductRecipe(
                "int8_tensor", "int8_tensor", dlhs=jaxq.SingleProduct("fp8_e5m2_tensor")
            ),
        )
    ]
    request = Monitoring(statistics=("flushed", "sqnr_db", "clipped", "block_range_bits"))
    seen = watched(fn, rules, request, params, x)[2].statistics()
    assert seen["second"]["dlhs/cotangent/flushed"] > 0.5
    assert seen["first"]["dlhs/cotangent/flushed"] == 0
    assert seen["second"]["lhs/flushed"] > 0.9, "the outlier channel sets the scale"
    assert seen["second"]["rhs/flushed"] < 0.02
    delayed = jaxq.delayed_scaling(squared, FP8, history=4)({"w": params["first"]}, x)
    state = monitor(squared, delayed, request)({"w": params["first"]}, x)
    run = jax.jit(functools.partial(observed, squared))
    state = state.update(run(state, {"w": params["first"]}, x / 1e3)[2])
    stale = run(state, {"w": params["first"]}, x)[2].statistics()["w"]
    np.testing.assert_allclose(stale["lhs/clipped"], 1 / 32, atol=0.02)
    assert stale["rhs/clipped"] == 0


def looped(params, x):
    return lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ params["w"], x).sum()


def frozen(params, x):
    """Returns a loss that depends on the product only through `stop_gradient` and an integer."""
    y = jax.jit(lambda x: x @ params["w"])(x)
    return (x @ x).sum() + lax.stop_gradient(y).sum(), y.argmax(-1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Monitoring(statistics=("sqnr",)), "Did you mean sqnr_db"),
        (lambda: Monitoring(tensors=("cotangents",)), "Did you mean cotangent"),
        (lambda: Monitoring(counterfactuals=["mxfp5"]), "No recipe or format is named 'mxfp5'"),
        (lambda: Monitoring(products="("), "regular expression"),
        (lambda: Monitoring(every=0), "at least 1"),
        (
            lambda: monitor(squared, [], Monitoring("v"))({"w": jnp.eye(2)}, jnp.eye(2)),
            "matches no product. Did you mean w",
        ),
        (
            lambda: monitor(looped, [])({"w": jnp.eye(2)}, jnp.eye(2)),
            "its cotangent is unknown in a while loop",
        ),
        (
            lambda: monitor(frozen, [], Monitoring("w"))({"w": jnp.eye(2)}, jnp.eye(2)),
            "no floating-point result of the function is differentiable",
        ),
        (
            lambda: monitor(squared, [])({"w": jnp.eye(2)}, jnp.eye(2)).flat(),
            "exist only in the gradient with respect to a state",
        ),
    ],
)
def test_wrong_requests_are_explained(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_state_of_another_model_is_refused():
    state = monitor(squared, [], FEW)({"w": jnp.eye(2)}, jnp.eye(2))
    other = lambda params, x: (x @ params["v"]).sum()
    with pytest.raises(ValueError, match="monitors 'w', which the function lacks"):
        jaxq.quantize_fn(other, state)({"v": jnp.eye(2)}, jnp.eye(2))
    state = monitor(layers, [], FEW)({"w": jnp.ones((3, 2, 2)), "shared": jnp.eye(2)}, jnp.eye(2))
    with pytest.raises(ValueError, match=r"must have layers \(2,\) for"):
        jaxq.quantize_fn(layers, state)(
            {"w": jnp.ones((2, 2, 2)), "shared": jnp.eye(2)}, jnp.eye(2)
        )
