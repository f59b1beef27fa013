"""Statistics of product inputs, and GPTQ on single weights."""

import dataclasses
import pathlib

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from jaxq.quantizers import Levels, snap
from tests import data

# The bits of sums do not matter here, and most time goes into compiling.
pytestmark = pytest.mark.unoptimized

INPUTS, OUTPUTS = 64, 16


def samples(inputs: int = INPUTS, tokens: int = 300) -> np.ndarray:
    """Returns correlated float32 tokens with inputs of different scales."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((tokens, inputs)) @ rng.standard_normal((inputs, inputs))
    return (mixed * np.exp(rng.standard_normal(inputs))).astype(np.float32)


def kernel(inputs: int = INPUTS, outputs: int = OUTPUTS) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((inputs, outputs)).astype(np.float32)


def hessian(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64).T @ x.astype(np.float64)


def loss(q: jaxq.Quantized, weight: np.ndarray, gram: np.ndarray) -> float:
    error = np.asarray(q.dequantize(), np.float64) - weight
    return float(np.sum(error * (gram @ error)))


def nearest(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns int4 levels in float64."""
    return np.clip(np.round(weight / scale), -7, 7) * scale


def obq(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Computes Optimal Brain Quantization, column by column, each with an update of the inverse."""
    left, result = weight.astype(np.float64), np.zeros_like(weight, np.float64)
    inverse = np.linalg.inv(gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram)))
    for i in range(len(left)):
        result[i] = nearest(left[i], scale[i])
        left -= np.outer(inverse[:, i], (left[i] - result[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return result


def ldlq(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Computes QuIP's form, H = (L + I) D (L + I)^T, here with an upper triangular L."""
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    feedback = upper / np.diag(upper) - np.eye(len(gram))
    result = np.zeros_like(weight, np.float64)
    for i in range(len(weight)):
        result[i] = nearest(weight[i] + (weight - result)[:i].T @ feedback[:i, i], scale[i])
    return result


def order_of(diagonal: np.ndarray, order: str | None) -> np.ndarray:
    """Returns the order of solving, for groups of 32 inputs."""
    if order == "group":
        groups = np.arange(INPUTS).reshape(-1, 32)
        groups = sorted(groups, key=lambda group: -diagonal[group].max())
        return np.concatenate([sorted(group, key=lambda i: -diagonal[i]) for group in groups])
    return np.argsort(-diagonal, kind="stable") if order else np.arange(INPUTS)


@pytest.mark.parametrize("order", data.each([None, "static", "group"], ["static", "group"]))
def test_gptq_gives_the_codes_of_float64_obq_and_ldlq(order: str | None):
    weight, gram = kernel(), hessian(samples())
    q = ptq.gptq(weight, gram, "int4_g32", order=order)
    scale = np.repeat(np.asarray(q.scales, np.float64), 32, axis=0)
    rows = order_of(np.diag(gram), order)
    for reference in (obq, ldlq):
        expected = np.empty_like(weight, np.float64)
        expected[rows] = reference(weight[rows], gram[np.ix_(rows, rows)], scale[rows])
        np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6)


def test_gptq_of_a_16_bit_weight_with_dead_inputs_and_a_short_block_equals_obq():
    x = samples()
    x[:, [5, 50]] = 0
    weight, gram = jnp.asarray(kernel(), jnp.bfloat16), hessian(x)
    recipe = jaxq.Recipe("int4", jaxq.PerBlock(24, pad=True))
    # The blocks do not divide the inputs, so the group order is that of a single group.
    q = ptq.gptq(weight, gram, recipe, order="group")
    scale = np.repeat(np.asarray(q.scales, np.float64), 24, axis=0)[:INPUTS]
    mean = np.mean(np.diag(gram))
    # The damping in `obq` is relative to a mean that includes the entries of dead inputs.
    damped = gram + np.diag(np.where(np.diag(gram) == 0, mean, 0))
    damped += 0.01 * (mean - np.mean(np.diag(damped))) * np.eye(INPUTS)
    rows = order_of(np.diag(damped), "static")
    expected = np.empty(weight.shape)
    expected[rows] = obq(np.float64(weight)[rows], damped[np.ix_(rows, rows)], scale[rows])
    np.testing.assert_allclose(np.float64(q.dequantize()), expected, rtol=2**-8)


def test_codes_equal_those_of_qwix():
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "ptq.npz")
    recipe = jaxq.Recipe("int4", jaxq.PerChannel(), jaxq.recipes.Symmetric(rule="half"))
    q = ptq.gptq(golden["weight"], golden["hessian"], recipe, order=None)
    np.testing.assert_allclose(q.scales, golden["scale"], rtol=1e-6)
    codes = np.round(q.dequantize() / q.scales.reshape(1, -1))
    np.testing.assert_array_equal(codes, golden["codes"])


