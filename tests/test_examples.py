"""The examples run, in their short forms, and show what they claim."""

import importlib.util
import pathlib
import sys

import jax
import pytest

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
