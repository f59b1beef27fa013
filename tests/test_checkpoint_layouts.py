"""Weights in the layouts of other programs: values, recipes and files that are refused."""

import json
import pathlib
import tracemalloc
from collections.abc import Mapping
from typing import Any

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jaxq
from jaxq.interop import FileError, load_tensors, open_tensors
from jaxq.recipes import Affine, PerBlock, Recipe
from tests import data

GOLDEN = pathlib.Path(__file__).parent / "golden" / "checkpoints.safetensors"
CONFIGS: dict[str, str] = safetensors.safe_open(GOLDEN, "np").metadata()

# The recipes that weights are read as; None for float32 values.
RECIPES = {
    "ct_int4": "int4_g32",
    "ct_int3_zero": "uint3_g32",
    "ct_int8": "int8_token",
    "ct_int8_plain": "int8_token",
    "ct_fp8_tensor": "fp8_e4m3_tensor",
    "ct_fp8_channel": "float8_e4m3fn_token",
    "ct_fp8_block": "float8_e4m3fn_tile16x32",
    "ct_nvfp4": "float4_e2m1fn_g16",
    "ct_mxfp4": "mxfp4",
    "ct_mxfp8": "mxfp8_e4m3",
    "awq": "uint4_g32",
    "gpt_oss": "mxfp4",
    "bnb_nf4": "nf4_g64",
    "bnb_nf4_nested": "nf4_dq",
    "bnb_fp4": "fp4_bnb_g64",
    "bnb_nf4_rows": None,
    "bnb_int8": "int8_token",
    "mlx_3": "uint3_g64",
    "mlx_4": "uint4_g64",
    "mlx_6": None,
    "mlx_mxfp4": "mxfp4",
    "mlx_mxfp8": "mxfp8_e4m3",
    "mlx_nvfp4": "float4_e2m1fn_g16",
}


@pytest.fixture(scope="module")
def golden() -> Mapping[str, np.ndarray]:
    with open_tensors(GOLDEN, raw=True) as file:
        return {entry.name: file.raw(entry) for entry in file.entries}


def written(
    folder: pathlib.Path, tensors: Mapping[str, Any], config: object = None
) -> pathlib.Path:
    """Writes a checkpoint, and returns its folder."""
    folder.mkdir(exist_ok=True)
    arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
    return folder


def method(name: str, **fields: object) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **fields}}


