"""Settings of the test suite: eight CPU devices, strict promotion, a cache of compiled programs."""

import gc
import pathlib

import chex
import jax
import pytest

chex.set_n_cpu_devices(8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Workers share one cache, and a second run takes about a third of the processor time of the first.
# JAX 0.12 does not write its files atomically: it warns of an incomplete file and compiles again.
_CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
gc.set_threshold(50_000, 20, 50)  # Traced programs are many small objects, few of them garbage.


class _Compilations:
    """Clears JAX's caches after 600 compilations, because all programs together take gigabytes."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, _: float, **__: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        if self.count > 600:
            jax.clear_caches()
            self.count = 0


def pytest_configure(config: pytest.Config) -> None:
    # Registered as a plugin, because a hook in this file would not run for the doctests of `jaxq`.
    config.pluginmanager.register(_Compilations())


@pytest.fixture
def eager():
    """Disables jit during a test."""
    with jax.disable_jit():
        yield


@pytest.fixture(scope="module")
def unoptimized():
    """Disables most XLA optimizations in a file of large programs, which halves compile time.

    Must not be used in bitwise tests of casts, quantizers or products: optimizations may affect
    their bits.
    """
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
