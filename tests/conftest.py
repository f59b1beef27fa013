"""Settings of the test suite: eight CPU devices, strict promotion, a cache of compiled programs."""

import gc
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import chex
import jax
import pytest
from jax._src.interpreters import mlir

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


class _Contexts(threading.local):
    """Lets ten programs share one MLIR context, as JAX 0.12 and later do by themselves.

    JAX 0.10 creates a context for each program, which takes a tenth of the processor time of the
    tests and half of their memory. Remove this class when JAX 0.12 is the oldest supported version.
    """

    def __init__(self, create: Callable[[], Any]):
        self.create = create
        self.uses = 0

    def __call__(self) -> Any:
        if self.uses % 10 == 0:
            self.context = self.create()
        self.uses += 1
        return self.context


if jax.__version_info__ < (0, 12):
    mlir.make_ir_context = _Contexts(mlir.make_ir_context)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimize", action="store_true", help="compile all files with optimizations")


class _Compilations:
    """Chooses XLA's optimizations for each test, and limits the memory of compiled programs.

    Programs are compiled without most optimizations, which takes a quarter less time, except
    in tests marked `optimized` and, with the option `--optimize` that `make verify` passes, in all
    tests not marked `unoptimized`.

    JAX's caches are cleared after 1500 compilations, because all programs together take gigabytes,
    and when the optimizations change, because they are not part of the keys of these caches.
    """

    def __init__(self, optimize: bool):
        self.optimize = optimize
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, _: float, **__: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        unoptimized = item.get_closest_marker("unoptimized")
        optimized = item.get_closest_marker("optimized") or (self.optimize and not unoptimized)
        if jax.config.read("jax_disable_most_optimizations") == bool(optimized):
            jax.clear_caches()
            jax.config.update("jax_disable_most_optimizations", not optimized)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        if self.count > 1500:
            jax.clear_caches()
            self.count = 0


def pytest_configure(config: pytest.Config) -> None:
    # Registered as a plugin, because a hook in this file would not run for the doctests of `jaxq`.
    config.pluginmanager.register(_Compilations(config.getoption("--optimize")))


@pytest.fixture
def eager():
    """Disables jit during a test."""
    with jax.disable_jit():
        yield
