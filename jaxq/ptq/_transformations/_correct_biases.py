"""Correction of biases for the mean error of quantized weights (`correct_biases`)."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.paths import leaf_path
from jaxq._base.registry import suggestion
from jaxq._base.tables import Table, Tabular
from jaxq._jax.processes import host_array
from jaxq.models import Product, Rules, not_floating
from jaxq.ptq._calibration_runs import (
    LeafKey,
    Leaves,
    Model,
    Occurrence,
    model_runner,
    read_calls,
    trace_weight,
)
from jaxq.ptq._statistics import MatrixLayout, Statistics, Targets, find_targets, shared_inputs
from jaxq.ptq._transformations._checks import check_function
from jaxq.quantizers import Quantized

__all__ = ["BiasChange", "BiasReport", "correct_biases"]

_OWNER = "ptq.correct_biases"


@dataclasses.dataclass(frozen=True)
class BiasChange:
    """The correction of one bias, in one layer of a scan.

    Attributes:
      product: the name of the product, with the layer in brackets if it is in a scan.
      bias: the path of the bias.
      tokens: the number of calibration tokens; for experts, the smallest number of any expert.
      rms: the root mean square of the correction over the outputs.
      largest: the largest absolute value of the correction.

    Example:
      >>> from jaxq import ptq
      >>> ptq.BiasChange("w", "b", tokens=32, rms=0.25, largest=0.5).largest
      0.5
    """

    product: str
    bias: str
    tokens: int
    rms: float
    largest: float


@dataclasses.dataclass(frozen=True, repr=False)
class BiasReport(Tabular):
    """The report of `jaxq.ptq.correct_biases`. Prints as a table.

    Attributes:
      rows: the corrections, in the order in which the model computes the products.

    Example:
      >>> from jaxq import ptq
      >>> ptq.BiasReport((ptq.BiasChange("w", "b", tokens=32, rms=0.25, largest=0.5),))
      product  bias  tokens   rms  largest
      w           b      32  0.25      0.5
    """

    rows: tuple[BiasChange, ...]

    def _table(self) -> Table:
        return Table(self.rows)


def correct_biases(
    fn: Callable[..., Any],
    rules: Rules,
    biases: Mapping[str, str],
    *,
    mask: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    r"""Returns a function that corrects biases for the mean error of quantized weights.

    The error E of a weight, the stored value minus the original one, shifts the mean of its
    product's outputs by `E^T mean(x)`. The function subtracts this shift from the bias that is
    added to the outputs, so the product has its original mean on the calibration data. The means of
    the inputs come from one run of the model with float weights. No Hessian is needed.

    If several products are added to the same bias, the sum of their shifts is subtracted.

    Args:
      fn: a function of the parameters and the inputs, as in `jaxq.quantize_fn`.
      rules: the rules with which the parameters were packed.
      biases: a mapping from the name of each product to the path of its bias in the parameters. The
        bias must be added to the product's outputs before any other operation. It has the shape of
        one token's outputs, or that shape flattened; layers of a scan and experts are leading axes.
      mask: as in `jaxq.ptq.quantize_weights`.

    Returns:
      A function `(params, packed, batches) -> (packed, BiasReport)`. `params` are the original
      parameters, `packed` is the result of `jaxq.quantize_weights` or `jaxq.ptq.quantize_weights`,
      and `batches` is a sequence as in `jaxq.ptq.quantize_weights`. Only biases change.

    Raises:
      TypeError: if `fn` is a pytree, such as a module.
      ValueError: as in `jaxq.ptq.quantize_weights`; if `biases` names a product or a leaf that does
        not exist; if a product's weight is not stored, or its bias is not a float array of its
        shape; or if `packed` does not have the structure of `params`.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> from jaxq import ptq
      >>> model = lambda params, x: x @ params["w"] + params["b"][None]
      >>> params = {"w": jnp.array([[0.25], [1.0]]), "b": jnp.zeros(1)}
      >>> rules = {"w": jaxq.Recipe("int2")}
      >>> packed = jaxq.quantize_weights(model, rules)(params, jnp.ones((1, 2)))
      >>> packed["w"].dequantize().tolist()
      [[0.0], [1.0]]
      >>> correct = ptq.correct_biases(model, rules, {"w": "b"})
      >>> packed, report = correct(params, packed, [jnp.array([[1.0, 0.0], [3.0, 1.0]])])
      >>> packed["b"].tolist(), report.rows[0].largest
      ([0.5], 0.5)

    References:
      Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019),
      section 4.2.
    """
    check_function(_OWNER, fn)

    def corrected(params: Any, packed: Any, batches: Any) -> tuple[Any, BiasReport]:
        calls = read_calls(_OWNER, fn, mask, (params, batches))
        model = _restrict(calls.plan(rules), biases)
        correction = _CorrectionRun(model, biases, params, packed)
        runner = model_runner(calls, model, correction.leaves, correction.solve)
        root = runner.root()
        envs = calls.environments(model, root.flat.body.invars)
        runner.solve_together(root, runner.observe_all(root, envs))
        return correction.result()

    return corrected


def _restrict(model: Model, biases: Mapping[str, str]) -> Model:
    """Returns the model with only the products in `biases` to observe, without Hessians.

    Raises:
      ValueError: if a name belongs to no product with a stored weight.
    """
    planned, targets = model.planned, find_targets(model.planned, hessian=False)
    numbers = {planned.products[n].name: n for n in targets.matrices}
    failed = {planned.products[n].name: reason for n, reason in targets.reasons.items()}
    for name in biases:
        if name in numbers and numbers[name] not in planned.stored.reasons:
            continue
        if name in numbers:
            failed[name] = f"its weight is not stored: {planned.stored.reasons[numbers[name]]}"
        if name in failed:
            raise ValueError(
                f"{_OWNER}: product {name!r} cannot be corrected: {failed[name]}. Remove it from "
                "`biases`."
            )
        raise ValueError(_unknown_name("a product whose weight `rules` quantize", name, numbers))
    matrices = {numbers[name]: targets.matrices[numbers[name]] for name in biases}
    return Model(planned, Targets(matrices, {}, shared_inputs(planned.node, matrices)))


def _unknown_name(noun: str, name: str, known: Iterable[str]) -> str:
    """Returns the error message for a name in `biases` that does not exist."""
    hint = suggestion(name, sorted(known), most=3)
    return f"{_OWNER}: `biases` must name {noun}, got {name!r}. {hint}"


def _other_structure(params: Any, packed_paths: Sequence[str]) -> str:
    """Returns the error message for packed parameters with another structure than `params`."""
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    got = "the same paths in other containers"
    for tree, first, second in (("packed", packed_paths, paths), ("params", paths, packed_paths)):
        other = "params" if tree == "packed" else "packed"
        alone = [path for path in first if path not in set(second)]
        if alone:
            got = f"the leaf {alone[0]!r:.80} in `{tree}` but not in `{other}`"
    return (
        f"{_OWNER}: `packed` must have the structure of `params`, got {got}. Pack `params` with "
        "jaxq.quantize_weights."
    )


class _CorrectionRun:
    """The corrected biases and the rows of the report in one call of the function.

    Args:
      model: the model, restricted to the products to correct.
      biases: the path of the bias of each product.
      params: the float parameters.
      packed: the packed parameters.

    Raises:
      ValueError: if the structures of `params` and `packed` differ, or a path does not exist.
    """

    def __init__(self, model: Model, biases: Mapping[str, str], params: Any, packed: Any) -> None:
        self._targets, self._biases = model.targets, biases
        self.leaves = Leaves(model.planned)
        pairs, self._structure = jax.tree_util.tree_flatten_with_path(packed, is_leaf=_is_quantized)
        self._paths = [leaf_path(path) for path, _ in pairs]
        if self._structure != jax.tree.structure(params):
            raise ValueError(_other_structure(params, self._paths))
        self._packed = [leaf for _, leaf in pairs]
        leaves = model.planned.traced.parameters[1]
        self._index = {leaf: i for i, leaf in enumerate(leaves) if leaf is not None}
        self._values: dict[int, jax.Array] = {}
        self._new: dict[int, np.ndarray] = {}
        self._rows: list[BiasChange] = []
        for number in model.targets.matrices:
            self._check_bias(model.planned.products[number])

    def _check_bias(self, product: Product) -> None:
        """Raises a ValueError unless the bias of a product is a float array of a suitable shape."""
        path = self._biases[product.name]
        if path not in self._paths:
            raise ValueError(_unknown_name("a leaf of `packed`", path, self._paths))
        leaf = self._packed[self._paths.index(path)]
        reason = not_floating(leaf)
        if reason:
            raise ValueError(
                f"{_OWNER}: bias {path!r} must be a float array, but it {reason}. Exclude it "
                "with a rule whose recipe is None."
            )
        matrix = self._targets.matrices[product.number]
        weight = product.operands[0 if matrix.swapped else 1].shape
        batch, free = ([weight[a] for a in axes] for axes in (matrix.axes.batch, matrix.axes.free))
        leading = [*product.stacks, *batch]
        shapes = [[*leading, *free], [*leading, int(np.prod(free))]]
        if _without_unit_axes(leaf.shape) not in map(_without_unit_axes, shapes):
            raise ValueError(
                f"{_OWNER}: bias {path!r} must have the shape {tuple(shapes[0])} of the "
                f"outputs of {product.where}, got {leaf.shape}. Name another leaf."
            )

    def solve(self, occurrence: Occurrence, observe: Callable[[], Statistics]) -> None:
        """Corrects the bias of one product, in one iteration of the scans around it."""
        statistics = observe()
        occurrence.check_finite(_OWNER, statistics)
        product, path = occurrence.product, self._biases[occurrence.product.name]
        view, reason = trace_weight(occurrence.frame, occurrence.variable)
        if view is None:
            raise ValueError(
                f"{_OWNER}: product {product.name!r} cannot be corrected: {reason}. Remove it from "
                "`biases`."
            )
        occurrence.check_weight(_OWNER, view.x)
        stored = view.move(*map(self._value, view.keys))
        layout = MatrixLayout(self._targets.matrices[product.number].axes, view.x.shape)
        stacked = layout.flatten_batches(statistics)
        mean = stacked.total / lax.max(stacked.tokens, np.int32(1))[:, None].astype(jnp.float32)
        error = layout.matrices(stored - view.x)
        shift = jnp.einsum("mio,mi->mo", error, mean, precision=lax.Precision.HIGHEST)
        self._subtract(path, product.stacks, occurrence.iterations, np.asarray(shift))
        for key in view.keys:
            self.leaves.forget(key)
        self._rows.append(
            BiasChange(
                product=occurrence.name,
                bias=path,
                tokens=int(jnp.min(stacked.tokens)),
                rms=float(jnp.sqrt(jnp.mean(shift**2))),
                largest=float(jnp.max(jnp.abs(shift))),
            )
        )

    def _value(self, key: LeafKey) -> jax.Array:
        """Returns the dequantized values of a leaf, or of one row of it, float32.

        Raises:
          ValueError: if the leaf is not packed.
        """
        if key.leaf not in self._values:
            leaf = self._packed[self._index[key.leaf]]
            if not _is_quantized(leaf):
                raise ValueError(
                    f"{_OWNER}: leaf {self._paths[self._index[key.leaf]]!r} of `packed` must be "
                    "packed, got an array. Pack the parameters with jaxq.quantize_weights and the "
                    "same rules."
                )
            self._values[key.leaf] = leaf.dequantize().astype(jnp.float32)
        return self._values[key.leaf][key.slice_index]

    def _subtract(
        self, path: str, stacks: tuple[int, ...], iterations: tuple[int, ...], shift: np.ndarray
    ) -> None:
        """Subtracts a shift from a bias, or from one layer of a stacked bias."""
        at = self._paths.index(path)
        if at not in self._new:
            self._new[at] = np.array(host_array(self._packed[at]), np.float32)
        layers = self._new[at].reshape((*stacks, -1))  # A view, since the array is contiguous.
        layers[iterations] -= shift.reshape(-1)

    def result(self) -> tuple[Any, BiasReport]:
        """Returns the packed parameters with the corrected biases, and the report."""
        leaves = [
            jnp.asarray(self._new[i], leaf.dtype) if i in self._new else leaf
            for i, leaf in enumerate(self._packed)
        ]
        return jax.tree.unflatten(self._structure, leaves), BiasReport(tuple(self._rows))


def _without_unit_axes(shape: Iterable[int]) -> list[int]:
    """Returns a shape without its axes of length 1."""
    return [n for n in shape if n != 1]


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)
