"""Correction of biases for the mean error of quantized weights."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.tables import Table, Tabular
from jaxq.models import Rules, not_floating
from jaxq.ptq._calls import Model, read_calls
from jaxq.ptq._collectors import Layout, shared_inputs
from jaxq.ptq._leaves import LeafKey, Leaves, followed
from jaxq.ptq._models import stages_of
from jaxq.ptq._observing import Sought, sought
from jaxq.ptq._parts import Place
from jaxq.ptq._statistics import Statistics
from jaxq.quantizers import Quantized

__all__ = ["BiasChange", "BiasReport", "correct_biases"]

_OWNER = "ptq.correct_biases"


@dataclasses.dataclass(frozen=True)
class BiasChange:
    """The correction of one bias, in one layer of a scan.

    Attributes:
      product: the name of the product, with the layer in brackets if it is in a scan.
      bias: the path of the bias.
      tokens: the number of tokens; for experts, of the one that saw the fewest.
      rms: the root mean square of the correction over the outputs.
      largest: the largest absolute value of the correction.
    """

    product: str
    bias: str
    tokens: int
    rms: float
    largest: float


@dataclasses.dataclass(frozen=True, repr=False)
class BiasReport(Tabular):
    """The report of `jaxq.ptq.correct_biases`; its `str` is a table.

    Attributes:
      rows: the corrections, in the order of the program.
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

    Products that add to the same bias are corrected for the sum of their shifts.

    Args:
      fn: a function of the parameters and the inputs, as in `jaxq.quantize_fn`.
      rules: the rules by which the parameters were packed.
      biases: for a product's name, the path of its bias in the parameters. The bias must be added
        to the product's outputs before any other operation. It has the shape of one token's
        outputs, or is flat; layers of a scan and experts lie along leading axes.
      mask: as in `jaxq.ptq.quantize_weights`.

    Returns:
      `(params, packed, batches) -> (corrected packed params, BiasReport)`. `params` are the
      original parameters, `packed` those of `jaxq.quantize_weights` or `jaxq.ptq.quantize_weights`,
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
    if not jax.tree_util.all_leaves([fn]):
        raise TypeError(
            f"{_OWNER}: `fn` must be a function of the parameters, got a pytree, "
            f"{type(fn).__name__}. Pass lambda module, x: module(x)."
        )

    def corrected(params: Any, packed: Any, batches: Any) -> tuple[Any, BiasReport]:
        calls = read_calls(_OWNER, fn, mask, (params, batches))
        model = _restricted(calls.plan(rules), biases)
        correction = _Correction(model, biases, params, packed)
        stages = stages_of(calls, model, correction.leaves, correction.solve)
        root = stages.root()
        envs = calls.environments(model, root.flat.body.invars)
        stages.together(root, stages.observed(root, envs))
        return correction.result()

    return corrected


def _restricted(model: Model, biases: Mapping[str, str]) -> Model:
    """Returns a model of which only the products with a bias are observed, without Hessians.

    Raises:
      ValueError: if a name is not that of a product whose stored weight the rules quantize.
    """
    planned, found = model.planned, sought(model.planned, hessian=False)
    numbers = {planned.products[n].name: n for n in found.matrices}
    failed = {planned.products[n].name: reason for n, reason in found.reasons.items()}
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
        raise ValueError(_unknown("a product whose weight `rules` quantize", name, numbers))
    matrices = {numbers[name]: found.matrices[numbers[name]] for name in biases}
    return Model(planned, Sought(matrices, {}, shared_inputs(planned.node, matrices)))


def _unknown(noun: str, name: str, known: Iterable[str]) -> str:
    """Returns the error for a name in `biases` that does not exist."""
    near = ", ".join(difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.0)) or "none"
    return f"{_OWNER}: `biases` must name {noun}, got {name!r}. The nearest are {near}."


