"""Commands on checkpoints of several files, and conversions for llama.cpp and vLLM."""

import io
import json
import pathlib
import sys

import chex
import numpy as np
import pytest
import safetensors.numpy

import jaxq
from jaxq.cli import main
from jaxq.interop import gguf, load_tensors, open_tensors

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LAYER = "model.layers.0"


def run(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str, str]:
    """Runs a command and returns its exit code, standard output and standard error."""
    code = main([str(argument) for argument in argv])
    return code, *capsys.readouterr()


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    """Writes a Hugging Face model with one layer."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (32, 32),
        f"{LAYER}.self_attn.q_proj.weight": (32, 32),
        f"{LAYER}.mlp.gate_proj.weight": (32, 32),
        f"{LAYER}.mlp.up_proj.weight": (32, 32),
        f"{LAYER}.input_layernorm.weight": (32,),
    }
    half = np.dtype("bfloat16")
    tensors = {n: rng.standard_normal(shape).astype(half) for n, shape in shapes.items()}
    tensors[f"{LAYER}.mlp.up_proj.weight"] *= half.type(4)
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")})
    )
    return folder


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as file:
        return {entry.name: file.read(entry) for entry in file.entries}


def test_a_model_becomes_gguf(capsys, model: pathlib.Path, tmp_path: pathlib.Path):
    tokens, target = tmp_path / "tokens.gguf", tmp_path / "out.gguf"
    words = [str(i) for i in range(32)]
    metadata = {"general.architecture": "llama", "tokenizer.ggml.tokens": words}
    gguf.write(tokens, [], metadata)
    code, _, err = run(capsys, "quantize", model, target, "--recipe", "q8_0", "--tokenizer", tokens)
    assert (code, err) == (0, "")
    before, after = read(model), read(target)
    q = before[f"{LAYER}.self_attn.q_proj.weight"]
    rows = q.reshape(2, 2, 8, 32).swapaxes(1, 2).reshape(32, 32)
    wanted = jaxq.fake_quant(rows, "q8_0")
    np.testing.assert_array_equal(after["blk.0.attn_q.weight"], wanted)
    with open_tensors(target) as file:
        kinds = {entry.name: entry.dtype for entry in file.entries}
        assert file.metadata["llama.block_count"] == 1
        assert file.metadata["tokenizer.ggml.tokens"] == words
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    code, _, err = run(capsys, "quantize", model, target, "--recipe", "q8_0", "--names", "keep")
    assert (code, err) == (0, "")
    assert set(read(target)) == set(before)
    assert "no tokenizer" in run(capsys, "quantize", model, target, "--recipe", "q8_0")[2]


def test_wrong_models_and_tokenizers_are_explained(
    capsys, model: pathlib.Path, tmp_path: pathlib.Path
):
    tokens, target = tmp_path / "tokens.gguf", tmp_path / "out.gguf"
    gguf.write(tokens, [], {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"]})
    none = tmp_path / "none.gguf"
    gguf.write(none, [], {"general.architecture": "llama"})
    for arguments, message in [
        ((target, "--tokenizer", tokens), "it has 1 tokens, but the embedding has 32 rows"),
        ((target, "--tokenizer", none), "no tokenizer.ggml.tokens"),
        ((tmp_path / "o.safetensors", "--tokenizer", tokens), "applies to GGUF only"),
        ((tmp_path / "folder",), "--to must name its kind"),
        ((tmp_path / "folder", "--to", "compressed-tensors"), "no scheme stores int4"),
    ]:
        code, _, err = run(capsys, "quantize", model, *arguments, "--recipe", "q4_0")
        assert code == 2
        assert message in err
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "phi3"}))
    code, _, err = run(capsys, "quantize", model, target, "--recipe", "q4_0")
    assert code == 2
    assert "No architecture is named 'phi3'" in err
    assert "--names keep" in err


def test_a_model_becomes_a_folder_for_vllm(capsys, model: pathlib.Path, tmp_path: pathlib.Path):
    target = tmp_path / "out"
    arguments = ("quantize", model, target, "--to", "compressed-tensors", "--recipe")
    code, out, err = run(capsys, *arguments, "int4_g32")
    assert code == 0, err
    assert "scales in bfloat16" in out
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["ignore"] == ["model.embed_tokens", "lm_head"]
    assert (target / "tokenizer.json").exists()
    params, before = load_tensors(target), load_tensors(model)
    gate = f"{LAYER}.mlp.gate_proj.weight"
    recipe = jaxq.Recipe("int4", jaxq.PerBlock(32), jaxq.recipes.Symmetric(scale_format="bfloat16"))
    wanted = jaxq.fake_quant(before[gate].astype("float32"), recipe)
    np.testing.assert_array_equal(params[gate].dequantize(), wanted)
    chex.assert_type(params["model.embed_tokens.weight"], np.dtype("bfloat16"))
    code, _, err = run(capsys, *arguments, "int4_g32")
    assert code != 0
    assert "exists" in err
    # A quantized model can be quantized again.
    again = tmp_path / "again.safetensors"
    assert run(capsys, "quantize", target, again, "--rules", _rules(tmp_path))[0] == 0
    chex.assert_trees_all_equal(jaxq.load(again)[gate], params[gate])


def test_dynamic_activations_are_written_for_vllm(capsys, model: pathlib.Path, tmp_path):
    target, arguments = tmp_path / "out", ("quantize", model, tmp_path / "out", "--recipe")
    options = ("--to", "compressed-tensors", "--dynamic-activations")
    code, _, err = run(capsys, *arguments, "int8_token", *options)
    assert code == 0, err
    quantization = json.loads((target / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "int-quantized"
    assert quantization["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    code, _, err = run(capsys, *arguments, "int8_token", "--to", "gguf", "--dynamic-activations")
    assert code == 2
    assert "--dynamic-activations applies to" in err


def _rules(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "rules.json"
    path.write_text('[["q_proj", "int8_token"]]')
    return path


def test_fused_weights_get_one_nvfp4_scale(capsys, model: pathlib.Path, tmp_path: pathlib.Path):
    target = tmp_path / "out"
    code, _, err = run(
        capsys, "quantize", model, target, "--to", "compressed-tensors", "--recipe", "nvfp4"
    )
    assert code == 0, err
    with open_tensors(target, raw=True) as file:
        entries = {entry.name: entry for entry in file.entries}
        scales = [
            file.raw(entries[f"{LAYER}.mlp.{n}_proj.weight_global_scale"]) for n in ("gate", "up")
        ]
    assert scales[0] == scales[1]


def test_compare_takes_files_folders_patterns_and_stdin(
    capsys, model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
):
    w = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", w=w)
    options = ("--recipes", "int8_token", "--json")
    pattern = str(tmp_path / "*.npz")
    code, out, err = run(capsys, "compare", model, pattern, tmp_path / "a.npz", *options)
    assert code == 0, err
    names = [row["tensor"] for row in json.loads(out)["tensors"]]
    assert len(names) == 7
    assert names[-2:] == [f"{tmp_path / n}.npz:w" for n in "ab"]
    data = (tmp_path / "a.npz").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, out, _ = run(capsys, "compare", "-", *options)
    assert [row["tensor"] for row in json.loads(out)["tensors"]] == ["w"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    for arguments, message in [
        (("-",), "standard input: the file must be GGUF"),
        (("-", "-"), "only once"),
        ((f"{tmp_path}/*.gguf",), "no file matches"),
    ]:
        code, _, err = run(capsys, "compare", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_inspect_lists_weights_or_their_parts(capsys, tmp_path: pathlib.Path):
    q = jaxq.quantize(np.ones((4, 32), np.float32), "mxfp4")
    jaxq.interop.compressed_tensors.write(tmp_path / "m", {"a.weight": q})
    for more, wanted in (((), ["a.weight"]), (("--raw",), ["a.weight_packed", "a.weight_scale"])):
        code, out, _ = run(capsys, "inspect", tmp_path / "m", "--json", *more)
        assert code == 0
        assert sorted(row["tensor"] for row in json.loads(out)["tensors"]) == wanted
    assert "compressed-tensors mxfp4" in run(capsys, "inspect", tmp_path / "m")[1]


def test_tensors_that_are_empty_or_not_finite_are_written_and_noted(capsys, tmp_path: pathlib.Path):
    w, source = np.ones((4, 64), np.float32), tmp_path / "model.safetensors"
    tensors = {"good": w, "empty": w[:0], "nan": w.copy(), "large": 1e30 * w}
    tensors["nan"][1, 2] = np.nan
    safetensors.numpy.save_file(tensors, source)
    for target in (tmp_path / "out.gguf", tmp_path / "out.safetensors"):
        code, out, _ = run(capsys, "quantize", source, target, "--recipe", "q8_0", "--json")
        assert code == 0
        notes = json.loads(out)["notes"]
        assert notes == {"NaNs or infinities after quantization": ["large", "nan"]}
        assert read(target)["empty" if target.suffix == ".gguf" else "empty/codes"].size == 0


def test_arrays_that_jaxq_has_quantized_are_not_quantized_again(capsys, tmp_path: pathlib.Path):
    w, source = np.ones((4, 64), np.float32), tmp_path / "packed.safetensors"
    jaxq.save(source, {"a": [jaxq.quantize(w, "int4_g32")], "b": w})
    target = tmp_path / "out.safetensors"
    for file in (source, tmp_path):
        code, _, err = run(capsys, "quantize", file, target, "--recipe", "int8_channel")
        assert code == 2
        assert "'a/0/codes' is a part of one. Quantize the original file" in err
    assert not target.exists()
    code, out, _ = run(capsys, "compare", source, "--recipes", "int8_token", "--json")
    assert code == 0
    assert {row["tensor"] for row in json.loads(out)["tensors"]} == {"b"}
    assert "not compared: a/0/scale: part of an array" in run(capsys, "compare", source)[1]
    jaxq.save(source, {"a": w, "b": [w]})
    assert run(capsys, "quantize", source, target, "--recipe", "int8_channel")[0] == 0
