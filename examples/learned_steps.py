"""Trains networks on handwritten digits in 4, 3 and 2 bits with learned step sizes (LSQ).

All operands of all products of a small network are quantized, in the first and the last layer too:
weights are signed with one step size per channel, activations unsigned with one step size per
tensor. Three methods start from the same float32 weights: rounding alone; training with the
straight-through estimator and scales from the largest magnitude; and learned step sizes (Esser et
al., 2020), which are trained as parameters. For comparison, the float32 network trains for the same
number of epochs with the same optimizer. All seeds train in one compiled, vmapped program.

    python examples/learned_steps.py [--seeds N] [--epochs N] [--short] [--output PICTURE]
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np
import optax
from common import BLUE, GRAY, GREEN, ORANGE, Params, Table, format_percent, plt
from digits import SIZES
from jax import numpy as jnp

import jaxq

Layer = dict[str, jax.Array]
Quantize = Callable[[Layer, str], Callable[[jax.Array], jax.Array]]
Data = tuple[jax.Array, jax.Array]

WIDTHS = (4, 3, 2)
METHODS = ("rounding alone", "straight-through, absmax scales", "learned steps (LSQ)")
PRETRAINING_RATE, LEARNING_RATE = 4e-3, 8e-3


@dataclasses.dataclass(frozen=True)
class Result:
    """The test accuracies of one method at one width, fractions, `[seeds]`."""

    bits: int
    method: str
    accuracy: np.ndarray


def recipe(operand: str, bits: int, gradient: Any, rule: str = "max") -> jaxq.Recipe:
    """Returns the recipe for the weights ("w") or the activations ("x") of a layer.

    Activations are unsigned, because images and the outputs of a rectifier are never negative.
    """
    if operand == "w":
        channel = jaxq.PerChannel((-1,))
        return jaxq.Recipe(f"int{bits}", channel, jaxq.Symmetric(rule=rule), gradient=gradient)
    return jaxq.Recipe(f"uint{bits}", gradient=gradient)


def absmax(bits: int) -> Quantize:
    """Returns quantizers with scales from the largest magnitude of the tensor or channel."""

    def quantize(layer: Layer, operand: str) -> Callable[[jax.Array], jax.Array]:
        del layer
        return lambda a: jaxq.fake_quant(a, recipe(operand, bits, "straight_through"))

    return quantize


def learned(bits: int, gradient: str = "lsq") -> Quantize:
    """Returns quantizers whose scales are parameters, `step_w` and `step_x` of each layer."""

    def quantize(layer: Layer, operand: str) -> Callable[[jax.Array], jax.Array]:
        def apply(a: jax.Array) -> jax.Array:
            estimator = gradient
            if (gradient, operand) == ("lsq", "x"):  # N must not depend on the batch size.
                estimator = jaxq.gradients.LSQ(a.shape[-1])
            scale = layer[f"step_{operand}"]
            # LSQ also uses the lowest code of signed weights, which "half" allows.
            return jaxq.fake_quant(a, recipe(operand, bits, estimator, "half"), scale=scale)

        return apply

    return quantize


def float32(layer: Layer, operand: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the identity in place of a quantizer."""
    del layer, operand
    return lambda a: a


def apply(params: Params, x: jax.Array, quantize: Quantize) -> jax.Array:
    """Returns logits `[batch, 10]` for images `[batch, 64]`."""
    for i, layer in enumerate(params):
        x = jax.nn.relu(x) if i else x
        x = quantize(layer, "x")(x) @ quantize(layer, "w")(layer["w"]) + layer["b"][None, :]
    return x


def with_steps(params: Params, x: jax.Array, bits: int) -> Params:
    """Adds initial step sizes, 2 mean|v| / sqrt(Qp) of the weights and of the activations for x."""
    result = []
    for i, layer in enumerate(params):
        x = jax.nn.relu(x) if i else x
        steps = {"step_w": jaxq.qat.lsq_scale(layer["w"], recipe("w", bits, "lsq"))}
        steps["step_x"] = jaxq.qat.lsq_scale(x, recipe("x", bits, "lsq"))
        result.append({**layer, **steps})
        x = x @ layer["w"] + layer["b"][None, :]
    return result


def accuracy(params: Params, data: Data, quantize: Quantize) -> jax.Array:
    """Returns the share of images that are classified correctly."""
    return (apply(params, data[0], quantize).argmax(-1) == data[1]).astype(jnp.float32).mean()


def train(
    params: Params, key: jax.Array, data: Data, quantize: Quantize, epochs: int, rate: float
) -> Params:
    """Trains the quantized network by Adam with a cosine schedule and returns its parameters."""
    x, y = data
    steps = len(x) // common.BATCH
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))

    def loss(params: Params, rows: jax.Array) -> jax.Array:
        logits = apply(params, x[rows], quantize)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(state: Any, rows: jax.Array) -> tuple[Any, None]:
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, rows), moments)
        return (optax.apply_updates(params, updates), moments), None

    state = (params, optimizer.init(params))
    return common.over_batches(step, state, key, len(x), epochs)[0][0]


