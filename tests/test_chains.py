"""Chains of conversions."""

import ml_dtypes
import numpy as np
import pytest

import jaxq
from tests.oracle import assert_same


def test_every_step_of_a_chain_matches_numpy():
    """Converts float32 to float16, float8 and int8 and back, and checks every step."""
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    steps = ["float16", "float8_e4m3fn", "int8_tensor", "float32"]
    half = x.astype(np.float16).astype(np.float32)
    quarter = half.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.abs(quarter).max() / np.float32(127)
    integers = (np.rint(quarter / scale) + 0.0).astype(np.float32) * scale
    want = [half, quarter, integers, integers]
    for y, w in zip(jaxq.analysis.chain(x, steps), want, strict=True):
        assert_same(y, w)
    rows = jaxq.analysis.chain_table(x, steps).rows
    before = x.astype(np.float64)
    for row, step, w in zip(rows, steps, want, strict=True):
        error = w - x.astype(np.float64)
        assert row.step == step
        assert row.mse == (error**2).mean()
        assert row.max_error == np.abs(error).max()
        assert row.added_mse == ((w - before) ** 2).mean()
        assert row.sqnr_db == pytest.approx(
            10 * np.log10((x.astype(np.float64) ** 2).mean() / row.mse)
        )
        before = w.astype(np.float64)
    assert rows[0].mse < rows[1].mse < rows[2].mse * 1.01


def test_chain_takes_records_and_exact_steps_have_no_error():
    x = np.float32([1.0, 2.0])
    rows = jaxq.analysis.chain_table(x, [jaxq.get_format("float16"), jaxq.Recipe("int8")]).rows
    assert [row.step for row in rows] == ["float16", "int8"]
    assert rows[0].sqnr_db == np.inf
    assert jaxq.analysis.chain(x, []) == []


def test_overflow_gives_infinite_errors():
    x = np.float32([1.0, 1e6])
    first, second = jaxq.analysis.chain_table(x, ["float16", "float32"]).rows
    assert first.mse == first.added_mse == second.mse == np.inf
    assert first.sqnr_db == second.sqnr_db == -np.inf
    assert np.isnan(second.added_mse)


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="Did you mean float16"):
        jaxq.analysis.chain(np.ones(2, np.float32), ["flaot16"])
    with pytest.raises(TypeError, match=r"A recipe or format must be a name.*got list"):
        jaxq.analysis.chain(np.ones(2, np.float32), [["float16"]])
    with pytest.raises(TypeError, match="got int32"):
        jaxq.analysis.chain(np.ones(2, np.int32), ["float16"])
