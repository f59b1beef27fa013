"""Does Adam need 32 bits of memory a moment? Handwritten digits with its state in 8-bit blocks.

One network is trained from the same weights on the same batches by float32 Adam, by Adam with both
moments in 8-bit dynamic codes (`jaxq.optim.quantize_state` as it is), with the second moment so and
the first in linear int8 ("mixed"), and with both moments linear. Loss curves, and the bytes that
the state takes. Linear codes suit the first moment; of the second, which spans many decades, they
make zeros, by which Adam then divides.

    python examples/adam8bit.py [--seeds N] [--epochs N] [--short] [--output PICTURE]
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np
import optax
from common import BLUE, GREEN, GREY, ORANGE, Params, plt, spread
from jax import numpy as jnp

import jaxq
from jaxq.optim import quantize_state

SIZES = (64, 256, 256, 10)
RATE = 1e-3
BLOCKS = jaxq.PerBlock(256)
INT8, UINT8 = jaxq.Quantizer("int8", BLOCKS), jaxq.Quantizer("uint8", BLOCKS)
UDYNAMIC8 = jaxq.Quantizer("udynamic8", BLOCKS)
ADAM = optax.adam(RATE)
# label: (optimizer, colour, line). `mu` and `nu` are what optax calls Adam's moments.
OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, str, Any]] = {
    "float32": (ADAM, GREY, "-"),
    "8-bit dynamic": (quantize_state(ADAM), BLUE, (0, (5, 2))),
    "8-bit mixed": (
        quantize_state(ADAM, [("/mu/", INT8), ("/nu/", UDYNAMIC8)]),
        GREEN,
        (0, (1, 1.5)),
    ),
    "8-bit linear": (quantize_state(ADAM, [("/mu/", INT8), ("/nu/", UINT8)]), ORANGE, "-"),
}

SHORT = ("float32", "8-bit dynamic", "8-bit linear")


@dataclasses.dataclass(frozen=True)
class Result:
    """How one optimizer fared: a loss for each seed and epoch, test accuracies, bytes of state."""

    label: str
    losses: np.ndarray
    accuracy: np.ndarray
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of state."""
        return sum(self.bytes.values())


def train(
    params: Params, key: jax.Array, tx: optax.GradientTransformation, data: tuple, epochs: int
) -> tuple[jax.Array, jax.Array]:
    """Loss of each epoch and test accuracy of one seed."""
    x, y, x_test, y_test = data

    def loss(params: Params, rows: jax.Array) -> jax.Array:
        logits = common.logits(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, rows)
        updates, moments = tx.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = (params, tx.init(params))
    (params, _), losses = common.over_batches(step, state, key, len(x), epochs)
    right = common.logits(params, x_test).argmax(-1) == y_test
    return losses.mean(-1), right.astype(jnp.float32).mean()


def bytes_of_state(tx: optax.GradientTransformation) -> dict[str, int]:
    """Bytes of each moment where it is quantized (or large enough to be), and of all the rest."""
    state = jax.eval_shape(lambda key: tx.init(common.init(key, SIZES)), jax.random.key(0))
    parts = {"first moment": 0, "second moment": 0, "small arrays": 0}
    for row in jaxq.tree_report(state).rows[:-1]:
        large = row.bytes_before >= 4 * 4096
        moment = "first moment" if "mu/" in row.path else "second moment"
        parts[moment if large else "small arrays"] += row.bytes_after
    return parts


def run(
    labels: Sequence[str], seeds: int, epochs: int, report: Callable[[str], None]
) -> list[Result]:
    """Trains with every optimizer, all seeds in one compiled program."""
    data = common.load()
    keys = jax.random.split(jax.random.key(0), seeds)
    start = common.networks(keys, SIZES)
    results = []
    for label in labels:
        tx = OPTIMIZERS[label][0]
        study = jax.jit(jax.vmap(lambda params, key, tx=tx: train(params, key, tx, data, epochs)))
        losses, accuracy = map(np.asarray, study(start, keys))
        results.append(Result(label, losses, accuracy, bytes_of_state(tx)))
        report(label)
    return results


