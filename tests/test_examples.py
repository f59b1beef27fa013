"""The examples run, in their short forms, and show what they claim."""

import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

import jaxq

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch):
    """A script finds its neighbours, and optax multiplies floats by integers."""
    monkeypatch.syspath_prepend(EXAMPLES)
    with jax.numpy_dtype_promotion("standard"):
        yield


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "digits.png"
    results = load("digits").main(["--short", "--output", str(picture)])
    by_label = {r.label: r for r in results}
    base = by_label["float32"].rounded.mean()
    assert base > 0.93
    assert abs(by_label["int8 per tensor"].rounded.mean() - base) < 0.02
    worst = by_label["int2 per channel"]
    assert worst.rounded.mean() < base - 0.3, "rounding alone breaks the network"
    assert worst.trained.mean() > worst.rounded.mean() + 0.2, "training repairs it"
    assert 2 < worst.bits_per_weight < 3
    assert by_label["int8 per tensor"].sqnr_db > 35
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Handwritten digits" in capsys.readouterr().out


def test_learned_steps(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "learned_steps.png"
    results = load("learned_steps").main(["--short", "--output", str(picture)])
    base, rounded, straight, lsq = (r.accuracy.mean() for r in results)
    assert base > 0.95
    assert rounded < base - 0.3, "rounding alone collapses"
    assert lsq > straight + 0.03
    assert lsq > base - 0.05
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "learned steps" in capsys.readouterr().out


def test_estimators(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "estimators.png"
    results = load("estimators").main(["--short", "--output", str(picture)])
    quality = results.quality
    np.testing.assert_allclose(quality["zero"].bias, 1)
    np.testing.assert_allclose(quality["zero"].deviation, 0)
    # With noise beyond a step the staircase is a clip, whose derivative these have.
    assert quality["clipped"].bias[-1] < 0.02 < quality["straight_through"].bias[-1]
    assert quality["dsq"].bias[0] < quality["clipped"].bias[0] < quality["zero"].bias[0]
    accuracy = {name: a.mean() for (name, _), a in results.accuracy.items()}
    assert set(quality) > set(jaxq.gradients.ALL)
    assert accuracy["lsq"] > accuracy["zero"] + 0.05
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "trust_region" in capsys.readouterr().out


def test_adam8bit(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "adam8bit.png"
    results = load("adam8bit").main(["--short", "--output", str(picture)])
    full, dynamic, linear = results
    assert abs(dynamic.losses[:, -1].mean() / full.losses[:, -1].mean() - 1) < 0.1
    assert not linear.losses[:, -1].mean() < 10 * full.losses[:, -1].mean()
    large = 64 * 256 + 256 * 256
    assert full.bytes["first moment"] == 4 * large
    assert dynamic.bytes["first moment"] == large + 4 * large // 256
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Adam's state" in capsys.readouterr().out


def test_bfloat16_updates(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "bfloat16_updates.png"
    results = load("bfloat16_updates").main(["--short", "--output", str(picture)])
    full, nearest, stochastic = results
    learnt = full.losses[:, 0].mean() - full.losses[:, -1].mean()
    assert learnt > 0.5
    assert nearest.losses[:, 0].mean() - nearest.losses[:, -1].mean() < 0.3 * learnt
    np.testing.assert_allclose(stochastic.losses[:, -1], full.losses[:, -1], rtol=0.05)
    assert nearest.still.mean() > 0.9
    assert nearest.moved.mean() < 0.2
    assert abs(stochastic.moved.mean() - 1) < 0.02
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Adam at a rate of" in capsys.readouterr().out
