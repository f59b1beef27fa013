"""Block types of ggml: bytes against libgguf (tools/golden_gguf.py), values against gguf."""

import functools
import pathlib
import tracemalloc

import chex
import jax
import numpy as np
import pytest
from gguf import GGUFWriter, quants
from gguf.constants import GGMLQuantizationType
from jax import numpy as jnp

import jaxq
from jaxq.cli import main
from jaxq.interop import gguf
from jaxq.recipes import RECIPES
from tests import data
from tests.oracle import assert_same
from tools.golden_gguf import tensors

pack = jax.jit(gguf.pack, static_argnums=1)
unpack = jax.jit(gguf.unpack, static_argnums=1)
X, IMPORTANCE = tensors()
GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "gguf.npz")
# `test_super_blocks.py` has fast tests of the searches of K-quants.
FEW = ["nvfp4", "tq1_0", "q4_0"]


@pytest.mark.parametrize("name", data.each(gguf.TYPES, FEW))
def test_bytes_equal_libgguf(name: str):
    np.testing.assert_array_equal(gguf.quantize(X, name), GOLDEN[name])


IMPORTANT = sorted(name.split()[0] for name in GOLDEN if "importance" in name)


@pytest.mark.parametrize("name", data.each(IMPORTANT, ["q4_0"]))
def test_bytes_with_an_importance_matrix_equal_libgguf(name: str):
    got = gguf.quantize(X, name, importance=IMPORTANCE)
    np.testing.assert_array_equal(got, GOLDEN[f"{name} importance"])


@pytest.mark.parametrize("case", data.each(GOLDEN, ["nvfp4", "mxfp4", "tq1_0", "q4_0 importance"]))
def test_recipe_gives_the_bytes_of_libgguf_and_bytes_give_the_tensor(case: str):
    name, *important = case.split()
    recipe, weights = gguf.recipe_of(name), IMPORTANCE if important else None
    q = jaxq.quantize(X, recipe, importance=weights)
    np.testing.assert_array_equal(pack(q, name), GOLDEN[case])
    again = unpack(GOLDEN[case], name)
    chex.assert_trees_all_equal_shapes_and_dtypes(again, q)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(got, want)
    values = quants.dequantize(GOLDEN[case], GGMLQuantizationType[name.upper()])
    assert_same(again.dequantize(), values)
    assert_same(jaxq.fake_quant(X.T, recipe, importance=weights, axis=0).T, values)


def test_three_types_have_recipes_of_other_names():
    names = {name: RECIPES.name_of(gguf.recipe_of(name)) for name in gguf.TYPES}
    others = {name: recipe for name, recipe in names.items() if name != recipe}
    assert others == {"tq1_0": "tq2_0", "mxfp4": "mxfp4_ggml", "nvfp4": "nvfp4_ggml"}


def test_scales_of_ocp_and_nvidia_differ_from_those_of_ggml():
    for name in ("mxfp4", "nvfp4"):
        assert not np.array_equal(jaxq.fake_quant(X, name), jaxq.fake_quant(X, f"{name}_ggml"))