def table(results: Sequence[Result]) -> common.Table:
    """The results, one optimizer a row."""
    grid = common.Table(title="Adam's state on handwritten digits: mean ± std over seeds")
    grid.add_column("state", no_wrap=True)
    for head in ("bytes", "a weight", "last loss", "accuracy, %"):
        grid.add_column(head, justify="right", no_wrap=True)
    weights = sum(n * m + m for n, m in itertools.pairwise(SIZES))
    for r in results:
        last = r.losses[:, -1]
        grid.add_row(
            r.label,
            f"{r.total:,}",
            f"{r.total / weights:.2f}",
            f"{last.mean():.4f} ± {last.std():.4f}" if last.mean() < 10 else f"{last.mean():.0e}",
            spread(r.accuracy),
        )
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Left the training loss over epochs, right the bytes of state."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1.25, 1)
    )
    top = 3.0
    for r in results:
        _, colour, line = OPTIMIZERS[r.label]
        epochs = np.arange(1, r.losses.shape[1] + 1)
        with np.errstate(invalid="ignore"):
            lost = not np.nanmean(r.losses[:, -1]) < top
        if lost:  # It leaves the picture within the first epoch.
            first = r.losses[:, 0].mean()
            left.annotate(
                f"{r.label} leaves the picture:\na loss of {first:.0e} in the first epoch",
                xy=(epochs[0], top),
                xytext=(epochs[0] + 0.15 * epochs[-1], 1.6),
                color=colour,
                arrowprops={"arrowstyle": "->", "color": colour, "relpos": (0, 0.5)},
                va="center",
            )
            continue
        left.fill_between(
            epochs, r.losses.min(0), r.losses.max(0), color=colour, alpha=0.15, linewidth=0
        )
        width = 4 if line == "-" else 2
        left.plot(
            epochs, r.losses.mean(0), color=colour, linestyle=line, linewidth=width, label=r.label
        )
    left.set_yscale("log")
    left.set_ylim(top=top)
    left.set_xlim(left=0.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("epoch")
    left.set_title(f"Training loss (bands: all {len(results[0].losses)} seeds)", loc="left")
    left.legend(loc="lower left", frameon=False)

    rows = list(reversed(results))
    heights, start = np.arange(len(rows)), np.zeros(len(rows))
    for part, colour in zip(rows[0].bytes, (BLUE, "#56B4E9", "#BBBBBB"), strict=True):
        sizes = np.array([r.bytes[part] for r in rows]) / 1000
        right.barh(heights, sizes, left=start, height=0.55, color=colour, label=part)
        start = start + sizes
    base = results[0].total
    for height, r in zip(heights, rows, strict=True):
        share = "" if r.total == base else f"  ({100 * r.total / base:.0f} %)"
        right.text(
            r.total / 1000 + base / 60000, height, f"{r.total / 1000:.0f} kB{share}", va="center"
        )
    right.set_yticks(heights, [r.label for r in rows])
    right.set_xlim(0, base / 1000 * 1.2)
    right.set_ylim(-0.6, len(rows) + 0.1)
    right.set_xlabel("kB")
    right.set_title("Bytes of state", loc="left")
    right.legend(loc="upper right", frameon=False, ncols=3, fontsize=9, columnspacing=1)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if axes is left else "x", color="#eeeeee")
        axes.set_axisbelow(True)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(
        __doc__, argv, "adam8bit.png", seeds=(5, "networks"), epochs=(20, "passes over the data")
    )
    labels = SHORT if args.short else tuple(OPTIMIZERS)
    seeds, epochs = (2, 3) if args.short else (args.seeds, args.epochs)
    with common.progress(len(labels)) as report:
        results = run(labels, seeds, epochs, report)
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
