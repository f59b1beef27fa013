"""Trees with quantized arrays in files, and back, bit for bit."""

import json
import math
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from jax import numpy as jnp

import jaxq

W = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
# Recipes that between them use every array and every kind of record that a Quantized may hold.
RECIPES = {
    "nvfp4": "nvfp4",
    "nf4_dq": "nf4_dq",
    "q5_1": "q5_1",
    "outliers": jaxq.Recipe("int4", jaxq.PerChannel((0,)), outliers=jaxq.Outliers(0.1)),
    "zero point": jaxq.Recipe("uint8", scaling=jaxq.Affine()),
}
DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e4m3b11fnuz", "int4", "float4_e2m1fn", "bool"]
DTYPES += ["complex64", "uint32", "float16"]


@pytest.fixture(scope="module")
def tree() -> dict:
    packed = jax.jit(lambda x: {name: jaxq.quantize(x, r) for name, r in RECIPES.items()})(W)
    plain = {name: np.arange(6).reshape(2, 3).astype(np.dtype(name)) for name in DTYPES}
    empty = {"list": [], "none": None, "tuple": (), "row": np.zeros((0, 3), np.float32)}
    return {"packed": packed, "plain": jax.device_put(plain), "empty": empty, "scale": 0.1, 7: "on"}


def same(got, want) -> None:
    chex.assert_trees_all_equal_structs(got, want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if hasattr(theirs, "dtype"):
            assert ours.dtype == theirs.dtype
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        else:
            assert ours == theirs


def test_tree_returns_bit_for_bit(tree: dict, tmp_path: pathlib.Path):
    tree = {key: value for key, value in tree.items() if key != 7}
    jaxq.save(tmp_path / "a.safetensors", tree)
    got = jaxq.load(tmp_path / "a.safetensors")
    same(got, tree)
    assert type(got["empty"]["list"]) is list
    assert got["packed"]["outliers"].recipe == RECIPES["outliers"]
    assert isinstance(got["packed"]["nvfp4"].codes, jax.Array)


def test_file_loads_in_a_new_process(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    tree = jaxq.quantize(W, "nvfp4")
    state = jaxq.optim.quantize_state(optax.identity(), min_size=1).init({"w": W})
    jaxq.save(path, (tree, state._replace(inner=()), jaxq.ptq.collect(W, hessian=False)))
    code = f"import jaxq; q, s, t = jaxq.load({str(path)!r}); print(bytes(q.dequantize()).hex())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == np.asarray(tree.dequantize()).tobytes().hex()


def test_other_programs_see_the_arrays(tree: dict, tmp_path: pathlib.Path):
    jaxq.save(tmp_path / "a.safetensors", {"w": tree["packed"]["q5_1"], "b": W})
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert sorted(file.keys()) == ["b", "w/codes", "w/scale", "w/zero_point"]
        np.testing.assert_array_equal(file.get_tensor("b"), W)
        assert json.loads(file.metadata()["jaxq"])["version"] == 1


def test_optimizer_state_and_keys_return_into_a_tree_like_them(tmp_path: pathlib.Path):
    drawing = jaxq.Recipe("int8", rounding="stochastic")
    feedback = jaxq.optim.quantize_gradients(drawing, key=jax.random.key(1))
    tx = optax.chain(feedback, jaxq.optim.quantize_state(optax.adam(1e-3), min_size=64))
    state = jax.jit(tx.init)({"w": W})
    jaxq.save(tmp_path / "a.safetensors", state)
    like = jax.eval_shape(tx.init, {"w": W})
    got = jaxq.load(tmp_path / "a.safetensors", like=like)
    keyless = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    same(jax.tree.map(keyless, got), jax.tree.map(keyless, state))
    with pytest.raises(ValueError, match="Pass `like`"):
        jaxq.load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="`like` must have"):
        jaxq.load(tmp_path / "a.safetensors", like={"w": W})


def test_python_values_come_from_the_file_and_not_from_like(tmp_path: pathlib.Path):
    class State(NamedTuple):
        step: int
        best: float
        name: str
        w: jax.Array

    path, like = tmp_path / "a.safetensors", State(0, math.inf, "", jnp.zeros(2))
    for saved in (State(5, 0.5, "run", jnp.ones(2)), State(5, math.nan, "run", jnp.ones(2))):
        jaxq.save(path, saved)
        got = jaxq.load(path, like=like)
        assert isinstance(got, State)
        assert str(got) == str(saved)
    with pytest.raises(ValueError, match="`like` must have the structure"):
        jaxq.load(path, like=like._replace(name=1))


def test_frozen_rules_return(tmp_path: pathlib.Path):
    rules = [("w", jaxq.ProductRecipe("int8_tensor", "int8_channel"))]
    model = lambda params, x: x @ params["w"]
    _, observed = jaxq.observe(model, rules)({"w": W.T}, W)
    frozen = jaxq.freeze(rules, observed)
    jaxq.save(tmp_path / "a.safetensors", frozen)
    got = jaxq.load(tmp_path / "a.safetensors")
    same(got, frozen)
    assert got.rules == frozen.rules


def test_arrays_are_placed_on_shardings(tmp_path: pathlib.Path):
    q = jaxq.quantize(W, "int4_g32")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    rows = jax.NamedSharding(mesh, jax.P("x"))
    jaxq.save(tmp_path / "a.safetensors", {"q": q, "w": W, "n": 3})
    got = jaxq.load(tmp_path / "a.safetensors", sharding=rows)
    assert got["w"].sharding == got["q"].codes.sharding == rows
    whole = jax.NamedSharding(mesh, jax.P())
    got = jaxq.load(tmp_path / "a.safetensors", sharding={"q": rows, "w": whole, "n": whole})
    assert got["q"].scale.sharding == rows
    assert got["w"].sharding == whole
    same(got["q"], q)


def test_interrupted_save_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch):
    path = tmp_path / "a.safetensors"
    jaxq.save(path, {"w": W})
    before = path.read_bytes()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        jaxq.save(path, {"w": 2 * W})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def with_metadata(path: pathlib.Path, **changes) -> None:
    """Changes the JSON text that a file holds beside its tensors."""
    with safetensors.safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        content = json.loads(file.metadata()["jaxq"])
    text = json.dumps({**content, **changes})
    safetensors.numpy.save_file(arrays, path, {"jaxq": text})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, but this jaxq reads version 1"),
        ({"tree": {"type": "models.Nothing", "children": []}}, "no class 'models.Nothing'"),
        ({"tree": {"type": "os.system", "children": [["a", None]]}}, "no class 'os.system'"),
        ({"tree": {"array": "b", "dtype": "float32"}}, "'b' is missing"),
        ({"tree": {"array": "w", "dtype": "object"}}, "unknown dtype 'object'"),
        ({"tree": {"array": "w", "dtype": "int4"}}, "must hold int4, got float32"),
        ({"tree": {"array": "w", "dtype": "finfo"}}, "unknown dtype 'finfo'"),
        ({"tree": {"array": "w", "dtype": "uint32", "key": "x"}}, "unknown kind 'x'"),
        ({"tree": {"type": "dict"}}, "damaged"),
        ({"tree": {"type": "dict", "children": [["a"]]}}, "damaged"),
        ({"tree": {"type": "quantizers.Quantized", "static": "", "children": []}}, "damaged"),
        ({"tree": [1]}, "damaged"),
    ],
)
def test_damaged_and_unknown_trees_are_refused(changes, message: str, tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    jaxq.save(path, {"w": W})
    with_metadata(path, **changes)
    with pytest.raises(ValueError, match=message):
        jaxq.load(path)


def test_files_of_other_programs_are_refused_by_name(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": W}, path)
    with pytest.raises(jaxq.interop.FileError, match=r"not written by jaxq\.save"):
        jaxq.load(path)


def test_trees_that_cannot_be_stored_raise(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    own = jaxq.Recipe("int8", rounding=lambda x, *_: x)
    for tree, message in [
        ({"f": print}, "leaves must be arrays, numbers or strings"),
        ({1.5: W}, "strings or integers"),
        (jaxq.quantize(W, own), "got a function"),
        ({"text": np.array(["a"])}, "must have a dtype of JAX, got <U1"),
        ({"wide": np.ones(2, np.longdouble)}, "must have a dtype of JAX, got float"),
        ({"record": np.zeros(2, [("x", "f4")])}, "must have a dtype of JAX"),
    ]:
        with pytest.raises(TypeError, match=message):
            jaxq.save(path, tree)
    assert not path.exists()


def test_equal_paths_get_distinct_names(tmp_path: pathlib.Path):
    tree = {"a/b": np.float32([1]), "a": {"b": np.float32([2])}, "__metadata__": np.float32([3])}
    jaxq.save(tmp_path / "a.safetensors", tree)
    same(jaxq.load(tmp_path / "a.safetensors"), jax.device_put(tree))


def test_orbax_restores_into_a_tree_of_shapes(tmp_path: pathlib.Path):
    """Checks that Orbax keeps the arrays; the recipes are in the target that it gets."""
    orbax = pytest.importorskip("orbax.checkpoint")
    quantize = lambda w: {"w": jaxq.quantize(w, "int4_g32")}
    tree = quantize(W)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", tree)
    with orbax.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(tmp_path / "step", jax.eval_shape(quantize, W))
    same(got, tree)


def test_empty_path_is_named_as_a_folder(tmp_path: pathlib.Path):
    for path in ("", ".", tmp_path):
        with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
            jaxq.save(path, {"w": W})


def test_file_that_a_killed_process_left_is_no_obstacle(tmp_path: pathlib.Path):
    """Saves with the number of the killed process, as in a container that was started again."""
    path = tmp_path / "a.safetensors"
    (tmp_path / f".{path.name}.{os.getpid()}.tmp").touch()
    jaxq.save(path, {"w": W})
    same(jaxq.load(path)["w"], W)


def test_abandoned_files_are_removed_and_those_in_use_stay(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    names = [f".{path.name}.0123abcd.tmp", f".{path.name}.4567cdef.tmp", f".{path.name}.mine.tmp"]
    old, recent, other = (tmp_path / name for name in names)
    for file in (old, recent, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (0, 0))
    jaxq.save(path, {"w": W})
    assert sorted(tmp_path.iterdir()) == sorted([recent, other, path])
    with jaxq.interop.atomic(path) as file:
        file.write(b"longer than ten minutes ago")
        file.flush()
        os.utime(file.name, (0, 0))
        jaxq.save(path, {"w": 2 * W})
        same(jaxq.load(path)["w"], 2 * W)
    assert path.read_bytes() == b"longer than ten minutes ago"
    assert sorted(tmp_path.iterdir()) == sorted([recent, other, path])


def test_replaced_file_keeps_its_permissions(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    jaxq.save(path, {"w": W})
    for mode in (0o600, 0o664):
        path.chmod(mode)
        jaxq.save(path, {"w": W})
        assert path.stat().st_mode & 0o777 == mode


def test_symbolic_link_stays_and_its_file_is_replaced(tmp_path: pathlib.Path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "a.safetensors", tmp_path / "disk" / "b.safetensors"
    link.symlink_to(target)
    for value in 1.0, 2.0:
        jaxq.save(link, {"w": jnp.full(2, value)})
        assert link.is_symlink()
        assert jaxq.load(target)["w"][0] == value
    assert [path.name for path in target.parent.iterdir()] == [target.name]
