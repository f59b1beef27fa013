"""Checkpoints of compressed-tensors: what is written is read again, and valid for the package."""

import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

import jaxq
from jaxq.interop import compressed_tensors as ct
from jaxq.interop import load_tensors
from jaxq.recipes import Affine, PerBlock, PerChannel, PerToken, Recipe, Symmetric

W = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32) * np.float32(0.1)
UNIFORM = {
    "int4": Recipe("int4", PerBlock(32), Symmetric(rule="half", scale_format="bfloat16")),
    "int3": Recipe("uint3", PerBlock(32), Affine(scale_format="float16")),
    "int8": Recipe("int8", PerToken(), Symmetric(rule="half")),
    "channel": Recipe("uint4", PerToken(), Affine()),
    "row": Recipe("int8", PerChannel(-2), Symmetric(rule="half")),
    "row_of_matrix": Recipe("int4", PerChannel(0), Symmetric()),
    "fp8": "fp8_e4m3_token",
    "fp8_tensor": "fp8_e4m3_tensor",
    "tile": Recipe("float8_e4m3fn", PerBlock((32, 32), pad=True)),
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8_e4m3",
}


def written(folder: pathlib.Path) -> dict[str, jaxq.Quantized]:
    """Writes a checkpoint with a weight of every recipe, and returns the weights."""
    params = {f"{name}.weight": jaxq.quantize(W, recipe) for name, recipe in UNIFORM.items()}
    others = {"norm.weight": W[0], "embed.weight": W.astype(jax.numpy.bfloat16)}
    ct.write(folder, {**params, **others}, {"architectures": ["LlamaForCausalLM"]})
    return params


def test_every_scheme_is_read_again_bit_for_bit(tmp_path: pathlib.Path):
    params = written(tmp_path / "model")
    again = load_tensors(tmp_path / "model")
    np.testing.assert_array_equal(again["norm.weight"], W[0])
    for name, q in params.items():
        got = again[name]
        if name == "nvfp4.weight":  # The inverse of a scale is stored.
            np.testing.assert_array_max_ulp(np.asarray(got.dequantize()), q.dequantize(), 2)
            continue
        np.testing.assert_array_equal(got.dequantize(), q.dequantize())
        assert got.recipe.element.bits == q.recipe.element.bits
    chex.assert_trees_all_equal(again["int4.weight"], params["int4.weight"])


def test_weights_of_few_rows_are_read_again(tmp_path: pathlib.Path):
    """Checks one row of tiles, of which the last is partial, and weights without rows."""
    shapes = {
        "tile": (1, 40),
        "int3": (0, 64),
        "int4": (0, 64),
        "channel": (0, 64),
        "mxfp4": (0, 64),
    }
    for name, (rows, columns) in shapes.items():
        params = {"a.weight": jaxq.quantize(W[:rows, :columns], UNIFORM[name])}
        ct.write(tmp_path / name, params)
        again = load_tensors(tmp_path / name)
        chex.assert_trees_all_equal(again, params)