class _Correction:
    """The state of a run: the corrections so far.

    Args:
      model: the model, of the products to correct.
      biases: the paths of the biases by product.
      params: the float parameters.
      packed: the packed parameters.

    Raises:
      ValueError: if the parameters do not fit each other, or a path does not exist.
    """

    def __init__(self, model: Model, biases: Mapping[str, str], params: Any, packed: Any) -> None:
        self._sought, self._biases = model.sought, biases
        self.leaves = Leaves(model.planned)
        pairs, self._structure = jax.tree_util.tree_flatten_with_path(packed, is_leaf=_is_quantized)
        if self._structure != jax.tree.structure(params):
            raise ValueError(
                f"{_OWNER}: `packed` must have the structure of `params`, got "
                f"{self._structure.num_leaves} leaves instead of "
                f"{jax.tree.structure(params).num_leaves}, or other names. Pack the same "
                "parameters by jaxq.quantize_weights."
            )
        self._paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in pairs]
        self._packed = [leaf for _, leaf in pairs]
        places = model.planned.traced.parameters[1]
        self._index = {place: i for i, place in enumerate(places) if place is not None}
        self._values: dict[int, jax.Array] = {}
        self._new: dict[int, np.ndarray] = {}
        self._rows: list[BiasChange] = []
        for number in model.sought.matrices:
            product = model.planned.products[number]
            path = biases[product.name]
            if path not in self._paths:
                raise ValueError(_unknown("a leaf of `packed`", path, self._paths))
            leaf = self._packed[self._paths.index(path)]
            reason = not_floating(leaf)
            if reason:
                raise ValueError(
                    f"{_OWNER}: bias {path!r} must be a float array, but it {reason}. Exclude it "
                    "by a rule with the recipe None."
                )
            axes = model.sought.matrices[number].axes
            weight = product.operands[0 if model.sought.matrices[number].swapped else 1].shape
            batch, free = ([weight[a] for a in own] for own in (axes.batch, axes.free))
            leading = [*product.stacks, *batch]
            shapes = [[*leading, *free], [*leading, int(np.prod(free))]]
            if _long(leaf.shape) not in [_long(shape) for shape in shapes]:
                raise ValueError(
                    f"{_OWNER}: bias {path!r} must have the shape {tuple(shapes[0])} of the "
                    f"outputs of {product.where}, got {leaf.shape}. Name another leaf."
                )

    def solve(self, place: Place, observed: Callable[[], Statistics]) -> None:
        """Corrects the bias of one product at one iteration."""
        statistics = observed()
        product, path = place.product, self._biases[place.product.name]
        if not bool(jnp.all(jnp.isfinite(statistics.amax))):
            raise ValueError(
                f"{_OWNER}: inputs must be finite, but {product.where} has a NaN or an infinity "
                "in its input. Look for it in the batches, or mask the padding."
            )
        seen = followed(place.frame, place.variable)
        if isinstance(seen, str):
            raise ValueError(
                f"{_OWNER}: product {product.name!r} cannot be corrected: {seen}. Remove it from "
                "`biases`."
            )
        stored = seen.move(*map(self._value, seen.keys))
        layout = Layout(self._sought.matrices[product.number].axes, seen.x.shape)
        own = layout.stacked(statistics)
        mean = own.total / lax.max(own.tokens, np.int32(1))[:, None].astype(jnp.float32)
        error = layout.matrices(stored - seen.x)
        shift = jnp.einsum("mio,mi->mo", error, mean, precision=lax.Precision.HIGHEST)
        self._subtract(path, product.stacks, place.iterations, np.asarray(shift))
        for key in seen.keys:
            self.leaves.forget(key)
        brackets = "".join(f"[{i}]" for i in (*place.frame.iterations, *place.iterations))
        self._rows.append(
            BiasChange(
                product=product.name + brackets,
                bias=path,
                tokens=int(jnp.min(own.tokens)),
                rms=float(jnp.sqrt(jnp.mean(shift**2))),
                largest=float(jnp.max(jnp.abs(shift))),
            )
        )

    def _value(self, key: LeafKey) -> jax.Array:
        """Returns the stored values of a leaf or a row of it, float32.

        Raises:
          ValueError: if the leaf is not packed.
        """
        if key.leaf not in self._values:
            leaf = self._packed[self._index[key.leaf]]
            if not _is_quantized(leaf):
                raise ValueError(
                    f"{_OWNER}: leaf {self._paths[self._index[key.leaf]]!r} of `packed` must be "
                    "packed, got an array. Pack the parameters by jaxq.quantize_weights with the "
                    "same rules."
                )
            self._values[key.leaf] = leaf.dequantize().astype(jnp.float32)
        return self._values[key.leaf][key.rows]

    def _subtract(
        self, path: str, stacks: tuple[int, ...], iterations: tuple[int, ...], shift: np.ndarray
    ) -> None:
        """Subtracts a shift from a bias or the layer of a bias."""
        at = self._paths.index(path)
        if at not in self._new:
            self._new[at] = np.array(self._packed[at], np.float32)
        layers = self._new[at].reshape((*stacks, -1))  # A view, since the array is contiguous.
        layers[iterations] -= shift.reshape(-1)

    def result(self) -> tuple[Any, BiasReport]:
        """Returns the packed parameters with new biases, and the report."""
        leaves = [
            jnp.asarray(self._new[i], leaf.dtype) if i in self._new else leaf
            for i, leaf in enumerate(self._packed)
        ]
        return jax.tree.unflatten(self._structure, leaves), BiasReport(tuple(self._rows))


def _long(shape: Iterable[int]) -> list[int]:
    """Returns the lengths other than 1 of a shape."""
    return [n for n in shape if n != 1]


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)
