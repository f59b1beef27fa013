"""Does a transformer train in 8 bits, or in 4? A small language model, in ten ways.

One model (`language_model.py`) learns Python's own documentation from the same weights, on the same
batches, by AdamW; only the numbers in which the products of its layers are computed differ, in the
forward pass and in the gradient. The model knows nothing of it: `jaxq.quantize_fn` takes its
function. Embedding and head stay in float32, and so do the weights that the optimizer updates.
Shown is the cross-entropy on held-out text, computed as in training, and the time of a step. The
runs are short, and any change of a last bit makes another run: how far bfloat16 is from float32,
and the seeds of one way from each other, says what small differences mean. For a model of this size
in 300 steps, that is all of them: every way learns, and none is told from float32 by three seeds.

    python examples/transformer.py [--steps N] [--seeds N] [--short] [--output PICTURE]
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import jax
import language_model
import numpy as np
import optax
from common import BLUE, GREEN, GREY, ORANGE, plt
from jax import numpy as jnp

import jaxq

BATCH, RATE = 8, 6e-3
LAYERS = "^layers/"
# NVFP4 without what was made for training in it: all rounded to nearest, nothing transformed.
NVFP4_NEAREST = jaxq.DotRecipe(
    "nvfp4",
    "nvfp4_tile16",
    dlhs=jaxq.ProductRecipe("nvfp4", "nvfp4_tile16"),
    drhs=jaxq.ProductRecipe("nvfp4", "nvfp4"),
    residuals="original",
)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train: the recipe of the layers' products, or the dtype of the whole model.

    With `delayed` scales are those of the steps before.
    """

    label: str
    recipe: str | jaxq.DotRecipe | None
    colour: str
    line: Any = "-"
    dtype: Any = jnp.float32
    delayed: bool = False


DASHED, DOTTED, DASHDOTTED = (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))
WAYS = (
    Way("float32", None, GREY),
    Way("bfloat16", None, GREY, DASHED, jnp.bfloat16),
    Way("int8 weights and activations", "w8a8", BLUE, DOTTED),
    Way("FP8, current scaling", "fp8", BLUE),
    Way("FP8, delayed scaling", "fp8", BLUE, DASHDOTTED, delayed=True),
    Way("MXFP8", "mxfp8", BLUE, DASHED),
    Way("int4 weights", "w4_g128", GREEN),
    Way("NVFP4, stochastic and Hadamard", "nvfp4", ORANGE),
    Way("NVFP4, to nearest", NVFP4_NEAREST, ORANGE, DASHED),
    Way("MXFP4", "mxfp4", ORANGE, DOTTED),
)
SHORT = ("float32", "FP8, delayed scaling")


@dataclasses.dataclass(frozen=True)
class Result:
    """How one way fared: held-out bits a byte `[seed, step]`, and the speed of training."""

    way: Way
    steps: np.ndarray
    held_out: np.ndarray
    tokens_per_second: float

    def beside(self, base: "Result") -> np.ndarray:
        """How much worse it ends than another one does, for each seed."""
        return self.held_out[:, -1] - base.held_out[:, -1]


def quantized_loss(
    way: Way, params: Any, scaling: Any, rows: jax.Array, key: jax.Array | None
) -> jax.Array:
    """The loss in the numbers of a way, `scaling` the state of delayed scaling or ()."""
    params = jax.tree.map(lambda x: x.astype(way.dtype), params)
    if way.recipe is None:
        return language_model.loss(params, rows)
    rules = scaling or [(LAYERS, way.recipe)]
    drawn = key if jaxq.get_dot_recipe(way.recipe).draws else None
    return jaxq.quantize_fn(language_model.loss, rules, key=drawn)(params, rows)


class Training(NamedTuple):
    """A step of training, the loss on given text, and the state that a key starts from.

    A state is the weights, the state of delayed scaling, and the optimizer's.
    """

    step: Callable[[Any, jax.Array], Any]
    loss: Callable[..., jax.Array]
    init: Callable[[jax.Array], Any]


def training(way: Way, data: jax.Array, steps: int) -> Training:
    """How one way trains."""
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1)
    )
    loss = functools.partial(quantized_loss, way)

    @jax.jit
    def step(state: Any, key: jax.Array) -> Any:
        params, scaling, moments = state
        of_batch, of_rounding = jax.random.split(key)
        last = data.size - language_model.CONTEXT
        rows = language_model.windows(data, jax.random.randint(of_batch, (BATCH,), 0, last))
        gradients, seen = jax.grad(loss, (0, 1))(params, scaling, rows, of_rounding)
        updates, moments = optimizer.update(gradients, moments, params)
        scaling = scaling.update(seen) if way.delayed else ()
        return optax.apply_updates(params, updates), scaling, moments

    def init(key: jax.Array) -> Any:
        params, scaling = language_model.init(key), ()
        if way.delayed:
            rows, rules = (
                jnp.zeros((BATCH, language_model.CONTEXT + 1), int),
                [(LAYERS, way.recipe)],
            )
            scaling = jaxq.delayed_scaling(language_model.loss, rules)(params, rows)
        return params, scaling, optimizer.init(params)

    return Training(step, jax.jit(loss), init)


