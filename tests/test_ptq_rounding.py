"""Learned rounding of blocks: SignRound and AdaRound."""

from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests import data
from tests.ptq_data import normal

# The bits of sums do not matter here, and most time goes into compiling.
pytestmark = pytest.mark.unoptimized

INPUTS, OUTPUTS, TOKENS = 16, 16, 40  # Square, so that two blocks share one program.
RECIPE = jaxq.Recipe("int3", jaxq.PerBlock(8))
KEY = jax.random.key(0)


def linear(w, x):
    return x @ w


def learned(method: Any, batches: list, recipe: Any = RECIPE) -> tuple[Any, ptq.LearnedBlock]:
    (packed,), report = ptq.learn_rounding([linear], recipe, method=method)(
        [WEIGHT], batches, key=KEY
    )
    return packed, report.rows[0]


WEIGHT = normal(0, INPUTS, OUTPUTS)
BATCH = normal(1, TOKENS, INPUTS) @ normal(2, INPUTS, INPUTS)
RTN = jaxq.quantize_weights(linear, RECIPE)(WEIGHT, BATCH)


class Reference:
    """The squared error of a linear block in float64, and its best values so far."""

    def __init__(self, x: np.ndarray, y: np.ndarray, values: np.ndarray):
        self.x, self.y = np.float64(x), np.float64(y)
        self.values, self.error = values, np.inf
        self.offer(values)

    def offer(self, values: np.ndarray) -> None:
        error = np.sum((self.x @ values - self.y) ** 2)
        if error < self.error:
            self.values, self.error = values, error

    def gradient(self, values: np.ndarray) -> np.ndarray:
        """Returns the gradient of the squared error, relative to the power of the targets."""
        return 2 * self.x.T @ (self.x @ values - self.y) / np.sum(self.y**2)

    def check(self, packed: jaxq.Quantized, row: ptq.LearnedBlock) -> None:
        np.testing.assert_allclose(packed.dequantize(), self.values, rtol=1e-5, atol=1e-6)
        assert row.loss == pytest.approx(self.error / np.sum(self.y**2), rel=1e-4)
        assert row.loss < row.rtn


def blocked(x: np.ndarray) -> np.ndarray:
    """Returns the sum over each block of 8 inputs."""
    return x.reshape(-1, 8, OUTPUTS).sum(1)


def test_signround_takes_the_steps_of_the_published_algorithm():
    steps, w = 16, WEIGHT.astype(np.float64)
    scale = np.abs(w).reshape(-1, 8, OUTPUTS).max(1) / 3
    offset, factor = np.zeros_like(w), np.ones_like(scale)
    reference = Reference(BATCH, BATCH @ w, np.asarray(RTN.dequantize(), np.float64))
    for step in range(steps + 1):
        s = np.repeat(scale * factor, 8, 0)
        units = w / s + offset
        integers, inside = np.clip(np.round(units), -3, 3), np.abs(units) <= 3.5
        reference.offer(integers * s)
        g = reference.gradient(integers * s)
        # round(w / s + v) s by v and by s, where the gradient passes through the rounding.
        by_offset, by_scale = g * s * inside, g * np.where(inside, integers - w / s, integers)
        rate = (1 - step / steps) / steps
        offset = np.clip(offset - rate * np.sign(by_offset), -0.5, 0.5)
        factor = np.clip(factor - rate * np.sign(blocked(by_scale) * scale), 0, 1)
    packed, row = learned(ptq.SignRound(steps=steps), [BATCH])
    reference.check(packed, row)
    assert np.any(packed.scales != RTN.scales)


@pytest.mark.parametrize("name", ["float4_e2m1fn", data.slow("nf4")])
def test_signround_rounds_to_adjacent_levels_of_nonuniform_grids(name: str):
    recipe = jaxq.Recipe(name)
    grid = np.unique(np.float64(jaxq.formats.get_format(name).values))
    w = np.linspace(grid[0], grid[-1], 238)[:, None].astype(np.float32)
    problem = ptq.RoundingProblem(jnp.asarray(w), jaxq.quantize(w, recipe))
    places = np.searchsorted(grid, np.float64(w), side="right").clip(1, len(grid) - 1)
    below, above = grid[places - 1], grid[places]
    for offset in (-0.5, -0.25, 0.25, 0.5):
        variables = {"offset": jnp.full_like(w, offset)}
        values = ptq.SignRound().rounded(variables, problem, recipe).grid_values
        share = (w - below) / (above - below) + offset
        is_tie = np.abs(share - 0.5) < 1e-5
        np.testing.assert_array_equal(
            np.where(is_tie, 0, values), np.where(is_tie, 0, np.where(share > 0.5, above, below))
        )


