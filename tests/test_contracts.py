"""What holds for everything in a registry: being listed is being tested."""

import functools
from dataclasses import fields

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import catalog, dot_recipes, presets, rounding
from tests import data
from tests.oracle import assert_same

FORMATS = pytest.mark.parametrize("fmt", catalog.ALL.values(), ids=lambda fmt: fmt.name)
# Without jit every operation is compiled once for all formats. That both ways agree has its test.
EAGER = pytest.mark.usefixtures("eager")
RECIPES = pytest.mark.parametrize("name", presets.ALL)
STRUCTURES = pytest.mark.parametrize("name", data.structures())
SHAPE = (128, 256)  # Every preset's blocks divide it.


def inputs() -> np.ndarray:
    wide = data.random_float32(2000)
    normal = np.random.default_rng(1).standard_normal(2000).astype(np.float32) * 3
    return np.concatenate([data.specials(), wide, normal])[:4016].reshape(8, -1)


def random_argument(mode: str, shape: tuple[int, ...]) -> dict:
    if mode != "stochastic":
        return {}
    bits = np.random.default_rng(2).integers(0, 2**23, shape, dtype=np.uint32)
    return {"random_bits": jnp.asarray(bits)}


@FORMATS
class TestFormats:
    def test_values_are_distinct_finite_sorted_and_counted(self, fmt):
        if fmt.bits > 16:
            with pytest.raises(ValueError, match="at most 16 bits"):
                _ = fmt.values
            return
        values = fmt.values
        assert np.isfinite(values).all()
        assert (np.diff(values) > 0).all()
        assert len(values) == fmt.num_values
        assert (values[0], values[-1]) == (fmt.min, fmt.max)
        assert (values[values > 0].min(initial=fmt.tiny)) == fmt.tiny

    def test_is_static_data(self, fmt):
        assert hash(fmt) == hash(jaxq.get_format(fmt.name))
        assert eval(repr(fmt), dict(vars(jaxq))) == fmt

    @EAGER
    def test_every_value_is_a_fixed_point_with_a_code(self, fmt):
        if fmt.bits > 16:
            return
        with np.errstate(over="ignore"):  # A takum has values beyond float32.
            values = fmt.values.astype(np.float32)
        values = values[values == fmt.values]
        # Two lengths for all formats, so that few operations are compiled again.
        x = np.resize(values, 256 if fmt.bits <= 8 else 2**16)
        assert_same(jaxq.cast(x, fmt), x)
        codes = np.asarray(jaxq.encode(x, fmt))
        assert len(np.unique(codes)) == len(values)
        assert_same(jaxq.decode(codes, fmt), x)

    @EAGER
    def test_all_modes_agree_with_the_codes_and_stay_on_the_grid(self, fmt):
        x = inputs()
        for mode in rounding.ALL:
            random = random_argument(mode, x.shape)
            y = np.asarray(jaxq.cast(x, fmt, rounding=mode, **random))
            codes = jaxq.encode(x, fmt, rounding=mode, **random)
            assert_same(jaxq.decode(codes, fmt), y, x)

    def test_eager_jit_vmap_and_sharded_agree(self, fmt):
        x = inputs()
        f = functools.partial(jaxq.cast, fmt=fmt)
        y = np.asarray(f(x))
        assert_same(jax.jit(f)(x), y, x)
        assert_same(jax.vmap(f)(x), y, x)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        sharded = jax.jit(f)(jax.device_put(x, sharding))
        assert sharded.sharding.is_equivalent_to(sharding, 2)
        assert_same(sharded, y, x)

    @EAGER
    def test_keeps_shape_and_dtype(self, fmt):
        assert jaxq.cast(jnp.zeros((0, 3)), fmt).shape == (0, 3)
        for dtype in ("float16", "bfloat16", "float32"):
            for shape in ((), (0,), (2, 3)):
                x = jax.ShapeDtypeStruct(shape, dtype)
                y = jax.eval_shape(functools.partial(jaxq.cast, fmt=fmt), x)
                assert (y.shape, y.dtype) == (shape, dtype)

    @EAGER
    def test_gradients(self, fmt):
        x = jnp.asarray([[0.3, -0.7, 1e9]])
        f = lambda x: (jaxq.cast(x, fmt) * 2).sum()
        assert_same(jax.grad(f)(x), np.full((1, 3), 2, np.float32))
        assert_same(jax.jvp(f, (x,), (jnp.ones_like(x),))[1], np.float32(6))
        chex.assert_tree_all_finite(jax.hessian(f)(x))


