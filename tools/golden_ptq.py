"""Makes tests/golden/ptq.npz: a weight solved by Qwix's GPTQ and QEP, and zero points by hqq.

    pip install qwix==0.1.8
    pip install --no-deps hqq==0.2.8.post1  # It also needs torch, which may be the CPU's.
    python tools/golden_ptq.py

Qwix solves int4 with one scale per output, or per group of inputs. hqq starts from the scales and
minima that the recipe stores, and runs on the CPU. This version of hqq does not increase beta, so
it equals kappa = 1.
"""

# pyright: reportMissingImports=false

import pathlib
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

import jaxq

PATH = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "ptq.npz"
INPUTS, OUTPUTS, GROUP = 64, 16, 32


def gptq() -> dict[str, np.ndarray]:
    """Returns a weight, a Hessian and a drift, and Qwix's scales and codes."""
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core, qep_core

    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS))
    x = (x * np.exp(rng.standard_normal(INPUTS))).astype(np.float32)
    weight = rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    hessian = np.asarray(gptq_core.compute_hessian(jnp.asarray(x.T)))
    floats = x + 0.1 * x.std(0) * rng.standard_normal(x.shape).astype(np.float32)
    drift = np.asarray(qep_core.compute_qep_stats(x.T, floats.T)["hessian_delta"])
    corrected = np.asarray(qep_core.weight_correct(weight.T, hessian, drift)).T
    result = {"weight": weight, "hessian": hessian, "drift": drift}
    for prefix, solver_weight, tiles in (
        ("", weight, {}),
        ("group_", weight, {1: GROUP}),
        ("qep_", corrected, {}),
    ):
        how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes=tiles)
        solve = jax.jit(lambda w, h, how=how: gptq_core.quantize_weight(w, h, how)[0])
        solved = solve(solver_weight.T, hessian)
        result[f"{prefix}scale"] = np.asarray(solved.scale).T
        result[f"{prefix}codes"] = np.asarray(solved.qvalue.astype(jnp.int8)).T
    return result


def hqq() -> dict[str, np.ndarray]:
    """Returns a weight in groups, and hqq's minima and codes."""
    import torch
    from hqq.core.optimize import optimize_weights_proximal_legacy

    weight = np.random.default_rng(2).standard_t(3, (8, INPUTS)).astype(np.float32)
    weight[0, :GROUP] = 0
    scaling = jaxq.recipes.ScaleAndMin(stored=True)
    plain = jaxq.quantize(weight, jaxq.Recipe("uint4", jaxq.PerBlock(GROUP), scaling))
    scale = np.array(plain.scales, np.float32).reshape(-1, 1)
    scale = np.where(scale == 0, np.float32(1), scale)
    assert plain.zero_point is not None
    minimum = np.array(plain.zero_point.view(jnp.float16), np.float32).reshape(-1, 1)
    groups, inverse, zero = map(
        torch.from_numpy, (weight.reshape(-1, GROUP), 1 / scale, -minimum / scale)
    )
    codes, inverse, zero = optimize_weights_proximal_legacy(groups, inverse, zero, [0, 15], axis=1)
    return {
        "hqq_weight": weight,
        "hqq_minimum": (-zero / inverse).numpy(),
        "hqq_codes": codes.numpy().astype(np.uint8).reshape(weight.shape),
    }


if __name__ == "__main__":
    arrays: dict[str, Any] = {**gptq(), **hqq()}
    np.savez_compressed(PATH, **arrays)