def test_adaround_takes_the_steps_of_the_published_algorithm_on_packed_inputs():
    # Scales that are powers of two, so that no weight lies on the grid.
    recipe = jaxq.Recipe("int3", jaxq.PerBlock(8), jaxq.recipes.MX("ceil"))
    steps, rate, strength = 20, 0.2, 0.5
    square, w = normal(7, INPUTS, INPUTS), WEIGHT.astype(np.float64)
    method = ptq.AdaRound(steps, rate, strength)
    (before, packed), report = ptq.learn_rounding([linear, linear], recipe, method=method)(
        [square, WEIGHT], [BATCH], key=KEY
    )
    nearest = jaxq.quantize_weights(linear, recipe)(WEIGHT, BATCH)
    np.testing.assert_array_equal(packed.scales, nearest.scales)
    s = np.repeat(np.asarray(nearest.scales, np.float64), 8, 0)
    below = np.floor(w / s)
    v = -np.log(1.2 / (w / s - below + 0.1) - 1)
    reference = Reference(
        BATCH @ before.dequantize(), BATCH @ square @ w, np.asarray(nearest.dequantize())
    )
    first, second = np.zeros_like(v), np.zeros_like(v)
    for step in range(steps):
        sigmoid = 1 / (1 + np.exp(-v))
        h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
        slope = 1.2 * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        g = reference.gradient((below + h) * s) * s * slope
        if step >= 0.2 * steps:
            beta = 2 + 18 * (steps - step) / (0.8 * steps)
            t = 2 * h - 1
            g -= strength * beta * np.abs(t) ** (beta - 1) * np.sign(t) * 2 * slope / w.size
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        v = v - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        reference.offer((below + (v >= 0)) * s)
    reference.check(packed, report.rows[1])


GRIDS = [
    data.slow(name, method)
    for name in ("nvfp4", "mxfp4", "nf4_g64", "nf4_dq", "uint4_channel", "q4_0", "q4_1")
    for method in ptq.ROUNDING_METHODS
]


@pytest.mark.parametrize(("name", "method"), GRIDS)
def test_learned_weights_stay_on_the_grid_of_their_recipe(name: str, method: str):
    w, x = normal(3, 64, 4), normal(4, 2, 80, 64) + 2 * normal(5, 2, 80, 1)
    how = {"signround": ptq.SignRound(100), "adaround": ptq.AdaRound(500)}[method]
    (packed,), report = ptq.learn_rounding([linear], name, method=how)([w], list(x), key=KEY)
    plain = jaxq.quantize_weights(linear, name)(w, x[0])
    assert jax.tree.structure(packed) == jax.tree.structure(plain)
    for actual, other in zip(packed.second, plain.second, strict=True):
        np.testing.assert_array_equal(actual, other)
    error = x @ (packed.dequantize() - w)
    (row,) = report.rows
    assert row.loss == pytest.approx(float(np.sum(error**2) / np.sum((x @ w) ** 2)), rel=1e-3)
    assert row.loss < row.rtn


def layer(params, x, mask):
    """Computes two products and a residual sum for the tokens that count."""
    h = jax.nn.relu(x @ params["up"].astype(jnp.float32)) @ params["down"].T
    return x + jnp.where(mask[..., None], h, 0), mask


LAYERS = [
    {"up": jnp.asarray(normal(i, 16, 8), jnp.bfloat16), "down": normal(i + 9, 16, 8)}
    for i in range(2)
]


def test_later_blocks_learn_from_the_outputs_of_packed_blocks():
    rules = {"up": jaxq.Recipe("int3", jaxq.PerChannel()), "down": "w8a8"}
    mask = np.arange(6) < 4
    x = np.where(mask[None, None, :, None], normal(5, 5, 2, 6, 16), 100)
    masks = np.broadcast_to(mask, (2, 6))
    batches = [(x[i], masks) for i in range(5)]
    rows = []
    learn = ptq.learn_rounding(
        [layer, layer],
        rules,
        method=ptq.SignRound(steps=25),
        mask=lambda _, mask: mask,
        progress=rows.append,
    )
    packed, report = learn(LAYERS, batches[:3], key=KEY, validation=batches[3:])
    chex.assert_type(packed[0]["up"], jnp.bfloat16)

    def model(params, x):
        return layer(params[1], *layer(params[0], x, masks))[0]

    small = jaxq.quantize_fn(model, rules)

    def error(batches):
        total = power = 0.0
        for batch, _ in batches:
            y, target = np.asarray(small(packed, batch)), np.asarray(model(LAYERS, batch))
            total += np.sum((y - target)[:, mask] ** 2)
            power += np.sum(target[:, mask] ** 2)
        return float(total / power)

    assert report.rows[1].loss == pytest.approx(error(batches[:3]), rel=1e-3)
    assert report.rows[1].validation_loss == pytest.approx(error(batches[3:]), rel=1e-3)
    assert [row.weights for row in report.rows] == [2, 2]
    assert report.rows[1].loss < 0.8 * report.rows[1].rtn
    assert [row.step for row in rows if row.block == 1][:2] == [0, 1]
    assert rows[-1].step == 25
    assert "rtn" in str(report)


