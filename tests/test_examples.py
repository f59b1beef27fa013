"""Runs the examples in their short forms and checks their results."""

import functools
import importlib.util
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxq
from tests import data

pytestmark = pytest.mark.unoptimized
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch):
    """Lets scripts import each other, and allows dtype promotion, which optax needs."""
    monkeypatch.syspath_prepend(EXAMPLES)
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_default_outputs_are_ignored_by_git():
    """Checks that the default outputs of scripts are untracked files."""
    root = EXAMPLES.parent
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    paths = {load("common").arguments("Draws.", [], "x.svg").output.as_posix()}
    for script in (*EXAMPLES.glob("*.py"), *(root / "benchmarks").glob("*.py")):
        paths |= set(re.findall(r'"((?:out|docs)/[^"]+)"', script.read_text()))
    verify = (root / "tools" / "verify.py").read_text()
    paths |= {"/".join(p) for p in re.findall(r'default=ROOT / "(.+)" / "(.+)"', verify)}
    assert len(paths) >= 5
    done = subprocess.run(
        ["git", "check-ignore", *sorted(paths)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(done.stdout.split()) == paths


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch):
    """Replaces jit: functions are traced but not run, and all of their results are ones."""
    jit = jax.jit

    def traced_jit(function=None, **options):
        if function is None:
            return functools.partial(traced_jit, **options)
        jitted = jit(function, **options)

        def call(*arguments):
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
                return jitted(*arguments)
            shapes = jitted.eval_shape(*arguments)
            return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)

        return call

    monkeypatch.setattr(jax, "jit", traced_jit)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "name",
    ["adam8bit", "bfloat16_updates", data.slow("estimators"), "learned_steps", "transformer"],
)
def test_scripts_run_with_traced_programs(name: str, tmp_path: pathlib.Path, capsys):
    """Checks only that the scripts run; slow tests check their results."""
    picture = tmp_path / "picture.svg"
    assert load(name).main(["--short", "--output", str(picture)])
    assert "<svg" in picture.read_text()
    assert "Picture: " in capsys.readouterr().out


