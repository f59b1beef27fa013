"""Inputs for the tests of `jaxq.ptq`."""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp


def normal(seed: int, *shape: int) -> np.ndarray:
    """Returns normally distributed float32 numbers as a NumPy array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gated(params, x):
    """Scans over layers with two products of one input, and one of their result."""

    def layer(x, w):
        gate = jnp.einsum("td,dhk->thk", x, w["gate"]).reshape(len(x), -1)
        return x + (jax.nn.silu(gate) * (x @ w["up"].T)) @ w["down"], None

    return lax.scan(layer, x, params["layers"])[0] @ params["head"]


def gated_params(hidden: int) -> dict:
    """Returns the parameters of `gated` for 8 inputs, with this number of hidden channels."""
    layers = {
        "gate": normal(1, 2, 8, 2, hidden // 2),
        "up": normal(2, 2, hidden, 8),
        "down": normal(3, 2, hidden, 8) / 8,
    }
    return {"layers": layers, "head": normal(4, 8, 3)}
