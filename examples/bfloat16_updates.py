"""Trains bfloat16 weights without a float32 copy, with updates rounded in two ways.

The same network learns handwritten digits at a small learning rate with float32 weights, with
bfloat16 weights whose updates are rounded to nearest, and with bfloat16 weights whose updates are
rounded stochastically. Adam, its state and the products are float32 in all three, so only the dtype
of the weights differs. With rounding to nearest, an update below half the spacing of bfloat16 at a
weight never changes the weight, and training stalls. Stochastic rounding changes as few weights per
step, but each of them by a whole spacing, so that on average the weights move by the full updates.

    python examples/bfloat16_updates.py [--seeds N] [--epochs N] [--short] [--output PICTURE]
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np
import optax
from common import BLUE, GRAY, ORANGE, Params, format_percent, plt
from jax import numpy as jnp

from jaxq.optim import apply_updates

SIZES = (64, 48, 32, 10)
RATE = 1e-4
# label: (dtype of the weights, rounding of the updates, color, line style)
WEIGHTS: dict[str, tuple[str, str, str, Any]] = {
    "float32": ("float32", "nearest_even", GRAY, "-"),
    "bfloat16 to nearest": ("bfloat16", "nearest_even", ORANGE, "-"),
    "bfloat16 stochastic": ("bfloat16", "stochastic", BLUE, (0, (5, 2))),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one kind of weights.

    Attributes:
      label: the kind of weights, a key of `WEIGHTS`.
      losses: the mean training loss, `[seeds, epochs]`.
      idle: the share of nonzero updates that did not change their weight, `[seeds, epochs]`.
      applied: the change of the weights, projected on the updates, as a share of the updates,
        `[seeds, epochs]`.
      accuracy: the test accuracy, a fraction, `[seeds]`.
    """

    label: str
    losses: np.ndarray
    idle: np.ndarray
    applied: np.ndarray
    accuracy: np.ndarray


def as_dtype(params: Params, dtype: str) -> Params:
    """Returns the parameters in a dtype."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def flat(params: Any) -> jax.Array:
    """Returns all parameters as one float32 vector."""
    return jnp.concatenate([p.astype(jnp.float32).ravel() for p in jax.tree.leaves(params)])


def train(
    params: Params, key: jax.Array, dtype: str, rounding: str, data: tuple, epochs: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Trains one seed.

    Returns:
      The loss, the share of idle updates and the applied share of each epoch, and the test
      accuracy.
    """
    x, y, x_test, y_test = data
    optimizer = optax.adam(RATE)

    def loss(params: Params, rows: jax.Array) -> jax.Array:
        logits = common.logits(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(state: Any, rows: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        params, moments, key = state
        key, rounding_key = jax.random.split(key)
        value, gradients = jax.value_and_grad(loss)(as_dtype(params, "float32"), rows)
        updates, moments = optimizer.update(gradients, moments)
        draw = rounding_key if rounding == "stochastic" else None
        new = apply_updates(params, updates, rounding=rounding, key=draw)
        change, requested = flat(new) - flat(params), flat(updates)
        idle = ((change == 0) & (requested != 0)).sum() / (requested != 0).sum()
        applied = jnp.vdot(change, requested) / jnp.vdot(requested, requested)
        return (new, moments, key), (value, idle, applied)

    params = as_dtype(params, dtype)
    state = (params, optimizer.init(as_dtype(params, "float32")), key)
    (params, *_), measured = common.over_batches(step, state, key, len(x), epochs)
    correct = common.logits(as_dtype(params, "float32"), x_test).argmax(-1) == y_test
    return tuple(m.mean(-1) for m in measured), correct.astype(jnp.float32).mean()


def run(seeds: int, epochs: int, report: Callable[[str], None]) -> list[Result]:
    """Trains every kind of weights, with all seeds of one kind in one compiled program."""
    data = common.load()
    keys = jax.random.split(jax.random.key(0), seeds)
    start = common.networks(keys, SIZES)
    results = []
    for label, (dtype, rounding, *_) in WEIGHTS.items():

        @jax.jit
        @jax.vmap
        def train_all(params, key, dtype=dtype, rounding=rounding):
            return train(params, key, dtype, rounding, data, epochs)

        measured, accuracy = train_all(start, keys)
        losses, idle, applied = map(np.asarray, measured)
        results.append(Result(label, losses, idle, applied, np.asarray(accuracy)))
        report(label)
    return results


def table(results: Sequence[Result]) -> common.Table:
    """Returns the table of results, one row per kind of weights."""
    grid = common.Table(
        title=f"Adam at a rate of {RATE:g}: mean ± std over seeds, shares in %",
        caption="bytes: per weight; idle: nonzero updates that change no weight;\n"
        "applied: change of the weights as a share of the updates",
    )
    grid.add_column("weights", no_wrap=True)
    for head in ("bytes", "last loss", "idle", "applied", "accuracy"):
        grid.add_column(head, justify="right", no_wrap=True)
    for r in results:
        last = r.losses[:, -1]
        grid.add_row(
            r.label,
            str(jnp.dtype(WEIGHTS[r.label][0]).itemsize),
            f"{last.mean():.3f} ± {last.std():.3f}",
            f"{100 * r.idle.mean():.1f}",
            f"{100 * r.applied.mean():.1f}",
            format_percent(r.accuracy),
        )
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Draws the loss, the idle updates and the applied share of the updates over epochs."""
    figure, mosaic = plt.subplot_mosaic("ab;ac", figsize=(9, 5), layout="constrained")
    panels = list(mosaic.values())
    epochs = np.arange(1, results[0].losses.shape[1] + 1)
    contents = (
        ("Training loss", "losses", 1.0),
        ("Nonzero updates that change no weight, %", "idle", 100.0),
        ("Applied share of the updates, %", "applied", 100.0),
    )
    for axes, (title, name, scale) in zip(panels, contents, strict=True):
        for r in results:
            *_, color, line = WEIGHTS[r.label]
            values = scale * getattr(r, name)
            width = 4 if r.label == "float32" else 2
            axes.plot(
                epochs, values.mean(0), color=color, linestyle=line, linewidth=width, label=r.label
            )
            axes.fill_between(
                epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0
            )
        axes.set_title(title, loc="left", fontsize=10.5)
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0 if name == "losses" else -4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    panels[1].set_ylim(top=104)
    panels[2].set_ylim(top=115)
    panels[0].legend(loc="lower left", frameon=False)
    figure.suptitle(
        f"Handwritten digits, Adam at a rate of {RATE:g} (bands: range of "
        f"{len(results[0].losses)} seeds)",
        x=0.01,
        ha="left",
    )
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(
        __doc__,
        argv,
        "bfloat16_updates.svg",
        seeds=(5, "networks"),
        epochs=(100, "passes over the data"),
    )
    seeds, epochs = (2, 20) if args.short else (args.seeds, args.epochs)
    with common.progress(len(WEIGHTS)) as report:
        results = run(seeds, epochs, report)
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
