"""Inputs for the tests of `jaxq.ptq`."""

import numpy as np


def normal(seed: int, *shape: int) -> np.ndarray:
    """Returns normally distributed float32 numbers as a NumPy array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
