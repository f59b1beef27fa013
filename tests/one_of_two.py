"""One of two processes that compute together: `python -m tests.one_of_two NAME NUMBER PORT FOLDER`.

Each process has two devices, and writes the leaves of its results into the folder. `run_two` in
`tests/data.py` starts both.
"""

import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxq
from jaxq.models import Observed


def merged(state: Any) -> Any:
    """Gathers the states of all hosts and merges them."""
    stacked = multihost_utils.process_allgather(state)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(jax.process_count())]
    return functools.reduce(type(state).merge, parts)


def layouts() -> Any:
    """Quantizes, trains a step and calibrates on arrays sharded over all four devices."""
    from tests import test_layouts as tests
    from tools.collectives import Layout, stack, step

    layout = Layout({"data": 4}, ("data",), (None, "data"), (None, None, "data"))
    assert len({d.process_index for d in layout.mesh.devices.flat}) == 2
    of_params, of_data = layout.shardings
    params, x, weights, normal = jax.device_put(
        (tests.PARAMS, tests.X, tests.WEIGHTS, tests.NORMAL),
        (of_params, of_data, of_data, of_data),
    )
    own = np.split(tests.X, jax.process_count())[jax.process_index()]
    observe = jax.jit(jaxq.observe(stack, tests.CALIBRATED))
    whole, host = observe(params, x)[1], observe(tests.PARAMS, own)[1]
    assert isinstance(host, Observed)
    recipe = tests.RECIPES["tensor"]
    sharded = {
        "fake_quant": [
            jax.jit(lambda x, r=r: jaxq.fake_quant(x, r))(normal) for r in tests.PRESETS
        ],
        "step": step(layout, recipe, tests.loss)(params, x, weights),
        "whole": whole.states,
    }
    hosts = {"hosts": merged(host).states}
    return hosts | multihost_utils.process_allgather(sharded, tiled=True)


def ptq(folder: pathlib.Path) -> Any:
    """Solves a model on batches of which each process has a part."""
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxq._jax.processes import host_array
    from jaxq.ptq import observe
    from tests import test_ptq_sharded as tests

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def part(x: np.ndarray) -> np.ndarray:
        return np.split(x, jax.process_count())[jax.process_index()]

    def shared(x: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        return jax.make_array_from_process_local_data(sharding, part(x))

    _, seen = jax.jit(observe(tests.stepped, tests.RULES))(tests.EXACT, part(tests.INTEGERS[0]))
    batches = [shared(x) for x in tests.INTEGERS]
    columns = NamedSharding(mesh, PartitionSpec(None, None, "data"))
    params = {**tests.EXACT, "layers": jax.device_put(tests.EXACT["layers"], columns)}
    computed = tests.results(params, batches, shared(tests.KEEP), folder / "run")
    return {"merged": merged(seen), **jax.tree.map(host_array, computed)}


def main(name: str, number: int, port: str, folder: pathlib.Path) -> None:
    """Joins the other process, computes, and writes the leaves of the results."""
    jax.distributed.initialize(f"localhost:{port}", 2, number, initialization_timeout=60)
    assert jax.device_count() == 4
    computed = ptq(folder) if name == "ptq" else layouts()
    np.savez(folder / f"{number}.npz", *jax.tree.leaves(computed))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4]))