def pretrained(keys: jax.Array, data: Data, epochs: int) -> Params:
    """Trains one float32 network per key."""

    @jax.jit
    @jax.vmap
    def learn(key: jax.Array) -> Params:
        return train(common.init(key, SIZES), key, data, float32, epochs, PRETRAINING_RATE)

    return learn(keys)


def run(
    widths: Sequence[int], seeds: int, epochs: int, report: Callable[[str], None]
) -> list[Result]:
    """Trains every width by every method; the float32 network is the first result, with 32 bits."""
    x, y, x_test, y_test = common.load()
    data, test = (x, y), (x_test, y_test)
    keys = jax.random.split(jax.random.key(0), seeds)
    base = pretrained(keys, data, min(epochs, 30))

    def measure(quantize: Quantize, start: Callable, epochs: int) -> np.ndarray:
        def one(params: Params, key: jax.Array) -> jax.Array:
            params = start(params)
            if epochs:
                params = train(params, key, data, quantize, epochs, LEARNING_RATE)
            return accuracy(params, test, quantize)

        return np.asarray(jax.jit(jax.vmap(one))(base, keys))

    results = [Result(32, "float32", measure(float32, lambda p: p, epochs))]
    report("float32")
    for bits in widths:
        settings = (
            (absmax(bits), lambda p: p, 0),
            (absmax(bits), lambda p: p, epochs),
            (learned(bits), lambda p, bits=bits: with_steps(p, x, bits), epochs),
        )
        for method, setting in zip(METHODS, settings, strict=True):
            results.append(Result(bits, method, measure(*setting)))
            report(f"{bits} bits, {method}")
    return results


def table(results: Sequence[Result]) -> Table:
    """Returns the table of results, one row per width."""
    base = results[0].accuracy.mean()
    grid = Table(
        title="Weights and activations in few bits: test accuracy in %, mean ± std over seeds",
        caption=f"float32 after the same training: {format_percent(results[0].accuracy)}",
    )
    grid.add_column("bits", justify="right")
    for head in (*METHODS, "LSQ minus float32"):
        grid.add_column(head, justify="right")
    for bits in sorted({r.bits for r in results[1:]}, reverse=True):
        row = [r.accuracy for r in results if r.bits == bits]
        gap = 100 * (row[-1].mean() - base)
        grid.add_row(str(bits), *(format_percent(a) for a in row), f"[bold green]{gap:+.1f}[/]")
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Draws the test errors of every method at every width, and a band above that of float32."""
    base = 100 * (1 - results[0].accuracy)
    widths = sorted({r.bits for r in results[1:]})
    figure, axes = plt.subplots(figsize=(9, 1.0 * len(widths) + 1.9), layout="constrained")
    axes.axvspan(base.mean(), base.mean() + 1, color="#e8e8e8", linewidth=0, zorder=0)
    axes.axvline(base.mean(), color=GRAY, linestyle="--", linewidth=1)
    axes.text(
        base.mean() + 0.06,
        len(widths) - 0.3,
        "up to one point above float32",
        color=GRAY,
        fontsize=8.5,
        va="top",
    )
    styles = ((ORANGE, "o", 0.2), (GREEN, "s", 0.0), (BLUE, "D", -0.2))
    for method, (color, marker, shift) in zip(METHODS, styles, strict=True):
        rows = [r for r in results if r.method == method]
        for r in rows:
            height = widths.index(r.bits) + shift
            error = 100 * (1 - r.accuracy)
            axes.plot(error, [height] * len(error), "|", color=color, markersize=9, alpha=0.7)
            axes.hlines(height, error.min(), error.max(), color=color, linewidth=1)
            label = method if r is rows[0] else None
            axes.plot(error.mean(), height, marker, color=color, markersize=8, label=label, ls="")
            axes.annotate(
                f"{error.mean():.1f}",
                (error.max(), height),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=9,
            )
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.4, 130)
    axes.set_ylim(-0.55, len(widths) - 0.2)
    axes.set_yticks(range(len(widths)), [f"{bits} bits" for bits in widths])
    axes.set_xlabel(
        f"test error, %, logarithmic: left is better (symbols: mean; ticks: {len(base)} seeds)"
    )
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(loc="upper right", framealpha=1, edgecolor="white")
    axes.set_title("Learned steps: handwritten digits down to 2 bits", loc="left", pad=12)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    args = common.arguments(
        __doc__,
        argv,
        "learned_steps.svg",
        seeds=(5, "networks"),
        epochs=(120, "passes over the data"),
    )
    widths = WIDTHS[-1:] if args.short else WIDTHS
    seeds, epochs = (2, 30) if args.short else (args.seeds, args.epochs)
    with common.progress(1 + len(METHODS) * len(widths), "training in float32") as report:
        results = run(widths, seeds, epochs, report)
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
