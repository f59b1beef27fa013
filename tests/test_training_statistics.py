"""Logs of statistics, their pictures, the ranking of products, and statistics of steps."""

import functools
import io
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from matplotlib.text import Text
from rich.console import Console

import jaxq
from jaxq import cli
from jaxq.analysis import (
    GradientError,
    LiveTable,
    Log,
    Monitoring,
    StatisticsLog,
    blame,
    gradient_errors,
    monitor,
    plots,
    read_log,
    update_statistics,
)
from tests import data
from tests.oracle import assert_same

# Without optimizations the sums of a product depend on the program around it.
pytestmark = pytest.mark.optimized


def normal(seed: int, *shape: int) -> jax.Array:
    return data.normal(shape, seed)


def layers(params, x):
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["hidden"])[0]
    return ((x @ params["out"]) ** 2).sum()


PARAMS = {"hidden": normal(0, 2, 8, 8), "out": normal(1, 8, 8)}
X = normal(2, 4, 8)
REQUEST = Monitoring(tensors=("lhs", "cotangent"), statistics=("amax", "nonfinite", "exponents"))


@functools.cache
def recorded():
    """Returns a function from an input to the gradient with respect to the state."""
    state = monitor(layers, [], REQUEST)(PARAMS, X)
    return jax.jit(jax.grad(lambda s, x: jaxq.quantize_fn(layers, s)(PARAMS, x))), state


def seen(x):
    run, state = recorded()
    return run(state, x)


def test_log_loads_as_arrays_by_step_and_layer(tmp_path: pathlib.Path):
    log = StatisticsLog(tmp_path / "run.log")
    sizes = (1, 3, 2)
    for step, size in zip((0, 20, 10), sizes, strict=True):
        log.append(step, seen(X * size))
    found = read_log(log.path)
    assert found.steps.tolist() == [0, 10, 20]
    assert found.values["hidden/lhs/amax"].shape == (3, 2)
    want = np.abs(np.asarray(X)).max() * np.float32([1, 2, 3])
    np.testing.assert_array_equal(found.values["hidden/lhs/amax"][:, 0], want)
    flat = seen(X).flat()
    assert flat["hidden/1/lhs/amax"] == found.values["hidden/lhs/amax"][0, 1]
    assert flat["out/cotangent/amax"] == found.values["out/cotangent/amax"][0]


def test_log_survives_a_crash_and_a_resumed_run(tmp_path: pathlib.Path):
    path = tmp_path / "run.log"
    StatisticsLog(path).append(0, seen(X))
    StatisticsLog(path).append(1, seen(X))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert read_log(path).steps.tolist() == [0]
    resumed = StatisticsLog(path)
    resumed.append(1, seen(2 * X))
    resumed.append(1, seen(3 * X))
    found = read_log(path)
    assert found.steps.tolist() == [0, 1]
    assert found.values["hidden/lhs/amax"][1, 0] == 3 * found.values["hidden/lhs/amax"][0, 0]


def test_log_of_another_model_or_version_is_refused(tmp_path: pathlib.Path):
    path = tmp_path / "run.log"
    StatisticsLog(path).append(0, seen(X))
    other = monitor(layers, [], Monitoring(products="out"))(PARAMS, X)
    with pytest.raises(ValueError, match="another model or request"):
        StatisticsLog(path).append(1, other.at(0))
    lines = path.read_text().splitlines()
    path.write_text(json.dumps({**json.loads(lines[0]), "version": 9}) + "\n")
    with pytest.raises(ValueError, match="has version 9"):
        read_log(path)
    path.write_text("not a log\n")
    with pytest.raises(ValueError, match="must be a log"):
        StatisticsLog(path).append(1, seen(X))


def errors(*cosines: float) -> dict[str, GradientError]:
    return {
        f"w{i}": GradientError(*map(jnp.float32, (cosine, 1, 0, 0)))
        for i, cosine in enumerate(cosines)
    }


def logged(tmp_path: pathlib.Path, with_gradients: bool = False) -> pathlib.Path:
    """Returns a log in which an input of the first layer has a NaN at step 3."""
    log = StatisticsLog(tmp_path / "run.log")
    for step in range(5):
        x = X.at[0, 0].set(jnp.nan) if step == 3 else X * (step + 1)
        log.append(step, seen(x), gradients=errors(0.9) if with_gradients else None)
    return log.path