def test_mxfp4_of_ocp_is_packed_with_its_own_scales():
    q = jaxq.quantize(X, "mxfp4")
    want = quants.dequantize(np.asarray(gguf.pack(q)), GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(q.dequantize(), want)


def test_minus_zero_and_scales_that_are_no_numbers_are_read_as_by_ggml():
    mxfp4, nvfp4 = np.full(17, 0x81, np.uint8), np.full(36, 0x18, np.uint8)
    nvfp4[:4] = 0x38, 0xB8, 0x7F, 0
    for content, name in ((mxfp4, "mxfp4"), (nvfp4, "nvfp4")):
        want = quants.dequantize(content, GGMLQuantizationType[name.upper()])
        assert_same(gguf.unpack(content, name).dequantize(), want)


def test_every_scale_of_mxfp4_gives_the_values_of_ggml():
    """Values below 2^-126 are 0; two scales are below it, but most of their values are not."""
    content = np.repeat(np.arange(16, dtype=np.uint8)[None] * 17, 256, axis=0)
    content = np.concatenate([np.arange(256, dtype=np.uint8)[:, None], content], axis=1)
    with np.errstate(over="ignore"):
        want = quants.dequantize(content, GGMLQuantizationType.MXFP4)
    want = np.where(np.abs(want) < 2.0**-126, np.float32(0), want)
    np.testing.assert_array_equal(gguf.dequantize(content, "mxfp4"), want)
    # Recipes limit values to the range of float32, and the last scale is their NaN.
    values = np.nan_to_num(want[:255], posinf=np.finfo("f4").max, neginf=np.finfo("f4").min)
    np.testing.assert_array_equal(gguf.unpack(content, "mxfp4").dequantize()[:255], values)


@pytest.mark.parametrize("name", data.each(gguf.TYPES, ["q4_k", "tq1_0", "nvfp4"]))
def test_values_equal_gguf(name: str):
    """Compares random bytes, too, which hold every code; scales are made finite."""
    layout = gguf.TYPES[name]
    rng = np.random.default_rng(0)
    random = rng.integers(0, 256, (12, layout.size), dtype=np.uint8)

    @jax.jit
    def with_scales(blocks, scales):
        fields = dict(layout.read(blocks))
        given = {name: a for name, a in zip("dm", scales, strict=True) if name in fields}
        return layout.write(fields | given)

    scales = rng.standard_normal((2, 12)).astype(np.float32)
    random = np.asarray(with_scales(random, scales)).reshape(1, -1)
    for content in (GOLDEN[name], random):
        want = quants.dequantize(content, GGMLQuantizationType[name.upper()])
        assert_same(gguf.dequantize(content, name), want)


def test_importance_may_differ_between_experts():
    x, weights = X.reshape(2, 6, 256), jnp.stack([IMPORTANCE, IMPORTANCE[::-1]])[:, None]
    got = gguf.quantize(x, "q4_0", importance=weights)
    want = GOLDEN["q4_0 importance"][:6]
    np.testing.assert_array_equal(got[0], want)
    assert not np.array_equal(got[1], GOLDEN["q4_0 importance"][6:])
    q = jaxq.quantize(x, "q4_0", importance=weights)
    np.testing.assert_array_equal(gguf.pack(q), got)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["q4_k", "iq4_nl", "q4_0 importance"])
def test_large_tensors_are_cut_into_chunks(case: str):
    name, *important = case.split()
    got = gguf.quantize(np.tile(X, (25, 1)), name, importance=IMPORTANCE if important else None)
    np.testing.assert_array_equal(got, np.tile(GOLDEN[case], (25, 1)))


