"""Recipes of GGUF that search for their scales: bytes against libgguf, values against gguf."""

import functools
import pathlib

import chex
import jax
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from jax import numpy as jnp

import jaxq
from jaxq import ptq
from jaxq.interop import gguf
from jaxq.quantizers import slices
from jaxq.recipes import SignedScale, SuperBlocks
from tests import data
from tests.oracle import assert_same
from tools.golden_gguf import tensors

X, IMPORTANCE = tensors()
GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "gguf.npz")
PACK, UNPACK = jax.jit(gguf.pack), jax.jit(gguf.unpack, static_argnums=1)
BITS = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
BITS |= {"iq4_nl": 4.5, "iq4_xs": 4.25}
CASES = [f"{name}{suffix}" for name in BITS for suffix in ("", " importance")]


def quantized(case: str, x: np.ndarray = X, axis: int = -1) -> jaxq.Quantized:
    name, *important = case.split()
    return jaxq.quantize(x, name, importance=IMPORTANCE if important else None, axis=axis)


@pytest.mark.parametrize("case", data.each(CASES, ["q4_k"]))
def test_bytes_and_values_equal_libgguf(case: str):
    name, q = case.split()[0], quantized(case)
    np.testing.assert_array_equal(PACK(q), GOLDEN[case])
    assert q.nbytes == GOLDEN[case].nbytes == q.recipe.nbytes(X.shape)
    assert q.recipe.bits_per_weight(X.shape) == BITS[name]
    want = quants.dequantize(GOLDEN[case], GGMLQuantizationType[name.upper()])
    assert_same(q.dequantize(), want)


@pytest.mark.parametrize("name", data.each(BITS, ["q5_k"]))
def test_bytes_are_unpacked_and_packed_without_loss(name: str):
    for case in (name, f"{name} importance"):
        content = GOLDEN[case].reshape(6, -1)  # Two super-blocks in a row.
        q = UNPACK(content, name)
        np.testing.assert_array_equal(PACK(q), content)
        want = quants.dequantize(content, GGMLQuantizationType[name.upper()])
        assert_same(q.dequantize(), want)


@pytest.mark.parametrize("name", data.each(BITS, ["q4_k"]))
def test_super_blocks_without_importance_become_zero(name: str):
    """Checks what ggml does with inputs that a model never uses: it divides no zero by zero."""
    rows = np.arange(len(X)) % 3 > 0
    q = jaxq.quantize(X, name, importance=np.where(rows[:, None], IMPORTANCE, np.float32(0)))
    np.testing.assert_array_equal(PACK(q)[rows], GOLDEN[f"{name} importance"][rows])
    assert (np.asarray(q.dequantize())[~rows] == 0).all()


