"""Properties of casts for random formats and inputs."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxq
from tests.oracle import assert_same, same

MODES = ["nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd"]
SYMMETRIC = ("nearest_even", "nearest_away", "toward_zero", "to_odd")


@st.composite
def floats(draw: st.DrawFn) -> jaxq.FloatFormat:
    exponent_bits = draw(st.integers(1, 8))
    nan, inf = draw(
        st.sampled_from(
            [("ieee", True), ("all_ones", False), ("all_ones", True)] + [(None, False)] * 2
        )
    )
    signed = draw(st.booleans())
    if signed and not inf and draw(st.booleans()):
        nan = "negative_zero"
    mantissa_bits = draw(st.integers(0 if nan in (None, "negative_zero") else 2, 6))
    bias = draw(st.one_of(st.none(), st.integers(-20, 140)))
    subnormals = mantissa_bits == 0 or draw(st.booleans())
    return jaxq.FloatFormat(
        "drawn",
        exponent_bits,
        mantissa_bits,
        bias=bias,
        signed=signed,
        inf=inf,
        nan=nan,
        subnormals=subnormals,
    )


@st.composite
def integers(draw: st.DrawFn) -> jaxq.IntFormat:
    bits, signed = draw(st.integers(2, 16)), draw(st.booleans())
    narrow = signed and draw(st.booleans())
    fraction_bits = draw(st.integers(-16, 16))
    return jaxq.IntFormat("drawn", bits, signed=signed, narrow=narrow, fraction_bits=fraction_bits)


@st.composite
def codebooks(draw: st.DrawFn) -> jaxq.CodebookFormat:
    levels = st.integers(-1000, 1000).map(lambda n: n / 64)
    found = draw(st.lists(levels, min_size=2, max_size=16, unique=True))
    return jaxq.CodebookFormat("drawn", tuple(found), ties=draw(st.sampled_from(["down", "up"])))


@st.composite
def tapered(draw: st.DrawFn) -> jaxq.TaperedFormat:
    return jaxq.TaperedFormat("drawn", draw(st.integers(5, 16)), draw(st.integers(0, 3)))


FORMATS = st.one_of(floats(), integers(), codebooks(), tapered())


def near(fmt: jaxq.Format, seed: int) -> np.ndarray:
    """Returns sorted numbers near values, midpoints and ends of a format, and random numbers."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        values = np.float32(rng.choice(fmt.values, min(40, len(fmt.values)), replace=False))
    values = values[np.isfinite(values)]
    middles = values[:-1] / 2 + values[1:] / 2
    exact = np.concatenate([values, middles, np.float32([0.0, -0.0, 1e-45, 3e38, -3e38])])
    bits = rng.integers(0, 2**32, 50, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        normal = np.float32(rng.standard_normal(50)) * np.float32(min(fmt.max, 1e38))
        neighbors = [np.nextafter(exact, np.float32(end)) for end in (np.inf, -np.inf)]
        x = np.concatenate([exact, *neighbors, bits, normal]).astype(np.float32)
    # Always 400 numbers, so that no operation is compiled again.
    return np.sort(np.resize(x[np.isfinite(x)], 400))


def assert_projection(fmt: jaxq.Format, mode: str, seed: int) -> None:
    x = near(fmt, seed)
    with jax.disable_jit():  # Without jit each operation compiles once for all formats.
        y = np.asarray(jaxq.cast(x, fmt, rounding=mode, overflow="saturate"))
        again = np.asarray(jaxq.cast(y, fmt, rounding=mode, overflow="saturate"))
        codes = np.asarray(jaxq.encode(x, fmt, rounding=mode, overflow="saturate"))
        decoded = np.asarray(jaxq.decode(codes, fmt))
        mirrored = np.asarray(jaxq.cast(-x, fmt, rounding=mode, overflow="saturate"))

    assert_same(again, y, x)  # Idempotent.
    assert (y[1:] >= y[:-1]).all()  # Monotone.
    finite = np.isfinite(y)
    assert same(decoded, y)[finite].all()  # Agrees with its codes.

    if isinstance(fmt, jaxq.TaperedFormat):
        return  # Tapered formats round the code instead of the value.
    # The result is one of the two neighboring values, and the nearer one in nearest modes.
    grid = fmt.values
    wide, result = x.astype(np.float64), y.astype(np.float64)
    clipped = np.clip(wide, grid[0], grid[-1])
    place = np.clip(np.searchsorted(grid, clipped, side="right") - 1, 0, len(grid) - 2)
    low, high = grid[place], grid[place + 1]
    with np.errstate(over="ignore"):
        low32, high32 = low.astype(np.float32), high.astype(np.float32)
    assert ((y == low32) | (y == high32) | ((clipped == high) & (y == high32))).all()
    if mode.startswith("nearest"):
        error = np.abs(result - clipped)
        assert (error <= (high - low) / 2)[np.isfinite(low32) & np.isfinite(high32)].all()

    # The cast is an odd function if the grid and the mode are symmetric.
    if mode in SYMMETRIC and not isinstance(fmt, jaxq.CodebookFormat) and fmt.min == -fmt.max:
        assert_same(mirrored + np.float32(0), -y + np.float32(0), x)


def examples(count: int):
    """Returns a decorator that runs a test on `count` random formats with a fixed seed."""
    fixed = settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=tuple(HealthCheck),
    )
    drawn = given(fmt=FORMATS, mode=st.sampled_from(MODES), seed=st.integers(0, 2**32 - 1))
    return lambda test: fixed(drawn(test))


@examples(30)
def test_cast_is_monotone_projection(fmt: jaxq.Format, mode: str, seed: int):
    assert_projection(fmt, mode, seed)


@pytest.mark.slow
@examples(200)
def test_cast_is_monotone_projection_for_many_formats(fmt: jaxq.Format, mode: str, seed: int):
    assert_projection(fmt, mode, seed)
