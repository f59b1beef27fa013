"""Measures what statistics of a training step cost.

The model is the transformer of `examples/language_model.py`, its layers quantized by
`fp8_training`. The cases are the step alone; the step with a state of `jaxq.analysis.monitor` and
the default statistics, in steps with and without statistics; and the step with the comparison of
its gradient to the float one. Times and temporary memory are ratios to the step alone in the same
run. Each time is that of the fastest of several interleaved rounds, and each compile time is the
processor time of one compilation.

    python benchmarks/monitoring.py [--rounds N] [--batch N]
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxq
from jaxq.analysis import Monitoring, gradient_errors, monitor

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))

import language_model

RULES = [("^layers/", "fp8_training")]
BASE = "step"


class Case(NamedTuple):
    """A compiled case.

    Attributes:
      run: the function that runs it and waits for its result.
      compiling: the processor seconds of its tracing and compilation.
      memory: the bytes of its temporary memory, by XLA.
    """

    run: Callable[[], Any]
    compiling: float
    memory: int


def functions(params: Any, rows: jax.Array) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Returns the cases by name: functions and their arguments."""
    loss = language_model.loss
    state = monitor(loss, RULES, Monitoring(products="^layers/", every=2))(params, rows)

    def step(params: Any, rows: jax.Array) -> Any:
        return jax.value_and_grad(jaxq.quantize_fn(loss, RULES))(params, rows)

    def monitored(params: Any, rows: jax.Array, n: jax.Array) -> Any:
        def objective(params: Any, state: Any) -> jax.Array:
            return jaxq.quantize_fn(loss, state)(params, rows)

        return jax.value_and_grad(objective, (0, 1))(params, state.at(n))

    def compared(params: Any, rows: jax.Array) -> Any:
        value, gradient = step(params, rows)
        return value, gradient, gradient_errors(gradient, jax.grad(loss)(params, rows))

    return {
        BASE: (step, (params, rows)),
        "with statistics": (monitored, (params, rows, jnp.int32(0))),
        "without statistics": (monitored, (params, rows, jnp.int32(1))),
        "with gradient comparison": (compared, (params, rows)),
    }


def compile_case(function: Callable[..., Any], arguments: tuple) -> Case:
    """Returns a compiled case."""
    start = time.process_time()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.process_time() - start
    analysis = program.memory_analysis()
    memory = 0 if analysis is None else analysis.temp_size_in_bytes
    return Case(lambda: jax.block_until_ready(program(*arguments)), seconds, memory)


def main() -> None:
    """Runs the benchmark from its command line and prints the table."""
    parser = argparse.ArgumentParser(description="Measures the cost of statistics in training.")
    parser.add_argument("--rounds", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--batch", type=int, default=8, help="rows of 128 bytes (default 8)")
    arguments = parser.parse_args()
    params = language_model.init(jax.random.key(0))
    # With initial weights of 0 in the head, all cotangents in the layers would be 0.
    params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape) / 11
    data, _ = language_model.text()
    rows = language_model.windows(data, 1000 * jnp.arange(arguments.batch))
    cases = {
        name: compile_case(function, case_arguments)
        for name, (function, case_arguments) in functions(params, rows).items()
    }
    best = dict.fromkeys(cases, np.inf)
    for _ in track(range(arguments.rounds), description="measuring"):
        for name, case in cases.items():
            start = time.perf_counter()
            case.run()
            best[name] = min(best[name], time.perf_counter() - start)
    base, grid = cases[BASE], Table(title="Ratios to the quantized step alone")
    for head in ("case", "time", "compile time", "temporary memory"):
        grid.add_column(head, justify="left" if head == "case" else "right")
    for name, case in cases.items():
        ratios = (
            best[name] / best[BASE],
            case.compiling / base.compiling,
            case.memory / base.memory,
        )
        grid.add_row(name, *(f"{ratio:.2f}" for ratio in ratios))
    grid.caption = (
        f"Step: {1e3 * best[BASE]:.0f} ms, compiled in {base.compiling:.1f} s, "
        f"{base.memory / 2**20:.1f} MiB"
    )
    Console().print(grid)


if __name__ == "__main__":
    main()
