"""Posits and takums against the formulas of their definitions."""

import fractions

import jax
import numpy as np
import pytest

import jaxq
from jaxq.analysis import expected_error
from tests import data
from tests.oracle import assert_same

F = fractions.Fraction
NAMED = [f for f in jaxq.formats.FORMATS.values() if isinstance(f, jaxq.TaperedFormat)]
OTHERS = [jaxq.TaperedFormat(f"posit{n}_es{es}", n, es) for n, es in ((5, 0), (6, 3), (11, 1))]
OTHERS += [jaxq.TaperedFormat(f"takum{n}", n, None) for n in (6, 7, 12)]
# One format for each kind of exponent: a posit with es = 0, one with es = 2, and a takum.
WIDEST = [f for f in NAMED if f.name in ("posit8_es0", "posit16", "takum8")]
FEW = data.each([*NAMED, *OTHERS], [*WIDEST, *(f for f in OTHERS if f.bits == 6)])


def value(code: int, bits: int, es: int | None) -> F:
    """Returns the value of a code other than 0 and NaR, by the definition of the format.

    The definition is that of the Posit standard (2022), section 3.2, with es instead of 2, and that
    of linear takums. It evaluates negative codes directly, without negating them.
    """
    string = [(code >> i) & 1 for i in reversed(range(bits))] + [0] * 40
    sign, rest = string[0], string[1:]
    number = lambda digits: int("".join(map(str, digits)) or "0", 2)
    if es is None:
        regime = number(rest[1:4])
        size = regime if rest[0] else 7 - regime
        exponent = number(rest[4 : 4 + size])
        exponent += 2**size - 1 if rest[0] else 1 - 2 ** (size + 1)
        fraction = rest[4 + size :]
        exponent = (1 - 2 * sign) * (exponent + sign)
    else:
        run = next(i for i, bit in enumerate([*rest, 1 - rest[0]]) if bit != rest[0])
        run = min(run, bits - 1)
        r = run - 1 if rest[0] else -run
        body = rest[run + 1 :]
        exponent = (1 - 2 * sign) * (2**es * r + number(body[:es]) + sign)
        fraction = body[es:]
    f = F(number(fraction), 2 ** len(fraction))
    return ((1 - 3 * sign) + f) * (F(2) ** exponent)


@pytest.mark.parametrize("fmt", FEW, ids=lambda fmt: fmt.name)
def test_all_codes_decode_by_the_definition(fmt: jaxq.TaperedFormat):
    codes = np.arange(2**fmt.bits)
    if fmt.bits > 12:
        codes = codes[::7]
    narrow = codes.astype(np.uint8 if fmt.bits <= 8 else np.uint16)
    nar = 2 ** (fmt.bits - 1)
    exact = [F(0) if c in (0, nar) else value(int(c), fmt.bits, fmt.exponent_bits) for c in codes]
    wide = np.array([float(v) for v in exact])
    wide[codes == nar] = np.nan
    with np.errstate(over="ignore"):
        assert_same(jaxq.decode(narrow, fmt), wide.astype(np.float32) + np.float32(0), codes)
    with jax.enable_x64(True):
        assert_same(jaxq.decode(narrow, fmt, dtype="float64"), wide, codes)
    assert set(wide[np.isfinite(wide)]) <= set(fmt.values)


@pytest.mark.parametrize("fmt", FEW, ids=lambda fmt: fmt.name)
def test_rounding_thresholds_are_longer_codes(fmt: jaxq.TaperedFormat):
    """Checks that the threshold between two codes is the code with one more bit, ties to even."""
    top = 2 ** (fmt.bits - 1) - 1
    codes = range(1, top) if fmt.bits <= 12 else [*range(1, top, 97), top - 1]
    float32, numbers, want = np.finfo(np.float32), [], []
    for c in codes:
        threshold = float(value(2 * c + 1, fmt.bits + 1, fmt.exponent_bits))
        if (
            not float(float32.tiny) < threshold < float(float32.max)
            or np.float32(threshold) != threshold
        ):
            continue
        near = np.float32(threshold)
        numbers.append([np.nextafter(near, np.float32(0)), near, np.nextafter(near, float32.max)])
        want.append([c, c + c % 2, c + 1])
    x, want = np.array(numbers), np.array(want)
    np.testing.assert_array_equal(jaxq.encode(x, fmt), want)
    np.testing.assert_array_equal(jaxq.encode(-x, fmt), 2**fmt.bits - want)
    down = jaxq.encode(x, fmt, rounding="toward_zero")
    np.testing.assert_array_equal(down, np.broadcast_to(want[:, :1], x.shape))


