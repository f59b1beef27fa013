"""Runs of `jaxq.ptq.quantize_weights` that were interrupted and continued."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from tests.ptq_data import normal

pytestmark = pytest.mark.unoptimized

RULES = "int4_channel"


def model(w, x):
    x, _ = lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, w["layers"])
    return jax.nn.relu(x @ w["twice"]) @ w["twice"] @ w["out"]


PARAMS = {"layers": normal(0, 2, 8, 8), "twice": normal(1, 8, 8), "out": normal(2, 8, 8)}
BATCHES = [normal(3, 20, 8), normal(4, 20, 8)]


def test_interrupted_run_continues_with_the_same_result(tmp_path: pathlib.Path):
    plain, expected = ptq.quantize_weights(model, RULES, solver="qep")(PARAMS, BATCHES)
    folder, names = tmp_path / "run", []

    def interrupt(row: ptq.SolvedProduct) -> None:
        names.append(row.product)
        if len(names) == 3:
            raise KeyboardInterrupt

    def solve(progress=None):
        return ptq.quantize_weights(model, RULES, solver="qep", progress=progress, resume=folder)(
            PARAMS, BATCHES
        )

    with pytest.raises(KeyboardInterrupt):
        solve(interrupt)
    count = len([*folder.iterdir()])
    for _ in range(2):  # Goes on, and then takes all that can be taken.
        packed, report = solve()
        assert str(report) == str(expected)
        assert jax.tree.structure(packed) == jax.tree.structure(plain)
        for actual, other in zip(jax.tree.leaves(packed), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(actual, other)
    assert len([*folder.iterdir()]) == count + 1  # Products of a shared weight have no file.


def test_stored_products_are_not_solved_again(tmp_path: pathlib.Path):
    solve = ptq.quantize_weights(model, RULES, resume=tmp_path / "run")
    solve(PARAMS, BATCHES)
    path = tmp_path / "run" / "00000.safetensors"
    entry = jaxq.load(path)
    entry["texts"]["unsolved_reason"] = "from the file"
    jaxq.save(path, entry)
    _, report = solve(PARAMS, BATCHES)
    assert [row.unsolved_reason for row in report.rows][:2] == ["from the file", ""]


@pytest.mark.parametrize("validation", [None, [normal(5, 20, 8)]], ids=["alone", "validation"])
def test_interrupted_learning_continues_with_the_same_result(tmp_path: pathlib.Path, validation):
    blocks, params = [lambda w, x: jnp.tanh(x @ w)] * 3, [*PARAMS["layers"], PARAMS["out"]]
    method = ptq.SignRound(steps=4)

    def learn(seed: int, batches=BATCHES, validation=validation, **options):
        learned = ptq.learn_rounding(blocks, RULES, method=method, **options)
        return learned(params, batches, key=jax.random.key(seed), validation=validation)

    def interrupt(row: ptq.LearnedBlock) -> None:
        if row.block == 2:
            raise KeyboardInterrupt

    expected, rows = learn(0)
    folder, seen = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        learn(0, progress=interrupt, resume=folder)
    packed, report = learn(0, progress=lambda row: seen.append(row.block), resume=folder)
    assert report == rows
    assert seen == [0, 1, 2, 2, 2, 2, 2]
    for leaf, other in zip(jax.tree.leaves(packed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)
    with pytest.raises(ValueError, match="of another run"):
        learn(1, resume=folder)
    with pytest.raises(ValueError, match="of another run"):  # The same data with other roles.
        learn(0, BATCHES[:1], [BATCHES[1], *(validation or [])], resume=folder)


def test_folder_of_another_run_is_an_error(tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    ptq.quantize_weights(model, RULES, solver="rtn", resume=folder)(PARAMS, BATCHES)
    changed = {**PARAMS, "out": 2 * PARAMS["out"]}
    for solver, params in (("gptq", PARAMS), ("rtn", changed)):
        solve = ptq.quantize_weights(model, RULES, solver=solver, resume=folder)
        with pytest.raises(ValueError, match=r"`resume` must be a new folder.*of another run"):
            solve(params, BATCHES)
    (tmp_path / "file").touch()
    solve = ptq.quantize_weights(model, RULES, solver="rtn", resume=tmp_path)
    with pytest.raises(ValueError, match="holds other files"):
        solve(PARAMS, BATCHES)


def test_run_continues_that_was_killed_while_it_stored_its_first_file(tmp_path: pathlib.Path):
    kill = "import os, pathlib; pathlib.Path.replace = lambda *_: os._exit(9)"
    code = (
        f"{kill}; import jaxq; from jaxq import ptq; import numpy as np; "
        "solve = ptq.quantize_weights(lambda w, x: x @ w['out'], 'int4_channel', resume='run'); "
        "solve({'out': np.ones((8, 8), np.float32)}, [np.ones((2, 8), np.float32)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert (done.returncode, len([*(tmp_path / "run").iterdir()])) == (9, 1)
    solve = ptq.quantize_weights(model, RULES, solver="rtn", resume=tmp_path / "run")
    for _ in range(2):
        _, report = solve(PARAMS, BATCHES)
    assert len(report.rows) == 5


def test_folder_of_a_run_with_other_closed_over_arrays_is_an_error(tmp_path: pathlib.Path):
    def with_embedding(array):
        return lambda w, x: jax.jit(lambda x: x @ array)(x) @ w["out"]

    folder, embedding = tmp_path / "run", normal(5, 8, 8)
    ptq.quantize_weights(with_embedding(embedding), RULES, resume=folder)(PARAMS, BATCHES)
    solve = ptq.quantize_weights(with_embedding(2 * embedding), RULES, resume=folder)
    with pytest.raises(ValueError, match="of another run"):
        solve(PARAMS, BATCHES)


def test_folder_of_a_run_with_other_levels_is_an_error(tmp_path: pathlib.Path):
    def rules(*levels):
        return jaxq.Recipe(jaxq.CodebookFormat("own", levels), jaxq.PerChannel())

    folder = tmp_path / "run"
    ptq.quantize_weights(model, rules(-1.0, 0.0, 0.5), resume=folder)(PARAMS, BATCHES)
    with pytest.raises(ValueError, match="of another run"):
        ptq.quantize_weights(model, rules(-1.0, 0.0, 0.25), resume=folder)(PARAMS, BATCHES)


def test_run_with_random_keys_is_resumed(tmp_path: pathlib.Path):
    def dropping(w, x, key):
        return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0.0) @ w["out"]

    solve = ptq.quantize_weights(dropping, RULES, resume=tmp_path / "run")
    (packed, _), (again, _) = (solve(PARAMS, [(BATCHES[0], jax.random.key(0))]) for _ in range(2))
    np.testing.assert_array_equal(packed["out"].codes, again["out"].codes)
    with pytest.raises(ValueError, match="of another run"):
        solve(PARAMS, [(BATCHES[0], jax.random.key(1))])
