"""Tensors that `jaxq compare` and `jaxq quantize` read in parts, and the remaining time."""

import pathlib
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxq.cli import _packing, main
from jaxq.cli._pieces import LARGE, Numbers, errors_in
from jaxq.cli._progress import Pace
from jaxq.interop import gguf, open_tensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_parts_of_a_tensor_are_its_numbers(tmp_path: pathlib.Path, dtype: type):
    x = np.random.default_rng(0).standard_normal((7, 13)).astype(dtype)
    if dtype is np.float64:
        path = tmp_path / "a.npy"
        np.save(path, x)
    else:
        path = tmp_path / "a.safetensors"
        safetensors.numpy.save_file({"pad": np.ones(3, np.int8), "x": x}, path)
    with open_tensors(path) as file:
        entry = next(entry for entry in file.entries if entry.shape == x.shape)
        parts = [part.copy() for part in file.stream(entry, 20)]
        np.testing.assert_array_equal(np.concatenate(parts), file.read(entry).reshape(-1))
    assert [part.size for part in parts] == [20, 20, 20, 20, 11]
    assert parts[0].dtype == np.float32


def test_a_file_that_shrinks_while_it_is_read_raises(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"x": np.ones(2**16, np.float32)}, path)
    with open_tensors(path) as file:
        parts = file.stream(file.entries[0], 2**14)
        next(parts)
        with path.open("r+b") as other:
            other.truncate(2**14)
        with pytest.raises(Exception, match="became shorter"):
            list(parts)


def matrix(path: pathlib.Path, rows: dict[str, np.ndarray]) -> pathlib.Path:
    """Writes an importance matrix of two experts, of which the second received no tokens."""
    tensors = []
    for name, sums in rows.items():
        counts = np.array([[4.0], [0.0]][: len(sums)], np.float32)
        for kind, x in (("in_sum2", sums * counts), ("counts", counts)):
            x = np.float32(x)
            tensors.append(gguf.Tensor(f"{name}.{kind}", "f32", x.shape, lambda x=x: x))
    gguf.write(path, tensors, {"general.type": "imatrix"})
    return path


def test_importance_in_parts_gives_the_bytes_of_whole_tensors(tmp_path: pathlib.Path):
    """Uses rows shorter than a piece, and experts with weights of their own."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 160)).astype(np.float32)
    sums = np.abs(rng.standard_normal((2, 160))) + 0.1
    source, target = tmp_path / "a.safetensors", tmp_path / "a.gguf"
    safetensors.numpy.save_file({"w": x}, source)
    imatrix = matrix(tmp_path / "imatrix.gguf", {"w": sums})
    command = ["quantize", source, target, "--recipe", "q4_0", "--imatrix", imatrix]
    assert main([str(argument) for argument in command]) == 0
    weights = np.stack([np.float32(sums[:1]), np.ones((1, 160), np.float32)])
    want = gguf.quantize(x, "q4_0", importance=weights)
    with open_tensors(target) as file:
        np.testing.assert_array_equal(file.raw(file.entries[0]), want)


def test_parts_are_packed_in_threads_and_in_order(monkeypatch: pytest.MonkeyPatch):
    """Makes two parts wait for each other, once the program has been compiled."""
    x = np.random.default_rng(0).standard_normal((3, LARGE)).astype(np.float32)
    together, pack = threading.Barrier(2), _packing._packed_part

    def packed(type: str, measure: Any, piece: Any) -> Any:
        if not np.array_equal(piece.elements, x[0]):
            together.wait(timeout=60)
        return pack(type, measure, piece)

    monkeypatch.setattr(_packing, "_cores", lambda: 2)
    monkeypatch.setattr(_packing, "_packed_part", packed)
    parts = list(_packing.pack_in_pieces(Numbers.of(x), "q8_0", errors_in))
    np.testing.assert_array_equal(
        np.concatenate([part.data for part in parts]), gguf.quantize(x, "q8_0").reshape(-1)
    )


def test_a_new_program_is_called_by_one_thread_first(monkeypatch: pytest.MonkeyPatch):
    """Packs one large part and four small ones, which are two programs."""
    started, done, pack = set(), set(), _packing._packed_part

    def packed(type: str, measure: Any, piece: Any) -> Any:
        size = piece.elements.size
        assert size in done or size not in started
        started.add(size)
        part = pack(type, measure, piece)
        done.add(size)
        return part

    monkeypatch.setattr(_packing, "_cores", lambda: 4)
    monkeypatch.setattr(_packing, "_COMPILED", set())
    monkeypatch.setattr(_packing, "_packed_part", packed)
    x = np.zeros((3, LARGE // 2), np.float32)
    assert len(list(_packing.pack_in_pieces(Numbers.of(x), "q8_0", errors_in))) == 5
    assert len(done) == 2


def test_threads_end_when_packing_is_interrupted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_packing, "_cores", lambda: 2)
    x, before = np.zeros((6, LARGE), np.float32), threading.active_count()
    parts = _packing.pack_in_pieces(Numbers.of(x), "q8_0", errors_in)
    next(parts)
    next(parts)
    assert threading.active_count() > before
    parts.close()
    assert threading.active_count() == before


def test_an_importance_matrix_of_another_model_is_an_error(capsys, tmp_path: pathlib.Path):
    source = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.ones((4, 64), np.float32)}, source)
    imatrix = matrix(tmp_path / "imatrix.gguf", {"w": np.ones((1, 32))})
    command = ["quantize", source, tmp_path / "a.gguf", "--recipe", "q4_0", "--imatrix", imatrix]
    assert main([str(argument) for argument in command]) == 2
    assert "must be of this model" in capsys.readouterr().err


class Clock:
    """A clock that a test advances."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_estimate_is_right_within_a_factor_of_two_after_a_tenth():
    """Tensors take up to 1.5 times as long as estimated, and a compilation takes most of all."""
    rng, clock = np.random.default_rng(0), Clock()
    for fastest, slowest in ((1.0, 1.0), (0.7, 1.5), (1.5, 1.5)):
        work = rng.uniform(1, 10, 200)
        seconds = work * rng.uniform(fastest, slowest, 200)
        pace, compilation = Pace(work.sum(), clock), 5 * seconds.sum()
        assert pace.seconds_left is None
        for i in range(200):
            if i in (0, 5):
                clock.now += compilation
                pace.exclude(compilation)
            clock.now += seconds[i]
            pace.advance(work[i])
            rest = seconds[i + 1 :].sum()
            if pace.done > pace.total / 10 and rest > 0:
                assert rest / 2 < pace.seconds_left < rest * 2
        assert pace.seconds_left == pytest.approx(0, abs=1e-6)
