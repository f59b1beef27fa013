"""Recipes with a `BinaryGrid`: many formats in one program, equal to each format bit for bit."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq.recipes import (
    MX,
    SCALINGS,
    Outliers,
    PerBlock,
    PerChannel,
    PerTensor,
    SuperBlocks,
    Symmetric,
)

WIDTHS = ((2, 1), (4, 3), (8, 0))  # The last one exceeds float32's range.
BITS = (3, 8)
RECIPES = {
    "channel": {"granularity": PerChannel(0), "rounding": "toward_zero"},
    "float16_scale": {
        "granularity": PerBlock(8),
        "scaling": Symmetric(scale_format="float16", stored=False),
    },
    "mx": {"granularity": PerBlock(8), "scaling": MX()},
}
SLOW = {
    "tensor": {},
    "tile": {"granularity": PerBlock((2, 8))},
    "reciprocal": {"granularity": PerBlock(8), "scaling": Symmetric(reciprocal=True)},
    "search": {"granularity": PerBlock(8), "scaling": Symmetric(search=(1.0, 0.9, 0.8))},
    "sigmas": {"granularity": PerChannel(0), "scaling": Symmetric(range="sigmas")},
    "outliers": {"granularity": PerChannel(0), "outliers": Outliers(0.05)},
    **{f"mx_{rule}": {"scaling": MX(rule)} for rule in ("ceil", "rceil", "max")},
}


def data() -> np.ndarray:
    """Returns values with outliers, zero blocks, subnormals, a NaN and an infinity."""
    x = np.random.default_rng(0).standard_t(3, (4, 32)).astype(np.float32)
    x[0, :8], x[0, 8:16], x[1, 8:16] = 0, 1e-39, x[1, 8:16] * np.float32(1e30)
    x[2, 3], x[3, 9] = np.nan, -np.inf
    return x


def float_format(e: int, m: int) -> jaxq.FloatFormat:
    return jaxq.FloatFormat(f"e{e}m{m}", e, m, inf=False, nan=None)


@pytest.mark.parametrize(
    "kwargs",
    [
        *(pytest.param(kwargs, id=name) for name, kwargs in RECIPES.items()),
        *(pytest.param(kw, id=name, marks=pytest.mark.slow) for name, kw in SLOW.items()),
    ],
)
def test_traced_widths_equal_each_format(kwargs):
    formats = [*(float_format(e, m) for e, m in WIDTHS), *(jaxq.IntFormat("i", b) for b in BITS)]

    @jax.jit
    def each(x):
        return [jaxq.fake_quant(x, jaxq.Recipe(fmt, **kwargs)) for fmt in formats]

    @jax.jit
    def together(x, exponents, mantissas, widths):
        def of_floats(e, m):
            grid = jaxq.float_grid(e, m, inf=False, nan=False)
            return jaxq.fake_quant(x, jaxq.Recipe(grid, **kwargs))

        def of_integers(b):
            return jaxq.fake_quant(x, jaxq.Recipe(jaxq.int_grid(b), **kwargs))

        return jax.vmap(of_floats)(exponents, mantissas), jax.vmap(of_integers)(widths)

    x, (e, m) = data(), np.array(WIDTHS).T
    found = np.concatenate(together(x, e, m, np.array(BITS)))
    for fmt, y, known in zip(formats, found, each(x), strict=True):
        known = np.asarray(known).view(np.uint32)
        np.testing.assert_array_equal(y.view(np.uint32), known, err_msg=fmt.name)


def test_given_scale_of_traced_grid_has_the_gradient_of_the_format():
    x, scale = data()[1:2, 16:], jnp.float32(0.3)

    def loss(scale, fmt):
        recipe = jaxq.Recipe(fmt, PerTensor(), gradient="lsq")
        return jnp.sum(jaxq.fake_quant(x, recipe, scale=scale) ** 2)

    traced = jax.jit(jax.grad(lambda scale, b: loss(scale, jaxq.int_grid(b))))(scale, 4)
    np.testing.assert_allclose(traced, jax.grad(loss)(scale, "int4"), rtol=1e-6)


def test_other_functions_and_scalings_refuse_grids():
    recipe = jaxq.Recipe(jaxq.int_grid(4))
    assert repr(recipe) == "Recipe(<BinaryGrid>)"
    with pytest.raises(TypeError, match=r"which only fake_quant and neighbors take.*IntFormat"):
        jaxq.quantize(data(), recipe)
    for scaling in SCALINGS:
        if not scaling.takes_grids:
            record = scaling("q4_k") if scaling is SuperBlocks else scaling()
            with pytest.raises(ValueError, match="BinaryGrid"):
                jaxq.Recipe(jaxq.int_grid(4), scaling=record)
    with pytest.raises(ValueError, match=r"fixed widths, got 'BinaryGrid'. Use Symmetric\(\)"):
        jaxq.Recipe(jaxq.int_grid(4), scaling=Symmetric(range="percentile"))
    with pytest.raises(ValueError, match=r"must be scalars.*Use jax.vmap over the widths"):
        jaxq.Recipe(jaxq.int_grid(jnp.arange(3, 5)))
    with pytest.raises(TypeError, match=r"Write jaxq.Recipe\(grid\)"):
        jaxq.fake_quant(data(), jaxq.int_grid(4))
