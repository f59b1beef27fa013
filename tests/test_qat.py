"""Functions for quantization-aware training, against NumPy and finite differences."""

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import qat
from tests import data
from tests.oracle import assert_same

# Formats of every family, signed and unsigned, with and without zero, infinities and NaN.
KINDS = ("int2", "int4", "uint4", "ocp_int8", "ternary", "binary", "nf4", "fp4_bnb", "dynamic8")
KINDS += ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e3m4", "float4_e2m1fn", "posit8")


def numbers(shape=(4, 16), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", KINDS)
def test_neighbors_are_adjacent_values_in_every_kind_of_format(name: str):
    fmt = jaxq.Recipe(name).element
    with np.errstate(over="ignore"):
        values = np.unique(fmt.values.astype(np.float32))
    values = values[np.isfinite(values) & ((values == 0) | (np.abs(values) > 1e-37))]
    inner = values[1:-1] if len(values) > 2 else values
    middle = (values[:-1] + values[1:]) / 2
    x = np.concatenate([inner, middle, values[[0, -1]], [values[-1] * 1.5 + 1, values[0] - 1]])
    if isinstance(fmt, jaxq.TaperedFormat):  # Tapered formats never round to 0.
        x = x[(x == 0) | (np.abs(x) > fmt.min_positive)]
    recipe = jaxq.Recipe(fmt)
    neighbors = lambda x: tuple(jaxq.neighbors(x, recipe, scale=1.0))
    below, above = data.in_pieces(neighbors, x.astype(np.float32))
    at = np.clip(np.searchsorted(values, x, side="right"), 1, len(values) - 1)
    assert_same(below + 0, values[at - 1] + 0, x)
    assert_same(above + 0, values[at] + 0, x)


@pytest.mark.parametrize("name", data.each(data.structures(), data.few()))
def test_neighbors_include_quantized_value(name: str):
    x = numbers((128, 256)) * 3
    y = np.asarray(jaxq.fake_quant(x, name))
    below, above = (np.asarray(v) for v in jaxq.neighbors(x, name))
    assert (below < above).all()
    assert ((y == below) | (y == above)).all()
    slack = np.abs(x) * 1e-5 + (0.001 if "q" in name or name == "nf4_dq" else 0)
    inside = (x >= below.min()) & (x <= above.max())
    strict = (below <= x + slack) & (x - slack <= above)
    assert strict[inside].mean() > 0.8  # Ranges differ between blocks.


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dorefa_matches_its_formula(bits: int):
    w = np.float64(numbers())
    bounded = np.tanh(w)
    largest = np.abs(bounded).max()
    steps = 2**bits - 1
    units = (bounded / (2 * largest) + 0.5) * steps
    want = 2 * np.rint(units) / steps - 1
    near = np.abs(units - np.floor(units) - 0.5) > 1e-4
    got = jax.jit(qat.dorefa, static_argnums=1)(jnp.asarray(w, jnp.float32), bits)
    np.testing.assert_allclose(got[near], want[near], atol=1e-6)
    # The gradient is that of the transform, including its maximum, without the rounding.
    c = numbers(seed=3)
    loss = lambda w: jnp.vdot(qat.dorefa(w, bits), c)
    got = jax.jit(jax.grad(loss))(jnp.asarray(w, jnp.float32))
    slope, top = (1 - bounded**2) / largest, np.unravel_index(np.abs(bounded).argmax(), w.shape)
    want = c * slope
    want[top] -= (c * bounded).sum() / largest * slope[top] * np.sign(w[top])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_dorefa_takes_zeros_and_empty_tensors():
    assert_same(qat.unit_tanh(jnp.zeros(3)), np.zeros(3, np.float32))
    chex.assert_tree_all_finite(jax.grad(lambda w: qat.unit_tanh(w).sum())(jnp.zeros(3)))
    chex.assert_shape(qat.dorefa(jnp.zeros((0, 2)), 4), (0, 2))
    chex.assert_type(qat.dorefa(jnp.ones(2, jnp.bfloat16), 4), jnp.bfloat16)


def test_unit_tanh_of_float16_subnormals():
    w = jnp.array([1e-6, -5e-7], jnp.float16)
    want = np.asarray(w, np.float32)
    np.testing.assert_allclose(jax.jit(qat.unit_tanh)(w), want / want[0], rtol=1e-3)


def test_dorefa_with_one_bit_raises():
    with pytest.raises(ValueError, match="`bits` must be an integer from 2 to 16, got 1"):
        qat.dorefa(jnp.ones(2), 1)


def test_uniform_noise_is_bounded_and_unbiased():
    x = jnp.asarray(numbers((40, 1000)))
    recipe = jaxq.Recipe("int8")
    pair = jaxq.neighbors(x, recipe, scale=0.25)
    f = lambda x: qat.uniform_noise(x, *pair, jax.random.key(0))
    error = np.asarray(f(x) - x)
    assert np.abs(error).max() <= 0.125 + 1e-6
    assert abs(error.mean()) < 5 * 0.25 / 12**0.5 / error.size**0.5
    np.testing.assert_allclose(error.var(), 0.25**2 / 12, rtol=0.02)
    assert_same(jax.grad(lambda x: f(x).sum())(x), np.ones(x.shape, np.float32))


def test_adaround_matches_its_formula():
    v = np.float64(numbers((50,)) * 3)
    h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
    a = w = jnp.asarray(v, jnp.float32)
    np.testing.assert_allclose(jax.jit(qat.rectified_sigmoid)(a), h, atol=1e-6)
    inner = (h > 0) & (h < 1)
    slope = np.where(inner, 1.2 * np.exp(-v) / (1 + np.exp(-v)) ** 2, 0)
    got = jax.jit(jax.grad(lambda v: qat.rectified_sigmoid(v).sum()))(a)
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-6)
    penalty = jax.jit(jax.value_and_grad(qat.adaround_penalty))
    for beta in (20.0, 2.0):
        want = (1 - np.abs(2 * h - 1) ** beta).sum()
        value, got = penalty(a, beta)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        want = -2 * beta * np.abs(2 * h - 1) ** (beta - 1) * np.sign(2 * h - 1) * slope
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert qat.adaround_init(w[:1] * 0, w[:1] * 0, w[:1] * 0) == 0
    for name in ("int4_channel", "mxfp4", "nf4_g64"):
        w = numbers((4, 64))
        below, above = jax.device_get(jax.jit(lambda w, name=name: jaxq.neighbors(w, name))(w))
        share = (w - below) / (above - below)
        start = qat.adaround_init(w, below, above)
        clipped = np.clip(w, below, above)
        np.testing.assert_allclose(qat.adaround(start, below, above), clipped, atol=1e-5)
        if name == "int4_channel":  # On an even grid AdaRound starts at the nearest neighbor.
            hard = np.where(np.asarray(start) >= 0, above, below)
            decided = np.abs(share - 0.5) > 1e-3
            assert_same(hard[decided], np.asarray(jaxq.fake_quant(w, name))[decided])


