"""One of two processes of two devices each, for `test_layouts`: `python -m tests.one_of_two`.

It quantizes, trains a step and calibrates on arrays that lie over all four devices; the first
process writes what came of it.
"""

import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxq
from jaxq.transforms import Observed
from tests.test_layouts import CALIBRATED, NORMAL, PARAMS, PRESETS, RECIPES, WEIGHTS, X, loss
from tools.collectives import Layout, stack, step

LAYOUT = Layout({"data": 4}, ("data",), (None, "data"), (None, None, "data"))


def merged(state: Observed) -> Observed:
    """The states of all hosts as one, the same on each."""
    stacked = multihost_utils.process_allgather(state)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(jax.process_count())]
    return functools.reduce(Observed.merge, parts)


def results() -> Any:
    """What the test compares, whole on every process."""
    of_params, of_data = LAYOUT.shardings
    params, x, weights, normal = jax.device_put(
        (PARAMS, X, WEIGHTS, NORMAL), (of_params, of_data, of_data, of_data)
    )
    own = np.split(X, jax.process_count())[jax.process_index()]
    observe = jax.jit(jaxq.observe(stack, CALIBRATED))
    whole, host = observe(params, x)[1], observe(PARAMS, own)[1]
    spread = {
        "fake_quant": [jax.jit(lambda x, r=r: jaxq.fake_quant(x, r))(normal) for r in PRESETS],
        "step": step(LAYOUT, RECIPES["tensor"], loss)(params, x, weights),
        "whole": whole.states,
    }
    hosts = {"hosts": merged(host).states}
    return hosts | multihost_utils.process_allgather(spread, tiled=True)


def main(number: int, port: str, path: str) -> None:
    """Joins the other process, computes, and writes the leaves of the results."""
    jax.distributed.initialize(f"localhost:{port}", 2, number, initialization_timeout=60)
    assert jax.device_count() == 4
    assert len({d.process_index for d in LAYOUT.mesh.devices.flat}) == 2
    found = results()
    if number == 0:
        np.savez(pathlib.Path(path), *jax.tree.leaves(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
