"""Builds the distributions, installs the wheel into a new environment, and runs the command."""

import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

import jaxq

pytestmark = pytest.mark.slow  # It downloads the dependencies.

ROOT = pathlib.Path(__file__).parent.parent


def run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    # PYTHONPATH could lead to this checkout instead of the installed package.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=variables, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_installs_and_runs(tmp_path: pathlib.Path):
    dist, environment = tmp_path / "dist", tmp_path / "environment"
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT, cwd=tmp_path)
    (wheel,) = dist.glob("jaxq-*-py3-none-any.whl")
    (source,) = dist.glob("jaxq-*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "jaxq/py.typed", "tests/test_install.py"} <= names

    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    binaries = environment / ("Scripts" if sys.platform == "win32" else "bin")
    run(binaries / "python", "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    assert jaxq.__version__ in run(binaries / "jaxq", "--version", cwd=tmp_path)
    assert "0.1015625" in run(
        binaries / "jaxq", "show", "0.1", "--in", "float8_e4m3fn", cwd=tmp_path
    )
    where = run(binaries / "python", "-c", "import jaxq; print(jaxq.__file__)", cwd=tmp_path)
    assert pathlib.Path(where.strip()).is_relative_to(environment)