@pytest.mark.slow
@pytest.mark.parametrize(("prefix", "propagation"), [("group_", 0.0), ("qep_", 0.5)])
def test_codes_on_scales_of_qwix_equal_its_codes(prefix: str, propagation: float):
    """Takes the scales of Qwix, which come from the weight after the changes by GPTQ or QEP."""
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "ptq.npz")
    weight, scale = golden["weight"], golden[f"{prefix}scale"]
    step = np.repeat(scale, INPUTS // len(scale), axis=0)
    statistics = dataclasses.replace(
        ptq.collect(np.ones((1, INPUTS), np.float32)),
        hessian=jnp.asarray(golden["hessian"]),
        drift=jnp.asarray(golden["drift"]),
    )
    recipe = jaxq.Recipe("int4", scaling=jaxq.recipes.Symmetric(rule="half"))
    nearest = np.clip(np.round(weight / step), -8, 7)
    levels = Levels(jnp.asarray(step), None, None)
    problem = ptq.Problem(jnp.asarray(weight), levels, jnp.asarray(nearest), statistics)
    solution = ptq.GPTQ(order=None, propagation=propagation).solve(problem, recipe)
    np.testing.assert_array_equal(np.round(solution.grid_values), golden[f"{prefix}codes"])
    assert np.any(nearest != golden[f"{prefix}codes"])


# One recipe for each kind of scale and element.
KINDS = {
    "int4_channel", "int4_g64", "uint4_channel", "int8_tensor", "mxfp4", "nvfp4", "nvfp4_4over6",
    "nvfp4_tile16", "nf4_g64", "nf4_dq", "q4_0", "q4_1", "fp8_e4m3_tile128", "ternary_absmean",
}  # fmt: skip


@pytest.mark.parametrize("name", data.each(sorted(KINDS), {"uint4_channel"}))
def test_gptq_keeps_the_scales_and_lowers_the_loss(name: str):
    x = samples(128)
    weight, gram = kernel(128, 128), hessian(x)
    plain, q = jaxq.quantize(weight, name, axis=0), ptq.gptq(weight, gram, name)
    assert q.recipe == plain.recipe
    for actual, other in zip(jax.tree.leaves(q)[1:], jax.tree.leaves(plain)[1:], strict=True):
        np.testing.assert_array_equal(actual, other)
    assert loss(q, weight, gram) < 0.8 * loss(plain, weight, gram)


@pytest.mark.slow
def test_permuted_inputs_permute_the_solution():
    weight, gram = kernel(), hessian(samples())
    rows = np.random.default_rng(2).permutation(INPUTS)
    q = ptq.gptq(weight, gram, "int4_channel")
    permuted = ptq.gptq(weight[rows], gram[np.ix_(rows, rows)], "int4_channel")
    np.testing.assert_array_equal(permuted.dequantize(), q.dequantize()[rows])


def test_diagonal_hessian_gives_the_nearest_levels_on_any_axis():
    weight = kernel().reshape(INPUTS, 4, 4).transpose(1, 0, 2)
    q = ptq.gptq(weight.astype(jnp.bfloat16), np.diag(np.arange(INPUTS)), "int4_channel", axis=1)
    plain = jaxq.quantize(weight.astype(jnp.bfloat16), "int4_channel", axis=1)
    np.testing.assert_array_equal(q.codes, plain.codes)
    chex.assert_type(q, jnp.bfloat16)


@pytest.mark.slow
def test_vmap_over_experts_equals_separate_solutions():
    weights = np.stack([kernel(), -2 * kernel()[::-1]])
    grams = np.stack([hessian(samples()), hessian(samples()[:40])]).astype(np.float32)
    both = jax.vmap(lambda w, h: ptq.gptq(w, h, "int4_channel"))(weights, grams)
    for i in range(2):
        one = ptq.gptq(weights[i], grams[i], "int4_channel")
        np.testing.assert_array_equal(both.codes[i], one.codes)


def test_damping_is_raised_until_a_factor_exists():
    gram = hessian(samples())
    indefinite = gram - 0.02 * np.mean(np.diag(gram)) * np.eye(INPUTS)
    weight = kernel()
    q = ptq.gptq(weight, indefinite, "int4_channel")
    assert loss(q, weight, gram) < loss(jaxq.quantize(weight, "int4_channel"), weight, gram)


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    x = samples()
    x[:, 5] = 0
    q = ptq.gptq(kernel(), hessian(x), "int4_channel")
    np.testing.assert_array_equal(q.codes[5], jaxq.quantize(kernel(), "int4_channel").codes[5])


@pytest.mark.parametrize("gram", [np.full((INPUTS, INPUTS), np.nan), np.zeros((INPUTS, INPUTS))])
def test_hessian_without_a_cholesky_factor_is_an_error(gram: np.ndarray):
    with pytest.raises(ValueError, match=r"gptq: `hessian` must be .* finite and not zero"):
        ptq.gptq(kernel(), gram, "int4_channel")


@pytest.mark.parametrize(
    ("recipe", "axis", "message"),
    [
        (jaxq.Recipe("int4", rounding="stochastic"), 0, "rounds stochastically"),
        (
            "int4_channel",
            1,
            r"`hessian` must have the shape \(n, n\).*got \(64, 64\) and \(64, 16\)",
        ),
        ("int4_channel", 2, "axis=2"),
        ("int4_chanel", 0, "int4_channel"),
    ],
)
def test_arguments_that_gptq_does_not_support_are_errors(recipe, axis: int, message: str):
    with pytest.raises(ValueError, match=message):
        ptq.gptq(kernel(), np.eye(INPUTS), recipe, axis=axis)


def test_solvers_are_looked_up_by_name():
    assert ptq.get_solver("gptq") == ptq.GPTQ()
    with pytest.raises(ValueError, match="Did you mean gptq"):
        ptq.get_solver("gtpq")
    with pytest.raises(ValueError, match="`order` must be"):
        ptq.GPTQ(order="act")
    with pytest.raises(TypeError, match=r"must be a name or a solver.*such as GPTQ\(\)"):
        ptq.get_solver(ptq.GPTQ)


@pytest.mark.parametrize("name", data.each(ptq.SOLVERS, ["gptq"]))
def test_contract_of_solvers(name: str):
    """Checks that every solver is hashable and returns values on the levels of the weight."""
    solver = ptq.SOLVERS[name]
    assert hash(solver) == hash(ptq.get_solver(name))
    x = samples()
    model = lambda w, x: x @ w
    # All solvers take a recipe with minima; HQQ takes no other.
    packed, report = ptq.quantize_weights(model, "q4_1", solver=solver)(kernel(), [x])
    plain = jaxq.quantize_weights(model, "q4_1")(kernel(), x)
    np.testing.assert_array_equal(packed.scale, plain.scale)
    assert packed.recipe == plain.recipe
    (row,) = report.rows
    for stored, relative in ((packed, row.loss), (plain, row.rtn)):
        power = row.power * row.tokens
        np.testing.assert_allclose(relative * power, loss(stored, kernel(), hessian(x)), rtol=1e-3)
    assert loss(packed, kernel(), hessian(x)) <= loss(plain, kernel(), hessian(x))


@dataclasses.dataclass(frozen=True)
class ErrorDiffusion:
    """Adds the error of each input's weights to those of the next input."""

    def solve(self, problem: ptq.Problem, recipe: jaxq.Recipe) -> ptq.Solution:
        def step(error, row):
            wanted = row[0] + error
            grid_values, values = snap(wanted, row[1], recipe)
            return wanted - values, grid_values

        start = jnp.zeros_like(problem.weight[0])
        _, grid_values = jax.lax.scan(step, start, (problem.weight, problem.levels))
        return ptq.Solution(grid_values, jnp.float32(np.nan), jnp.bool(True))


def test_solver_of_a_user_chooses_the_codes():
    solve = ptq.quantize_weights(lambda w, x: x @ w, "int4_channel", solver=ErrorDiffusion())
    packed, report = solve(kernel(), [np.ones((8, INPUTS), np.float32)])
    assert not report.unsolved
    # Error diffusion makes the sum over the inputs exact to half a step.
    error = np.asarray(packed.dequantize() - kernel()).sum(0)
    assert (np.abs(error) <= 0.5001 * np.asarray(packed.scales)).all()


def test_statistics_do_not_depend_on_the_batches():
    x = samples()
    at_once = ptq.collect(x)
    parts = [ptq.collect(x[:37]), ptq.collect(x[37:200]), ptq.collect(x[200:])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    stacked = jax.vmap(ptq.collect)(x.reshape(3, 100, INPUTS))
    gathered = jax.vmap(lambda s: s.gather("i"), axis_name="i")(stacked)
    expected = ptq.Statistics(
        tokens=len(x),
        total=x.sum(0, dtype=np.float64),
        magnitude=np.abs(x).sum(0, dtype=np.float64),
        square=np.square(x, dtype=np.float64).sum(0),
        amax=np.abs(x).max(0),
        hessian=hessian(x),
    )
    for statistics in (at_once, merged, jax.tree.map(lambda leaf: leaf[0], gathered)):
        for actual, other in zip(
            jax.tree.leaves(statistics), jax.tree.leaves(expected), strict=True
        ):
            scale = np.abs(other).max()
            np.testing.assert_allclose(actual, other, rtol=1e-5, atol=1e-5 * scale)


def test_masked_tokens_do_not_count_even_if_they_are_nan():
    x = samples()
    padded = np.concatenate([x, np.full((20, INPUTS), np.nan, np.float32)])
    masked, plain = ptq.collect(padded, np.arange(320) < 300), ptq.collect(x)
    assert int(masked.tokens) == 300
    bound = 1e-6 * np.abs(plain.hessian).max()  # The order of the sum differs.
    np.testing.assert_allclose(masked.hessian, plain.hessian, rtol=0, atol=bound)
    np.testing.assert_array_equal(masked.amax, plain.amax)


def test_nan_in_data_gives_nan_statistics():
    x = samples()
    x[3, 4] = np.nan
    one = ptq.collect(x, hessian=False)
    assert one.hessian is None
    for statistics in (one, one.merge(ptq.collect(samples(), hessian=False))):
        assert np.flatnonzero(np.isnan(statistics.amax)).tolist() == [4]
