"""The command line: output, rejected arguments and exit codes."""

import csv
import importlib
import io
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxq
from jaxq import analysis
from jaxq.cli import _compare as comparing
from jaxq.cli import _output as output
from jaxq.cli import _pieces as pieces
from jaxq.cli import main
from jaxq.cli._formats import fields
from jaxq.formats import FORMATS
from jaxq.interop import gguf
from tests import data
from tools import cli_document

RECIPES = "int8_token,int4_g32,bfloat16"
BAD_NAME = "<b>[red]\x1b[31m\n\u2028"


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    """Runs a command and returns its exit code, standard output and standard error."""
    code = main(argv)
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 64)).astype(np.float32)
    arrays = {
        "a.weight": w,
        "b.weight": (3 * w).astype(ml_dtypes.bfloat16),
        "c.weight": w.astype(np.float16),
        "narrow": w[:, :33].copy(),
        "bad": np.where(w > 2.5, np.float32(np.inf), w),
        "bias": w[0],
        "scalar": np.array(2, np.float32),
        "empty": np.zeros((0, 64), np.float32),
        "ids": np.arange(3),
        BAD_NAME: w + 1,
    }
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    return path


def compared(capsys: pytest.CaptureFixture, *argv: str) -> dict:
    code, out, err = run(capsys, "compare", *argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def json_value(row: dict, name: str) -> float:
    """Returns a number of a row, which JSON stores separately if it is not finite."""
    return float(row["nonfinite"][name] if row[name] is None else row[name])


def test_rows_match_numpy(capsys, checkpoint: pathlib.Path):
    """Compares scales, levels, errors and bytes with NumPy."""
    result = compared(capsys, str(checkpoint), "--recipes", RECIPES)
    rows = {(r["tensor"], r["recipe"]): r for r in result["tensors"]}
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for name, x in (("a.weight", w), ("b.weight", (3 * w).astype(ml_dtypes.bfloat16))):
        x = x.astype(np.float32)
        scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
        blocks = x.reshape(64, 2, 32)
        small = np.abs(blocks).max(2, keepdims=True) / np.float32(7)
        expected = {
            "int8_token": (np.rint(x / scale) * scale, 64 * 64 + 4 * 64),
            "int4_g32": ((np.rint(blocks / small) * small).reshape(x.shape), 64 * 32 + 4 * 128),
            "bfloat16": (x.astype(ml_dtypes.bfloat16).astype(np.float32), 64 * 64 * 2),
        }
        for recipe, (y, size) in expected.items():
            row = rows[name, recipe]
            noise = np.mean((y.astype(np.float64) - x) ** 2)
            signal_power = np.mean(x.astype(np.float64) ** 2)
            assert row["mse"] == pytest.approx(noise, rel=1e-6)
            assert row["power"] == pytest.approx(signal_power, rel=1e-6)
            assert row["max_error"] == pytest.approx(np.abs(y - x).max(), rel=1e-5)
            db = 10 * math.log10(signal_power / noise) if noise else math.inf
            assert json_value(row, "sqnr_db") == pytest.approx(db, abs=1e-4)
            assert (row["bytes"], row["bits"]) == (size, 8 * size / 4096)
    assert rows["b.weight", "bfloat16"]["sqnr_db"] is None
    assert rows["b.weight", "bfloat16"]["nonfinite"] == {"sqnr_db": "inf"}


def test_notes_explain_missing_numbers(capsys, checkpoint: pathlib.Path):
    result = compared(capsys, str(checkpoint), "--recipes", RECIPES)
    notes = {(r["tensor"], r["recipe"]): r["note"] for r in result["tensors"]}
    assert re.search("32 does not divide axis 1", notes["narrow", "int4_g32"])
    assert notes["narrow", "int8_token"] == ""
    assert re.fullmatch(r"not finite: 0 NaN, \d+ infinite in float32", notes["bad", "bfloat16"])
    assert notes["bias", "int8_token"] == notes["scalar", "bfloat16"] == "fewer than 2 axes"
    assert notes["empty", "int4_g32"] == "empty"
    assert result["left"] == {"dtype I64": ["ids"]}
    assert len(notes) == 9 * 3
    every = compared(capsys, str(checkpoint), "--recipes", "int8_token", "--min-axes", "0")
    notes = {r["tensor"]: r["note"] for r in every["tensors"]}
    assert "needs a tensor of at least 1 axes" in notes["scalar"]
    assert notes["bias"] == ""


def test_totals_equal_sums_over_tensors(capsys, checkpoint: pathlib.Path):
    result = compared(capsys, str(checkpoint), "--recipes", RECIPES, "--exclude", "bad|empty")
    sizes = {"a.weight": 4, "b.weight": 2, "c.weight": 2, "narrow": 4 * 33 / 64, BAD_NAME: 4}
    before = sum(64 * 64 * n for n in sizes.values()) + 4 * 64 + 4
    for total in result["totals"]:
        mine = [r for r in result["tensors"] if r["recipe"] == total["recipe"]]
        done = [r for r in mine if not r["note"]]
        assert total["bytes"] == sum(r["bytes"] for r in mine)
        assert total["ratio"] == pytest.approx(before / total["bytes"])
        assert (total["tensors"], total["kept"]) == (len(done), len(mine) - len(done))
        noise = sum(r["mse"] * r["elements"] for r in done)
        power = sum(r["power"] * r["elements"] for r in done)
        assert total["sqnr_db"] == pytest.approx(10 * math.log10(power / noise))
        assert total["worst_db"] == min(json_value(r, "sqnr_db") for r in done)
    assert result["left"]["excluded"] == ["bad", "empty"]


def test_compiles_once_per_recipe(tmp_path: pathlib.Path, capsys):
    arrays = {f"w{i}": np.full((4, 8 + i), i, np.float32) for i in range(20)}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    before = pieces._errors._cache_size()
    compared(capsys, str(tmp_path / "a.safetensors"), "--recipes", "fp8_e5m2_tensor")
    assert pieces._errors._cache_size() - before == 1


EVERY_KIND = "int8_tensor,uint8_channel,mxfp4,nvfp4,nf4_dq,q4_1"
CUT_OR_WHOLE = "int8_tensor,mxfp4,nf4_dq"


@pytest.mark.parametrize(
    ("axis", "recipes"),
    [
        (-1, CUT_OR_WHOLE),
        (-2, "uint8_channel,q4_1"),
        data.slow(-1, EVERY_KIND),
        data.slow(-2, EVERY_KIND),
    ],
)
def test_errors_of_pieces_are_those_of_whole_tensors(
    tmp_path: pathlib.Path, capsys, axis: int, recipes: str
):
    """Compares with `fake_quant`; int8_tensor of `long` takes two pieces, nf4_dq is not cut."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(64, 192)), "long": rng.normal(size=(1, 3, 64, 1600))}
    arrays = {
        name: np.float32(x * np.exp2(rng.integers(-3, 4, x.shape)) + 0.5)
        for name, x in arrays.items()
    }
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    result = compared(
        capsys, str(tmp_path / "a.safetensors"), "--recipes", recipes, "--axis", str(axis)
    )
    for row in result["tensors"]:
        x = arrays[row["tensor"]]
        error = np.float64(jaxq.fake_quant(x, row["recipe"], axis=axis)) - x
        assert row["max_error"] == np.float32(np.abs(error).max())
        assert row["mse"] == pytest.approx(np.mean(error**2), rel=1e-6)


def test_block_types_of_gguf_are_compared(tmp_path: pathlib.Path, capsys):
    x = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    safetensors.numpy.save_file({"w": x, "v": x[:, :64].copy()}, tmp_path / "a.safetensors")
    result = compared(capsys, str(tmp_path / "a.safetensors"), "--recipes", "tq1_0,nvfp4_ggml")
    rows = {(row["tensor"], row["recipe"]): row for row in result["tensors"]}
    for name, recipe in (("tq1_0", "tq2_0"), ("nvfp4_ggml", "nvfp4_ggml")):
        error = np.float64(jaxq.fake_quant(x, recipe)) - x
        assert rows["w", name]["mse"] == pytest.approx(np.mean(error**2))
    assert rows["w", "tq1_0"]["bytes"] == 6 * 54
    assert rows["v", "tq1_0"]["note"] == "blocks of 256 do not divide rows of 64"


def test_tables_and_csv(capsys, checkpoint: pathlib.Path):
    code, out, err = run(capsys, "compare", str(checkpoint), "--recipes", RECIPES)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "not compared: ids: dtype I64" in out
    assert "kept by int4_g32: narrow: PerBlock" in out
    narrow = ("--include", "narrow", "--recipes", "int8_token,int4_g32")
    _, out, _ = run(capsys, "compare", str(checkpoint), *narrow)
    assert re.search(r"int4_g32 +0 +1 +- +- +8448 +1.00 +-", out)
    code, out, _ = run(capsys, "compare", str(checkpoint), "--recipes", RECIPES, "--worst", "1")
    assert "nan" not in out
    header, first = out.split("\n\n")[0], out.split("\n\n")[1].splitlines()
    assert header.startswith(
        "Products contract axis -1, as in weights [outputs, inputs]; use --axis"
    )
    assert [line.split()[0] for line in first[2:]] == RECIPES.split(",")
    code, out, _ = run(capsys, "compare", str(checkpoint), "--recipes", RECIPES, "--csv")
    assert len(list(csv.DictReader(io.StringIO(out)))) == 27
    assert "\x1b" not in out


def test_html_report_escapes_names_and_needs_no_other_file(
    capsys, checkpoint: pathlib.Path, tmp_path: pathlib.Path
):
    page = tmp_path / "r.html"
    arguments = ("compare", str(checkpoint), "--recipes", RECIPES, "--html", str(page))
    assert run(capsys, *arguments)[0] == 0
    text = page.read_text()
    assert "<b>[red]" not in text
    assert "&lt;b&gt;[red]\\x1b" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<p>Products contract axis -1, as in weights [outputs, inputs]" in text
    assert list(tmp_path.iterdir()) == [page]


def test_axis_option_equals_transposed_weight(capsys, tmp_path: pathlib.Path):
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    kernel, weight = tmp_path / "kernel.npy", tmp_path / "weight.npy"
    np.save(kernel, w)
    np.save(weight, w.T.copy())
    recipes = ("--recipes", "int4_g32,int8_channel")
    flax = compared(capsys, str(kernel), *recipes, "--axis", "-2")
    torch = compared(capsys, str(weight), *recipes)
    assert (flax["axis"], torch["axis"]) == (-2, -1)
    for ours, theirs in zip(flax["tensors"], torch["tensors"], strict=True):
        assert ours["max_error"] == theirs["max_error"]
        assert ours["mse"] == pytest.approx(theirs["mse"])
        assert ours["bits"] == theirs["bits"]
    wrong = compared(capsys, str(kernel), "--recipes", "int4_g32")
    assert wrong["tensors"][0]["mse"] != pytest.approx(flax["tensors"][0]["mse"])
    drawn = ("plot", "compression", "--file", str(kernel), *recipes, "--axis", "-2")
    code, _, err = run(capsys, *drawn, "-o", str(tmp_path / "p.svg"))
    assert (code, err) == (0, "")
    code, _, err = run(capsys, "plot", "number_line", "--axis", "-2", "-o", str(tmp_path / "p.svg"))
    assert code == 2
    assert "has no --axis" in err


def test_report_explains_missing_picture(capsys, tmp_path: pathlib.Path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {"exact": np.ones((64, 64), np.float32), "w": rng.normal(size=(4, 64)).astype("f4")}
    path, page = tmp_path / "a.safetensors", tmp_path / "r.html"
    safetensors.numpy.save_file(arrays, path)
    arguments = ("compare", str(path), "--recipes", "int8_tensor,bfloat16", "--html", str(page))
    code, _, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    text = page.read_text()
    assert "<h2>Bits and SQNR of w</h2>" in text
    assert "<h2>Bits and SQNR of exact</h2>" not in text
    assert text.index("<td>w</td>") < text.index("<td>exact</td>")
    code, out, err = run(capsys, *arguments, "--exclude", "w")
    assert code == 0
    assert "int8_tensor" in out
    assert "no picture" in err
    assert "no picture" in page.read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, *arguments)
    assert code == 0
    for text in (err, page.read_text().replace("&#x27;", "'")):
        assert "no picture" in text
        assert "pip install matplotlib" in text


def test_totals_at_every_magnitude(capsys, tmp_path: pathlib.Path):
    w = np.random.default_rng(0).normal(size=(16, 64))
    for size in (1e-41, 1e-22, 1.0, 1e20, 1e37):
        path = tmp_path / "a.npz"
        np.savez(path, a=np.float32(w * size), b=np.float32(w[::-1] * size))
        result = compared(capsys, str(path), "--recipes", "int8_tensor")
        (total,) = result["totals"]
        a, _ = result["tensors"]
        assert total["sqnr_db"] == pytest.approx(json_value(a, "sqnr_db"), abs=1e-4)
        assert a["power"] == pytest.approx(np.mean(np.square(np.float64(np.float32(w * size)))))


def test_error_explains_excluded_tensors(capsys, checkpoint: pathlib.Path):
    _, _, err = run(capsys, "compare", str(checkpoint), "--include", "w", "--exclude", "weight|row")
    assert "1 dtype I64" in err
    assert "excluded" in err
    assert "not included" in err


def test_sigterm_removes_temporary_files(
    capsys, checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(comparing, "html", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    page = tmp_path / "r.html"
    code, _, _ = run(
        capsys, "compare", str(checkpoint), "--recipes", "int8_token", "--html", str(page)
    )
    assert code == 143
    assert [*tmp_path.iterdir()] == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_failure_leaves_old_report(
    capsys, checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
):
    page = tmp_path / "r.html"
    page.write_text("old")
    for error, code in ((OSError(28, "No space left"), 1), (KeyboardInterrupt(), 130)):
        # The error occurs while tensors are compared or while the page is written.
        for owner, name in ((comparing, "html"), (comparing, "totals")):
            with monkeypatch.context() as patch:

                def fails(*_, error=error):
                    raise error

                patch.setattr(owner, name, fails)
                arguments = ("compare", str(checkpoint), "--recipes", "bfloat16")
                got, _, err = run(capsys, *arguments, "--html", str(page))
            assert got == code
            assert err.count("\n") == 1
            assert list(tmp_path.iterdir()) == [page]
            assert page.read_text() == "old"


def test_kill_leaves_old_file(tmp_path: pathlib.Path):
    page = tmp_path / "r.html"
    page.write_text("old")
    code = (
        "import os, signal, sys; from jaxq.cli._output import atomic\n"
        "with atomic(sys.argv[1]) as f:\n"
        "    f.write('half' * 100000); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(page)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert page.read_text() == "old"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["formats", "float8_e4m3f"], "Did you mean float8_e4m3fn"),
        (["formats", "--values"], "needs the names"),
        (["formats", "--values", "float16"], "at most 8 bits"),
        (["show", "x", "--in", "int4"], "is not a number"),
        (["show", "0x3f", "--in", "int4"], "--bits 0x3f"),
        (
            ["show", "--bits", "0x1f", "--in", "int4"],
            "0x1f is not a code of int4; codes are 0x0 to 0xf",
        ),
        (["show", "--bits", "1.5", "--in", "int4"], "a bit pattern is"),
        (["show", "1"], "--in"),
        (["show", "1", "--in", ","], "separated by commas"),
        (["compare", "none.safetensors"], "No such file"),
        (["compare", "none.txt"], "No such file"),
        (["compare", "x.npy", "--recipes", "int9"], "No recipe or format is"),
        (["compare", "x.npy", "--worst", "0"], "at least 1"),
        (["compare", "x.npy", "--json", "--csv"], "not allowed with"),
        (["memory"], "name a model"),
        (["memory", "llama"], "Did you mean llama-2-7b"),
        (["memory", "--params", "-7e9"], "a number of parameters of at least 0"),
        (["fits", "--devices", "abacus"], "No device is named"),
        (["dance"], "invalid choice"),
        (["plot", "nothing-of-the-kind", "-o", "a.png"], "Known: bit_layouts"),
        (["plot", "nubmer_line", "-o", "a.png"], "Did you mean number_line"),
    ],
)
def test_invalid_arguments_exit_with_2(capsys, argv: list[str], text: str):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert text in err
    assert err.startswith("jaxq: ")
    assert err.count("\n") == 1


def test_invalid_files_and_patterns(capsys, checkpoint: pathlib.Path, tmp_path: pathlib.Path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:-5])
    cases = {
        (str(cut),): "bytes",
        (str(checkpoint), "--include", "["): "regular expression",
        (str(checkpoint), "--include", "nothing"): "no floating-point tensor",
        (str(checkpoint), "--html", str(tmp_path)): "folder",
        (str(checkpoint), "--html", str(tmp_path / "no" / "r.html")): "No such file",
    }
    for arguments, text in cases.items():
        code, out, err = run(capsys, "compare", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert text in err


def test_failure_prints_one_line_without_debug(capsys, monkeypatch):
    def fails(_):
        raise RuntimeError("it\nbroke")

    monkeypatch.setattr(output, "print_json", fails)
    monkeypatch.setattr("jaxq.cli._formats.print_json", fails)
    code, _, err = run(capsys, "formats", "int4", "--json")
    assert (code, err) == (1, "jaxq: RuntimeError: it broke (--debug shows where)\n")
    with pytest.raises(RuntimeError):
        main(["formats", "int4", "--json", "--debug"])


def test_formats_command_lists_formats_and_values(capsys):
    _, out, _ = run(capsys, "formats", "--json")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(FORMATS)
    _, out, _ = run(capsys, "formats", "--values", "float4_e2m1fn", "--json")
    values = json.loads(out)["float4_e2m1fn"]
    got = np.array([v["value"] for v in values])
    np.testing.assert_array_equal(
        got, np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(float)
    )
    assert values[9] == {"hex": "0x9", "binary": "1 00 1", "value": -0.5}


@pytest.mark.parametrize("name", ["float8_e4m3fn", "bfloat16", "float8_e5m2"])
def test_show_matches_ml_dtypes(capsys, name: str):
    dtype = np.dtype(name)
    numbers = ["0.1", "-0.3", "1e-3", "-1e-3", "1000", "-0", "inf", "-inf", "nan"]
    _, out, _ = run(capsys, "show", *numbers, "--in", name, "--json")
    for text, row in zip(numbers, json.loads(out), strict=True):
        x = np.float64(text)
        value = x.astype(dtype)
        bits = int(value.view(f"u{dtype.itemsize}"))
        if not np.isnan(value):
            assert int(row["code"], 16) == bits
            np.testing.assert_equal(json_value(row, "value"), float(value))
        text = "".join(part["bits"] for part in row["fields"])
        assert text == f"{int(row['code'], 16):0{8 * dtype.itemsize}b}"
        if np.isfinite(value):
            info = ml_dtypes.finfo(dtype)
            for side, end in (("below", info.min), ("above", info.max)):
                near = np.nextafter(value, dtype.type(end))
                expected = math.nan if value == end else float(near)
                np.testing.assert_array_equal(json_value(row, side), expected)
            assert row["error"] == float(value) - x


def test_show_bits_inverts_show(capsys):
    for name in ("float32", "tf32", "int4", "nf4", "posit8", "ocp_int8"):
        _, out, _ = run(capsys, "show", "0.625", "--in", name, "--json")
        (there,) = json.loads(out)
        _, out, _ = run(capsys, "show", "--bits", there["code"], "--in", name, "--json")
        (back,) = json.loads(out)
        assert back == {key: there[key] for key in back}
        assert there["below"] < there["value"] < there["above"]
        fmt = jaxq.get_format(name)
        assert sum(width for _, width in fields(fmt)) == fmt.bits


def test_show_command_takes_rounding_and_overflow(capsys):
    for options, value in (
        (["--rounding", "up"], "0.109375"),
        (["--rounding", "toward_zero"], "0.1015625"),
        (["--rounding", "stochastic", "--seed", "3"], "0.1"),
    ):
        _, out, _ = run(capsys, "show", "0.102", "--in", "float8_e4m3fn", *options)
        assert f"value    {value}" in out
    _, out, _ = run(capsys, "show", "1e30", "--in", "float8_e5m2", "--overflow", "saturate")
    assert "value    57344" in out
    _, out, _ = run(capsys, "show", "--bits", "0b0111_1111", "127", "--in", "float8_e4m3fn")
    assert out.count("value    nan") == 2


def test_memory_command_matches_arithmetic(capsys):
    _, out, _ = run(capsys, "memory", "--params", "7e9", "--recipes", "int4_g128", "--json")
    (row,) = json.loads(out)
    assert row["weights_gib"] == 7e9 * 4.25 / 8 / 2**30
    arguments = ["--recipes", "int4_g128", "--devices", "l4", "--context", "1000", "--json"]
    _, out, _ = run(capsys, "fits", "llama-3.1-8b", *arguments)
    (row,) = json.loads(out)
    expected = analysis.memory("llama-3.1-8b", "int4_g128", context=1000).total
    assert row["total_gib"] == expected / 2**30


def shell(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(argv, capture_output=True, text=True, check=False, **options)


def test_runs_as_process():
    """Checks `python -m jaxq`, a closed pipe and non-ASCII names on an ASCII terminal."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    done = shell(sys.executable, "-m", "jaxq", "--version", env=environment)
    assert (done.returncode, done.stdout) == (0, "jaxq 0.1.0\n")
    line = f"{sys.executable} -m jaxq formats | true; echo ${{PIPESTATUS[0]}}"
    done = shell("bash", "-c", line, env=environment)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_closed_streams_change_no_exit_code(tmp_path: pathlib.Path):
    target = tmp_path / "out.safetensors"
    quantize = f"quantize {small_file(tmp_path)} {target} --recipe int4_g32"
    done = shell("bash", "-c", f"{sys.executable} -m jaxq {quantize} >&-")
    assert (done.returncode, done.stderr, target.is_file()) == (0, "", True)
    # The error must not appear on stdout.
    done = shell("bash", "-c", f"{sys.executable} -m jaxq formats int44 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def small_file(folder: pathlib.Path) -> str:
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((8, 64)), "v": rng.standard_normal((4, 48)), "b": np.ones(4)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    path = folder / "in.safetensors"
    safetensors.numpy.save_file({**arrays, "step": np.arange(1)}, path)
    return str(path)


def test_quantize_refuses_a_file_without_tensors(capsys, tmp_path: pathlib.Path):
    source = tmp_path / "in.safetensors"
    safetensors.numpy.save_file({}, source)
    code, _, err = run(capsys, "quantize", str(source), "out.gguf", "--recipe", "q8_0")
    assert (code, "(the file has no tensors)" in err) == (2, True)


def test_quantize_writes_what_load_reads(capsys, tmp_path: pathlib.Path):
    source, target = small_file(tmp_path), tmp_path / "out.safetensors"
    code, out, _ = run(capsys, "quantize", source, str(target), "--recipe", "int4_g32", "--json")
    assert code == 0
    summary = json.loads(out)
    assert (summary["quantized"], summary["kept"]) == (1, 3)
    assert summary["bytes after"] == target.stat().st_size
    got, want = jaxq.load(target), safetensors.numpy.load_file(source)
    np.testing.assert_array_equal(
        got["w"].dequantize(), jaxq.fake_quant(want["w"], "int4_g32", axis=-1)
    )
    for name in ("v", "b", "step"):  # 32 does not divide 48.
        np.testing.assert_array_equal(got[name], want[name])


def test_quantize_keeps_big_endian_arrays_and_sorts_names(capsys, tmp_path: pathlib.Path):
    source, target = tmp_path / "in.npz", tmp_path / "out.safetensors"
    arrays = {"z": np.ones((8, 32), np.float32), "b": np.arange(5, dtype=">f4")}
    np.savez(source, **arrays)
    for path in (target, tmp_path / "out.gguf"):
        code, _, error = run(capsys, "quantize", str(source), str(path), "--recipe", "q8_0")
        assert code == 0, error
        with jaxq.interop.open_tensors(path) as file:
            kept = next(entry for entry in file.entries if entry.name == "b")
            np.testing.assert_array_equal(file.read(kept), np.arange(5))
    like = {"z": jaxq.quantize(arrays["z"], "q8_0"), "b": np.zeros(5, np.float32)}
    np.testing.assert_array_equal(jaxq.load(target, like=like)["b"], np.arange(5))


def test_importance_of_an_expert_without_tokens_is_uniform(capsys, tmp_path: pathlib.Path):
    x = np.random.default_rng(0).standard_normal((2, 4, 32)).astype(np.float32)
    source, target, matrix = (str(tmp_path / name) for name in ("x.npz", "x.gguf", "i.gguf"))
    np.savez(source, w=x)
    sums = np.stack([np.zeros(32), np.arange(1.0, 33)]).astype(np.float32)
    parts = {"w.in_sum2": sums, "w.counts": np.float32([[0], [4]])}
    tensors = [
        gguf.Tensor(name, "f32", array.shape, lambda array=array: array)
        for name, array in parts.items()
    ]
    gguf.write(matrix, tensors, {"general.architecture": "none"})
    arguments = ("--recipe", "q4_0", "--imatrix", matrix)
    assert run(capsys, "quantize", source, target, *arguments)[0] == 0
    with jaxq.interop.open_tensors(target) as file:
        got = file.read(file.entries[0])
    for i, weights in enumerate((np.ones(32, np.float32), sums[1] / 4)):
        want = jaxq.fake_quant(x[i], "q4_0", importance=weights)
        np.testing.assert_array_equal(got[i], want)
    code, _, error = run(
        capsys, "quantize", source, str(tmp_path / "y.safetensors"),
        "--recipe", "int4_g32", "--imatrix", matrix,
    )  # fmt: skip
    assert code == 2
    assert "--imatrix applies to the block types" in error


def test_quantize_writes_gguf_with_fallbacks_and_rules(capsys, tmp_path: pathlib.Path):
    source, target = small_file(tmp_path), tmp_path / "out.gguf"
    rules = tmp_path / "rules.json"
    rules.write_text('[["w", "q4_k"], ["v", null]]')
    code, out, _ = run(capsys, "quantize", source, str(target), "--rules", str(rules))
    assert code == 0
    assert "1 tensor: q5_0 in place of q4_k\n  w" in out
    code, out, _ = run(capsys, "inspect", str(target), "--json")
    assert code == 0
    listed = {row["tensor"]: row["dtype"] for row in json.loads(out)["tensors"]}
    assert listed == {"w": "Q5_0", "v": "F32", "b": "F32", "step": "I64"}
    assert json.loads(out)["metadata"]["general.architecture"] == "unknown"
    with jaxq.interop.open_tensors(target) as file:
        w = next(entry for entry in file.entries if entry.name == "w")
        want = jaxq.fake_quant(safetensors.numpy.load_file(source)["w"], "q5_0")
        np.testing.assert_array_equal(file.read(w), want)


def test_quantize_explains_wrong_arguments(capsys, tmp_path: pathlib.Path):
    source, target = small_file(tmp_path), str(tmp_path / "out.gguf")
    for arguments, message in [
        ([source, target], "needs --recipe NAME or --rules"),
        ([source, str(tmp_path / "out.bin"), "--recipe", "q4_0"], r"must end in .safetensors or"),
        ([source, target, "--recipe", "q4_k_m"], "Did you mean q4_k"),
        ([source, target, "--recipe", "fp8"], "No recipe is named"),
        ([source, target, "--recipe", "int8_token"], "GGUF has no type 'int8_token'"),
        ([source, target, "--recipe", "q4_0", "--axis", "-2"], "need --axis -1"),
        ([source, target, "--recipe", "q4_0", "--axis", "5"], "need --axis -1"),
    ]:
        code, _, error = run(capsys, "quantize", *arguments)
        assert code == 2
        assert message in error
    rules = tmp_path / "rules.json"
    rules.write_text('[["w", ["q4_0"]]]')
    code, _, error = run(capsys, "quantize", source, target, "--rules", str(rules))
    assert code == 2
    assert "it must be a list of pairs [expression, recipe or null]" in error
    assert not pathlib.Path(target).exists()


def test_inspect_and_recipes_print_tables(capsys, tmp_path: pathlib.Path):
    code, out, _ = run(capsys, "inspect", small_file(tmp_path))
    assert code == 0
    assert "4 tensors, 709 elements" in out
    code, out, _ = run(capsys, "recipes", "q4_k", "int4_g32")
    assert code == 0
    assert out.splitlines()[2].split()[:2] == ["q4_k", "4.5"]


def test_folders_of_safetensors_are_one_checkpoint(capsys, tmp_path: pathlib.Path):
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    for name, file in names.items():
        safetensors.numpy.save_file({name: np.ones((2, 32), np.float32)}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    for path in (tmp_path, index):
        code, out, _ = run(capsys, "compare", str(path), "--recipes", "int8_token", "--csv")
        assert code == 0
        assert [line.split(",")[0] for line in out.splitlines()] == ["tensor", "a", "b"]
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    code, _, error = run(capsys, "inspect", str(tmp_path))
    assert code == 2
    assert "other folders" in error


def test_parameters_may_be_written_with_a_unit(capsys):
    one, other = (run(capsys, "memory", "--params", text)[1] for text in ("7B", "7e9"))
    assert one == other


def test_rich_tables_are_drawn_only_if_they_fit(monkeypatch, capsys):
    """Checks that terminal tables use rich only if they fit, and print names without markup."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    output.print_table([{"name": "[red]n", "value": 1.5}], "title")
    out = capsys.readouterr().out
    assert "[red]n" in out
    assert "│" in out
    output.print_table([{"name": "[red]" + "n" * 200, "value": 1.5}], "title")
    out = capsys.readouterr().out
    assert "[red]" + "n" * 200 + "    1.5" in out
    assert "│" not in out


def test_documented_output_is_current():
    shown = cli_document.blocks(cli_document.PAGE.read_text())
    cheap = [pair for pair in shown if not cli_document.needs_a_file(pair[0])]
    assert len(cheap) >= 6
    for arguments, out in cheap:
        assert cli_document.output_of(arguments) == out
    assert all(out for arguments, out in shown if " -o " not in arguments)


def test_every_command_is_documented(capsys):
    text = cli_document.PAGE.read_text()
    _, out, _ = run(capsys, "--help")
    for name in re.findall(r"^    (\w+)  ", out, re.MULTILINE):
        assert f"jaxq {name}" in text


def test_documented_error_of_broken_file(capsys, tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("broken.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{}")
    _, _, err = run(capsys, "compare", "broken.safetensors")
    assert err in cli_document.PAGE.read_text()


def test_plot_command_lists_and_draws_every_picture(capsys, tmp_path: pathlib.Path):
    pytest.importorskip("matplotlib")
    plots = importlib.import_module("jaxq.analysis.plots")
    code, out, _ = run(capsys, "plot")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(plots.PLOTS)
    path = tmp_path / "a.svg"
    arguments = ("plot", "number_line", "--formats", "int4,float4_e2m1fn")
    assert run(capsys, *arguments, "-o", str(path))[0] == 0
    assert b"<svg" in path.read_bytes()
    for wrong in (("--recipes", "nf4_g64"), ("--file", "a.npy")):
        code, _, err = run(capsys, *arguments, *wrong, "-o", str(path))
        assert (code, err.count("\n")) == (2, 1)
    assert run(capsys, *arguments)[0] == 2
    assert run(capsys, *arguments, "-o", "a.gif")[0] == 2


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_plot_writes_the_same_bytes_on_another_day(capsys, tmp_path, monkeypatch, kind: str):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"a.{kind}"
    files = []
    for day in (0, 1):
        # matplotlib takes the date from this variable.
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86_400 * day))
        assert run(capsys, "plot", "number_line", "--formats", "int2", "-o", str(path))[0] == 0
        files.append(path.read_bytes())
    assert files[0] == files[1]