@pytest.mark.parametrize("name", data.each(gguf.TYPES, ["q4_k", "tq1_0", "q4_0"]))
def test_empty_tensors_stay_empty(name: str):
    layout, row = gguf.TYPES[name], np.ones(256, np.float32)
    for shape, weights in (((0, 256), None), ((3, 0), row[:0]), ((2, 0, 256), row)):
        content = gguf.quantize(np.zeros(shape, np.float32), name, importance=weights)
        chex.assert_shape(content, (*shape[:-1], shape[-1] // layout.block * layout.size))
        chex.assert_shape(gguf.dequantize(content, name), shape)
        q = gguf.unpack(content, name)
        chex.assert_shape((q.dequantize(), gguf.pack(q, name)), (shape, content.shape))


def test_file_is_read_as_the_quantized_tensors_of_its_recipes(tmp_path: pathlib.Path):
    path = tmp_path / "a.gguf"
    names = ["q8_0", "tq1_0", "mxfp4"]
    write(path, names)
    for name, q in jaxq.interop.load_tensors(path).items():
        assert isinstance(q, jaxq.Quantized)
        assert q.recipe == gguf.recipe_of(name)
        np.testing.assert_array_equal(pack(q, name), GOLDEN[name])


@pytest.mark.slow
def test_commands_copy_and_convert_block_types(tmp_path: pathlib.Path):
    path, copy, rules = (tmp_path / name for name in ("a.gguf", "b.safetensors", "rules.json"))
    write(path, ["q4_k", "tq1_0", "mxfp4"])
    rules.write_text('[["tq1_0", "tq1_0"]]')
    assert main(["quantize", str(path), str(copy), "--rules", str(rules)]) == 0
    for name, q in jaxq.load(copy).items():
        np.testing.assert_array_equal(pack(q, name), GOLDEN[name])
    copy = tmp_path / "b.gguf"
    assert main(["quantize", str(path), str(copy), "--recipe", "mxfp4_ggml"]) == 0
    with jaxq.interop.open_tensors(copy) as file:
        assert {entry.dtype for entry in file.entries} == {"MXFP4"}


def write(path: pathlib.Path, names: list[str]) -> None:
    """Writes a tensor of each of some types."""
    read = lambda name: functools.partial(GOLDEN.__getitem__, name)
    gguf.write(path, [gguf.Tensor(name, name, X.shape, read(name)) for name in names], {})


@pytest.mark.parametrize(
    ("name", "length", "want"),
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 576, "q5_0"),
        ("q5_k", 640, "q5_1"),
        ("q6_k", 64, "q8_0"),
        ("q2_k", 64, "q4_0"),
        ("iq4_xs", 64, "iq4_nl"),
        ("q4_0", 48, "f16"),
    ],
)
def test_fallbacks_are_those_of_llama_quantize(name: str, length: int, want: str):
    assert gguf.fallback(name, length) == want


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match=r"Did you mean q4_k"):
        gguf.quantize(X, "q4_k_m")
    with pytest.raises(ValueError, match=r"blocks of 256 .*fallback"):
        gguf.quantize(X[:, :64], "q4_k")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        gguf.quantize(X.astype(np.int32), "q4_0")
    with pytest.raises(ValueError, match="`importance` must have"):
        gguf.quantize(X, "q4_0", importance=IMPORTANCE[:64])
    with pytest.raises(ValueError, match="144 bytes, which must divide"):
        gguf.dequantize(np.zeros(100, np.uint8), "q4_k")
    with pytest.raises(TypeError, match="must be uint8"):
        gguf.dequantize(np.zeros(144), "q4_k")


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    numbers = version.to_bytes(4, "little"), tensors.to_bytes(8, "little")
    return b"GGUF" + b"".join(numbers) + keys.to_bytes(8, "little") + b"".join(parts)


def text(value: str) -> bytes:
    return len(value.encode()).to_bytes(8, "little") + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + kind.to_bytes(4, "little") + value


def info(name: str = "a", shape: tuple = (32,), kind: int = 0, start: int = 0) -> bytes:
    dims = b"".join(n.to_bytes(8, "little") for n in reversed(shape))
    numbers = kind.to_bytes(4, "little") + start.to_bytes(8, "little")
    return text(name) + len(shape).to_bytes(4, "little") + dims + numbers


def words(*values: int) -> bytes:
    """Returns the item type and the count of an array."""
    return values[0].to_bytes(4, "little") + values[1].to_bytes(8, "little")


