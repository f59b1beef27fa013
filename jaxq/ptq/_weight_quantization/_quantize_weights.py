"""Quantization of the weights of a model by a solver (`quantize_weights`)."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from jaxq.models import Rules
from jaxq.ptq._calibration_runs import BatchRun, Leaves, model_runner, read_calls
from jaxq.ptq._results import SolvedProduct, folder_of, journal_of
from jaxq.ptq._solvers import Solver, get_solver, needs_drift
from jaxq.ptq._weight_quantization._solver_run import SolverRun

__all__ = ["quantize_weights"]


def quantize_weights(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    solver: str | Solver = "gptq",
    sequential: bool = True,
    mask: Callable[..., Any] | None = None,
    progress: Callable[[SolvedProduct], None] | None = None,
    resume: str | pathlib.Path | None = None,
) -> Callable[..., Any]:
    """Returns a function that packs a model's parameters, with codes chosen by a solver.

    The packed parameters have the form and the scales of
    `jaxq.quantize_weights(fn, rules)(params, batch)`, and are used in the same way:
    `jaxq.quantize_fn(fn, rules)(packed, batch)`. The solver chooses the codes from the inputs of
    the products on the batches.

    Sequential solving runs the model in parts. The weight of a product is solved on the inputs that
    the packed weights before it produce, so later layers correct the errors of earlier ones.
    Products that read the same array, such as queries, keys and values, are solved together. A scan
    over layers runs one iteration at a time. Products in other loops, in `cond` or `shard_map`, or
    under a custom derivative are solved after one run of that loop or call with float weights. The
    values between two parts are stored for all batches; Hessians are stored for one input at a
    time. With `sequential=False`, all Hessians are collected in one run of the model with float
    weights.

    A weight that several products multiply in the same way, such as one shared by layers, is
    solved again at each of them, with the sum of their Hessians. Embedding tables are rounded to
    the nearest levels, unless a product multiplies them too. Activations that have a recipe are
    quantized while the model runs on the calibration data; the Hessian of a product is computed
    from its input before quantization.

    Args:
      fn: as in `jaxq.quantize_fn`. The parameters are its first argument; if `fn` is a pytree, such
        as an Equinox module, they are its leaves.
      rules: as in `jaxq.quantize_fn`.
      solver: a solver, or its name in `jaxq.ptq.SOLVERS`.
      sequential: False to solve all products on the inputs of the model with float weights.
      mask: a function of the arguments of `fn` after the parameters that returns a boolean array,
        False for padding, as in `jaxq.ptq.observe`. None (the default) uses all tokens.
      progress: a function that is called with the report of each solved product.
      resume: a folder in which each solved product is stored as one file, or None. Products that an
        interrupted run with the same model, rules, solver and batches stored there are not solved
        again, and the result equals that of an uninterrupted run. If the batches are sharded over
        several processes, each process has a folder of its own within this folder.

    Returns:
      A function `(params, batches) -> (packed, Report)`, or `(batches) -> (packed, Report)` if `fn`
      is a pytree. `batches` is a sequence with the arguments of `fn` after the parameters for each
      call, as a tuple if there are several; all calls have the same shapes. 32 sequences of 256
      tokens are a small calibration set, 128 sequences of 2048 tokens a large one. The domain of
      the data matters more than its amount.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`; if there are no batches, or their shapes differ; if the
        solver does not support a recipe; if an input or a weight is not finite, or their squared
        sums overflow float32; if the mask does not fit; or if `resume` holds products of another
        run.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> model = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (8, 16)),
      ...           "down": jax.random.normal(keys[1], (16, 4))}
      >>> batches = [jax.random.normal(keys[2], (32, 8))]
      >>> packed, report = ptq.quantize_weights(model, "int4_channel")(params, batches)
      >>> [row.product for row in report.rows], report.rows[0].loss < report.rows[0].rtn
      (['up', 'down'], True)
      >>> jaxq.quantize_fn(model, "int4_channel")(packed, batches[0]).shape
      (32, 4)

    References:
      Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
      Transformers" (2023), for the order of solving.
    """
    record, folder = get_solver(solver), folder_of("ptq.quantize_weights", resume)
    if needs_drift(record) and not sequential:
        raise ValueError(
            "ptq.quantize_weights: `sequential` must be True for a solver that corrects the drift "
            "of inputs, because inputs do not drift otherwise. Use solver='gptq'."
        )

    @functools.wraps(fn, updated=())
    def packed(*args: Any) -> Any:
        calls = read_calls("ptq.quantize_weights", fn, mask, args)
        model = calls.plan(rules)
        solving = SolverRun(calls.owner, model, record, progress)
        if folder is not None:
            settings = record, sequential
            solving.journal = journal_of(folder, calls, model, settings, SolvedProduct)
        runner = model_runner(calls, model, solving.leaves, solving.solve)
        root = runner.root()
        envs = calls.environments(model, root.flat.body.invars)
        if sequential:
            solving.pack_unsolved()  # Look-ups before the first product use the stored tables.
            runs = [BatchRun(root, envs)]
            if needs_drift(record):
                float_root = runner.root(Leaves(model.planned))
                runs.append(BatchRun(float_root, calls.environments(model, root.flat.body.invars)))
            runner.solve_in_order(runs)
        else:
            runner.solve_together(root, runner.observe_all(root, envs))
        return solving.result(), solving.report()

    return packed
