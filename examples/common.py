"""Shared code of the examples: data, a network, the loop over batches, and output."""

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
    sys.exit(f"This example needs {error.name}: pip install '.[examples]'")

__all__ = [
    "BATCH",
    "BLUE",
    "GRAY",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "Console",
    "Figure",
    "Params",
    "Table",
    "arguments",
    "format_percent",
    "init",
    "load",
    "logits",
    "networks",
    "over_batches",
    "plt",
    "progress",
    "show",
]

BATCH = 64
OUT = pathlib.Path("out")  # The default folder of pictures, which git ignores.
# From the palette of Okabe and Ito.
BLUE, ORANGE, GREEN, GRAY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#767676", "#CC79A7"
# Inverts the lightness of an SVG and keeps its hues, as docs/_static/jaxq.css does.
DARK = "<style>svg { filter: invert(0.9) hue-rotate(180deg) }</style>"

Params = list[dict[str, jax.Array]]


def load() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns training and test images `[n, 64]` in [0, 1] and their labels, split 3 to 1."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = jnp.asarray(digits.data[order] / 16, jnp.float32)
    y = jnp.asarray(digits.target[order], jnp.int32)
    split = len(order) * 3 // 4
    return x[:split], y[:split], x[split:], y[split:]


def init(key: jax.Array, sizes: Sequence[int]) -> Params:
    """Returns He-initialized parameters of a network with the given layer sizes."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
        for k, (n, m) in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def networks(keys: jax.Array, sizes: Sequence[int]) -> Params:
    """Returns initialized parameters of one network per key, stacked along the first axis."""
    return jax.jit(jax.vmap(lambda key: init(key, sizes)))(keys)


def logits(
    params: Params,
    x: jax.Array,
    weight: Callable[[jax.Array], jax.Array] = lambda w: w,
    activation: Callable[[jax.Array], jax.Array] = lambda a: a,
) -> jax.Array:
    """Returns logits `[batch, 10]`.

    Args:
      params: the parameters of `init`.
      x: the images, `[batch, 64]`.
      weight: a function applied to the weights of every layer. Default: the identity.
      activation: a function applied to the inputs of every layer. Default: the identity.
    """
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
    """Scans `step(state, rows)` over shuffled batches of n rows and stacks its outputs."""
    steps = n // BATCH

    def epoch(state: Any, key: jax.Array) -> tuple[Any, Any]:
        order = jax.random.permutation(key, n)[: steps * BATCH]
        return jax.lax.scan(step, state, order.reshape(steps, BATCH))

    return jax.lax.scan(epoch, state, jax.random.split(key, epochs))


def arguments(
    doc: str | None,
    argv: Sequence[str] | None,
    picture: str | None = None,
    **options: tuple[int | str, str],
) -> argparse.Namespace:
    """Parses the command line of an example.

    Args:
      doc: the docstring of the example; its first line is the help text.
      argv: the arguments; None takes those of the command line.
      picture: the default file name of the picture; None if the example draws none.
      **options: the default and the help text of each option, which has the default's type.
    """
    parser = argparse.ArgumentParser(description=str(doc).splitlines()[0])
    for name, (default, meaning) in options.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default})"
        )
    parser.add_argument(
        "--short", action="store_true", help="a quick run with fewer cases and steps"
    )
    if picture is not None:
        path = OUT / picture
        parser.add_argument(
            "--output", type=pathlib.Path, default=path, help=f"the picture (default {path})"
        )
    return parser.parse_args(argv)


@contextlib.contextmanager
def progress(total: int, first: str = "training") -> Iterator[Callable[[str], None]]:
    """Shows a progress bar and yields a function that advances it and sets its label."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task(first, total=total)
        yield lambda label: bar.update(task, advance=1, description=label)


def show(table: Table, figure: Figure, path: pathlib.Path, dark: bool = False) -> None:
    """Prints a table, writes a picture and prints its path.

    Args:
      table: the table to print.
      figure: the picture.
      path: the file of the picture; its suffix is the kind.
      dark: True also writes the variant of an SVG for dark pages, with "-dark" in its name.
    """
    console = Console()
    console.print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_svg, dates = path.suffix == ".svg", {".svg": "Date", ".pdf": "CreationDate"}
    metadata = {dates[path.suffix]: None} if path.suffix in dates else None
    with mpl.rc_context({"svg.hashsalt": "jaxq"}):  # The same bytes every time.
        figure.savefig(path, dpi=130, metadata=metadata)
    plt.close(figure)
    console.print(f"Picture: {path}")
    if dark and is_svg:
        variant = path.with_stem(f"{path.stem}-dark")
        variant.write_text(path.read_text().replace("<style", f"{DARK}<style", 1))
        console.print(f"Picture: {variant}")


def format_percent(values: np.ndarray) -> str:
    """Formats the mean and the standard deviation of fractions over seeds in percent."""
    return f"{100 * values.mean():5.1f} ± {100 * values.std():.1f}"