@pytest.mark.usefixtures("eager")  # Without jit operations compile once for all.
@pytest.mark.parametrize("fmt", data.each(NAMED, WIDEST[1:]), ids=lambda fmt: fmt.name)
def test_nonzero_numbers_never_become_zero_or_nar(fmt: jaxq.TaperedFormat):
    x = data.random_float32(5000)
    x = x[np.isfinite(x) & (x != 0)]
    nar = 2 ** (fmt.bits - 1)
    for mode in jaxq.numerics.ROUNDINGS:
        key = {"key": jax.random.key(0)} if mode == "stochastic" else {}
        encode = lambda x, mode=mode, key=key: jaxq.encode(x, fmt, rounding=mode, **key)
        codes = data.in_pieces(encode, x)
        assert not np.isin(codes, [0, nar]).any()
    specials = np.float32([0, -0.0, np.inf, -np.inf, np.nan])
    codes = data.in_pieces(lambda x: jaxq.encode(x, fmt), specials)
    np.testing.assert_array_equal(codes, [0, 0, nar, nar, nar])
    saturated = data.in_pieces(lambda x: jaxq.encode(x, fmt, overflow="saturate"), specials)
    np.testing.assert_array_equal(saturated, [0, 0, nar - 1, nar + 1, nar])


def test_posits_match_the_standard():
    """Compares with the Posit standard (2022), table 1, and maxpos of posit<8, 0> and <16, 1>."""
    figures = {"posit8": 2.0**24, "posit16": 2.0**56, "posit8_es0": 64.0, "posit16_es1": 2.0**28}
    for name, largest in figures.items():
        fmt = jaxq.get_format(name)
        assert (fmt.max, fmt.min_positive) == (largest, 1 / largest)
    assert jaxq.get_format("posit8").values[-2:].tolist() == [2.0**20, 2.0**24]


@pytest.mark.parametrize("fmt", data.each(NAMED, WIDEST), ids=lambda fmt: fmt.name)
def test_absmax_scales_use_precise_range(fmt: jaxq.TaperedFormat):
    """Checks on normal numbers that no other scale is much better than that of absmax."""
    x = np.random.default_rng(0).standard_normal((256, 128)).astype(np.float32)
    recipe = jaxq.Recipe(fmt, jaxq.PerChannel((0,)))
    error = lambda y: float(np.square(np.asarray(y) - x).mean())
    ours = error(jaxq.fake_quant(x, recipe))
    assert ours < error(jaxq.cast(x, fmt))
    amax = np.abs(x).max(1, keepdims=True)
    targets = np.array([0.5, 1, 1.4, 2, 2.8, 4, 5.6, 8, 11, 16, 32, 64, fmt.scaled_max * 256], "f4")
    others = [error(jaxq.fake_quant(x, recipe, scale=amax / t)) for t in targets]
    assert ours < 1.06 * min(others)
    theory = expected_error(recipe, x.shape)
    assert abs(ours - theory.mse) < 5 * theory.deviation


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "max"])
@pytest.mark.parametrize("name", ["posit8", "takum8"])
def test_power_of_two_scales_use_precise_range(name: str, rule: str):
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    recipe = jaxq.Recipe(name, jaxq.PerBlock(32), jaxq.MX(rule))
    q = jaxq.quantize(x, recipe)
    top = np.abs(x).max(1) / np.asarray(q.scales)[:, 0]
    useed = 16 if name == "posit8" else 2
    assert (top <= useed * (1.5 if rule == "max" else 1)).all()
    assert (top >= useed / 4).all()
