"""Compares gradient estimators by bias and variance, and by accuracy on digits.

The derivative of a quantizer Q is zero almost everywhere, but the expected loss over noisy inputs
has a useful one: F(theta) = E[loss(Q(theta + sigma z))] with normal z. A gradient estimator gives a
derivative g at each noisy input. Its bias is E[g] - F', and its variance is that of g. The example
computes both, and F', by quadrature for the 3-bit integers, for inputs theta over their whole range
and for noise between a twentieth of a step and two steps.

The same estimators then train the network of `learned_steps.py` on handwritten digits in 4, 3 and
2 bits, from the same weights and step sizes; each estimator also gives the gradients of the step
sizes.

    python examples/estimators.py [--seeds N] [--epochs N] [--short] [--output PICTURE]
"""

import dataclasses
from collections.abc import Callable, Sequence

import common
import jax
import learned_steps
import numpy as np
from common import Table, format_percent, plt
from jax import numpy as jnp
from matplotlib.lines import Line2D

import jaxq

GRID, TARGET = "int3", 0.3
NOISES = np.geomspace(0.05, 2, 17)  # The standard deviations, in steps of the grid.
TABLE_NOISE = 0.25  # The noise level in the table.
# Methods that replace rounding in the forward pass instead of its gradient.
REPLACEMENTS = ("uniform noise", "soft rounding")
WIDTHS = (4, 3, 2)
SHORT = ("zero", "lsq")


@dataclasses.dataclass(frozen=True)
class Quality:
    """Bias and standard deviation of an estimator, relative to the true gradient.

    Each is a root mean square over inputs, divided by that of the true gradient.

    Attributes:
      bias: one value per noise level.
      deviation: one value per noise level.
    """

    bias: np.ndarray
    deviation: np.ndarray


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of both studies.

    Attributes:
      quality: bias and deviation by estimator.
      accuracy: the test accuracies, fractions, `[seeds]`, by estimator and bits.
      float32: the test accuracies of the float32 network, fractions, `[seeds]`.
    """

    quality: dict[str, Quality]
    accuracy: dict[tuple[str, int], np.ndarray]
    float32: np.ndarray


def loss(y: jax.Array) -> jax.Array:
    """Returns half the squared distance to a target between two values of the grid."""
    return (y - TARGET) ** 2 / 2


def derivatives(name: str, v: jax.Array) -> jax.Array:
    """Returns an estimator's derivatives of the loss at each input, `[draws, inputs]`."""
    if name == "uniform noise":  # The midpoint rule replaces random draws of the noise.
        shifts = (np.arange(16, dtype=np.float32) + 0.5) / 16 - 0.5
        return jax.vmap(lambda shift: jax.grad(lambda v: loss(v + shift).sum())(v))(shifts)
    if name == "soft rounding":
        pair = jaxq.neighbors(v, jaxq.Recipe(GRID), scale=1.0)
        return jax.grad(lambda v: loss(jaxq.qat.soft_round(v, *pair)).sum())(v)[None]
    return jax.grad(lambda v: loss(jaxq.cast(v, GRID, gradient=name)).sum())(v)[None]


def qualities(names: Sequence[str]) -> dict[str, Quality]:
    """Computes bias and deviation of every estimator at every noise level."""
    fmt = jaxq.get_format(GRID)
    width = 1 / 128  # The jumps of Q lie on borders of cells, where the midpoint rule is exact.
    v = (np.arange(fmt.min - 12, fmt.max + 12, width) + width / 2).astype(np.float32)
    theta = np.linspace(fmt.min, fmt.max, 141)[:, None]
    values = np.float64(loss(jaxq.cast(v, GRID)))
    g = {name: np.float64(derivatives(name, jnp.asarray(v))) for name in names}
    bias = {name: [] for name in names}
    deviation = {name: [] for name in names}
    for sigma in NOISES:
        z = (v - theta) / sigma
        weights = np.exp(-(z**2) / 2) * (width / sigma / np.sqrt(2 * np.pi))
        # The derivative of the density with respect to theta is z / sigma times the density.
        truth = (weights * z / sigma) @ values
        size = np.sqrt((truth**2).mean())
        for name in names:
            mean = weights @ g[name].mean(0)
            variance = weights @ (g[name] ** 2).mean(0) - mean**2
            bias[name].append(np.sqrt(((mean - truth) ** 2).mean()) / size)
            deviation[name].append(np.sqrt(variance.clip(0).mean()) / size)
    return {n: Quality(np.array(bias[n]), np.array(deviation[n])) for n in names}


def run(
    names: Sequence[str],
    widths: Sequence[int],
    seeds: int,
    epochs: int,
    report: Callable[[str], None],
) -> Results:
    """Runs both studies."""
    quality = qualities([*jaxq.gradients.ESTIMATORS, *REPLACEMENTS])
    report("bias and variance")
    x, y, x_test, y_test = common.load()
    keys = jax.random.split(jax.random.key(0), seeds)
    base = learned_steps.pretrained(keys, (x, y), min(epochs, 30))
    report("training in float32")

    def measure(quantize: learned_steps.Quantize, bits: int | None) -> np.ndarray:
        def one(params: common.Params, key: jax.Array) -> jax.Array:
            if bits is not None:
                params = learned_steps.with_steps(params, x, bits)
            rate = learned_steps.LEARNING_RATE
            params = learned_steps.train(params, key, (x, y), quantize, epochs, rate)
            return learned_steps.accuracy(params, (x_test, y_test), quantize)

        return np.asarray(jax.jit(jax.vmap(one))(base, keys))

    float32 = measure(learned_steps.float32, None)
    accuracy = {}
    for bits in widths:
        for name in names:
            accuracy[name, bits] = measure(learned_steps.learned(bits, name), bits)
            report(f"{bits} bits, {name}")
    return Results(quality, accuracy, float32)