@pytest.mark.parametrize(("grid", "fmt"), [("int", "int{}"), ("float", "float_e4m{}")])
def test_fractional_bits_interpolate_between_formats(grid: str, fmt: str):
    x = jnp.asarray(numbers((64,)) * 3)
    make = {"int": jaxq.int_grid, "float": lambda m: jaxq.float_grid(4, m)}[grid]
    at = lambda n: jaxq.cast(x, make(n), overflow="saturate")

    def named(n: int) -> np.ndarray:
        name = fmt.format(n)
        record = (
            jaxq.IntFormat(name, n)
            if grid == "int"
            else jaxq.FloatFormat(name, 4, n, nan="ieee", inf=True)
        )
        return np.asarray(jaxq.cast(x, record, overflow="saturate"), np.float64)

    f = jax.jit(lambda bits: qat.fractional_bits(at, bits))
    assert_same(f(jnp.float32(3)), np.float32(named(3)))
    want = 0.7 * named(3) + 0.3 * named(4)
    np.testing.assert_allclose(f(jnp.float32(3.3)), want, rtol=1e-5, atol=1e-6)
    _, slope = jax.jvp(f, (jnp.float32(3.3),), (jnp.float32(1),))
    np.testing.assert_allclose(slope, named(4) - named(3), rtol=1e-6)
    differences = (np.float64(f(jnp.float32(3.375))) - np.float64(f(jnp.float32(3.25)))) / 0.125
    np.testing.assert_allclose(slope, differences, atol=1e-4)
    many = jax.vmap(f)(jnp.linspace(2, 5, 7))
    assert_same(many[2], f(jnp.float32(3)))
    # The gradient of the tensor is straight-through.
    whole = jax.grad(lambda x: qat.fractional_bits(lambda n: jaxq.cast(x, make(n)), 3.3).sum())
    np.testing.assert_allclose(whole(x), np.ones(64), rtol=1e-6)


def test_learned_width_converges():
    """Checks that gradient descent on error plus a cost per bit settles at a width."""
    x = jnp.asarray(numbers((256,)))

    def at(n):
        grid = jaxq.int_grid(n, narrow=True)
        scale = jnp.abs(x).max() / grid.max
        return jaxq.cast(x / scale, grid) * scale

    def cost(bits):
        return ((qat.fractional_bits(at, bits) - x) ** 2).mean() + 0.002 * bits

    def step(bits, _):
        return jnp.clip(bits - 5 * jax.grad(cost)(bits), 2, 7.9), None

    settled, _ = jax.lax.scan(step, jnp.float32(7.5), None, length=400)
    assert 3 < settled < 6