def texts(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_pictures_show_tensors_steps_and_the_range_of_a_format(tmp_path: pathlib.Path):
    log = read_log(logged(tmp_path))
    shown = texts(plots.statistics_map(log, "nonfinite"))
    assert "hidden/lhs [1]" in shown
    assert "out/cotangent" in shown
    lines = plots.statistic_by_step(log, ["hidden/lhs/amax", "out/lhs/amax"])
    assert len(lines.axes[0].lines) == 3
    assert "float8_e4m3fn normal" in texts(
        plots.exponents_by_step(log, "hidden/lhs", "float8_e4m3fn")
    )
    figure = plots.magnitudes_by_step(log, "lhs", "float8_e4m3fn")
    assert "float8_e4m3fn normal" in texts(figure)
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert {"hidden", "out"} < {*drawn}
    np.testing.assert_array_equal(drawn["hidden"], log.values["hidden/lhs/amax"].max(1))
    with pytest.raises(
        ValueError, match=r"has no 'scale_amax' of 'lhs'. Record it with Monitoring"
    ):
        plots.magnitudes_by_step(log, scales=True)
    with pytest.raises(ValueError, match="must be a float format, got int8"):
        plots.magnitudes_by_step(log, fmt="int8")
    with pytest.raises(ValueError, match="has no 'sqnr_db'"):
        plots.statistics_map(log, "sqnr_db")
    with pytest.raises(ValueError, match="has no 'hidden/lhs/rms'"):
        plots.statistic_by_step(log, ["hidden/lhs/rms"])


def test_scales_of_a_product_are_drawn_with_their_range():
    values = {
        "a/up/lhs/scale_amax": np.float32([0.5, 2, 0, np.nan]),
        "a/up/lhs/scale_smallest": np.float32([0.25, 1, 0, np.nan]),
    }
    log = Log(np.arange(4), values)
    axes = plots.magnitudes_by_step(log, "lhs", "float8_e4m3fn", scales=True).axes[0]
    assert "float8_e4m3fn max" in texts(axes)
    line = next(line for line in axes.lines if line.get_label() == "a/up")
    assert line.get_ydata().compressed().tolist() == [0.5, 2]
    assert len(axes.collections) == 1, "the band of the smaller scales"


def test_recipes_are_logged_and_their_ranges_drawn(tmp_path: pathlib.Path):
    def loss(params, x):
        return ((x @ params["w"]) ** 2).sum()

    params, path = {"w": PARAMS["out"]}, tmp_path / "run.log"
    request = Monitoring(tensors=("lhs", "cotangent"), statistics=("amax", "smallest", "exponents"))
    state = monitor(loss, "fp8_training", request)(params, X)
    log = StatisticsLog(path)
    run = jax.jit(jax.grad(lambda state, x: jaxq.quantize_fn(loss, state)(params, x)))
    for step in range(3):
        log.append(step, run(state, X * (step + 1)))
    found = read_log(path)
    assert found.recipes["w/lhs"] == ("fp8_e4m3_tensor", 448, 2**-9)
    assert found.recipes["w/dlhs/cotangent"] == ("fp8_e5m2_tensor", 57344, 2**-16)
    for tensor, ratio in (("lhs", 2**-9 / 448), ("cotangent", 2**-16 / 57344)):
        lines = plots.magnitudes_by_step(found, tensor).axes[0].lines
        drawn = next(line for line in lines if line.get_label().startswith("smallest of fp8"))
        want = found.values[f"w/{tensor}/amax"] * ratio
        np.testing.assert_allclose(drawn.get_ydata(), want, rtol=1e-6)
    (drawn,) = plots.exponents_by_step(found, "w/lhs").axes[0].lines
    want = np.log2(found.values["w/lhs/amax"] * 2**-9 / 448)
    np.testing.assert_allclose(drawn.get_ydata(), want, rtol=1e-6)
    wide = {
        "w/lhs/scale_amax": np.float32([4, 8, 4]),
        "w/lhs/scale_smallest": np.float32([2, 4, 4]),
    }
    both = Log(found.steps, {**found.values, **wide}, found.recipes)
    lines = plots.magnitudes_by_step(both, "lhs").axes[0].lines
    ends = {line.get_label(): line.get_ydata().tolist() for line in lines}
    assert ends["largest of fp8_e4m3_tensor"] == [4 * 448, 8 * 448, 4 * 448]
    assert ends["smallest of fp8_e4m3_tensor"] == [2 * 2**-9, 4 * 2**-9, 4 * 2**-9]
    other = monitor(loss, "w8a8", request)(params, X)
    with pytest.raises(ValueError, match="int8_token for w/lhs instead of fp8_e4m3_tensor"):
        StatisticsLog(path).append(3, other)


def test_gradient_errors_are_logged_and_drawn(tmp_path: pathlib.Path):
    path = tmp_path / "run.log"
    log = StatisticsLog(path)
    log.append(0, seen(X), gradients=errors(1, 0.5))
    log.append(1, seen(X))
    StatisticsLog(path).append(2, seen(X))  # A resumed run.
    log.append(3, seen(X), gradients=errors(0.9, 0.8))
    found = read_log(path)
    expected = np.float32([0.5, np.nan, np.nan, 0.8])
    np.testing.assert_array_equal(found.values["w1/gradient/cosine"], expected)
    assert found.values["out/lhs/amax"].all()
    lines = plots.gradient_cosines(found, worst=1).axes[0].lines
    assert lines[0].get_label() == "w1"
    assert lines[0].get_xdata().tolist() == [0, 3]
    np.testing.assert_array_equal(lines[0].get_ydata(), expected[[0, 3]])
    with pytest.raises(ValueError, match="another model or request"):
        log.append(4, seen(X), gradients=errors(1))
    with pytest.raises(ValueError, match=r"has no gradient errors. Append them with"):
        plots.gradient_cosines(Log(found.steps, {"a": found.steps}))


def test_report_names_the_tensor_and_step_of_a_nan(tmp_path: pathlib.Path, capsys):
    path, page = logged(tmp_path, with_gradients=True), tmp_path / "page.html"
    options = ["-o", str(page), "--worst", "9", "--format"]
    assert cli.main(["report", str(path), *options, "float8_e5m2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = next(line for line in lines if line[:1] == ["nonfinite"])
    assert {"3"} < {*first}
    assert any("hidden/lhs" in word for line in lines for word in line)
    text = page.read_text()
    images = text.count("data:image/png;base64,")
    assert images == 8, "a map, cosines, two kinds of tensors, and four histograms"
    assert "Cosine of the quantized to the float gradient" in text
    assert "Magnitudes of cotangent" in text
    assert "hidden/lhs [0]" in text
    assert cli.main(["report", str(tmp_path / "missing.log")]) == 2
    assert cli.main(["report", str(path), *options, "int8"]) == 2
    assert "must be a float format" in capsys.readouterr().err


def test_live_table_shows_the_worst_tensors_and_where_a_nan_was():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, _environ={})
    with LiveTable(("amax", "nonfinite"), worst=2, console=console) as table:
        table.update(0, seen(X))
        assert [row.statistic for row in table.rows] == ["amax", "amax"], "no fraction but 0"
        sizes = {n: v for n, v in seen(X).flat().items() if n.endswith("/amax")}
        worst = sorted(sizes, key=sizes.__getitem__, reverse=True)[:2]
        assert [f"{row.tensor}/amax" for row in table.rows] == worst
        table.update(1, seen(X.at[0, 0].set(jnp.nan)))
        table.update(2, seen(X))
        after = {row.tensor: row for row in table.rows if row.statistic == "nonfinite"}
        assert len(after) == 2
        assert all(row.value == 0 and row.worst > 0 and row.step == 1 for row in after.values())
        before = table.rows
        table.update(3, jax.tree.map(lambda x: x * jnp.nan, seen(X)))
        assert table.rows == before, "a step without statistics"
    text = file.getvalue()
    assert "step 0" in text
    assert "step 3" in text
    assert next(iter(after)) in text


def test_errors_of_the_live_table_name_the_remedy(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"no 'sqnr'. Did you mean sqnr_db"):
        LiveTable("sqnr")
    with pytest.raises(ValueError, match="no 'exponents'"):
        LiveTable("exponents")
    with pytest.raises(ValueError, match="`worst` must be an integer of at least 1"):
        LiveTable(worst=0)
    with pytest.raises(ValueError, match=r"no 'clipped'. Request it with Monitoring"):
        LiveTable("clipped").update(0, seen(X))
    monkeypatch.setitem(sys.modules, "rich.live", None)
    with pytest.raises(ImportError, match=r"pip install rich"):
        LiveTable()


def test_blame_ranks_the_product_with_the_largest_error():
    rules = {"hidden": "int8_tensor", "out": "int4_tensor"}
    rows = {row.product: row for row in blame(layers, rules)(PARAMS, X).rows}
    assert list(rows)[:2] == ["all", "out"]
    assert set(rows) == {"all", "hidden/0", "hidden/1", "out"}

    def gradient(weights):
        return jax.value_and_grad(layers)({**PARAMS, **weights}, X)

    hidden = PARAMS["hidden"]
    broken = hidden.at[1].set(jaxq.fake_quant(hidden[1], "int8_tensor"))
    (exact, want), (value, got) = jax.jit(gradient)({}), jax.jit(gradient)({"hidden": broken})
    np.testing.assert_allclose(rows["hidden/1"].loss_alone, value - exact, rtol=1e-4, atol=1e-4)
    leaves = (map(np.asarray, jax.tree.leaves(tree)) for tree in (got, want))
    pairs = list(zip(*leaves, strict=True))
    error = sum(np.sum((a - b) ** 2, dtype=np.float64) for a, b in pairs)
    norm = sum(np.sum(b**2, dtype=np.float64) for _, b in pairs)
    np.testing.assert_allclose(rows["hidden/1"].gradient_alone, np.sqrt(error / norm), rtol=0.01)
    assert rows["all"].gradient_without == 0
    assert rows["out"].gradient_without < rows["out"].gradient_alone


def test_all_switches_off_give_the_float_function():
    """Checks products under custom derivatives, look-ups and outputs, too."""

    @jax.custom_jvp
    def inner(x, w):
        return x @ w

    inner.defjvp(lambda p, t: (inner(*p), t[0] @ p[1] + p[0] @ t[1]))

    def model(params, ids):
        x = jnp.tanh(inner(params["table"][ids], params["custom"]) @ params["out"])
        steps = lambda state: (state[0] + 1, jnp.tanh(state[1] @ params["loop"]))
        return lax.while_loop(lambda state: state[0] < 2, steps, (0, x))[1]

    names = ("table", "custom", "out", "loop")
    params = {name: normal(i, 8, 8) for i, name in enumerate(names)}
    rules = [jaxq.Rule("out", "w8a8", output="int4_tensor"), ("", "w4a16")]
    ids = jnp.array([3, 1])
    state = jaxq.models.make_switched("test", model, rules, 0)(params, ids)
    assert len(state.names) == 4
    run = jax.jit(lambda on: jaxq.quantize_fn(model, state.with_flags(on))(params, ids))
    assert_same(run(jnp.zeros(4)), jax.jit(model)(params, ids))
    assert_same(run(jnp.ones(4)), jax.jit(jaxq.quantize_fn(model, rules))(params, ids))
    for i in range(4):
        assert (np.asarray(run(jnp.eye(4)[i])) != np.asarray(run(jnp.zeros(4)))).any()
    with pytest.raises(ValueError, match="one number per name, 4"):
        state.with_flags(jnp.ones(3))


def test_a_recipe_switches_on_at_a_step_in_one_program():
    rules = {"hidden": "int8_tensor", "out": "int4_tensor"}
    switch = jaxq.models.switch(layers, rules)(PARAMS, X)
    request = Monitoring(tensors="rhs", statistics="sqnr_db")

    @jax.jit
    def step(params, number):
        own = switch.where("hid+en", number >= 2)
        state = monitor(layers, own, request)(params, X)
        run = lambda params, state: jaxq.quantize_fn(layers, state)(params, X)
        value, (gradient, seen) = jax.value_and_grad(run, (0, 1))(params, state)
        return (value, gradient), seen.statistics()

    before, after = (step(PARAMS, number) for number in (1, 2))
    assert step._cache_size() == 1
    for (results, _), own in ((before, {"out": "int4_tensor"}), (after, rules)):
        expected = jax.jit(jax.value_and_grad(jaxq.quantize_fn(layers, own)))(PARAMS, X)
        jax.tree.map(assert_same, results, expected)
    assert np.isnan(before[1]["hidden"]["rhs/sqnr_db"]).all()
    assert (after[1]["hidden"]["rhs/sqnr_db"] > 30).all()
    assert_same(before[1]["out"]["rhs/sqnr_db"], after[1]["out"]["rhs/sqnr_db"])


def test_errors_of_switches_name_the_products():
    switch = jaxq.models.switch(layers, {"hidden": "int8_tensor"})(PARAMS, X)
    with pytest.raises(ValueError, match=r"matches no product with a recipe.*hidden"):
        switch.where("out", False)
    with pytest.raises(ValueError, match="`on` must be a scalar"):
        switch.where("hidden", jnp.ones(2))
    with pytest.raises(ValueError, match="without a state, got Switched rules"):
        jaxq.models.switch(layers, switch)


def test_blame_needs_a_quantized_product():
    with pytest.raises(ValueError, match="must give some product a recipe"):
        blame(layers, [])(PARAMS, X)


def error_in_float64(samples, f) -> list[Any]:
    """Returns the fields of `GradientError`."""
    g, f = np.asarray(samples, np.float64), np.asarray(f, np.float64)
    m, norm = g.mean(0), np.linalg.norm
    size = norm(f)
    deviation = np.sqrt(((g - m) ** 2).sum() / len(g))
    return [
        (m * f).sum() / (norm(m) * size),
        norm(m) / size,
        norm(m - f) / size,
        deviation / size,
    ]


def test_gradient_errors_match_numpy():
    f = np.asarray(normal(0, 6, 5))
    samples = f[None] + np.asarray(normal(1, 7, 6, 5)) * np.float32(0.1) + np.float32(0.02)
    for of_f, factor in ((1e-30, 1), (1, 1), (1e38, 1), (1, 1e25), (1, 1e-25)):
        size = np.float32(of_f / np.abs(samples).max())
        exact, given = f * size, samples * size * np.float32(factor)
        got = gradient_errors({"w": given}, {"w": exact}, sampled=True)["w"]
        np.testing.assert_allclose(got, error_in_float64(given, exact), rtol=1e-4)
    with pytest.raises(ValueError, match="must have the shape"):
        gradient_errors({"w": jnp.ones(3)}, {"w": jnp.ones(2)})


def test_relative_errors_of_zeros_are_infinite_or_zero():
    zero, one = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    assert gradient_errors(one, zero)["w"] == (0, np.inf, np.inf, 0)
    assert gradient_errors(zero, zero)["w"] == (0, 0, 0, 0)
    assert update_statistics(one, zero)["w"].ratio == np.inf
    assert update_statistics(zero, zero)["w"].ratio == 0


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e20, 1e38])
def test_ratios_of_updates_match_numpy_at_every_magnitude(size: float):
    p = np.random.default_rng(0).uniform(0.3, 1, (2, 7, 5)).astype(np.float32) * np.float32(size)
    for factor in (1, 1e-2):
        u = p[1] * np.float32(factor)
        got = update_statistics({"w": u}, {"w": p[0]})["w"].ratio
        want = np.linalg.norm(u.astype(np.float64)) / np.linalg.norm(p[0].astype(np.float64))
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_swamped_bfloat16_updates_are_found():
    params = {"small": jnp.full(8, 1e-3, jnp.bfloat16), "large": jnp.ones(8, jnp.bfloat16)}
    updates = jax.tree.map(lambda p: jnp.full_like(p, 1e-3).at[0].set(0), params)
    found = update_statistics(updates, params)
    assert float(found["large"].swamped) == 1
    assert float(found["small"].swamped) == 0
    np.testing.assert_allclose(found["large"].ratio, 1e-3 * np.sqrt(7 / 8), rtol=1e-2)


def test_empty_log_has_no_steps(tmp_path: pathlib.Path):
    log = StatisticsLog(tmp_path / "run.log")
    log.append(0, seen(X))
    lines = log.path.read_text().splitlines()
    log.path.write_text(lines[0] + "\n")
    assert read_log(log.path).steps.size == 0
