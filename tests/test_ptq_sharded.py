"""Statistics of tokens that are spread over devices and processes."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq import ptq
from tests import data
from tests.oracle import assert_same

pytestmark = pytest.mark.unoptimized

RULES = "int4_channel"
TOKENS = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
KEEP = np.arange(32) % 5 > 0
PARAMS = {
    "layers": np.random.default_rng(1).standard_normal((2, 8, 8)).astype(np.float32),
    "out": np.random.default_rng(2).standard_normal((8, 4)).astype(np.float32),
}


def model(params, x):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["out"]


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])


def check_equal(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)


def test_statistics_of_shards_merge_into_those_of_all_tokens():
    observe = ptq.observe(model, RULES, mask=lambda *_: KEEP)
    _, expected = observe(PARAMS, TOKENS)
    assert expected["out"].tokens == KEEP.sum()

    def observe_shard(params, x, keep):
        _, inputs = ptq.observe(model, RULES, mask=lambda *_: keep)(params, x)
        return inputs.gather("data")

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    gathered = jax.jit(jax.shard_map(observe_shard, mesh=mesh(AxisType.Auto), **specs))
    check_equal(gathered(PARAMS, TOKENS, KEEP), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_statistics_of_a_sharded_array_are_those_of_all_tokens(kind: AxisType):
    x = jax.device_put(TOKENS, NamedSharding(mesh(kind), P("data")))
    with jax.set_mesh(mesh(kind)):
        check_equal(jax.jit(ptq.collect)(x), ptq.collect(TOKENS))


@pytest.mark.slow
def test_weights_are_solved_on_sharded_batches():
    def sharded(x):
        return jax.device_put(x, NamedSharding(mesh(AxisType.Auto), P("data")))

    one, _ = ptq.quantize_weights(model, RULES, solver="gptaq")(PARAMS, [TOKENS, 2 * TOKENS])
    batches = [sharded(TOKENS), sharded(2 * TOKENS)]
    other, report = ptq.quantize_weights(model, RULES, solver="gptaq")(PARAMS, batches)
    assert [row.tokens for row in report.rows] == [64, 64, 64]
    for name, leaf in one.items():
        # Sums in another order may change a code that lies near the middle of two levels.
        assert np.mean(np.asarray(leaf.codes) != np.asarray(other[name].codes)) < 0.05


# Data whose sums are exact in any order: the weights have scales of 1 / 8.
INTEGERS = np.random.default_rng(3).integers(-3, 4, (2, 32, 8)).astype(np.float32)
EXACT = {
    name: np.concatenate(
        [np.full_like(w[..., :1, :], 7 / 8), np.clip(w[..., 1:, :], -0.8, 0.8)], -2
    )
    for name, w in PARAMS.items()
}


def stepped(params, x):
    """Returns the outputs of a model whose hidden values are small integers."""
    layer = lambda x, w: (jnp.clip(jnp.round(x @ w), -3, 3), None)
    return lax.scan(layer, x, params["layers"])[0] @ params["out"]


def results(params: Any, batches: list[Any], keep: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Returns statistics, packed weights and scaled weights.

    Args:
      params: the parameters.
      batches: the batches.
      keep: the mask of each batch.
      folder: a folder from which the second solution is resumed.
    """
    _, inputs = jax.jit(ptq.observe(stepped, RULES))(params, batches[0])
    solve = ptq.quantize_weights(
        lambda params, x, _: stepped(params, x),
        RULES,
        solver="gptaq",
        mask=lambda _, keep: keep,
        resume=folder,
    )
    packed, report = solve(params, [(x, keep) for x in batches])
    resumed, _ = solve(params, [(x, keep) for x in batches])
    scaled, _ = ptq.scale_inputs(stepped, RULES, method="smoothquant")(params, batches)
    return {
        "inputs": inputs,
        "packed": packed,
        "resumed": resumed,
        "scaled": scaled,
        "tokens": np.array([row.tokens for row in report.rows]),
    }


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path: pathlib.Path):
    """Gives each of two processes half of each batch and half of the columns of some weights."""
    expected = {
        "merged": ptq.observe(stepped, RULES)(EXACT, INTEGERS[0])[1],
        **results(EXACT, list(INTEGERS), KEEP, tmp_path / "one"),
    }
    assert np.array_equal(expected["tokens"], [2 * KEEP.sum()] * 3)
    for actual in data.run_two("ptq", tmp_path):
        pairs = zip(actual, jax.tree_util.tree_leaves_with_path(expected), strict=True)
        for own, (path, other) in pairs:
            if path[0].key == "scaled":  # The scales contain powers, whose last bit may differ.
                np.testing.assert_allclose(own, other, rtol=1e-6)
            else:
                assert_same(own, other)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"process0", "process1"}