@jax.jit
def simulated(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the values of blocks along the first axis with an importance, and a gradient."""
    f = lambda x: jaxq.fake_quant(x, "q6_k", axis=0, importance=IMPORTANCE)
    y, pull = jax.vjp(f, x)
    return y, *pull(y)


def test_simulated_equals_stored_with_a_straight_through_gradient():
    y, gradient = simulated(X.T)
    want = quants.dequantize(GOLDEN["q6_k importance"], GGMLQuantizationType.Q6_K)
    assert_same(np.asarray(y).T, want)
    assert_same(gradient, y)


def test_numbers_that_are_not_finite_affect_no_other_super_block():
    x = X.copy()
    clean = np.asarray(simulated(x.T)[0]).T
    x[2, 7], x[3, 8], x[4] = np.nan, np.inf, 0
    dirty = np.asarray(simulated(x.T)[0]).T
    assert np.isnan(dirty[2:4]).all()
    assert (dirty[4] == 0).all()
    assert_same(np.delete(dirty, (2, 3, 4), 0), np.delete(clean, (2, 3, 4), 0))


def test_stored_tensor_is_cut_and_sharded_in_super_blocks():
    q = UNPACK(GOLDEN["q5_k"].reshape(6, -1), "q5_k")
    values = np.asarray(q.dequantize())
    np.testing.assert_array_equal(q[2:4].second[1], q.second[1][2:4])
    part = slices(q)
    assert part is not None
    assert_same(part.take(1, 32 * 9, 64), values[:, 288:352])
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    for spec, want in (((None, "a"), (6, 1)), (("a",), (3, 2))):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        placed = jax.device_put(q, jaxq.quantized_sharding(q, sharding))
        assert {s.data.shape for s in placed.second[0].addressable_shards} == {want}
        assert_same(placed.dequantize(), values)


def test_codes_of_slices_may_be_the_lowest():
    q = UNPACK(GOLDEN["q3_k"].reshape(6, -1), "q3_k")
    part = slices(q)
    assert part is not None
    assert (np.asarray(jaxq.decode(q.unpack(), "int3")) == -4).any()
    assert_same(part.take(0, 0, 6), q.dequantize())


def test_slices_of_tables_equal_the_whole():
    q = UNPACK(GOLDEN["iq4_xs"].reshape(6, -1), "iq4_xs")
    part = slices(q)
    assert part is not None
    assert_same(part.take(1, 256, 256), q.dequantize()[:, 256:])


@pytest.mark.slow
def test_importance_of_calibration_data_reaches_the_search():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((32, 256)) * np.sqrt(IMPORTANCE)).astype(np.float32)
    model = lambda w, x: jnp.split(x @ w, 3, axis=1)
    solver = ptq.RTN(search=ptq.ImportanceMatrix())
    packed, report = ptq.quantize_weights(model, "q6_k", solver=solver)(X.T, [x])
    statistics = ptq.collect(x)
    want = jaxq.quantize(X, "q6_k", importance=statistics.square / 32)
    # Zeros of blocks with scale 0 may have another sign.
    np.testing.assert_array_equal(packed.dequantize().T, want.dequantize())
    assert report.rows[0].loss < report.rows[0].rtn


@pytest.mark.slow
def test_parts_of_a_fused_leaf_have_their_own_importance():
    def model(w, x):
        first, second = jnp.split(w, 2, axis=1)
        return jnp.tanh(x @ first), (2 * x) @ second

    x = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    solver = ptq.RTN(search=ptq.ImportanceMatrix())
    packed, _ = ptq.quantize_weights(model, "q4_k", solver=solver)(X.T, [x])
    square = ptq.collect(x).square / 32
    first = jaxq.quantize(X[:6], "q4_k", importance=square).dequantize()
    second = jaxq.quantize(X[6:], "q4_k", importance=4 * square).dequantize()
    np.testing.assert_array_equal(packed.dequantize().T, np.concatenate([first, second]))


@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_empty_tensors_stay_empty(shape: tuple[int, ...]):
    q = jaxq.quantize(np.zeros(shape, np.float32), "q4_k")
    chex.assert_shape(q.dequantize(), shape)
    assert q.nbytes == 0


def test_another_rounding_mode_rounds_by_the_stored_scales():
    down = jaxq.Recipe("int6", jaxq.PerBlock(16), SuperBlocks("q6_k"), rounding="down")
    y, want = jaxq.quantize(X, down), gguf.unpack(GOLDEN["q6_k"], "q6_k")
    np.testing.assert_array_equal(y.scale, want.scale)
    units = X.reshape(12, 16, 16) / np.where(want.scales == 0, 1, want.scales)[..., None]
    codes = np.clip(np.floor(units), -32, 31).reshape(12, 256)
    got = jaxq.decode(y.unpack(), "int6")
    used = np.repeat(np.asarray(want.scales) != 0, 16, 1)
    np.testing.assert_array_equal(np.where(used, got, 0), np.where(used, codes, 0))


def test_invalid_arguments_raise():
    recipe = functools.partial(jaxq.Recipe, "uint4", scaling=SuperBlocks("q4_k"))
    tiles = jaxq.Recipe("int4", jaxq.PerBlock((4, 32)), SignedScale())
    for make, message in [
        (lambda: SuperBlocks("q4"), "`rule` must be .q2_k"),
        (lambda: jaxq.Recipe("int4", scaling=SuperBlocks("q4_k")), "element format 'uint4'"),
        (lambda: jaxq.quantize(X, recipe(jaxq.PerBlock(64))), r"blocks of 32 .*PerBlock\(32\)"),
        (lambda: jaxq.quantize(X, recipe()), "blocks along one axis"),
        (lambda: jaxq.quantize(X[:, :64], "q4_k"), "256 divides.* Use 'q5_0'"),
        (lambda: jaxq.quantize(X, "q4_k", importance=IMPORTANCE[:5]), "one weight for each"),
        (lambda: jaxq.quantize(X.T, "q4_k", axis=0, importance=X.T[:5]), "one weight for each"),
        (lambda: jaxq.quantize(X, "q8_0", importance=IMPORTANCE), "search of GGUF.* got q8_0"),
        (lambda: jaxq.quantize(X, "mxfp4_ggml", importance=IMPORTANCE), "search of GGUF"),
        (lambda: jaxq.quantize(X, tiles, importance=IMPORTANCE), "along one axis.* got blocks of"),
        (lambda: jaxq.quantize(X, "q4_k", scale=1.0), "computes its scales"),
        (lambda: ptq.ImportanceMatrix().check("f", jaxq.get_recipe("q4_0")), "such as 'q4_k'"),
        (lambda: ptq.ImportanceMatrix().check("f", jaxq.get_recipe("mxfp4_ggml")), "got mxfp4"),
        (lambda: ptq.ScaleSearch().check("f", jaxq.get_recipe("q4_k")), "ImportanceMatrix"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            make()
