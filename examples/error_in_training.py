"""Finds where quantization errors arise in training, and mixes formats accordingly.

The model of `language_model.py` learns Python's documentation by AdamW, in four parts:

1. It is trained in bfloat16. Counterfactual statistics of every product and layer give the errors
   that FP8, MXFP8, MXFP4 and NVFP4 would have caused in the same operands and cotangents.
2. `jaxq.analysis.blame` ranks the products by the error of the gradient that MXFP4, MXFP6 and MXFP8
   cause in each of them, on the weights after training.
3. From this ranking a mixed recipe is made: MXFP4, MXFP6 or MXFP8 for each kind of product, with
   the smallest sum of squared errors for a mean of at most 6.25 bits per number, the bits of MXFP6.
   As a control, the worst mixture has the same bits and the largest sum.
4. The model is trained in every format, with cotangents rounded to nearest and stochastically, and
   with both mixtures. For each seed, all of these start from the same weights and see the same
   batches.

Losses are those of the trained weights on held-out text in bfloat16. Runs are short, so compare
differences between formats with the deviation over seeds.

    python examples/error_in_training.py [--steps N] [--seeds N] [--batch N] [--short]
        [--output PICTURE]
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import common
import jax
import language_model
import mixed_formats
import numpy as np
import optax
from common import BLUE, GRAY, GREEN, ORANGE, plt
from jax import numpy as jnp

import jaxq
from jaxq.analysis import Log, Monitoring, StatisticsLog, monitor, read_log

CONTEXT, RATE, LAYERS = 64, 6e-3, "^layers/"
COUNTERFACTUALS = ("fp8_e4m3_tensor", "mxfp8_e4m3", "mxfp4", "nvfp4")
COLORS = {"MXFP4": ORANGE, "NVFP4": ORANGE, "MXFP8": BLUE, "FP8": BLUE}


class Variant(NamedTuple):
    """A variant of the training.

    Attributes:
      label: the name in the table and the picture.
      rules: the rules of the products in the layers.
      color: the color in the picture.
      bits: the mean bits per number of the operands, scales included.
    """

    label: str
    rules: Sequence[tuple[str, jaxq.ProductRecipe]]
    color: str
    bits: float


class Outcome(NamedTuple):
    """The results of one variant.

    Attributes:
      variant: the variant.
      losses: the loss on held-out text after training in bits per byte, `[seeds]`.
      error: the relative error of the gradient on held-out text, at the weights that bfloat16
        training gave for the first seed.
    """

    variant: Variant
    losses: np.ndarray
    error: float


class Result(NamedTuple):
    """The results of the study.

    Attributes:
      log: the statistics of the run in bfloat16, by steps.
      ranking: the squared errors of the gradient by kinds of products.
      outcomes: the results of all variants; the first is bfloat16.
    """

    log: Log
    ranking: mixed_formats.Ranking
    outcomes: list[Outcome]


def loss(params: Any, rows: jax.Array) -> jax.Array:
    """Returns the loss with weights and activations in bfloat16."""
    return language_model.loss(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), rows)


def rounded(name: str, rounding: str) -> jaxq.ProductRecipe:
    """Returns a product recipe with another rounding of cotangents."""
    recipe = jaxq.get_product_recipe(name)

    def of(product: jaxq.SingleProduct) -> jaxq.SingleProduct:
        cotangent = product.operands[0]
        assert cotangent is not None, "all of these recipes quantize cotangents"
        return dataclasses.replace(product, lhs=dataclasses.replace(cotangent, rounding=rounding))

    return dataclasses.replace(recipe, dlhs=of(recipe.dlhs), drhs=of(recipe.drhs))


def uniform(short: bool) -> list[Variant]:
    """Returns the variants with one recipe in all layers."""
    variants = []
    for name, color in ({"MXFP6": GREEN} | ({} if short else COLORS)).items():
        for rounding in ("nearest_even", "stochastic")[: 1 if name == "MXFP6" else 2]:
            recipe = rounded(f"{name.lower()}_training", rounding)
            label = name if rounding == "nearest_even" else f"{name}, stochastic"
            bits = mixed_formats.bits_of(recipe)
            variants.append(Variant(label, [(LAYERS, recipe)], color, bits))
    return variants


class Trainer:
    """Training of all variants of the model on the same batches.

    Args:
      steps: the number of steps.
      batch: the number of rows of text in a batch.
    """

    def __init__(self, steps: int, batch: int) -> None:
        self.steps, self.batch = steps, batch
        self.data, held_out = language_model.text()
        starts = np.linspace(0, held_out.size - 200, 32).astype(np.int32)
        self.held_out = language_model.windows(held_out, jnp.asarray(starts))[:, : CONTEXT + 1]
        rate = optax.warmup_cosine_decay_schedule(0.0, RATE, max(1, steps // 10), steps)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1)
        )
        self.update = jax.jit(self._update)
        self.evaluate = jax.jit(loss)

    def rows(self, seed: int, step: int) -> jax.Array:
        """Returns the batch of a step."""
        starts = np.random.default_rng((seed, step)).integers(0, self.data.size - 200, self.batch)
        starts = jnp.asarray(starts, jnp.int32)
        return language_model.windows(self.data, starts)[:, : CONTEXT + 1]

    def train(
        self, seed: int, gradient: Callable[[Any, jax.Array, int], Any], report: Callable[[], None]
    ) -> Any:
        """Returns the weights after training by a function that returns gradients."""
        params = language_model.init(jax.random.key(seed))
        moments = self.optimizer.init(params)
        for n in range(self.steps):
            gradients = gradient(params, self.rows(seed, n), n)
            params, moments = jax.block_until_ready(self.update(params, gradients, moments))
            report()
        return params

    def _update(self, params: Any, gradients: Any, moments: Any) -> tuple[Any, Any]:
        updates, moments = self.optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments


def gradient_of(variant: Variant) -> Callable[[Any, jax.Array, int], Any]:
    """Returns the function from weights, a batch and the number of the step to the gradient."""
    draws = any(recipe.draws for _, recipe in variant.rules)

    @jax.jit
    def gradient(params: Any, rows: jax.Array, step: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(3), step) if draws else None
        return jax.grad(jaxq.quantize_fn(loss, variant.rules, key=key))(params, rows)

    return lambda params, rows, step: gradient(params, rows, jnp.int32(step))


def monitored(
    request: Monitoring, path: pathlib.Path, rows: jax.Array
) -> Callable[[Any, jax.Array, int], Any]:
    """Returns the function that gives the gradient in bfloat16 and logs statistics."""
    state = monitor(loss, [], request)(language_model.init(jax.random.key(0)), rows)

    @jax.jit
    def gradient(params: Any, rows: jax.Array, step: jax.Array) -> Any:
        def objective(params: Any, state: Any) -> jax.Array:
            return jaxq.quantize_fn(loss, state)(params, rows)

        return jax.grad(objective, (0, 1))(params, state.at(step))

    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    log = StatisticsLog(path)

    def logged(params: Any, rows: jax.Array, step: int) -> Any:
        gradients, seen = gradient(params, rows, jnp.int32(step))
        if step % request.every == 0:
            log.append(step, seen)
        return gradients

    return logged


def mixed(ranking: mixed_formats.Ranking, choice: Sequence[int], label: str, color: str) -> Variant:
    """Returns the variant with a mixture of formats."""
    return Variant(label, mixed_formats.rules_of(ranking, choice), color, ranking.bits_of(choice))


def relative(gradient: Any, exact: Any) -> float:
    """Returns the norm of the difference of two gradients relative to that of the second."""
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True))
    error = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    return (error / sum(float((b**2).sum()) for _, b in pairs)) ** 0.5


def summary(log: Log, recipes: Sequence[str]) -> common.Table:
    """Returns the mean SQNR that each recipe would have had, by kind of tensor."""
    grid = common.Table(title="Mean SQNR in dB, had the bfloat16 run been quantized")
    kinds = {"activations": "/lhs", "weights": "/rhs", "cotangents": "/dlhs/cotangent"}
    for head in ("recipe", *kinds, "worst"):
        grid.add_column(head)
    for recipe in recipes:
        sqnr = {k: v for k, v in log.values.items() if k.endswith(f"/{recipe}/sqnr_db")}
        # Cotangents of zeros, as in the first step, have an infinite SQNR.
        means = [
            np.mean([v[np.isfinite(v)].mean() for k, v in sqnr.items() if f"{kind}/{recipe}" in k])
            for kind in kinds.values()
        ]
        name, values = min(sqnr.items(), key=lambda item: item[1].min())
        step, layer = np.unravel_index(values.argmin(), values.shape)
        tensor = name.removeprefix("layers/").removesuffix(f"/{recipe}/sqnr_db")
        worst = f"{values.min():.1f}: {tensor}, layer {layer}, step {log.steps[step]}"
        grid.add_row(recipe, *(f"{mean:.1f}" for mean in means), worst)
    return grid


def table(outcomes: Sequence[Outcome]) -> common.Table:
    """Returns the table of all variants; differences have their deviation over seeds."""
    base = outcomes[0]
    grid = common.Table(title="Trained in each format, loss on held-out text in bits per byte")
    grid.add_column("products in the layers", no_wrap=True)
    for head in ("bits", "error of\ngradient", "loss", "minus bfloat16"):
        grid.add_column(head, justify="right", no_wrap=True)
    for o in outcomes:
        gap = o.losses - base.losses
        means = f"{o.losses.mean():.3f}", f"{gap.mean():+.4f} ± {gap.std():.4f}"
        grid.add_row(o.variant.label, f"{o.variant.bits:.2f}", f"{o.error:.4f}", *means)
    return grid


def picture(result: Result) -> common.Figure:
    """Draws the errors by layers and steps, the ranking, and the losses."""
    figure, mosaic = plt.subplot_mosaic("aa;bc", figsize=(9, 8.5), layout="constrained")
    axes = list(mosaic.values())
    _draw_map(figure, axes[0], result.log)
    ranking, names = result.ranking, [*mixed_formats.FORMATS]
    order, best = np.argsort(ranking.squares[:, 0]), ranking.best()
    for i, (label, color) in enumerate(zip(names, (ORANGE, GREEN, BLUE), strict=True)):
        errors = np.sqrt(ranking.squares[order, i])
        axes[1].plot(errors, np.arange(len(order)), "o", color=color, label=label)
    kinds = [ranking.kinds[i].removeprefix("layers/") for i in order]
    chosen = [names[best[i]] for i in order]
    ticks = [f"{kind}\n{name}" for kind, name in zip(kinds, chosen, strict=True)]
    axes[1].set_yticks(np.arange(len(order)), ticks)
    axes[1].set_xlim(left=0)
    axes[1].legend(frameon=False)
    axes[1].set_title("Error of the gradient", loc="left")
    rows, base = list(reversed(result.outcomes[1:])), result.outcomes[0].losses
    for height, o in enumerate(rows):
        gap = o.losses - base
        axes[2].plot(gap, np.full_like(gap, height), "|", color=o.variant.color, markersize=10)
        axes[2].plot(gap.mean(), height, "o", color=o.variant.color)
    labels = [f"{o.variant.label} ({o.variant.bits:.2f})" for o in rows]
    axes[2].set_yticks(range(len(rows)), labels)
    axes[2].axvline(0, color=GRAY, linewidth=1)
    axes[2].set_title("Bits per byte above bfloat16", loc="left")
    for panel in axes[1:]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#eeeeee")
        panel.set_axisbelow(True)
    return figure


def _draw_map(figure: common.Figure, axes: Any, log: Log) -> None:
    """Draws the SQNR of MXFP4 for the cotangents of every layer, over the steps."""
    rows: Mapping[str, np.ndarray] = {
        f"{name.split('/')[2]} {layer}": values[:, layer]
        for name, values in log.values.items()
        if name.endswith("dlhs/cotangent/mxfp4/sqnr_db")
        for layer in range(values.shape[1])
    }
    data = np.array(list(rows.values()))
    image = axes.imshow(
        np.where(np.isfinite(data), data, np.nan), aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    places = np.unique(np.linspace(0, len(log.steps) - 1, 6).astype(int))
    axes.set_xticks(places, log.steps[places].tolist())
    axes.set_xlabel("step")
    axes.set_title("SQNR of cotangents in MXFP4, dB", loc="left")
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).outline.set_visible(False)


def main(argv: Sequence[str] | None = None) -> Result:
    """Runs the study, prints the tables, draws the picture and returns the results."""
    amounts = {
        "steps": (40, "of training"),
        "seeds": (3, "of weights and batches"),
        "batch": (4, f"rows of {CONTEXT} bytes"),
    }
    args = common.arguments(__doc__, argv, "error_in_training.svg", **amounts)
    steps, seeds, batch = (3, 1, 2) if args.short else (args.steps, args.seeds, args.batch)
    recipes = COUNTERFACTUALS[2:] if args.short else COUNTERFACTUALS
    request = Monitoring(
        products=LAYERS,
        tensors=("lhs", "rhs", "cotangent"),
        statistics="sqnr_db",
        counterfactuals=recipes,
        every=2 if args.short else max(1, steps // 20),
    )
    trainer = Trainer(steps, batch)
    variants = uniform(args.short)
    path = args.output.with_suffix(".log")
    total = len(mixed_formats.FORMATS) + (len(variants) + 3) * seeds * steps
    with common.progress(total) as report:
        exact = monitored(request, path, trainer.rows(0, 0))
        bfloat16 = Variant("bfloat16", [], GRAY, 16)
        trained = [trainer.train(0, exact, lambda: report("bfloat16"))]
        # More text than in a batch, because the errors of one batch are noisy.
        rows = jnp.concatenate([trainer.rows(0, steps + i) for i in range(1 if args.short else 4)])
        ranking = mixed_formats.ranked(loss, trained[0], rows, report)
        mixtures = [
            mixed(ranking, ranking.best(), "best mixture", "black"),
            mixed(ranking, ranking.worst(), "worst mixture", GRAY),
        ]
        plain = gradient_of(bfloat16)
        trained += [
            trainer.train(seed, plain, lambda: report("bfloat16")) for seed in range(1, seeds)
        ]
        true = plain(trained[0], trainer.held_out, 0)
        losses = np.array([trainer.evaluate(p, trainer.held_out) for p in trained])
        outcomes = [Outcome(bfloat16, losses, 0.0)]
        for variant in (variants[0], *mixtures, *variants[1:]):
            gradient, losses = gradient_of(variant), []
            advance = functools.partial(report, variant.label)
            for seed in range(seeds):
                params = trainer.train(seed, gradient, advance)
                losses.append(float(trainer.evaluate(params, trainer.held_out)))
            error = relative(gradient(trained[0], trainer.held_out, 0), true)
            outcomes.append(Outcome(variant, np.array(losses), error))
            lines = [",".join(map(str, (o.variant.label, o.error, *o.losses))) for o in outcomes]
            args.output.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    result = Result(read_log(path), ranking, outcomes)
    console = common.Console()
    console.print(summary(result.log, recipes))
    console.print(mixed_formats.ranking_table(ranking))
    common.show(table(outcomes), picture(result), args.output)
    return result


if __name__ == "__main__":
    main()