def run(
    ways: Sequence[Way],
    seeds: int,
    steps: int,
    looks: int,
    windows: int,
    report: Callable[[str], None],
) -> list[Result]:
    """Trains in all ways, a step of each in turn, so that a busy machine slows all alike."""
    data, held = language_model.text()
    starts = np.linspace(0, held.size - language_model.CONTEXT - 1, windows).astype(np.int32)
    rows = language_model.windows(held, jnp.asarray(starts))
    trainings = [training(way, data, steps) for way in ways]
    marks = np.unique(np.linspace(0, steps, looks + 1).astype(int))
    losses = np.zeros((len(ways), seeds, len(marks)))
    seconds = np.zeros((len(ways), seeds, steps))
    for way, train in zip(ways, trainings, strict=True):
        report(f"compiling {way.label}")
        key = jax.random.key(0)
        jax.block_until_ready(train.step(train.init(key), key))
    for seed in range(seeds):
        key = jax.random.key(seed)
        states = [train.init(key) for train in trainings]
        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        for i in range(steps + 1):
            for n, train in enumerate(trainings):
                if i in marks:
                    loss = train.loss(*states[n][:2], rows, keys[0])
                    losses[n, seed, np.searchsorted(marks, i)] = loss
                if i < steps:
                    start = time.perf_counter()
                    states[n] = jax.block_until_ready(train.step(states[n], keys[i]))
                    seconds[n, seed, i] = time.perf_counter() - start
            report("training")
    speeds = BATCH * language_model.CONTEXT / np.median(seconds, axis=(1, 2))
    return [
        Result(way, marks, own, float(speed))
        for way, own, speed in zip(ways, losses, speeds, strict=True)
    ]


def table(results: Sequence[Result]) -> common.Table:
    """The results, one way a row: means over the seeds, and the deviation of a difference."""
    base = results[0]
    grid = common.Table(title="A language model on held-out text, bits a byte")
    grid.add_column("products in the layers", no_wrap=True)
    for head in ("loss", "beside float32", "tokens/s", "time"):
        grid.add_column(head, justify="right", no_wrap=True)
    for r in results:
        grid.add_row(
            r.way.label,
            f"{r.held_out[:, -1].mean():.3f}",
            f"{r.beside(base).mean():+.3f} ± {r.beside(base).std():.3f}",
            f"{r.tokens_per_second:,.0f}",
            f"{base.tokens_per_second / r.tokens_per_second:.2f} x",
        )
    return grid


def picture(results: Sequence[Result]) -> common.Figure:
    """Left the losses over steps, right what each way ends with beside float32."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(1.1, 1)
    )
    for r in results:
        mean = r.held_out.mean(0)
        left.plot(r.steps, mean, color=r.way.colour, linestyle=r.way.line, linewidth=1.6)
    left.set_ylim(top=5.2)
    left.set_xlim(0, results[0].steps[-1])
    left.set_xlabel("step")
    left.set_title("Held-out bits a byte", loc="left")

    rows = list(reversed(results))
    heights = np.arange(len(rows))
    gaps = np.array([r.beside(results[0]) for r in rows])
    for height, each, r in zip(heights, gaps, rows, strict=True):
        gap, label = each.mean(), f"{each.mean():+.3f}"
        right.plot([0, gap], [height, height], color=r.way.colour, linestyle=r.way.line)
        right.plot(each, np.full_like(each, height), "|", color=r.way.colour, markersize=9)
        right.plot(gap, height, "o", color=r.way.colour)
        place = max(0, *each), height
        right.annotate(label, place, (8, 0), textcoords="offset points", va="center")
    right.axvline(0, color=GREY, linewidth=1)
    right.set_xlim(right=max(0.02, gaps.max()) * 1.25)
    right.set_ylim(-0.6, len(rows) - 0.4)
    right.set_yticks(heights, [r.way.label for r in rows])
    right.tick_params(left=False)
    right.set_xlabel("bits a byte more than float32")
    base = results[0].held_out[:, -1].mean()
    right.set_title(f"At the end ({base:.2f} in float32), each seed a mark", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if axes is left else "x", color="#eeeeee")
        axes.set_axisbelow(True)
    right.spines["left"].set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Runs the study, prints the table, draws the picture and returns the results."""
    amounts = {"steps": (300, "of training"), "seeds": (3, "of weights and batches")}
    args = common.arguments(__doc__, argv, "transformer.png", **amounts)
    ways = [way for way in WAYS if way.label in SHORT] if args.short else list(WAYS)
    whole = (args.seeds, args.steps, 20, 32)
    seeds, steps, looks, windows = (1, 8, 1, 4) if args.short else whole
    with common.progress(len(ways) + seeds * (steps + 1)) as report:
        results = run(ways, seeds, steps, looks, windows, report)
    common.show(table(results), picture(results), args.output)
    return results


if __name__ == "__main__":
    main()