def test_config_describes_groups(tmp_path: pathlib.Path):
    written(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    assert quantization["ignore"] == ["embed", "lm_head"]
    groups = quantization["config_groups"].values()
    assert sorted(name for group in groups for name in group["targets"]) == sorted(UNIFORM)
    one = {"up_proj.weight": jaxq.quantize(W, "fp8_e4m3_token"), "lm_head.weight": W}
    ct.write(tmp_path / "one", one, dynamic_activations=True)
    text = (tmp_path / "one" / "config.json").read_text()
    group = json.loads(text)["quantization_config"]["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["input_activations"]["strategy"] == "token"


def test_large_checkpoints_are_split_into_files(tmp_path: pathlib.Path):
    params = {f"{i}.weight": jaxq.quantize(W + i, UNIFORM["int4"]) for i in range(3)}
    checkpoint = ct.Checkpoint(params, params.__getitem__, {}, max_shard_bytes=5000)
    ct.write_streamed(tmp_path / "model", checkpoint)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 2
    chex.assert_trees_all_equal(load_tensors(tmp_path / "model"), params)


def test_fused_weights_share_the_scale_of_a_tensor(tmp_path: pathlib.Path):
    names = ct.fused_with("a.q_proj.weight")
    weights = [W, 3 * W[:16], W[:16]]
    apart = {name: jaxq.quantize(w, "nvfp4") for name, w in zip(names, weights, strict=True)}
    with pytest.raises(ValueError, match="quantize_together"):
        ct.write(tmp_path / "model", apart)
    assert list(tmp_path.iterdir()) == []
    together = dict(zip(names, ct.quantize_together(weights, "nvfp4"), strict=True))
    ct.write(tmp_path / "model", together)
    again = load_tensors(tmp_path / "model")
    for name, w in zip(names, weights, strict=True):
        assert np.linalg.norm(together[name].dequantize() - w) < 0.2 * np.linalg.norm(w)
        np.testing.assert_array_max_ulp(
            np.asarray(again[name].dequantize()), together[name].dequantize(), 2
        )
    mixed = {names[0]: together[names[0]], names[1]: W[:16]}
    with pytest.raises(ValueError, match="same recipe"):
        ct.write(tmp_path / "other", mixed)


def test_wrong_checkpoints_are_refused(tmp_path: pathlib.Path):
    q = jaxq.quantize(W, "int8_token")
    cases = [
        ({"a": q}, "names that end in .weight"),
        (
            {"a.weight": jaxq.quantize(np.ones((2, 2, 32), np.float32), "mxfp4")},
            "Split a stack of experts",
        ),
        ({"a.weight": jaxq.quantize(W, "nf4_g64")}, "no scheme stores nf4"),
        ({"a.weight": jaxq.quantize(W[:32], "int4_g32", axis=-2)}, "no scheme stores int4"),
        ({"a.weight": jaxq.quantize(W, "int8_tensor")}, "no scheme stores int8"),
        ({"a.weight": jaxq.quantize(W, "int8_channel")}, "no scheme stores int8"),
        (
            {"a.weight": jaxq.quantize(W[None], Recipe("int8", PerChannel(0)))[0]},
            "must have one scale per row",
        ),
    ]
    for params, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            ct.write(tmp_path / "model", params)
        assert len(str(caught.value)) < 350
    with pytest.raises(ValueError, match=r"needs weights of int8 or float8.*'int8_token'"):
        ct.scheme_of(jaxq.get_recipe("nvfp4"), dynamic_activations=True)
    (tmp_path / "file").write_text("old")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="exists"):
            ct.write(path, {"a.weight": q})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_empty_folder_is_filled(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Checks a folder, the current folder, and the target of a link, which must stay."""
    q = jaxq.quantize(W, "int8_token")
    for name in ("folder", "current", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "current")
    for path in (tmp_path / "folder", pathlib.Path(), tmp_path / "link", tmp_path / "new"):
        inode = path.stat().st_ino if path.exists() else None
        ct.write(path, {"a.weight": q}, {"model_type": "llama"})
        assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
        assert inode in (None, path.stat().st_ino)
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(FileExistsError, match="exists"):
        ct.write(pathlib.Path(), {"a.weight": q})


def test_folder_of_a_killed_process_is_no_obstacle(tmp_path: pathlib.Path):
    """Writes to a new folder, and to an empty one, in which the temporary folder is."""
    (tmp_path / "empty").mkdir()
    for path, parent in ((tmp_path / "new", tmp_path), (tmp_path / "empty", tmp_path / "empty")):
        abandoned = parent / f".{path.name}.0123abcd.tmp"
        abandoned.mkdir()
        for file in (abandoned / "model.safetensors", abandoned):
            file.touch()
            os.utime(file, (0, 0))
        ct.write(path, {"a.weight": jaxq.quantize(W, "int8_token")})
        assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
        assert not abandoned.exists()


@pytest.mark.slow
def test_the_package_accepts_what_is_written(tmp_path: pathlib.Path):
    """Needs `JAXQ_COMPRESSED_TENSORS`, a Python with the compressed-tensors package."""
    python = os.environ.get("JAXQ_COMPRESSED_TENSORS", sys.executable)
    if subprocess.run([python, "-c", "import compressed_tensors"], check=False).returncode:
        pytest.skip("compressed-tensors is not installed; see the dependency group `vllm`")
    params = written(tmp_path / "model")
    values = {name: np.asarray(q.dequantize()) for name, q in params.items()}
    np.savez(tmp_path / "values.npz", **values)
    script = pathlib.Path(__file__).parent.parent / "tools" / "check_compressed_tensors.py"
    command = [python, str(script), str(tmp_path / "model"), str(tmp_path / "values.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{len(UNIFORM)} weights agree" in done.stdout
