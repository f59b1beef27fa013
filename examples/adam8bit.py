"""Trains a network on handwritten digits by Adam, whose state is stored in 8-bit blocks.

One network is trained from the same weights on the same batches with four kinds of Adam state:

- float32;
- both moments in 8-bit dynamic codes, the default of `jaxq.optim.quantize_state`;
- "mixed": the first moment in linear int8, the second in dynamic codes;
- "linear": both moments in linear codes.

The example shows the loss curves and the bytes of the state. Linear codes suit the first moment. By
default `quantize_state` stores the square root of the second moment and rounds no positive value to
0. The linear codes here store the second moment itself. Its values span many decades, so small ones
become 0, and Adam divides by them.

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
from common import BLUE, GRAY, GREEN, ORANGE, Params, format_percent, plt
from jax import numpy as jnp

import jaxq
from jaxq.optim import quantize_state

SIZES = (64, 256, 256, 10)
RATE = 1e-3
BLOCKS = jaxq.PerBlock(256)
INT8, UINT8 = jaxq.Recipe("int8", BLOCKS), jaxq.Recipe("uint8", BLOCKS)
UDYNAMIC8 = jaxq.Recipe("udynamic8", BLOCKS)
ADAM = optax.adam(RATE)
# label: (optimizer, color, line style). In optax `mu` and `nu` are Adam's first and second moment.
OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, str, Any]] = {
    "float32": (ADAM, GRAY, "-"),
    "8-bit dynamic": (quantize_state(ADAM), BLUE, (0, (5, 2))),
    "8-bit mixed": (
        quantize_state(ADAM, [("/mu/", INT8), ("/nu/", UDYNAMIC8)]),
        GREEN,
        (0, (1, 1.5)),
    ),
    "8-bit linear": (
        quantize_state(ADAM, [("/mu/", INT8), ("/nu/", UINT8)], second_moments=None),
        ORANGE,
        "-",
    ),
}

SHORT = ("float32", "8-bit dynamic", "8-bit linear")


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one optimizer.

    Attributes:
      label: the optimizer, a key of `OPTIMIZERS`.
      losses: the mean training loss, `[seeds, epochs]`.
      accuracy: the test accuracy, a fraction, `[seeds]`.
      bytes: the bytes of each part of the state.
    """

    label: str
    losses: np.ndarray
    accuracy: np.ndarray
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        """The bytes of the whole state."""
        return sum(self.bytes.values())


def train(
    params: Params, key: jax.Array, tx: optax.GradientTransformation, data: tuple, epochs: int
) -> tuple[jax.Array, jax.Array]:
    """Trains one seed and returns the loss of each epoch and the test accuracy."""
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
    correct = common.logits(params, x_test).argmax(-1) == y_test
    return losses.mean(-1), correct.astype(jnp.float32).mean()


def state_bytes(tx: optax.GradientTransformation) -> dict[str, int]:
    """Returns the bytes of the large arrays of each moment, and of all small arrays together.

    Small arrays have fewer than 4,096 elements; `quantize_state` leaves them in float32.
    """
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
    """Trains with every optimizer, with all seeds of one optimizer in one compiled program."""
    data = common.load()
    keys = jax.random.split(jax.random.key(0), seeds)
    start = common.networks(keys, SIZES)
    results = []
    for label in labels:
        tx = OPTIMIZERS[label][0]
        train_all = jax.jit(
            jax.vmap(lambda params, key, tx=tx: train(params, key, tx, data, epochs))
        )
        losses, accuracy = map(np.asarray, train_all(start, keys))
        results.append(Result(label, losses, accuracy, state_bytes(tx)))
        report(label)
    return results


def table(results: Sequence[Result]) -> common.Table:
    """Returns the table of results, one row per optimizer."""
    grid = common.Table(title="Adam's state on handwritten digits: mean ± std over seeds")
    grid.add_column("state", no_wrap=True)
    for head in ("bytes", "bytes per\nweight", "last loss", "accuracy, %"):
        grid.add_column(head, justify="right", no_wrap=True)
    weights = sum(n * m + m for n, m in itertools.pairwise(SIZES))
    for r in results:
        last = r.losses[:, -1]
        grid.add_row(
            r.label,
            f"{r.total:,}",
            f"{r.total / weights:.2f}",
            f"{last.mean():.4f} ± {last.std():.4f}" if last.mean() < 10 else f"{last.mean():.0e}",
            format_percent(r.accuracy),
        )
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Draws the training loss over epochs on the left and the bytes of the state on the right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 4), layout="constrained", width_ratios=(1.1, 1)
    )
    top = 3.0
    for r in results:
        _, color, line = OPTIMIZERS[r.label]
        epochs = np.arange(1, r.losses.shape[1] + 1)
        with np.errstate(invalid="ignore"):
            diverged = not np.nanmean(r.losses[:, -1]) < top
        if diverged:
            digit, exponent = f"{r.losses[:, 0].mean():.0e}".split("e")
            first = f"{digit} · $10^{{{int(exponent)}}}$"
            left.annotate(
                f"{r.label} diverges:\na loss of {first} in the first epoch",
                xy=(epochs[0], top),
                xytext=(epochs[0] + 0.15 * epochs[-1], 1.6),
                color=color,
                arrowprops={"arrowstyle": "->", "color": color, "relpos": (0, 0.5)},
                va="center",
            )
            continue
        left.fill_between(
            epochs, r.losses.min(0), r.losses.max(0), color=color, alpha=0.15, linewidth=0
        )
        width = 4 if line == "-" else 2
        left.plot(
            epochs, r.losses.mean(0), color=color, linestyle=line, linewidth=width, label=r.label
        )
    left.set_yscale("log")
    left.set_ylim(top=top)
    left.set_xlim(left=0.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("epoch")
    left.set_title(f"Training loss (bands: range of {len(results[0].losses)} seeds)", loc="left")
    left.legend(loc="lower left", frameon=False)

    rows = list(reversed(results))
    heights, start = np.arange(len(rows)), np.zeros(len(rows))
    for part, color in zip(rows[0].bytes, (BLUE, "#56B4E9", "#BBBBBB"), strict=True):
        sizes = np.array([r.bytes[part] for r in rows]) / 1000
        right.barh(heights, sizes, left=start, height=0.55, color=color, label=part)
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
    right.legend(loc="lower right", frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if axes is left else "x", color="#eeeeee")
        axes.set_axisbelow(True)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(
        __doc__, argv, "adam8bit.svg", seeds=(5, "networks"), epochs=(20, "passes over the data")
    )
    labels = SHORT if args.short else tuple(OPTIMIZERS)
    seeds, epochs = (2, 3) if args.short else (args.seeds, args.epochs)
    with common.progress(len(labels)) as report:
        results = run(labels, seeds, epochs, report)
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
