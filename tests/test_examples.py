"""The examples run, in their short forms, and show what they claim."""

import importlib.util
import pathlib
import sys

import jax
import numpy as np

import jaxq

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


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
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules multiply float by int.
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
    load("digits")
    with jax.numpy_dtype_promotion("standard"):
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
    load("digits")
    load("learned_steps")
    with jax.numpy_dtype_promotion("standard"):
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