HUGE = 2**63 - 1
HOSTILE = {
    "short": b"GGUF\x03",
    "version": header(version=4),
    "big-endian": header(version=3 << 24),
    "tensors": header(tensors=HUGE),
    "keys": header(keys=HUGE),
    "text": header(HUGE.to_bytes(8, "little"), bytes(99), keys=1),
    "utf": header(key("a", 8, (1).to_bytes(8, "little") + b"\xff"), keys=1),
    "kind": header(key("a", 13, bytes(99)), keys=1),
    "truth": header(key("a", 7, b"\x02"), bytes(9), keys=1),
    "twice": header(key("a", 0, b"1"), key("a", 0, b"1"), keys=2),
    "count": header(key("a", 9, words(0, HUGE)), bytes(99), keys=1),
    "texts": header(key("a", 9, words(8, HUGE)), bytes(99), keys=1),
    "nested": header(key("a", 9, words(9, 1) * 9 + words(0, 0)), bytes(99), keys=1),
    "alignment": header(key("general.alignment", 4, bytes(4)), bytes(99), keys=1),
    "three": header(key("general.alignment", 4, (3).to_bytes(4, "little")), bytes(99), keys=1),
    "axes": header(info(shape=(1,) * 5), bytes(999), tensors=1),
    "overflow": header(info(shape=(2**40, 2**40)), bytes(999), tensors=1),
    "empty": header(info(shape=(0, 2**62), kind=2), bytes(999), tensors=1),
    "block": header(info(shape=(33,), kind=2), bytes(999), tensors=1),
    "unknown": header(info(kind=999), bytes(999), tensors=1),
    "beyond": header(info(shape=(999,)), bytes(999), tensors=1),
    "offset": header(info(start=8), bytes(999), tensors=1),
    "names": header(info(), info(start=128), bytes(999), tensors=2),
    "overlap": header(info(), info("b", start=96), bytes(999), tensors=2),
    "name": header(info("a" * 65), bytes(999), tensors=1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_before_anything_is_allocated(
    name: str, tmp_path: pathlib.Path
):
    path = tmp_path / "a.gguf"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(jaxq.interop.FileError, match="not a valid GGUF") as caught:
        with jaxq.interop.open_tensors(path):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.REMEDY.search(str(caught.value))
    assert peak < 2**18


def written_by_gguf(path: pathlib.Path) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("count", 3)
    writer.add_string("text", "h\u00e9")
    writer.add_array("texts", ["a", "bb", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("float", 0.1)
    writer.add_float64("double", 0.1)
    writer.add_bool("bool", True)
    writer.add_tensor("half", X[:, :7].astype(np.float16))
    for name in ("q4_k", "q8_0", "nvfp4"):
        writer.add_tensor(name, GOLDEN[name], raw_dtype=GGMLQuantizationType[name.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_files_of_gguf_are_read_and_written_again_identically(tmp_path: pathlib.Path):
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    written_by_gguf(first)
    with jaxq.interop.open_tensors(first) as file:
        entries = {entry.name: entry for entry in file.entries}
        np.testing.assert_array_equal(file.read(entries["half"]), X[:, :7].astype(np.float16))
        want = quants.dequantize(GOLDEN["q4_k"], GGMLQuantizationType.Q4_K)
        np.testing.assert_array_equal(file.read(entries["q4_k"]), want)
        assert file.metadata["texts"] == ["a", "bb", ""]
        raw = {name: file.raw(entry) for name, entry in entries.items()}
        again = [
            gguf.Tensor(e.name, e.dtype.lower(), e.shape, functools.partial(raw.get, e.name))
            for e in file.entries
        ]
        gguf.write(second, again, file.metadata)
    assert first.read_bytes() == second.read_bytes()


def test_nvfp4_values_are_multiplied_by_the_scale_tensor(tmp_path: pathlib.Path):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    scale, data = np.float32([0.25]), GOLDEN["nvfp4"]
    tensors = [
        gguf.Tensor("a.weight", "nvfp4", X.shape, lambda: data),
        gguf.Tensor("a.scale", "f32", (1,), lambda: scale),
    ]
    gguf.write(path, tensors, {})
    with jaxq.interop.open_tensors(path) as file:
        want = 0.25 * quants.dequantize(data, GGMLQuantizationType.NVFP4)
        np.testing.assert_array_equal(file.read(file.entries[0]), want)
    assert main(["quantize", str(path), str(again), "--recipe", "q8_0"]) == 0
    with jaxq.interop.open_tensors(again) as file:
        assert [entry.name for entry in file.entries] == ["a.weight"]
    wrong = tensors[1]._replace(shape=(2,), read=lambda: np.zeros(2, np.float32))
    gguf.write(path, [tensors[0], wrong], {})
    with jaxq.interop.open_tensors(path) as file:
        with pytest.raises(jaxq.interop.FileError, match="must hold 1 or 12 float32"):
            file.read(file.entries[0])


def test_writing_checks_its_arguments(tmp_path: pathlib.Path):
    path, good = tmp_path / "a.gguf", gguf.Tensor("a", "f32", (2,), lambda: np.zeros(2, "f4"))
    for written, metadata, message in [
        ([good, good], {}, "distinct"),
        ([good._replace(type="q9")], {}, "has the type 'q9'"),
        ([good._replace(name="a" * 64)], {}, "does not fit"),
        ([good._replace(shape=(3,))], {}, "has 8 bytes"),
        ([good], {"general.alignment": 3}, "power of two"),
        ([good], {"a": ["b", 1]}, "one type"),
        ([good], {"a": None}, "numbers, strings"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            gguf.write(path, written, metadata)
    assert not path.exists()
