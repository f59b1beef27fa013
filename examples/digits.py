"""Compares the accuracy of fourteen formats on handwritten digits, rounded and retrained.

A small network learns scikit-learn's handwritten digits in float32. The example then measures, for
each format of weights and activations, the test accuracy after rounding alone and after
quantization-aware training from the float32 weights. This training quantizes the operands of every
product and uses the straight-through estimator. All seeds of a format train in one
compiled, vmapped program.

    python examples/digits.py [--seeds N] [--epochs N] [--short] [--output PICTURE]
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np
import optax
from common import BLUE, GRAY, ORANGE, Params, format_percent, plt
from jax import numpy as jnp

import jaxq

# With a format, values are cast without a scale; with None, nothing is quantized.
RecipeLike = str | jaxq.Recipe | jaxq.Format | None

SIZES = (64, 48, 32, 10)
PER_CHANNEL = jaxq.PerChannel((-1,))
# The recipe of the weights by label.
FORMATS: dict[str, RecipeLike] = {
    "float32": None,
    "bfloat16": jaxq.get_format("bfloat16"),
    "int8 per channel": "int8_channel",
    "int8 per tensor": "int8_tensor",
    "float8 e4m3": "fp8_e4m3_tensor",
    "float8 e5m2": "fp8_e5m2_tensor",
    "float6 e2m3": jaxq.Recipe("float6_e2m3fn"),
    "float6 e3m2": jaxq.Recipe("float6_e3m2fn"),
    "int5 per tensor": jaxq.Recipe("int5"),
    "int4 per tensor": "int4_tensor",
    "int4 per channel": "int4_channel",
    "float4 e2m1": jaxq.Recipe("float4_e2m1fn"),
    "int3 per channel": jaxq.Recipe("int3", PER_CHANNEL),
    "int2 per channel": jaxq.Recipe("int2", PER_CHANNEL),
}
SHORT = ("float32", "int8 per tensor", "int2 per channel")

Quantize = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one format.

    Attributes:
      label: the format, a key of `FORMATS`.
      bits_per_weight: the mean storage bits of a weight, including scales.
      sqnr_db: the signal-to-quantization-noise ratio of the weights in dB.
      rounded: the test accuracy after rounding alone, a fraction, `[seeds]`.
      trained: the test accuracy after quantization-aware training, a fraction, `[seeds]`.
    """

    label: str
    bits_per_weight: float
    sqnr_db: float
    rounded: np.ndarray
    trained: np.ndarray


def quantizers(recipe: RecipeLike) -> tuple[Quantize, Quantize]:
    """Returns the quantizers of the weights and of the activations for a recipe of the weights.

    Activations have one scale per tensor, because hardware that multiplies the codes requires it.
    With an integer recipe they are unsigned with a zero point, because most are never negative.
    """
    if recipe is None:
        return lambda w: w, lambda a: a
    if isinstance(recipe, jaxq.Format):
        cast = functools.partial(jaxq.cast, fmt=recipe)
        return cast, cast
    weights = jaxq.get_recipe(recipe)
    if isinstance(weights.element, jaxq.IntFormat):
        activations = jaxq.Recipe(f"uint{weights.element.bits}", scaling=jaxq.Affine())
    else:
        activations = weights
    return (
        lambda w: jaxq.fake_quant(w, weights),
        lambda a: jaxq.fake_quant(a, activations),
    )


def apply(params: Params, x: jax.Array, recipe: RecipeLike) -> jax.Array:
    """Returns the logits of the network with the operands of every product quantized."""
    return common.logits(params, x, *quantizers(recipe))


def accuracy(params: Params, x: jax.Array, y: jax.Array, recipe: RecipeLike) -> jax.Array:
    """Returns the share of images that are classified correctly."""
    return (apply(params, x, recipe).argmax(-1) == y).astype(jnp.float32).mean()


def sqnr(params: Params, recipe: RecipeLike) -> jax.Array:
    """Returns the signal-to-quantization-noise ratio of all weights together in dB."""
    weight, _ = quantizers(recipe)
    signal = sum((layer["w"] ** 2).sum() for layer in params)
    noise = sum(((layer["w"] - weight(layer["w"])) ** 2).sum() for layer in params)
    return 10 * jnp.log10(jnp.asarray(signal) / jnp.asarray(noise))


def train(
    params: Params,
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    recipe: RecipeLike,
    epochs: int,
    rate: float,
) -> Params:
    """Trains the quantized network by Adam with a cosine schedule and returns its parameters."""
    steps = epochs * (len(x) // common.BATCH)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(params: Params, rows: jax.Array) -> jax.Array:
        logits = apply(params, x[rows], recipe)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(state: Any, rows: jax.Array) -> tuple[Any, None]:
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, rows), moments)
        return (optax.apply_updates(params, updates), moments), None

    state = (params, optimizer.init(params))
    return common.over_batches(step, state, key, len(x), epochs)[0][0]