def test_cotangents_are_not_quantized():
    """Differentiating through a pair of conversions quantizes the cotangent; jaxq does not."""
    cotangent = jnp.asarray([1.03, 1e-4, 1000.0])
    x = jnp.ones(3)
    _, pull = jax.vjp(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), x)
    assert np.isnan(pull(cotangent)[0][2])
    _, pull = jax.vjp(lambda x: jaxq.cast(x, "float8_e4m3fn"), x)
    assert_same(pull(cotangent)[0], np.asarray(cotangent))


@RECIPES
class TestRecipes:
    def test_stored_equals_simulated(self, name):
        rng = np.random.default_rng(0)
        ordinary = rng.standard_normal(SHAPE).astype(np.float32)
        bad = ordinary.copy()
        bad[3, 4], bad[5, 6] = np.nan, np.inf
        cases = [ordinary, bad, ordinary * 1e-40, ordinary * 1e37, ordinary * 0, ordinary * 0 - 2.5]
        dtypes = ["float32", "bfloat16"] if name in data.structures() else ["float32"]
        for x in [case.astype(jnp.dtype(dtype)) for dtype in dtypes for case in cases]:
            q = jaxq.quantize(x, name)
            y = jaxq.fake_quant(x, name)
            chex.assert_equal_shape([x, y, q])
            assert y.dtype == x.dtype
            assert_same(y, q.dequantize())

    def test_a_bad_block_harms_no_other(self, name):
        if isinstance(jaxq.get_quantizer(name).second_level, jaxq.DoubleScale):
            return  # There it does: see its documentation and test_blocks.py.
        x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        clean = np.asarray(jaxq.fake_quant(x, name))
        rows, columns = (
            slice(at // b * b, at // b * b + b)
            for at, b in zip((2, 1), jaxq.get_quantizer(name).cut(SHAPE).block, strict=True)
        )
        for bad in (np.nan, np.inf, -np.inf):
            dirty = x.copy()
            dirty[2, 1] = bad
            y = np.array(jaxq.fake_quant(dirty, name))
            assert np.isnan(y[rows, columns]).all()
            y[rows, columns] = clean[rows, columns]
            assert_same(y, clean)

    def test_zeros_stay_zeros(self, name):
        x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        x[:, : SHAPE[1] // 2] = 0
        y = np.asarray(jaxq.fake_quant(x, name))
        if name != "binary":  # It has no zero within a block.
            assert (y[:, : SHAPE[1] // 2] == 0).all()
        assert (np.asarray(jaxq.fake_quant(x * 0, name)) == 0).all()

    def test_bytes_are_those_of_the_codes(self, name):
        q = jaxq.quantize(np.ones(SHAPE, np.float32), name)
        assert q.codes.nbytes == SHAPE[0] * SHAPE[1] * q.recipe.element.bits // 8
        assert 8 * q.nbytes == q.recipe.bits_per_weight(SHAPE) * SHAPE[0] * SHAPE[1]

    def test_json_round_trip(self, name):
        recipe = jaxq.get_quantizer(name)
        again = jaxq.Quantizer.from_json(recipe.to_json())
        assert again == recipe
        assert hash(again) == hash(recipe)

    def test_once_more_changes_nothing(self, name):
        """Not so with a zero point or a mean, as the recipe's documentation says."""
        recipe = jaxq.get_quantizer(name)
        plain = recipe.zero_point is None and recipe.range == "absmax" and not recipe.search
        if not plain or not recipe.stored_scale:
            return
        x = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
        y = jaxq.fake_quant(x, name)
        assert_same(jaxq.fake_quant(y, name), y)


@STRUCTURES
class TestStructures:
    def test_inside_a_larger_computation(self, name):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
        y = jaxq.fake_quant(x, name)

        @jax.jit
        def inside(x):
            before = jax.nn.standardize(x @ x.T)
            y = jaxq.fake_quant(x, name)
            return y, jnp.tanh(y.T @ before)

        assert_same(inside(x)[0], y)
        last, all_ = jax.lax.scan(lambda c, row: (c, jaxq.fake_quant(row, name)), 0, x[None])
        del last
        assert_same(all_[0], y)

    def test_gradient_is_straight_through(self, name):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
        assert_same(jax.grad(lambda x: jaxq.fake_quant(x, name).sum())(x), np.ones(SHAPE, "f4"))

    def test_quantized_is_a_pytree(self, name):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *SHAPE)), jnp.float32)
        q = jaxq.quantize(x[0], name)
        again = jax.jit(lambda q: jax.tree.map(lambda leaf: leaf, q))(q)
        assert_same(again.dequantize(), q.dequantize())
        shaped = jax.eval_shape(lambda x: jaxq.quantize(x, name), x[0])
        assert shaped.shape == SHAPE
        stacked = jax.vmap(lambda x: jaxq.quantize(x, name))(x)
        assert stacked.shape == x.shape
        each = np.stack([jaxq.fake_quant(layer, name) for layer in x])
        assert_same(stacked.dequantize(), each)
        _, scanned = jax.lax.scan(lambda c, layer: (c, layer.dequantize()), 0, stacked)
        assert_same(scanned, each)
        assert_same(stacked[-1].dequantize(), each[-1])

    def test_half_precision_loses_nothing_more(self, name):
        """A float16 tensor of tiny numbers: its scales are not float16's."""
        x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        tiny = (x * np.float32(2.0**-21)).astype(np.float16)
        y = np.asarray(jaxq.fake_quant(tiny, name))
        assert_same(y, jaxq.fake_quant(tiny.astype(np.float32), name).astype(jnp.float16))
        if jaxq.get_quantizer(name).stored_scale:  # GGUF's copy of a tiny scale may be 0.
            assert (y != 0).any()


@pytest.mark.parametrize("name", dot_recipes.ALL)
class TestDotRecipes:
    """That the gradient is the formula, to the bit, `test_dots.py` says of each."""

    SIZE = 128  # Every recipe's blocks divide it.

    def operands(self):
        rng = np.random.default_rng(0)
        return tuple(jnp.asarray(rng.standard_normal((2, self.SIZE, self.SIZE)), jnp.float32))

    def dot(self, name, x, w):
        key = jax.random.key(0) if dot_recipes.ALL[name].draws else None
        return jaxq.einsum("mk,kn->mn", x, w, recipe=name, key=key)

    def test_is_static_data(self, name):
        recipe = jaxq.get_dot_recipe(name)
        assert jaxq.get_dot_recipe(recipe) is recipe
        again = jaxq.DotRecipe(**{f.name: getattr(recipe, f.name) for f in fields(recipe)})
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert eval(repr(recipe), vars(jaxq) | vars(jaxq.second_level)) == recipe

    def test_inference_needs_no_key_and_one_token(self, name):
        x, w = self.operands()
        y = jaxq.einsum("k,kn->n", x[0], w, recipe=name)
        assert y.shape == (self.SIZE,)
        error = jnp.linalg.norm(y - x[0] @ w) / jnp.linalg.norm(x[0] @ w)
        assert 0 < float(error) < 0.25

    def test_gradients_are_near_and_of_every_kind(self, name):
        x, w = self.operands()
        f = lambda x, w: (self.dot(name, x, w) ** 2).sum()
        exact = lambda x, w: ((x @ w) ** 2).sum()

        @jax.jit
        def of(x, w):
            return jax.grad(f, (0, 1))(x, w), jax.jvp(f, (x, w), (x, w))[1]

        gradients, tangent = of(x, w)
        wanted = jax.grad(exact, (0, 1))(x, w)
        for got, want in zip(gradients, wanted, strict=True):
            assert 0 < float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.25
        np.testing.assert_allclose(tangent, 4 * exact(x, w), rtol=0.1)