def table(results: Results) -> Table:
    """Returns the table of results, one row per estimator."""
    widths = sorted({bits for _, bits in results.accuracy}, reverse=True)
    level = int(np.abs(NOISES - TABLE_NOISE).argmin())
    grid = Table(
        title="Bias and standard deviation with noise of a quarter step,\n"
        "in units of the true gradient; test accuracy in %, mean ± std over seeds",
        caption=f"float32 after the same training: {format_percent(results.float32)}",
    )
    grid.add_column("estimator", no_wrap=True)
    for head in ("bias", "std", *(f"{bits} bits" for bits in widths)):
        grid.add_column(head, justify="right", no_wrap=True)
    for name, quality in results.quality.items():
        row = [results.accuracy.get((name, bits)) for bits in widths]
        grid.add_row(
            name,
            f"{quality.bias[level]:.2f}",
            f"{quality.deviation[level]:.2f}",
            *("" if a is None else format_percent(a) for a in row),
        )
    return grid


# Color, marker, line style and label, in the palette of Okabe and Ito. The gradients of clipped,
# lsq and pact differ only for learned scales, so the three share a line in the left panels.
STYLES = {
    "straight_through": ("#0072B2", "o", "-", "straight_through"),
    "clipped": ("#D55E00", "s", "-", "clipped (also lsq and pact, for the gradient of x)"),
    "zero": ("#000000", "X", "-", "zero"),
    "lsq": ("#D55E00", "D", "", "lsq"),
    "pact": ("#D55E00", "^", "", "pact"),
    "trust_region": ("#009E73", "v", "--", "trust_region"),
    "dsq": ("#CC79A7", "P", "-", "dsq"),
    "uniform noise": ("#56B4E9", "", ":", "uniform noise in place of rounding"),
    "soft rounding": ("#E69F00", "", "-.", "soft rounding in place of rounding"),
}


def picture(results: Results) -> common.Figure:
    """Draws bias and deviation over the noise level, and the test error by bits."""
    figure, mosaic = plt.subplot_mosaic("ab;cc", figsize=(9, 8), layout="constrained")
    panels = list(mosaic.values())
    handles = {}
    for axes, field, title in (
        (panels[0], "bias", "Bias"),
        (panels[1], "deviation", "Standard deviation"),
    ):
        for name, quality in results.quality.items():
            color, marker, line, label = STYLES.get(name, ("#767676", "o", "-", name))
            if line:
                style = {"color": color, "linestyle": line, "linewidth": 1.8, "markersize": 6}
                marked = slice(None, None, 4)
                values = getattr(quality, field)
                axes.plot(NOISES, values, **style)
                axes.plot(NOISES[marked], values[marked], marker=marker, color=color, linestyle="")
                handles[label] = Line2D([], [], marker=marker, **style)
            else:
                handles[label] = Line2D([], [], marker=marker, color=color, linestyle="")
        axes.set_xscale("log")
        ticks = [0.05, 0.1, 0.2, 0.5, 1, 2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("noise of the input, in steps of the grid")
        axes.set_title(f"{title}, in units of the true gradient", loc="left", fontsize=11)
        axes.set_ylim(0, None)
    axes, widths = panels[2], sorted({bits for _, bits in results.accuracy}, reverse=True)
    names = list(dict.fromkeys(name for name, _ in results.accuracy))
    for order, name in enumerate(names):
        color, marker, _, _ = STYLES.get(name, ("#767676", "o", "-", name))
        for column, bits in enumerate(widths):
            error = 100 * (1 - results.accuracy[name, bits])
            position = column + 0.11 * (order - (len(names) - 1) / 2)
            axes.vlines(position, error.min(), error.max(), color=color, linewidth=1)
            axes.plot(position, error.mean(), marker, color=color, markersize=6.5)
    base = 100 * (1 - results.float32.mean())
    axes.axhline(base, color="#767676", linestyle="--", linewidth=1)
    right = {"ha": "right", "va": "top", "color": "#767676", "fontsize": 9}
    axes.text(len(widths) - 0.52, base * 0.97, "float32", **right)
    axes.set_ylim(0.4, 100)
    axes.set_yscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(widths)), [f"{bits} bits" for bits in widths])
    axes.set_xlim(-0.5, len(widths) - 0.5)
    axes.set_title("Test error on digits, %, logarithmic", loc="left", fontsize=11)
    seeds = len(results.float32)
    axes.set_xlabel(f"step sizes are learned (bars: range of {seeds} seeds)")
    for axes in panels:
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def main(argv: Sequence[str] | None = None) -> Results:
    """Runs the studies, prints the table, draws the picture and returns the results."""
    args = common.arguments(
        __doc__, argv, "estimators.svg", seeds=(3, "networks"), epochs=(30, "passes over the data")
    )
    widths = WIDTHS[-1:] if args.short else WIDTHS
    names = SHORT if args.short else tuple(jaxq.gradients.ESTIMATORS)
    seeds, epochs = (1, 8) if args.short else (args.seeds, args.epochs)
    with common.progress(2 + len(names) * len(widths), "bias and variance") as report:
        results = run(names, widths, seeds, epochs, report)
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