@pytest.mark.parametrize("method", [ptq.SignRound(60), data.slow(ptq.AdaRound(60, 0.1))])
@pytest.mark.parametrize(
    ("leaf", "product"),
    [(jnp.bfloat16, jnp.bfloat16), data.slow(jnp.float32, jnp.float16)],
)
def test_products_in_16_bits_learn(method: Any, leaf: Any, product: Any):
    # In float16, the gradients of a loss relative to these outputs would be 0.
    w, x = jnp.asarray(WEIGHT, leaf), 500 * (normal(1, 40, 16) + 3 * normal(2, 40, 1))
    x = jnp.asarray(x, product)
    learn = ptq.learn_rounding([lambda w, x: x @ w.astype(product)], RECIPE, method=method)
    (packed,), report = learn([w], [x], key=KEY)
    (row,) = report.rows
    error, power = (
        np.sum((np.float64(x) @ v) ** 2)
        for v in (np.float64(packed.dequantize()) - np.float64(w), np.float64(w))
    )
    assert row.loss == pytest.approx(error / power, rel=1e-2)
    assert row.loss < 0.5 * row.rtn


@pytest.mark.slow
def test_uses_of_a_weight_outside_products_pass_gradients():
    def block(w, x):
        return 0.01 * (x @ w.astype(jnp.float32)) + jnp.sum(w * 3, axis=0)[None].astype(jnp.float32)

    learn = ptq.learn_rounding([block], RECIPE, method=ptq.SignRound(40))
    _, report = learn([jnp.asarray(WEIGHT, jnp.bfloat16)], [BATCH], key=KEY)
    assert report.rows[0].loss < 0.3 * report.rows[0].rtn


def relative_error(packed: jaxq.Quantized, x: np.ndarray) -> float:
    """Returns the squared error of the outputs of `linear`, relative to their power."""
    error = x @ (packed.dequantize() - WEIGHT)
    return float(np.sum(error**2) / np.sum((x @ WEIGHT) ** 2))


@pytest.mark.parametrize("method", [ptq.SignRound(steps=60), ptq.AdaRound(steps=200)])
def test_validation_error_never_exceeds_that_of_nearest(method: Any):
    # Half as many tokens as inputs for the steps.
    tokens = normal(1, TOKENS, INPUTS).reshape(10, 4, INPUTS)
    few, held_out = tokens[:2], tokens[2:]
    learn = ptq.learn_rounding([linear], RECIPE, method=method)
    (overfitted,), alone = learn([WEIGHT], list(few), key=KEY)
    assert alone.rows[0].validation_loss is None
    (packed,), report = learn([WEIGHT], list(few), key=KEY, validation=iter(held_out))
    (row,) = report.rows
    start = relative_error(RTN, held_out)
    assert relative_error(overfitted, held_out) > 1.2 * start
    assert relative_error(packed, held_out) <= start
    assert row.validation_rtn == pytest.approx(start, rel=1e-4)
    assert row.validation_loss == pytest.approx(relative_error(packed, held_out), rel=1e-4)
    assert row.rtn == alone.rows[0].rtn == pytest.approx(relative_error(RTN, few), rel=1e-4)
    assert row.loss == pytest.approx(relative_error(packed, few), rel=1e-4)
    assert row.step < alone.rows[0].step


def test_steps_do_not_depend_on_validation():
    batches = [BATCH[:20], BATCH[20:]]
    learn = ptq.learn_rounding([linear], RECIPE, method=ptq.AdaRound(steps=40, learning_rate=0.1))
    (alone,), expected = learn([WEIGHT], batches, key=KEY)
    # If the steps used the validation data, 64 times as large, the balance of the loss and the
    # penalty would change.
    larger = [64 * BATCH[:20], 64 * BATCH[20:]]
    (packed,), report = learn([WEIGHT], batches, key=KEY, validation=larger)
    np.testing.assert_array_equal(packed.codes, alone.codes)
    (row,), (other,) = report.rows, expected.rows
    assert (row.step, row.loss) == (other.step, other.loss)
    assert row.validation_loss == pytest.approx(row.loss, rel=1e-5)


