"""Finds where quantization errors arise while a small language model trains.

The model of `language_model.py` learns Python's documentation by AdamW. In the first run its layers
compute in bfloat16, and counterfactual statistics tell what FP8, MXFP8, MXFP4 and NVFP4 would have
made of the same operands and cotangents in every layer. Every step with statistics is logged.

Then `jaxq.analysis.blame` ranks the products and layers by the error of the gradient that MXFP4
causes in each of them, on the weights after training.

    python examples/error_in_training.py [--steps N] [--short] [--output PICTURE]
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import jax
import language_model
import numpy as np
import optax
from jax import numpy as jnp

import jaxq
from jaxq.analysis import Log, Monitoring, StatisticsLog, blame, monitor, plots, read_log

BATCH, RATE, LAYERS = 8, 6e-3, "^layers/"
# One recipe of each family for the operands and the cotangents of every product.
WOULD_BE = ("fp8_e4m3_tensor", "mxfp8_e4m3", "mxfp4", "nvfp4")
BLAMED = "mxfp4_training"


class Result(NamedTuple):
    """The results of the study.

    Attributes:
      log: the statistics of the run, by steps.
      losses: the training losses in bits per byte, `[steps]`.
      ranking: the table of `blame`.
    """

    log: Log
    losses: np.ndarray
    ranking: jaxq.Table


def loss(params: Any, rows: jax.Array) -> jax.Array:
    """Returns the loss with weights and activations in bfloat16."""
    return language_model.loss(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), rows)


def train(
    steps: int, request: Monitoring, path: pathlib.Path, report: Callable[[str], None]
) -> tuple[Any, jax.Array, np.ndarray]:
    """Trains in bfloat16, logs the statistics, and returns weights, the last batch and losses."""
    data, _ = language_model.text()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.1))
    params = language_model.init(jax.random.key(0))
    rows = jnp.zeros((BATCH, language_model.CONTEXT + 1), int)
    state = monitor(loss, [], request)(params, rows)

    @jax.jit
    def step(params: Any, moments: Any, n: jax.Array) -> Any:
        starts = jax.random.randint(
            jax.random.fold_in(jax.random.key(1), n), (BATCH,), 0, data.size - 200
        )
        rows = language_model.windows(data, starts)

        def objective(params: Any, state: Any) -> jax.Array:
            return jaxq.quantize_fn(loss, state)(params, rows)

        own = state.at(n)
        value, (gradients, seen) = jax.value_and_grad(objective, (0, 1))(params, own)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, seen, value, rows

    moments, losses = optimizer.init(params), []
    path.unlink(missing_ok=True)
    log = StatisticsLog(path)
    for n in range(steps):
        params, moments, seen, value, rows = step(params, moments, jnp.int32(n))
        losses.append(float(value))
        if n % request.every == 0:
            log.append(n, seen)
        report("training")
    return params, rows, np.array(losses)


def summary(log: Log, recipes: Sequence[str]) -> common.Table:
    """Returns the mean SQNR that each recipe would have had, by kind of tensor."""
    grid = common.Table(title="Mean SQNR in dB, had the bfloat16 run been quantized")
    kinds = {"activations": "/lhs", "weights": "/rhs", "cotangents": "/dlhs/cotangent"}
    for head in ("recipe", *kinds, "worst"):
        grid.add_column(head)
    for recipe in recipes:
        own = {k: v for k, v in log.values.items() if k.endswith(f"/{recipe}/sqnr_db")}
        # Cotangents of zeros, as in the first step, have an infinite SQNR.
        means = [
            np.mean([v[np.isfinite(v)].mean() for k, v in own.items() if f"{kind}/{recipe}" in k])
            for kind in kinds.values()
        ]
        name, values = min(own.items(), key=lambda item: item[1].min())
        step, layer = np.unravel_index(values.argmin(), values.shape)
        tensor = name.removeprefix("layers/").removesuffix(f"/{recipe}/sqnr_db")
        worst = f"{values.min():.1f}: {tensor}, layer {layer}, step {log.steps[step]}"
        grid.add_row(recipe, *(f"{mean:.1f}" for mean in means), worst)
    return grid


def ranked(ranking: jaxq.Table) -> common.Table:
    """Returns the first rows of the ranking as a table."""
    grid = common.Table(title=f"Error of the gradient caused by {BLAMED}")
    for head in ("product and layer", "alone", "all without it"):
        grid.add_column(head, no_wrap=True)
    for row in ranking.rows[:9]:
        grid.add_row(row.product, f"{row.gradient_alone:.3f}", f"{row.gradient_without:.3f}")
    return grid


def main(argv: Sequence[str] | None = None) -> Result:
    """Runs the study, prints the tables, draws the picture and returns the results."""
    args = common.arguments(__doc__, argv, "error_in_training.png", steps=(300, "of training"))
    steps, every = (3, 2) if args.short else (args.steps, max(1, args.steps // 30))
    products, recipes = ("mlp/up", WOULD_BE[2:]) if args.short else (LAYERS, WOULD_BE)
    request = Monitoring(
        products=products,
        tensors=("lhs", "rhs", "cotangent"),
        statistics=("amax", "rms", "sqnr_db", "flushed", "nonfinite"),
        counterfactuals=recipes,
        every=every,
    )
    path = args.output.with_suffix(".log")
    with common.progress(steps + 1) as report:
        params, rows, losses = train(steps, request, path, report)
        report("ranking")
        rules = [(products, BLAMED)]
        ranking = blame(language_model.loss, rules, key=_key(BLAMED))(params, rows)
    log = read_log(path)
    picked = {k: v for k, v in log.values.items() if "/mxfp4/" in k and "drhs" not in k}
    figure = plots.statistics_map(Log(log.steps, picked), "sqnr_db")
    common.Console().print(summary(log, recipes), ranked(ranking))
    common.show(
        common.Table(title=f"{steps} steps, final loss {losses[-1]:.2f}"), figure, args.output
    )
    return Result(log, losses, ranking)


def _key(recipe: str) -> jax.Array | None:
    """Returns a key if a recipe draws random bits."""
    return jax.random.key(2) if jaxq.get_product_recipe(recipe).draws else None


if __name__ == "__main__":
    main()
