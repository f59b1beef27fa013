"""Hostile and damaged files are rejected with one line; valid ones read as in other libraries."""

import io
import json
import os
import pathlib
import random
import tracemalloc
import warnings
import zipfile

import chex
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxq.interop import FileError, open_tensors
from tests import data


def packed(header: object, data: bytes = b"") -> bytes:
    """Returns the bytes of a safetensors file with a header (JSON text or an object) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape: object = (2,), begin: int = 0, end: int = 8, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def npy(text: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + text.encode() + data


def npz(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # Duplicate names cause a warning.
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}"
GOOD = npy(FLOATS, bytes(8))
DEEP = b"{" + b'"a":[' * 200_000

MALFORMED = {
    "empty.safetensors": b"",
    "short.safetensors": b"\x01\x00\x00",
    "beyond.safetensors": (1000).to_bytes(8, "little") + b"{}",
    "huge.safetensors": (2**63).to_bytes(8, "little") + b"{}",
    "large.safetensors": (2**25 + 1).to_bytes(8, "little") + b"{}",
    "list.safetensors": packed([]),
    "space.safetensors": packed(b" {}"),
    "open.safetensors": packed(b'{"a":'),
    "latin.safetensors": packed(b'{"\xff":1}'),
    "deep.safetensors": packed(DEEP),
    "digits.safetensors": packed(b'{"a":' + b"9" * 10_000 + b"}"),
    "nan.safetensors": packed(b'{"a":NaN}'),
    "twice.safetensors": packed(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "field.safetensors": packed(
        b'{"a":{"dtype":"F32","shape":[9],"shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "surrogate.safetensors": packed(
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "metadata.safetensors": packed({"__metadata__": {"a": 1}}),
    "missing.safetensors": packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "more.safetensors": packed({"a": {**tensor(), "x": 1}}, bytes(8)),
    "dtype.safetensors": packed({"a": tensor(dtype="F33")}, bytes(8)),
    "kind.safetensors": packed({"a": {**tensor(), "dtype": ["F32"]}}, bytes(8)),
    "bytes.safetensors": packed({"a": tensor((3,))}, bytes(8)),
    "overflow.safetensors": packed({"a": tensor((2**32, 2**32, 2**32))}, bytes(8)),
    "wrap.safetensors": packed({"a": tensor((2**62, 4), 0, 0)}),
    "negative.safetensors": packed({"a": tensor((-2,))}, bytes(8)),
    "negatives.safetensors": packed({"a": tensor((-2, -1))}, bytes(8)),
    "before.safetensors": packed({"a": tensor(begin=-8, end=0)}, bytes(8)),
    "fraction.safetensors": packed({"a": tensor((2.0,))}, bytes(8)),
    "truth.safetensors": packed({"a": tensor((True, 2))}, bytes(8)),
    "axes.safetensors": packed({"a": tensor((1,) * 1000 + (2,))}, bytes(8)),
    "number.safetensors": packed({"a": tensor(2)}, bytes(8)),
    "out.safetensors": packed({"a": tensor(begin=8, end=16)}, bytes(8)),
    "back.safetensors": packed({"a": tensor(begin=8, end=0)}, bytes(8)),
    "three.safetensors": packed({"a": {**tensor(), "data_offsets": [0, 8, 8]}}, bytes(8)),
    "hole.safetensors": packed({"a": tensor(), "b": tensor(begin=12, end=20)}, bytes(20)),
    "overlap.safetensors": packed({"a": tensor(), "b": tensor(begin=4, end=12)}, bytes(12)),
    "rest.safetensors": packed({"a": tensor()}, bytes(9)),
    "magic.npy": b"\x92NUMPY" + GOOD[6:],
    "version.npy": npy(FLOATS, bytes(8), b"\x04\x00"),
    "truncated.npy": GOOD[:-1],
    "header.npy": b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little"),
    "code.npy": npy("__import__('os').system('true')"),
    "nested.npy": npy("(" * 5000),
    "keys.npy": npy("{'descr': '<f4', 'shape': (2,)}", bytes(8)),
    "shape.npy": npy(FLOATS.replace("(2,)", "(2**40,)"), bytes(8)),
    "size.npy": npy(FLOATS.replace("(2,)", "(4611686018427387905,)"), bytes(8)),
    "minus.npy": npy(FLOATS.replace("(2,)", "(-2,)"), bytes(8)),
    "minuses.npy": npy(FLOATS.replace("(2,)", "(-2, -1)"), bytes(8)),
    "objects.npy": npy(FLOATS.replace("<f4", "|O"), bytes(8)),
    "record.npy": npy(FLOATS.replace("'<f4'", "[('a', 'O')]"), bytes(8)),
    "nothing.npz": b"",
    "cut.npz": npz(("a.npy", GOOD))[:-30],
    "path.npz": npz(("../a.npy", GOOD)),
    "root.npz": npz(("/a.npy", GOOD)),
    "text.npz": npz(("a.txt", GOOD)),
    "double.npz": npz(("a.npy", GOOD), ("a.npy", GOOD)),
    "inner.npz": npz(("a.npy", GOOD[:-1])),
    "pickle.npz": npz(("a.npy", npy(FLOATS.replace("<f4", "|O"), bytes(8)))),
    "bomb.npz": npz(
        ("a.npy", npy(FLOATS.replace("(2,)", "(20000000,)"), bytes(80_000_000))),
        method=zipfile.ZIP_DEFLATED,
    ),
    "name.txt": b"",
    "many.safetensors": packed(b'{"a":' + b'"data_offsets",' * 200_001 + b"1}"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_rejected(name: str, tmp_path: pathlib.Path):
    path = tmp_path / name
    path.write_bytes(MALFORMED[name])
    tracemalloc.start()
    with pytest.raises(FileError) as caught, open_tensors(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert data.REMEDY.search(str(caught.value))
    assert peak < 2**20 + 30 * len(MALFORMED[name])


def test_damaged_literal_causes_no_warning(tmp_path: pathlib.Path):
    path = tmp_path / "a.npy"
    path.write_bytes(npy(FLOATS.replace("<f4", r"<f4\e"), bytes(8)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_tensors(path) as file:
            assert not file.entries[0].is_float
    assert not caught


def test_only_regular_files_are_open_tensors(tmp_path: pathlib.Path):
    for kind in (".safetensors", ".npz", ".npy"):
        pipe, folder = tmp_path / f"pipe{kind}", tmp_path / f"folder{kind}"
        os.mkfifo(pipe)
        folder.mkdir()
        for path in (pipe, folder):
            with pytest.raises(FileError, match="regular file") as caught:
                with open_tensors(path):
                    pass
            assert data.REMEDY.search(str(caught.value))


def test_empty_tensor_of_too_large_shape_raises_when_read(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed({"a": tensor((2**60, 2**60, 0), 0, 0)}))
    with open_tensors(path) as file, pytest.raises(FileError, match="shape"):
        file.read(file.entries[0])


def test_valid_variants_are_read(tmp_path: pathlib.Path):
    """Reads padding, empty tensors, scalars, metadata, unordered entries and other dtypes."""
    header = {
        "b": tensor((), 8, 12),
        "__metadata__": {"format": "pt"},
        "a": tensor((2,)),
        "none": tensor((0, 2**62), 12, 12),
        "four": tensor((4,), 12, 14, "F4"),
        "whole": tensor((1,), 14, 22, "I64"),
    }
    data = np.float32([1, 2, 3]).tobytes() + bytes(10)
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(text + b" " * 7, data))
    with open_tensors(path) as file:
        entries = {e.name: e for e in file.entries}
        assert list(entries) == ["a", "b", "none", "four", "whole"]
        assert file.read(entries["a"]).tolist() == [1, 2]
        chex.assert_shape(file.read(entries["b"]), ())
        assert entries["four"].numpy_dtype is None
        assert not entries["whole"].is_float


def test_corrupted_headers_agree_with_safetensors(tmp_path: pathlib.Path):
    """Checks that files accepted by jaxq and by safetensors have the same contents in both."""
    rng, accepted = random.Random(0), 0
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    good = safetensors.numpy.save(arrays)
    length = 8 + int.from_bytes(good[:8], "little")
    path = tmp_path / "a.safetensors"
    for _ in range(1500):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 2])):
            place = rng.randrange(length)
            bad[place] = (
                rng.choice(b'0123456789[]{},:" aFb-\\')
                if rng.random() < 0.8
                else rng.randrange(256)
            )
        path.write_bytes(bad)
        try:
            with open_tensors(path) as file:
                ours = {e.name: file.read(e) for e in file.entries if e.is_float}
                names = {e.name for e in file.entries}
        except FileError:
            continue
        accepted += 1
        theirs = safetensors.safe_open(path, "np")
        assert names == set(theirs.keys())
        for name, array in ours.items():
            if bytes(bad[:length]).count(b"BF") or bytes(bad[:length]).count(b"F8"):
                continue
            np.testing.assert_array_equal(array, theirs.get_tensor(name).astype(np.float32))
    assert accepted > 20


DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def test_values_match_safetensors(tmp_path: pathlib.Path):
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=(3, 5)).astype(np.dtype(n)) for n in DTYPES}
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays, path)
    with open_tensors(path) as file:
        assert {e.name for e in file.entries} == set(DTYPES)
        for entry in file.entries:
            got = file.read(entry)
            chex.assert_type(got, np.float32)
            np.testing.assert_array_equal(got, arrays[entry.name].astype(np.float32))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy_archives_are_read(tmp_path: pathlib.Path, save):
    x = np.arange(12, dtype=np.float64).reshape(3, 4)
    arrays = {
        "c": x,
        "f": np.asfortranarray(x.astype(np.float32)),
        "big": x.astype(">f4"),
        "half": x.astype(np.float16),
        "whole": np.arange(3),
        "text": np.array(["a", "bc"]),
        "record": np.zeros(2, [("a", "f4")]),
        "brain": x.astype(ml_dtypes.bfloat16),
        "sub/zero": np.float32(7),
    }
    path = tmp_path / "a.npz"
    save(path, **arrays)
    with open_tensors(path) as file:
        floating = {e.name: file.read(e) for e in file.entries if e.is_float}
        assert {e.name for e in file.entries} == set(arrays)
    assert set(floating) == {"c", "f", "big", "half", "sub/zero"}
    for name, got in floating.items():
        np.testing.assert_array_equal(got, arrays[name].astype(np.float32))


def test_numpy_files_of_every_version_are_read(tmp_path: pathlib.Path):
    x = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    for version in ((1, 0), (2, 0), (3, 0)):
        path = tmp_path / "a.npy"
        with path.open("wb") as target:
            np.lib.format.write_array(target, x, version)
        with open_tensors(path) as file:
            (entry,) = file.entries
            assert entry.name == "a"
            np.testing.assert_array_equal(file.read(entry), x)


def test_damaged_archive_member_raises(tmp_path: pathlib.Path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(100_000, np.float32))
    data = bytearray(path.read_bytes())
    data[300_000] = 1
    path.write_bytes(data)
    with open_tensors(path) as file, pytest.raises(FileError, match="damaged"):
        file.read(file.entries[0])


def test_file_that_shrinks_raises(tmp_path: pathlib.Path):
    path = tmp_path / "a.npy"
    np.save(path, np.ones(100_000, np.float32))
    with open_tensors(path) as file:
        with path.open("r+b") as other:
            other.truncate(1000)
        with pytest.raises(FileError, match="shorter"):
            file.read(file.entries[0])


def test_reads_one_tensor_at_a_time(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({f"w{i}": np.ones(2**20, np.float32) for i in range(8)}, path)
    tracemalloc.start()
    with open_tensors(path) as file:
        for entry in file.entries:
            file.read(entry)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 2**22