@pytest.mark.parametrize("case", RECIPES)
def test_values_match_the_library_that_wrote_them(case: str, golden, tmp_path: pathlib.Path):
    mine = {n.split("|")[1]: x for n, x in golden.items() if n.split("|")[0] == case}
    (name,) = (n[1:] for n in mine if n.startswith("="))
    value = mine.pop(f"={name}")
    folder = written(tmp_path / case, mine, CONFIGS[case])
    with open_tensors(folder) as file:
        entry = next(entry for entry in file.entries if entry.name == name)
        assert entry.shape == value.shape
        assert entry.nbytes == sum(part.nbytes for part in entry.layout.parts.values())
        got, q = file.read(entry), file.quantized(entry)
    chex.assert_type(got, np.float32)
    if case == "bnb_int8":  # bitsandbytes multiplies by 1 / 127 after the scale.
        np.testing.assert_array_max_ulp(got, value, 2)
    else:
        np.testing.assert_array_equal(got, value)
    if RECIPES[case] is None:
        assert isinstance(q, np.ndarray)
        assert entry.dtype.endswith("float32 values")
    else:
        assert repr(q).split("[")[0].split("(")[0] == RECIPES[case]
        chex.assert_trees_all_equal(q.dequantize(), got)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Returns the int32 words of codes along the first axis, by the definition of GPTQ."""
    result = np.zeros((codes.shape[0] * bits // 32, codes.shape[1]), np.uint64)
    for i, row in enumerate(codes.astype(np.uint64)):
        word, shift = divmod(i * bits, 32)
        result[word] |= row << np.uint64(shift) & np.uint64(2**32 - 1)
        if shift + bits > 32:
            result[word + 1] |= row >> np.uint64(32 - shift)
    return result.astype(np.uint32).view(np.int32)


def gptq(bits: int, plus: int, order: np.ndarray | None = None) -> tuple[dict, np.ndarray]:
    """Returns the tensors of a GPTQ weight of 64 inputs and 32 outputs, and its values."""
    rng = np.random.default_rng(bits)
    codes, zeros = (rng.integers(0, 2**bits, shape) for shape in ((64, 32), (2, 32)))
    scales = (rng.random((2, 32)) * 0.01 + 1e-3).astype(np.float16)
    index = np.arange(64) // 32 if order is None else order
    value = (codes - zeros[index]).astype(np.float32) * scales[index].astype(np.float32)
    tensors = {
        "a.qweight": words(codes, bits),
        "a.qzeros": words(((zeros - plus) % 2**bits).T, bits).T,
        "a.scales": scales,
        "a.g_idx": index.astype(np.int32),
    }
    return tensors, value.T


@pytest.mark.parametrize(("bits", "version"), [(4, "gptq"), (3, "gptq_v2"), (8, None), (2, "gptq")])
def test_gptq_versions_differ_in_their_zero_points(bits, version, tmp_path: pathlib.Path):
    tensors, value = gptq(bits, 0 if version == "gptq_v2" else 1)
    config = method("gptq", bits=bits, desc_act=bits == 4)
    if version:
        config["quantization_config"]["checkpoint_format"] = version
    params = load_tensors(written(tmp_path, tensors, config))
    wanted = Recipe(f"uint{bits}", PerBlock(32), Affine(scale_format="float16"))
    assert params["a.weight"].recipe == wanted
    np.testing.assert_array_equal(params["a.weight"].dequantize(), value)


def test_gptq_activation_order_is_dequantized(tmp_path: pathlib.Path):
    order = np.random.default_rng(0).permutation(64) // 32
    tensors, value = gptq(4, 1, order)
    folder = written(tmp_path, tensors, method("gptq", bits=4, desc_act=True))
    np.testing.assert_array_equal(load_tensors(folder)["a.weight"], value)
    with open_tensors(folder) as file:
        assert file.entries[0].dtype == "gptq float32 values"
        assert "activation order" in file.entries[0].layout.note
    (folder / "config.json").write_text(json.dumps(method("gptq", desc_act=False)))
    with pytest.raises(FileError, match="g_idx must be in order"):
        load_tensors(folder)
    (folder / "config.json").unlink()
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    np.testing.assert_array_equal(load_tensors(folder)["a.weight"], value)


@pytest.mark.parametrize("size", [48, 60])
def test_last_group_of_gptq_may_be_shorter(size: int, tmp_path: pathlib.Path):
    tensors, value = gptq(4, 1, np.arange(64) // size)
    config = method("gptq", bits=4, group_size=size, desc_act=False)
    with open_tensors(written(tmp_path, tensors, config)) as file:
        np.testing.assert_array_equal(file.read(file.entries[0]), value)
        assert "the last of its groups" in file.entries[0].layout.note
    del tensors["a.g_idx"]
    with pytest.raises(FileError, match=r"'a.g_idx' is missing"):
        load_tensors(written(tmp_path, tensors, config))


def nvfp4(rows: int, columns: int) -> tuple[dict, np.ndarray]:
    """Returns the tensors of an NVFP4 weight of ModelOpt, and its values."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (rows, columns))
    scale = rng.random((rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
    second = np.float32(0.0123)
    levels = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    elements = levels[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))
    steps = scale.astype(np.float32) * second
    data = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    tensors = {"a.weight": data, "a.weight_scale": scale, "a.weight_scale_2": second}
    return tensors, elements * np.repeat(steps, 16, axis=1)


def test_modelopt_nvfp4_and_fp8(tmp_path: pathlib.Path):
    tensors, value = nvfp4(4, 64)
    narrow = np.float32([[1, -448], [0.5, 3]]).astype(ml_dtypes.float8_e4m3fn)
    tensors |= {"b.weight": narrow, "b.weight_scale": np.float32(0.3)}
    tensors |= {"norm.weight": np.ones(4, np.float32), "a.input_scale": np.float32(1)}
    folder = written(tmp_path, tensors)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    params = load_tensors(folder)
    assert set(params) == {"a.weight", "b.weight", "norm.weight", "a.input_scale"}
    assert params["a.weight"].recipe == jaxq.get_recipe("nvfp4")
    np.testing.assert_array_equal(params["a.weight"].dequantize(), value)
    exact = narrow.astype(np.float32) * np.float32(0.3)
    np.testing.assert_array_equal(params["b.weight"].dequantize(), exact)
    chex.assert_type(params["norm.weight"], np.float32)


def test_deepseek_tiles_may_be_partial_at_the_edges(tmp_path: pathlib.Path):
    """Reads the method from the names of tensors, and from a configuration with other blocks."""
    rng = np.random.default_rng(0)
    q = (rng.standard_normal((130, 200)) * 100).astype(ml_dtypes.float8_e4m3fn)
    for block, config in ((128, None), (64, method("fp8", weight_block_size=[64, 64]))):
        counts = [-(-n // block) for n in q.shape]
        scale = rng.random(counts).astype(np.float32)
        folder = written(
            tmp_path / str(block), {"a.weight": q, "a.weight_scale_inv": scale}, config
        )
        each = np.repeat(np.repeat(scale, block, 0), block, 1)[:130, :200]
        got = load_tensors(folder)["a.weight"]
        np.testing.assert_array_equal(got.dequantize(), q.astype(np.float32) * each)
        assert got.recipe.granularity == PerBlock((block, block), pad=True)


def test_raw_lists_tensors_as_stored(tmp_path: pathlib.Path):
    tensors, _ = gptq(4, 1)
    folder = written(tmp_path, tensors)
    with pytest.raises(FileError, match=r"no config.json.*raw=True"), open_tensors(folder):
        pass
    with open_tensors(folder, raw=True) as file:
        assert {entry.name for entry in file.entries} == set(tensors)
    (folder / "config.json").write_text(json.dumps(method("gptq")))
    with open_tensors(folder / "model.safetensors") as file:  # A single file finds its folder's.
        assert [entry.name for entry in file.entries] == ["a.weight"]


def test_weights_of_a_folder_are_read_in_parts(tmp_path: pathlib.Path):
    """Reads a second weight whose parts are in two files and whose codes have its name."""
    tensors, value = gptq(4, 1)
    with open_tensors(written(tmp_path / "gptq", tensors, method("gptq"))) as file:
        parts = list(file.stream(file.entries[0], 1000))
    np.testing.assert_array_equal(np.concatenate(parts), value.reshape(-1))
    folder, codes = tmp_path / "fp8", np.ones((128, 128), ml_dtypes.float8_e4m3fn)
    written(folder, {"a.weight": codes})
    scale = {"a.weight_scale_inv": np.full((1, 1), 3, np.float32)}
    safetensors.numpy.save_file(scale, folder / "scales.safetensors")
    with open_tensors(folder) as file:
        parts = list(file.stream(file.entries[0], 10000))
    np.testing.assert_array_equal(np.concatenate(parts), np.full(128 * 128, 3, np.float32))


def test_load_tensors_places_arrays_and_keeps_others(tmp_path: pathlib.Path):
    tensors, value = gptq(4, 1)
    tensors |= {"b": np.arange(3), "c": np.ones((2, 2), ml_dtypes.bfloat16)}
    device = jax.devices()[0]
    params = load_tensors(written(tmp_path, tensors, method("gptq")), sharding=device)
    assert params["b"].dtype == np.int64
    assert params["c"].dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(jaxq.dequantize_tree(params)["a.weight"], value)


FP8 = np.zeros((4, 8), ml_dtypes.float8_e4m3fn)
INT = np.zeros((4, 8), np.int32)
ONE, TWO = np.float32(1), np.zeros((4, 1), np.float32)
BYTES = np.zeros((4, 8), np.uint8)


def state(text: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a 4-bit weight of bitsandbytes with a description."""
    return {
        "a.weight": np.zeros((32, 1), np.uint8),
        "a.weight.absmax": np.ones(1, np.float32),
        "a.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(text.encode(), np.uint8),
    }


def packed(shape: object, words: np.ndarray = INT) -> dict[str, np.ndarray]:
    parts = {"a.weight_packed": words, "a.weight_scale": np.ones((4, 2), np.float32)}
    return {**parts, "a.weight_shape": np.array(shape, np.int64)}


CT = method("compressed-tensors", config_groups={"g": {"weights": {"num_bits": 4}}})
GPTQ = gptq(4, 1)[0]
REFUSED: dict[str, tuple[Mapping[str, Any], object, str]] = {
    "unknown method": ({"a": ONE}, method("hqq"), "'hqq' is not supported; awq"),
    "no method": ({"a": ONE}, {"quantization_config": {}}, "no quant_method"),
    "damaged config": ({"a": ONE}, "{", "not a valid JSON"),
    "config of another kind": ({"a": ONE}, "[]", "a JSON object, got list"),
    "gptq format": (GPTQ, method("gptq", checkpoint_format="gptq_p"), "'gptq_p' is not supp"),
    "gptq bits": (GPTQ, method("gptq", bits=3), "it has 4 bits"),
    "gptq scales": ({**GPTQ, "a.scales": TWO}, method("gptq"), "bits"),
    "gptq empty": (
        {**GPTQ, "a.scales": np.zeros((0, 32), np.float16), "a.qzeros": np.zeros((0, 4), np.int32)},
        method("gptq"),
        "it has the shape",
    ),
    "gptq zeros": ({k: v for k, v in GPTQ.items() if k != "a.qzeros"}, method("gptq"), "missing"),
    "gptq order": (
        {**GPTQ, "a.g_idx": np.full(64, 9, np.int32)},
        method("gptq", desc_act=True),
        "numbers 0 to 1, got 9 to 9",
    ),
    "awq version": ({"a": ONE}, method("awq", version="gemv"), "'gemv' is not supported"),
    "awq shapes": ({"a.qweight": INT, "a.scales": TWO, "a.qzeros": INT}, method("awq"), "must be"),
    "ct format": (packed([4, 64]), method("compressed-tensors", format="marlin-24"), "marlin-24"),
    "ct sparsity": (
        packed([4, 64]),
        method("compressed-tensors", sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse-24",
    ),
    "ct groups": (packed([4, 64]), method("compressed-tensors", config_groups=[1]), "a table"),
    "ct rows": (packed([5, 64]), CT, "does not fit a weight of"),
    "ct huge": (packed([4, 2**62]), CT, "does not fit a weight of"),
    "ct negative": (packed([4, -64]), CT, "does not fit a weight of"),
    "ct width": (packed([4, 80]), CT, "fit 0 of the widths"),
    "ct dtype": (packed([4, 64], INT.astype(np.int64)), CT, "must be int32"),
    "ct shape": ({**packed([4, 64]), "a.weight_shape": np.zeros(9000, np.int64)}, CT, "of shape"),
    "ct global": (
        {
            "a.weight_packed": BYTES,
            "a.weight_scale": np.zeros((4, 1), ml_dtypes.float8_e4m3fn),
            "a.weight_global_scale": np.float32([np.nan]),
        },
        CT,
        "positive normal",
    ),
    "ct mxfp4": (
        {"a.weight_packed": BYTES[:, :5], "a.weight_scale": BYTES[:, :0]},
        CT,
        "groups of 32 do not divide rows of 10",
    ),
    "ct mxfp4 group": (
        {"a.weight_packed": np.zeros((4, 28), np.uint8), "a.weight_scale": BYTES[:, :1]},
        CT,
        "groups of 32 do not divide rows of 56",
    ),
    "fp8 block": (
        {"a.weight": FP8, "a.weight_scale_inv": np.ones((2, 2), np.float32)},
        None,
        "do not fit",
    ),
    "fp8 groups": (
        {"a.weight": FP8[:, :0], "a.weight_scale": np.ones((4, 2), np.float32)},
        method("fp8"),
        "do not fit",
    ),
    "ct vector": (
        {"a.weight": FP8[0], "a.weight_scale": np.ones(2, np.float32)},
        method("compressed-tensors", config_groups={"g": {"weights": {"block_structure": [4, 4]}}}),
        "are unsupported",
    ),
    "fp8 config": ({"a": ONE}, method("fp8", weight_block_size=[0, 128]), "two integers"),
    "gpt-oss": (
        {"m_proj_blocks": np.zeros((2, 3, 8), np.uint8), "m_proj_scales": BYTES},
        None,
        "16 bytes",
    ),
    "modelopt": ({"a": ONE}, method("modelopt", quant_algo="W4A8_AWQ"), "W4A8_AWQ"),
    "modelopt scale": (
        {"a.weight": BYTES, "a.weight_scale": FP8, "a.weight_scale_2": ONE},
        None,
        "must be float8",
    ),
    "mlx mode": (
        {"a.weight": BYTES.view(np.uint32), "a.scales": ONE},
        {"quantization": {"bits": 4, "group_size": 32, "mode": "new"}},
        "'new' is not supported",
    ),
    "mlx list": (
        {"a.weight": BYTES.view(np.uint32), "a.scales": ONE},
        {"quantization": {"bits": 4, "group_size": 32, "mode": [1]}},
        "mode .1. is not supported",
    ),
    "mlx bits": (
        {"a.weight": BYTES.view(np.uint32), "a.scales": ONE},
        {"quantization": {"bits": 7, "group_size": 32}},
        "7 bits",
    ),
    "bnb state": (state("{"), None, "damaged"),
    "bnb blocks": (state('{"shape": [8, 8], "blocksize": 0}'), None, "damaged"),
    "bnb huge": (state('{"shape": [1099511627776, 64], "blocksize": 64}'), None, "bytes for"),
    "bnb negative": (state('{"shape": [-8, -8], "blocksize": 64}'), None, "damaged"),
    "bnb long": (state(" " * 5000), None, "a few numbers are expected"),
    "bnb int8": ({"a.weight": BYTES, "a.SCB": ONE}, None, "must be int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_checkpoints_are_refused(case: str, tmp_path: pathlib.Path):
    tensors, config, message = REFUSED[case]
    folder = written(tmp_path, tensors, config)
    tracemalloc.start()
    with pytest.raises(FileError, match=message) as caught:
        load_tensors(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21
    assert str(caught.value).startswith(str(folder))
    assert data.REMEDY.search(str(caught.value))
    assert len(str(caught.value)) < 300 + len(str(folder))