@pytest.mark.slow
def test_equal_keys_give_equal_codes():
    batches = np.split(BATCH, 2)
    one, other, third = (
        ptq.learn_rounding([linear], RECIPE, method=ptq.SignRound(steps=16))(
            [WEIGHT], batches, key=jax.random.key(seed)
        )[0][0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.codes, other.codes)
    assert np.any(one.codes != third.codes)


@pytest.mark.slow
def test_equal_blocks_are_compiled_once():
    def compilations(count: int, **validation: Any) -> int:
        compilations = []

        def listen(event: str, _: float, **__: object) -> None:
            compilations.append(event == "/jax/core/compile/backend_compile_duration")

        square = [normal(i, INPUTS, INPUTS) for i in range(count)]
        learn = ptq.learn_rounding([linear] * count, RECIPE, method=ptq.SignRound(steps=3))
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            learn(square, [BATCH], key=KEY, **validation)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        return sum(compilations)

    compilations(2)  # Compiles the small operations too.
    assert compilations(4) == compilations(2) <= 8
    compilations(2, validation=[BATCH])
    assert compilations(4, validation=[BATCH]) == compilations(2)


@pytest.mark.slow
def test_signround_without_scales_keeps_those_of_the_recipe():
    q, _ = learned(ptq.SignRound(steps=16, scales=False), [BATCH])
    np.testing.assert_array_equal(q.scales, RTN.scales)


@pytest.mark.slow
def test_stacked_layers_of_one_block_learn_as_separate_ones():
    def scanned(params, x):
        return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params)[0]

    def unrolled(params, x):
        for w in params:
            x = x + jnp.tanh(x @ w)
        return x

    w, x = normal(0, 2, 8, 8), [normal(1, 40, 8)]
    method = ptq.SignRound(steps=30)
    results = [
        ptq.learn_rounding([fn], RECIPE, method=method)([params], x, key=KEY)[0][0]
        for fn, params in ((scanned, w), (unrolled, list(w)))
    ]
    for i in range(2):
        np.testing.assert_array_equal(results[0].codes[i], results[1][i].codes)


@pytest.mark.slow
def test_learned_rounding_beats_nearest_on_a_transformer_block():
    def attention(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        weights = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / 4)
        x = x + weights @ v @ params["o"]
        return x + jax.nn.gelu(x @ params["up"]) @ params["down"]

    shapes = {"q": (32, 16), "k": (32, 16), "v": (32, 16), "o": (16, 32)}
    shapes |= {"up": (32, 64), "down": (64, 32)}
    params = {n: normal(i, *s) / np.sqrt(s[0]) for i, (n, s) in enumerate(shapes.items())}
    mixing = normal(9, 32, 32) / 6
    batches = [normal(10 + i, 8, 16, 32) @ mixing for i in range(8)]
    for method in (ptq.SignRound(), ptq.AdaRound()):
        learn = ptq.learn_rounding([attention], RECIPE, method=method)
        _, report = learn([params], batches, key=KEY)
        assert report.rows[0].loss < 0.5 * report.rows[0].rtn


def validated(validation: Any) -> Any:
    return ptq.learn_rounding([linear], RECIPE)([WEIGHT], [BATCH], key=KEY, validation=validation)


def test_weights_that_are_not_stored_are_reported():
    def blocks(params, x):
        return x @ (params["w"] * params["g"][:, None])

    learn = ptq.learn_rounding([blocks], "int4_channel", method=ptq.SignRound(steps=2))
    _, report = learn([{"w": WEIGHT, "g": normal(6, INPUTS)}], [BATCH], key=KEY)
    assert report.rows[0].weights == 0
    assert "computed from" in report.rows[0].note


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ptq.SignRound(steps=0), "`steps` must be an integer of at least 1"),
        (lambda: ptq.AdaRound(warm_up=1), "`warm_up` must be a number in"),
        (lambda: ptq.learn_rounding([], RECIPE), "`blocks` must be a sequence"),
        (lambda: ptq.get_rounding_method("adarond"), "adaround"),
        (lambda: learned("signround", []), "`batches` must contain at least one batch"),
        (lambda: validated([]), "`validation` must contain at least one batch"),
        (lambda: validated(BATCH), "`validation` must be a sequence of batches"),
        (lambda: validated([BATCH, BATCH[1:]]), "batch 1 of `validation` differs from the first"),
        (lambda: validated([BATCH * np.nan]), "those of block 0 contain a NaN"),
        (lambda: learned("signround", [BATCH], {"1/w": RECIPE}), "matches no weight"),
        (lambda: learned("signround", [BATCH * np.nan]), "those of block 0 contain a NaN"),
        (
            lambda: learned("adaround", [BATCH], jaxq.Recipe("int4", rounding="stochastic")),
            "must not use stochastic rounding",
        ),
        (
            lambda: ptq.learn_rounding([linear], RECIPE)(WEIGHT, [BATCH], key=KEY),
            "`params` must be a list with one pytree for each of the 1 blocks",
        ),
    ],
)
def test_bad_calls_are_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
