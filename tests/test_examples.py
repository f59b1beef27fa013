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


def test_minilm(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "minilm.png"
    results = load("minilm").main(["--short", "--output", str(picture)])
    int8, int4, int2, tiles = results
    assert int8.weights.cosine > 0.999
    assert int8.activations.cosine > 0.995
    assert int8.weights.rank > 0.999
    for part in ("weights", "activations"):
        cosines = [getattr(r, part).cosine for r in (int8, int4, int2)]
        assert cosines == sorted(cosines, reverse=True)
    assert int4.bits == 5
    assert "30522" in tiles.reason
    assert picture.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    off = float(output.split("met within ")[1].split(".\n")[0])
    assert off <= 0.00005 + 1e-6, "published to four decimals"


def test_sentences():
    encoder = load("encoder")
    tokens, mask = encoder.tokenize(["Caf\u00e9s, unaffable?", "a"])
    # Of the vocabulary: [CLS] cafes , una ##ffa ##ble ? [SEP]
    assert tokens.tolist()[0] == [101, 23812, 1010, 14477, 20961, 3468, 1029, 102]
    assert tokens.tolist()[1] == [101, 1037, 102, 0, 0, 0, 0, 0]
    assert mask.sum(1).tolist() == [8, 3]
    sentences = encoder.sentences()
    assert 60 <= len(set(sentences)) == len(sentences) <= 100


def test_transformer(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "transformer.png"
    results = load("transformer").main(["--short", "--output", str(picture)])
    (full,), (fp8,) = (result.held_out for result in results)
    assert full[0] == pytest.approx(7), "128 bytes, each as likely"
    assert full[-1] < 5.5
    assert fp8[-1] == pytest.approx(full[-1], rel=0.01)
    assert fp8[-1] != full[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "bits a byte" in capsys.readouterr().out


def test_frameworks(capsys):
    results = load("frameworks").main(["--short"])
    for found in results.values():
        (loss, gradient), *others = found.values()
        for own, own_gradient in others:
            assert own == loss, "to the bit"
            np.testing.assert_allclose(own_gradient, gradient, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(found["Flax NNX"][1], gradient)
    assert "Equinox" in capsys.readouterr().out