def test_digits_recovers_accuracy_by_training(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "digits.svg"
    results = load("digits").main(["--short", "--output", str(picture)])
    by_label = {r.label: r for r in results}
    base = by_label["float32"].rounded.mean()
    assert base > 0.93
    assert abs(by_label["int8 per tensor"].rounded.mean() - base) < 0.02
    worst = by_label["int2 per channel"]
    assert worst.rounded.mean() < base - 0.3, "rounding alone must reduce the accuracy"
    assert worst.trained.mean() > worst.rounded.mean() + 0.2, "training must recover accuracy"
    assert 2 < worst.bits_per_weight < 3
    assert by_label["int8 per tensor"].sqnr_db > 35
    dark = (tmp_path / "digits-dark.svg").read_text()
    assert "invert" in dark
    assert "invert" not in picture.read_text()
    assert len(dark) > len(picture.read_text())
    assert "Handwritten digits" in capsys.readouterr().out


@pytest.mark.slow
def test_ptq_has_less_loss_than_rounding(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "ptq.svg"
    options = ["--recipes", "int4_g64,raised,mixed", "--output", str(picture)]
    methods = "nearest,GPTQ,AWQ + GPTQ,search + GPTQ,rotation + GPTQ"
    base, *results = load("ptq").main(["--short", "--methods", methods, *options])
    assert base.recipe == "float32"
    by_recipe = {result.recipe: result for result in results}
    assert 3.5 < by_recipe["mixed"].bits <= by_recipe["raised"].bits < 4.5
    by_method = {result.method: result for result in results if result.recipe == "int4_g64"}
    nearest = np.mean(by_method["GPTQ"].nearest)
    assert np.mean(by_method["GPTQ"].losses) < 0.5 * nearest
    assert np.mean(by_method["AWQ + GPTQ"].losses) < nearest
    assert np.mean(by_method["search + GPTQ"].losses) < nearest
    assert "<svg" in picture.read_text()
    assert "layers/down[1]" in capsys.readouterr().out


@pytest.mark.slow
def test_learned_rounding_has_less_error_than_nearest():
    results = load("learned_rounding").main(["--short", "--layers", "all", "--sequences", "2"])
    assert results["SignRound"].error < results["GPTQ"].error < results["nearest"].error
    assert all(result.perplexity is not None for result in results.values())


@pytest.mark.slow
def test_learned_steps_recover_accuracy(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "learned_steps.svg"
    results = load("learned_steps").main(["--short", "--output", str(picture)])
    base, rounded, straight, lsq = (r.accuracy.mean() for r in results)
    assert base > 0.95
    assert rounded < base - 0.3, "rounding alone must reduce the accuracy"
    assert lsq > straight + 0.03
    assert lsq > base - 0.05
    assert "<svg" in picture.read_text()
    assert "learned steps" in capsys.readouterr().out


@pytest.mark.slow
def test_estimators_have_their_known_bias(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "estimators.svg"
    results = load("estimators").main(["--short", "--output", str(picture)])
    quality = results.quality
    np.testing.assert_allclose(quality["zero"].bias, 1)
    np.testing.assert_allclose(quality["zero"].deviation, 0)
    # With much noise the expected quantizer is nearly a clip, whose derivative is "clipped".
    assert quality["clipped"].bias[-1] < 0.02 < quality["straight_through"].bias[-1]
    assert quality["dsq"].bias[0] < quality["clipped"].bias[0] < quality["zero"].bias[0]
    accuracy = {name: a.mean() for (name, _), a in results.accuracy.items()}
    assert set(quality) > set(jaxq.gradients.ESTIMATORS)
    assert accuracy["lsq"] > accuracy["zero"] + 0.05
    assert "<svg" in picture.read_text()
    assert "trust_region" in capsys.readouterr().out


@pytest.mark.slow
def test_adam8bit_learns_like_adam(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "adam8bit.svg"
    results = load("adam8bit").main(["--short", "--output", str(picture)])
    full, dynamic, linear = results
    assert abs(dynamic.losses[:, -1].mean() / full.losses[:, -1].mean() - 1) < 0.1
    assert not linear.losses[:, -1].mean() < 10 * full.losses[:, -1].mean()
    large = 64 * 256 + 256 * 256
    assert full.bytes["first moment"] == 4 * large
    assert dynamic.bytes["first moment"] == large + 4 * large // 256
    assert "<svg" in picture.read_text()
    assert "Adam's state" in capsys.readouterr().out


@pytest.mark.slow
def test_bfloat16_updates_need_stochastic_rounding(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "bfloat16_updates.svg"
    results = load("bfloat16_updates").main(["--short", "--output", str(picture)])
    full, nearest, stochastic = results
    learned = full.losses[:, 0].mean() - full.losses[:, -1].mean()
    assert learned > 0.5
    assert nearest.losses[:, 0].mean() - nearest.losses[:, -1].mean() < 0.3 * learned
    np.testing.assert_allclose(stochastic.losses[:, -1], full.losses[:, -1], rtol=0.05)
    assert nearest.idle.mean() > 0.9
    assert nearest.applied.mean() < 0.2
    assert abs(stochastic.applied.mean() - 1) < 0.02
    assert "<svg" in picture.read_text()
    assert "Adam at a rate of" in capsys.readouterr().out


def test_minilm_keeps_its_embeddings_in_one_recipe(tmp_path: pathlib.Path, capsys, monkeypatch):
    script = load("minilm")
    monkeypatch.setattr(script, "SHORT", (script.SHORT[0], script.SHORT[-1]))
    int8, tiles = script.main(["--short", "--output", str(tmp_path / "minilm.svg")])
    assert int8.weights.cosine > 0.999
    assert int8.activations.cosine > 0.995
    assert int8.weights.rank > 0.999
    assert "30522" in tiles.reason
    output = capsys.readouterr().out
    difference = float(output.split("(four decimals): ")[1].split(".\n")[0])
    assert difference <= 0.00005 + 1e-6, "published similarities have four decimals"


@pytest.mark.slow
def test_minilm_keeps_its_embeddings_in_int8(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "minilm.svg"
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
    assert "<svg" in picture.read_text()
    output = capsys.readouterr().out
    difference = float(output.split("(four decimals): ")[1].split(".\n")[0])
    assert difference <= 0.00005 + 1e-6, "published similarities have four decimals"


def test_tokenizer_gives_the_published_tokens():
    encoder = load("encoder")
    tokens, mask = encoder.tokenize(["Caf\u00e9s, unaffable?", "a"])
    # The tokens are [CLS] cafes , una ##ffa ##ble ? [SEP].
    assert tokens.tolist()[0] == [101, 23812, 1010, 14477, 20961, 3468, 1029, 102]
    assert tokens.tolist()[1] == [101, 1037, 102, 0, 0, 0, 0, 0]
    assert mask.sum(1).tolist() == [8, 3]
    sentences = encoder.sentences()
    assert 60 <= len(set(sentences)) == len(sentences) <= 100


@pytest.mark.slow
def test_transformer_learns(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "transformer.svg"
    results = load("transformer").main(["--short", "--output", str(picture)])
    (full,), (fp8,) = (result.held_out for result in results)
    assert full[0] == pytest.approx(7), "all 128 bytes are equally likely at first"
    assert full[-1] < 5.5
    assert fp8[-1] == pytest.approx(full[-1], rel=0.01)
    assert fp8[-1] != full[-1]
    assert "<svg" in picture.read_text()
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.usefixtures("traced")
def test_frameworks_trace_their_models(capsys):
    assert load("frameworks").main(["--short"])
    assert "Equinox" in capsys.readouterr().out


@pytest.mark.slow
def test_frameworks_give_equal_losses(capsys):
    results = load("frameworks").main(["--short"])
    for found in results.values():
        (loss, gradient), *others = found.values()
        for own, own_gradient in others:
            assert own == loss, "losses must be bitwise equal"
            np.testing.assert_allclose(own_gradient, gradient, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(found["Flax NNX"][1], gradient)
    assert "Equinox" in capsys.readouterr().out


@pytest.mark.slow
def test_error_in_training_ranks_formats_and_mixes_them(tmp_path: pathlib.Path, capsys):
    picture = tmp_path / "error_in_training.svg"
    result = load("error_in_training").main(["--short", "--output", str(picture)])
    assert result.log.steps.tolist() == [0, 2]
    up = {
        name: result.log.values[f"layers/mlp/up/lhs/{name}/sqnr_db"] for name in ("mxfp4", "nvfp4")
    }
    assert up["mxfp4"].shape == (2, 4), "steps and layers"
    assert (up["nvfp4"] > up["mxfp4"]).all()
    ranking = result.ranking
    assert (ranking.squares[:, 0] > ranking.squares[:, 2]).all(), "MXFP4 is worse than MXFP8"
    best, worst = ranking.best(), ranking.worst()
    assert ranking.bits_of(ranking.uniform) == pytest.approx(6.25)
    assert ranking.bits_of(best) < 6.2501
    assert ranking.bits_of(worst) == pytest.approx(6.25)
    assert ranking.error(best) <= ranking.error(ranking.uniform) < ranking.error(worst)
    errors = {outcome.variant.label: outcome.error for outcome in result.outcomes}
    assert errors["bfloat16"] == 0 < errors["best mixture"] < errors["worst mixture"]
    assert "Root of the sum of squares" in capsys.readouterr().out
