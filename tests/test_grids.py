"""Grids with traced widths, compared with named formats in one compilation."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from tests import data
from tests.oracle import assert_same

PAIRS = [(e, m) for e in range(2, 9) for m in range(1, 15)]


@pytest.mark.parametrize(
    ("inf", "nan", "rounding"),
    [
        (True, True, "up"),
        (False, True, "to_odd"),
        (False, False, "nearest_even"),
        *(data.slow(True, True, rounding) for rounding in ("nearest_even", "to_odd")),
        *(data.slow(False, True, rounding) for rounding in ("nearest_even", "up")),
        *(data.slow(False, False, rounding) for rounding in ("up", "to_odd")),
    ],
)
def test_traced_float_widths_equal_each_format(inf: bool, nan: bool, rounding: str):
    x = np.concatenate([data.specials(), data.random_float32(3000)])
    compiled = jax.jit(
        jax.vmap(
            lambda e, m: jaxq.cast(x, jaxq.float_grid(e, m, inf=inf, nan=nan), rounding=rounding)
        )
    )
    widths = jnp.asarray(PAIRS, jnp.int32)
    results = np.asarray(compiled(widths[:, 0], widths[:, 1]))
    rule = "ieee" if inf else "all_ones" if nan else None
    for (e, m), got in list(zip(PAIRS, results, strict=True))[::3]:
        fmt = jaxq.FloatFormat("traced", e, m, inf=inf, nan=rule)
        with jax.disable_jit():  # Without jit each operation compiles once for all formats.
            want = jaxq.cast(x, fmt, rounding=rounding)
        assert_same(got, want, x)


def test_traced_formats_without_mantissa_equal_each_format():
    x = np.concatenate([data.specials(), data.random_float32(3000)])
    got = jax.vmap(lambda e: jaxq.cast(x, jaxq.float_grid(e, 0, inf=False, nan=False)))(
        jnp.arange(2, 9)
    )
    for e, row in zip(range(2, 9), got, strict=True):
        assert_same(row, jaxq.cast(x, jaxq.FloatFormat("traced", e, 0)), x)


@pytest.mark.parametrize("signed", [True, False])
def test_traced_integer_widths_equal_each_format(signed: bool):
    x = np.concatenate([data.specials(), data.random_float32(3000)])
    x = np.concatenate([x, np.random.default_rng(0).uniform(-70000, 70000, 3000).astype("f4")])
    widths = jnp.arange(2, 17)
    compiled = jax.jit(jax.vmap(lambda b: jaxq.cast(x, jaxq.int_grid(b, signed=signed))))
    for bits, row in zip(range(2, 17), compiled(widths), strict=True):
        assert_same(row, jaxq.cast(x, jaxq.IntFormat("traced", bits, signed=signed)), x)


def test_error_falls_with_mantissa_bits_inside_map():
    x = jnp.linspace(-2, 2, 50)
    errors = jax.lax.map(
        lambda m: ((jaxq.cast(x, jaxq.float_grid(5, m)) - x) ** 2).mean(), jnp.arange(1, 10)
    )
    assert (np.diff(errors) < 0).all()
