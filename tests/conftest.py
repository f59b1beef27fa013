"""Settings of the whole suite: eight CPU devices, and JAX at its strictest."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def eager():
    """A test without jit."""
    with jax.disable_jit():
        yield
