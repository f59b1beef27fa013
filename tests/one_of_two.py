"""One of the two processes of a test in `test_layouts`: `python -m tests.one_of_two`.

Each process has two devices. Together they quantize, train a step and calibrate on arrays sharded
over all four devices, and the first process writes the results.
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
from tests.test_layouts import CALIBRATED, NORMAL, PARAMS, PRESETS, RECIPES, WEIGHTS, X, loss
from tools.collectives import Layout, stack, step

LAYOUT = Layout({"data": 4}, ("data",), (None, "data"), (None, None, "data"))


def merged(state: Observed) -> Observed:
    """Gathers the calibration states of all hosts and merges them."""
    stacked = multihost_utils.process_allgather(state)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(jax.process_count())]
    return functools.reduce(Observed.merge, parts)


def results() -> Any:
    """Returns the results to compare, replicated on every process."""
    of_params, of_data = LAYOUT.shardings
    params, x, weights, normal = jax.device_put(
        (PARAMS, X, WEIGHTS, NORMAL), (of_params, of_data, of_data, of_data)
    )
    own = np.split(X, jax.process_count())[jax.process_index()]
    observe = jax.jit(jaxq.observe(stack, CALIBRATED))
    whole, host = observe(params, x)[1], observe(PARAMS, own)[1]
    sharded = {
        "fake_quant": [jax.jit(lambda x, r=r: jaxq.fake_quant(x, r))(normal) for r in PRESETS],
        "step": step(LAYOUT, RECIPES["tensor"], loss)(params, x, weights),
        "whole": whole.states,
    }
    hosts = {"hosts": merged(host).states}
    return hosts | multihost_utils.process_allgather(sharded, tiled=True)


def main(number: int, port: str, path: str) -> None:
    """Joins the other process, computes, and writes the leaves of the results."""
    jax.distributed.initialize(f"localhost:{port}", 2, number, initialization_timeout=60)
    assert jax.device_count() == 4
    assert len({d.process_index for d in LAYOUT.mesh.devices.flat}) == 2
    computed = results()
    if number == 0:
        np.savez(pathlib.Path(path), *jax.tree.leaves(computed))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
