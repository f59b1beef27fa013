"""Makes tests/golden/ptq.npz: a weight solved by Qwix's GPTQ, and zero points by hqq.

    pip install qwix==0.1.8
    pip install --no-deps hqq==0.2.8.post1  # It also needs torch, which may be the CPU's.
    python tools/golden_ptq.py

Qwix solves int4 with one scale per output. hqq starts from the scales and minima that the recipe
stores, and runs on the CPU. This version of hqq does not increase beta, so it equals kappa = 1.
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
    """Returns a weight, a Hessian, and Qwix's scales and codes."""
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS))
    x = (x * np.exp(rng.standard_normal(INPUTS))).astype(np.float32)
    weight = rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    hessian = np.asarray(gptq_core.compute_hessian(jnp.asarray(x.T)))
    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,))
    solve = jax.jit(lambda w, h: gptq_core.quantize_weight(w, h, how)[0])
    solved = solve(weight.T, hessian)
    codes = np.asarray(solved.qvalue.astype(jnp.int8)).T
    return {"weight": weight, "hessian": hessian, "scale": solved.scale.ravel(), "codes": codes}


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
