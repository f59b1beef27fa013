"""Tests of the examples with real models, on tiny random models of the same form."""

import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.unoptimized
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch):
    """Lets scripts import each other, and allows dtype promotion, as in a user's program."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    with jax.numpy_dtype_promotion("standard"):
        yield


def load(name: str):
    return sys.modules.get(name) or importlib.import_module(name)


def test_log_mel_spectrogram_equals_that_of_transformers():
    golden = np.load(ROOT / "tests" / "golden" / "whisper_mel.npz")
    own = load("speech").mel(golden["audio"].astype(np.float32) / 2**15, 16_000)
    np.testing.assert_allclose(own[::10], golden["mel"], rtol=0, atol=2e-4)


@pytest.mark.slow
def test_cached_decoding_equals_decoding_of_the_whole_prefix():
    whisper = load("whisper")
    model = whisper.tiny()
    sound = jax.random.normal(jax.random.key(0), (2, 64, 80))
    prompt = jnp.array([[7, 8], [9, 10]])
    suppressed, longest = jnp.array([0, 1]), 8

    @jax.jit
    def both(params):
        encoded = whisper.encode(params, sound, model.heads)
        tokens = whisper.transcribe(params, encoded, prompt, suppressed, model.heads, longest)
        return tokens, whisper.decode(params, encoded, tokens, model.heads)

    tokens, logits = both(model.params)
    np.testing.assert_array_equal(tokens[:, :2], prompt)
    best = logits.at[:, :, suppressed].set(-jnp.inf).argmax(-1)
    np.testing.assert_array_equal(tokens[:, 2:], best[:, 1:-1])
    assert len(np.unique(tokens)) > 4


def test_word_errors_count_changed_missing_and_added_words():
    word_errors = load("model_data").word_errors
    assert word_errors("Measure twice, cut once.", "measure twice cut once") == (0, 4)
    assert word_errors("one two three", "one too three four") == (2, 3)
    assert word_errors("one two three", "three") == (2, 3)
    assert word_errors("one", "") == (1, 1)


def test_noise_is_told_from_differences():
    script = load("model_rows")
    noise = np.random.default_rng(0).normal(size=40)
    weight = [1.0] * 40
    assert script.compared(noise.tolist(), [0.0] * 40, weight) == "="
    assert script.compared((noise + 2).tolist(), noise.tolist(), weight) == "worse"
    assert script.compared((noise - 2).tolist(), noise.tolist(), weight) == "better"
    low, high = script.interval(noise.tolist(), weight)
    width = 2 * 1.96 * noise.std() / 40**0.5
    assert high - low == pytest.approx(width, rel=0.05), "the normal approximation"


def test_sentencepiece_joins_the_pair_with_the_highest_score():
    gemma = load("gemma")
    tokens = ["a", "b", "c", "ab", "bc", "abc", "\N{LOWER ONE EIGHTH BLOCK}", "<0xC3>", "<0xA9>"]
    scores = [0.0, 0.0, 0.0, -2.0, -1.0, -3.0, 0.0, 0.0, 0.0]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert gemma._tokenize("abc ab\N{LATIN SMALL LETTER E WITH ACUTE}", vocabulary, scores) == [
        *(vocabulary[token] for token in ("abc", "\N{LOWER ONE EIGHTH BLOCK}", "ab")),
        *(vocabulary[token] for token in ("<0xC3>", "<0xA9>")),
    ]
    assert gemma._tokenize("bca", vocabulary, scores) == [4, 0]


@pytest.mark.slow
def test_table_continues_from_the_file(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "real_models.svg"
    script = load("real_models")
    rows = script.main(["--short", "--output", str(picture)])
    names = ("SmolLM2", "Whisper")
    assert {(r.model, r.recipe, r.method) for r in rows} == {
        (name, *case) for name in names for case in (("float32", "-"), *script.SHORT)
    }
    errors = {(r.model, r.method): np.mean(r.error) for r in rows}
    for name in names:
        assert errors[name, "-"] == pytest.approx(0, abs=1e-6)
        assert 0 < errors[name, "GPTQ"] < errors[name, "nearest"]
    lines = picture.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line)["row"]["seconds"] for line in lines] == [r.seconds for r in rows]
    picture.with_suffix(".jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = script.main(["--short", "--output", str(picture)])
    assert again[:-1] == rows[:-1], "rows in the file are not measured again"
    assert again[-1].error == rows[-1].error
    assert "<svg" in picture.read_text()
    assert "Quantized layers of real models" in capsys.readouterr().out


@pytest.mark.slow
def test_layers_lose_less_with_finer_scales(tmp_path: pathlib.Path, capsys):
    results = load("layers").main(["--short", "--output", str(tmp_path / "layers.svg")])
    for layers in results:
        assert layers.db["int4_g32"] > layers.db["int4_tensor"] > 10
    assert [len(layers.matrices) for layers in results] == [12, 20]
    assert "int4_g32, dB" in capsys.readouterr().out