def run(
    labels: Sequence[str], seeds: int, epochs: int, report: Callable[[str], None]
) -> list[Result]:
    """Trains the float32 networks, then quantizes and retrains them in every format."""
    x, y, x_test, y_test = common.load()
    keys = jax.random.split(jax.random.key(0), seeds)
    learn = functools.partial(train, x=x, y=y, epochs=epochs)
    base = jax.jit(jax.vmap(lambda k: learn(common.init(k, SIZES), k, recipe=None, rate=4e-3)))(
        keys
    )

    results = []
    for label in labels:
        recipe = FORMATS[label]
        measure = jax.vmap(functools.partial(accuracy, x=x_test, y=y_test, recipe=recipe))

        @jax.jit
        def study(base, keys, recipe=recipe, measure=measure):
            tuned = jax.vmap(lambda p, k: learn(p, k, recipe=recipe, rate=2e-3))(base, keys)
            db = jax.vmap(functools.partial(sqnr, recipe=recipe))(base)
            return measure(base), measure(tuned), db

        rounded, trained, db = study(base, keys)
        shapes = list(itertools.pairwise(SIZES))
        counts = [n * m for n, m in shapes]
        bits = [bits_per_weight(recipe, shape) for shape in shapes]
        results.append(
            Result(
                label,
                float(np.average(bits, weights=counts)),
                float(np.mean(np.asarray(db))),
                np.asarray(rounded),
                np.asarray(trained),
            )
        )
        report(label)
    return results


def bits_per_weight(recipe: RecipeLike, shape: tuple[int, ...]) -> float:
    """Returns the storage bits of a weight, including scales."""
    if recipe is None:
        return 32.0
    if isinstance(recipe, jaxq.Format):
        return float(recipe.bits)
    return jaxq.get_recipe(recipe).bits_per_weight(shape)


def table(results: Sequence[Result]) -> common.Table:
    """Returns the table of results, one row per format."""
    grid = common.Table(title="Handwritten digits: test accuracy in %, mean ± std over seeds")
    grid.add_column("format", no_wrap=True)
    for head in ("bits per\nweight", "SQNR, dB", "rounded", "trained", "gain"):
        grid.add_column(head, justify="right", no_wrap=True)
    for r in results:
        gain = 100 * (r.trained.mean() - r.rounded.mean())
        grid.add_row(
            r.label,
            f"{r.bits_per_weight:.2f}",
            "exact" if np.isinf(r.sqnr_db) else f"{r.sqnr_db:.1f}",
            format_percent(r.rounded),
            format_percent(r.trained),
            f"[bold green]{gain:+.1f}[/]" if gain >= 2 else f"{gain:+.1f}",
        )
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Draws the test error of each format after rounding alone and after training."""
    rows = list(reversed(results))
    heights = np.arange(len(rows))
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.8), layout="constrained")
    margin = axes.get_yaxis_transform()  # x in fractions of the axes' width, y in data units.
    errors = {
        "float32 weights, rounded": [100 * (1 - r.rounded) for r in rows],
        "quantization-aware training": [100 * (1 - r.trained) for r in rows],
    }
    means = {name: np.array([v.mean() for v in values]) for name, values in errors.items()}
    left, right = means.values()
    axes.hlines(heights, left, right, color="#dddddd", linewidth=10, zorder=1)
    # Color, marker and vertical shift, which keeps the error bars of a row from overlapping.
    styles = ((ORANGE, "o", 0.12), (BLUE, "D", -0.12))
    for (name, values), (color, marker, shift) in zip(errors.items(), styles, strict=True):
        mean = means[name]
        low = [m - v.min() for m, v in zip(mean, values, strict=True)]
        high = [v.max() - m for m, v in zip(mean, values, strict=True)]
        axes.errorbar(
            mean,
            heights + shift,
            xerr=[low, high],
            fmt=marker,
            color=color,
            markersize=7,
            capsize=3,
            linewidth=1,
            label=name,
        )
    for height, r in enumerate(rows):
        sqnr = "exact" if np.isinf(r.sqnr_db) else f"{r.sqnr_db:.0f} dB"
        axes.text(
            1.07, height, f"{r.bits_per_weight:.1f}", transform=margin, va="center", ha="right"
        )
        axes.text(1.17, height, sqnr, transform=margin, va="center", ha="right")
    for position, head in ((1.07, "bits per\nweight"), (1.17, "weights'\nSQNR")):
        top = len(rows) - 0.4
        axes.text(position, top, head, transform=margin, ha="right", fontsize=8.5, color=GRAY)
    axes.axvline(means["float32 weights, rounded"][-1], color=GRAY, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        f"test error, %, logarithmic: left is better (bars: range of {len(rows[0].rounded)} seeds)"
    )
    axes.set_yticks(heights, [r.label for r in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(loc="upper right", framealpha=1, edgecolor="white")
    axes.set_title("Handwritten digits, weights and activations in few bits", loc="left", pad=12)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(
        __doc__, argv, "digits.svg", seeds=(5, "networks"), epochs=(30, "passes over the data")
    )
    labels = SHORT if args.short else tuple(FORMATS)
    seeds, epochs = (2, 15) if args.short else (args.seeds, args.epochs)
    with common.progress(len(labels), "training in float32") as report:
        results = run(labels, seeds, epochs, report)
    common.show(table(results), picture(results), args.output, dark=True)
    return results


if __name__ == "__main__":
    main()
