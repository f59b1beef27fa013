"""What the examples share: the data, a network, the loop over batches, and how results look."""

import argparse
import contextlib
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

try:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"This example needs {error.name}: pip install 'jaxq[examples]'")

__all__ = [
    "BATCH",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "Console",
    "Figure",
    "Params",
    "Table",
    "arguments",
    "init",
    "load",
    "logits",
    "networks",
    "over_batches",
    "plt",
    "progress",
    "show",
    "spread",
]

BATCH = 64
IMAGES = pathlib.Path("docs/images")
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"  # Okabe and Ito's palette.

Params = list[dict[str, jax.Array]]


def load() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Training and test images `[n, 64]` in [0, 1] and labels, split 3 to 1, always the same."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = jnp.asarray(digits.data[order] / 16, jnp.float32)
    y = jnp.asarray(digits.target[order], jnp.int32)
    split = len(order) * 3 // 4
    return x[:split], y[:split], x[split:], y[split:]


def init(key: jax.Array, sizes: Sequence[int]) -> Params:
    """He-initialised weights."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
        for k, (n, m) in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def networks(keys: jax.Array, sizes: Sequence[int]) -> Params:
    """Initialised weights, a network for each key: one program for all that begin with them."""
    return jax.jit(jax.vmap(lambda key: init(key, sizes)))(keys)


def logits(
    params: Params,
    x: jax.Array,
    weight: Callable[[jax.Array], jax.Array] = lambda w: w,
    activation: Callable[[jax.Array], jax.Array] = lambda a: a,
) -> jax.Array:
    """Logits `[batch, 10]` for images `[batch, 64]`; every product's operands pass a function."""
    for i, layer in enumerate(params):
        x = activation(x) @ weight(layer["w"]) + layer["b"][None, :]
        if i < len(params) - 1:
            x = jax.nn.relu(x)
    return x


def over_batches(
    step: Callable[[Any, jax.Array], tuple[Any, Any]],
    state: Any,
    key: jax.Array,
    n: int,
    epochs: int,
) -> tuple[Any, Any]:
    """Scans `step(state, rows)` over shuffled batches of n rows; what it gives is stacked."""
    steps = n // BATCH

    def epoch(state: Any, key: jax.Array) -> tuple[Any, Any]:
        order = jax.random.permutation(key, n)[: steps * BATCH]
        return jax.lax.scan(step, state, order.reshape(steps, BATCH))

    return jax.lax.scan(epoch, state, jax.random.split(key, epochs))


def arguments(
    doc: str | None,
    argv: Sequence[str] | None,
    picture: str | None = None,
    **amounts: tuple[int, str],
) -> argparse.Namespace:
    """The command line that every example has, and amounts of its own: defaults and meanings."""
    parser = argparse.ArgumentParser(description=str(doc).splitlines()[0])
    for name, (default, meaning) in amounts.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{meaning} (default {default})"
        )
    parser.add_argument("--short", action="store_true", help="a quick run with fewer of everything")
    if picture is not None:
        parser.add_argument("--output", type=pathlib.Path, default=IMAGES / picture)
    return parser.parse_args(argv)


@contextlib.contextmanager
def progress(total: int, first: str = "training") -> Iterator[Callable[[str], None]]:
    """A progress bar that names what is running; one call of what it gives is one step."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task(first, total=total)
        yield lambda label: bar.update(task, advance=1, description=label)


def show(table: Table, figure: Figure, path: pathlib.Path) -> None:
    """Prints a table, writes a picture and says where it is."""
    console = Console()
    console.print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    console.print(f"Picture: {path}")


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds, in percent."""
    return f"{100 * values.mean():5.1f} ± {100 * values.std():.1f}"
