"""Statistics of every tensor of a model's products in a training step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq._base.arguments import described, integer
from jaxq._base.registry import suggestion
from jaxq.analysis._arguments import format_or_recipe
from jaxq.analysis._finishing import finished
from jaxq.analysis._tallies import Sums, difference_of, errors_of, quantized, sums_of
from jaxq.formats import FORMATS, Format
from jaxq.models import Monitored, Rules, check_pattern, make_monitored
from jaxq.products import (
    Axes,
    Gradient,
    Operands,
    Results,
    Running,
    Tally,
    is_stochastic,
    placed,
)
from jaxq.products import Tensor as Operand
from jaxq.recipes import Granularity, PerBlock, Recipe, title_of

__all__ = ["STATISTICS", "Monitoring", "check_names", "monitor"]

TENSORS = ("lhs", "rhs", "output", "cotangent", "residual")
_VALUES = ("amax", "smallest", "rms", "mean", "zeros", "nonfinite", "range_bits")
_ERRORS = (
    "sqnr_db",
    "mse",
    "bias",
    "cosine",
    "clipped",
    "flushed",
    "lost",
)
_SCALES = ("scale_amax", "scale_smallest", "scale_range_bits", "scale_ends")
STATISTICS = (
    *_VALUES,
    *_ERRORS,
    "exponents",
    "block_range_bits",
    "codes_used",
    *_SCALES,
    "product",
)
_OF_ERRORS = {*_ERRORS, "block_range_bits", "codes_used", *_SCALES}
_OF_PRODUCTS = ("product", "accumulation")


@dataclasses.dataclass(frozen=True)
class Monitoring:
    """The statistics that `monitor` computes. Frozen, hashable, static in jit.

    A product has up to five tensors: `"lhs"`, `"rhs"` (the weight, on either side), `"output"`, the
    `"cotangent"` of the output, and the `"residual"` of each operand, which the gradient's products
    may quantize again. An array that the function marks by `jax.ad_checkpoint.checkpoint_name` has
    two: `"output"`, the array itself, and its `"cotangent"`. The statistics of a tensor, by name:

    - of its finite elements: `"amax"`, `"smallest"` (nonzero magnitude), `"rms"`, `"mean"`,
      `"zeros"` (the fraction), `"range_bits"`, which is log2(amax / smallest), and `"exponents"`,
      the counts of the exponents -127 to 127; also `"nonfinite"`, the fraction of all elements;
    - of the error e of its recipe: `"sqnr_db"`, `"mse"`, `"bias"` (the mean of e), `"cosine"`, and
      the fractions `"clipped"`, `"flushed"` (to zero) and `"lost"`. Lost elements are finite before
      quantization and not after it, as in a block with a NaN; they do not count in the errors;
      `"block_range_bits"`, the largest range within a block; `"codes_used"`, the fraction of codes
      that occur;
    - of its scales: `"scale_amax"`, `"scale_smallest"`, `"scale_range_bits"`, and `"scale_ends"`,
      the fraction at an end of the scales' format;
    - `"product"`: the errors of the output, and of the two products of the gradient, relative to
      the float products of the original operands. Costs up to four more products. If the recipe
      emulates accumulation, `"accumulation"` has the part of the error that is due to it: the error
      relative to the same product with sums in float32, in the same order.

    Attributes:
      products: regular expressions; a product is monitored if one of them is found in its name, as
        `jaxq.explain` lists it, and a marked array if one is found in the name of its mark. A
        string means one of them. Default: all products and marked arrays.
      tensors: the names of the tensors. Default: all but `"residual"`.
      statistics: the names of the statistics. Default: those of the elements and the error except
        `"exponents"`, `"block_range_bits"` and `"codes_used"`.
      counterfactuals: recipes or formats, or their names, that are applied to the same tensors for
        comparison, without changing the step. For operands and cotangents of products, a
        granularity refers to the tensor as a matrix, as in `jaxq.SingleProduct`; for outputs and
        marked arrays, to their own axes, as in `jaxq.Rule`. A last block may be shorter. Default:
        none.
      every: the number of steps from one step with statistics to the next; see `Monitored.at`.
        Default: 1.

    Raises:
      ValueError: if a name is unknown, a counterfactual is stochastic, or `every` is less than 1.
      TypeError: if a field has another type.

    Example:
      >>> Monitoring(statistics=("sqnr", "amax"))
      Traceback (most recent call last):
      ...
      ValueError: Monitoring: `statistics` has no 'sqnr'. Did you mean sqnr_db?
    """

    products: str | Sequence[str] = ("",)
    tensors: Sequence[str] = TENSORS[:-1]
    statistics: Sequence[str] = (*_VALUES, *_ERRORS)
    counterfactuals: Sequence[str | Recipe | Format] = ()
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("products", "tensors", "statistics"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for pattern in self.products:
            check_pattern("Monitoring", "products", pattern)
        check_names("Monitoring", "tensors", self.tensors, TENSORS)
        check_names("Monitoring", "statistics", self.statistics, STATISTICS)
        integer("Monitoring", "every", self.every, "Use 1.", least=1)
        counterfactuals = self.counterfactuals
        if isinstance(counterfactuals, str | Recipe | Format):
            counterfactuals = (counterfactuals,)
        object.__setattr__(self, "counterfactuals", tuple(map(_counterfactual, counterfactuals)))
        self._check_counterfactuals()

    def _check_counterfactuals(self) -> None:
        labels = [_label(target) for target in self.counterfactuals if not isinstance(target, str)]
        if len({*labels}) != len(labels):
            raise ValueError(
                "Monitoring: `counterfactuals` must have distinct names, got "
                f"{', '.join(labels)}. Put one of them into another Monitoring."
            )
        elements = [
            target.element if isinstance(target, Recipe) else target
            for target in self.counterfactuals
            if not isinstance(target, str)
        ]
        wide = [fmt.name for fmt in elements if fmt.bits > 16]
        if wide and "codes_used" in self.statistics:
            raise ValueError(
                'Monitoring: "codes_used" needs counterfactuals of at most 16 bits, got '
                f"{', '.join(wide)}. Leave one of them out."
            )


def check_names(owner: str, field: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises a ValueError with suggestions for the first name that is not known."""
    for name in names:
        if name not in known:
            hint = suggestion(str(name), known)
            raise ValueError(f"{owner}: `{field}` has no {name!r}. {hint}")


def _counterfactual(name_or_target: str | Recipe | Format) -> Recipe | Format:
    try:
        target = format_or_recipe(name_or_target)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Monitoring: `counterfactuals`: {error}") from error
    if isinstance(target, Recipe) and is_stochastic(target):
        raise ValueError(
            "Monitoring: `counterfactuals` must round without random bits, got "
            f"{_label(target)}. Use dataclasses.replace(recipe, rounding='nearest_even')."
        )
    return target


def _label(target: Recipe | Format) -> str:
    """Returns the name of a recipe or format for statistics."""
    if isinstance(target, Format):
        return FORMATS.name_of(target) or target.name
    return title_of(target)


@dataclasses.dataclass(frozen=True)
class _Statistics:
    """The definition of the statistics of one request, as `jaxq.models` needs it."""

    request: Monitoring

    @property
    def every(self) -> int:
        """The number of steps from one step with statistics to the next."""
        return self.request.every

    @property
    def keeps_operands(self) -> bool:
        """True if the backward pass needs the values of the operands."""
        return "residual" in self.request.tensors or "product" in self.request.statistics

    def forward(
        self, running: Running, operands: Operands, y: jax.Array, output: Recipe | None
    ) -> Tally:
        """Returns the statistics of the operands and the output."""
        tally, axes = Tally.empty(), running.operation.contraction.axes
        for i, name in enumerate(("lhs", "rhs")):
            if name in self.request.tensors:
                sums = self._sums(operands[i])
                others = self._counterfactuals(operands[i].value, axes[i])
                tally = tally.join(sums.tensor.join(sums.errors).join(others).prefixed(name))
        if "output" in self.request.tensors:
            result = Operand(y, y)
            if output is not None:
                result = quantized(y, output.to_nearest() if is_stochastic(output) else output)
            sums = self._sums(result)
            others = self._counterfactuals(y, None)
            tally = tally.join(sums.tensor.join(sums.errors).join(others).prefixed("output"))
            tally = tally.join(self._product(lambda: running.results(y)).prefixed("output"))
        return tally

    def backward(
        self,
        running: Running,
        operands: Operands | None,
        gradients: tuple[Gradient, Gradient],
        cotangent: jax.Array,
    ) -> Tally:
        """Returns the statistics of the cotangent and the products of the gradient."""
        asked, contraction = {*self.request.tensors}, running.operation.contraction
        tally, first = Tally.empty(), gradients[0].cotangent
        # The statistics of tensors that both products quantize in the same way are computed once.
        known: dict[Any, Tally] = {}
        if "cotangent" in asked:
            same = first.value is cotangent
            sums = self._sums(first if same else Operand(cotangent, cotangent))
            tally = sums.tensor.prefixed("cotangent")
            known |= {_identity(first): sums.errors} if same else {}
        for index, (name, axes) in enumerate(
            (("dlhs", contraction.dlhs.axes), ("drhs", contraction.drhs.axes))
        ):
            for i, part in enumerate(("cotangent", "residual")):
                operand = gradients[index][i]
                if part not in asked or operand is None:
                    continue
                if _identity(operand) not in known:
                    known[_identity(operand)] = self._errors(operand)
                sums = known[_identity(operand)]
                sums = sums.join(self._counterfactuals(operand.value, axes[i], known))
                tally = tally.join(sums.prefixed(f"{name}/{part}"))
            if "cotangent" in asked and operands is not None:
                results = functools.partial(running.gradient_results, index, cotangent, operands)
                tally = tally.join(self._product(results).prefixed(name))
        return tally

    def array(self, tensor: str, x: jax.Array) -> Tally:
        """Returns the statistics of a marked array or of its cotangent."""
        if tensor not in self.request.tensors:
            return Tally.empty()
        sums = self._sums(Operand(x, x)).tensor
        return sums.join(self._counterfactuals(x, None)).prefixed(tensor)

    def finish(self, tally: Tally) -> dict[str, jax.Array]:
        """Returns the requested statistics by name."""
        asked = self.request.statistics
        return {
            name: value
            for name, value in finished(tally).items()
            if name.rpartition("/")[2] in asked or name.split("/")[-2] in _OF_PRODUCTS
        }

    @property
    def _asked(self) -> set[str]:
        return {*self.request.statistics}

    def _sums(self, operand: Operand) -> Sums:
        """Returns the sums of a tensor and of its recipe's error."""
        if not self._asked & {*_VALUES, "exponents"}:
            return Sums(Tally.empty(), self._errors(operand))
        errors = operand.recipe is not None and bool(self._asked & _OF_ERRORS)
        return sums_of(operand, self._asked, errors)

    def _errors(self, operand: Operand) -> Tally:
        """Returns the sums of a recipe's error."""
        if operand.recipe is None or not self._asked & _OF_ERRORS:
            return Tally.empty()
        return errors_of(operand, self._asked)

    def _counterfactuals(
        self, x: jax.Array, axes: Axes | None, known: dict[Any, Tally] | None = None
    ) -> Tally:
        """Returns the sums of the errors of the counterfactual recipes.

        Args:
          x: the tensor.
          axes: its axes in a product, or None to read granularities on the tensor's own axes.
          known: the sums that are known already, which are extended.
        """
        tally, known = Tally.empty(), {} if known is None else known
        for target in self.request.counterfactuals:
            assert not isinstance(target, str)
            placed_target = target
            if isinstance(target, Recipe):
                granularity = _padded(target.granularity)
                if axes is not None:
                    granularity = placed(granularity, x.shape, axes)
                placed_target = dataclasses.replace(target, granularity=granularity)
            if (id(x), placed_target) not in known:
                known[id(x), placed_target] = self._errors(quantized(x, placed_target))
            tally = tally.join(known[id(x), placed_target].prefixed(_label(target)))
        return tally

    def _product(self, results: Callable[[], Results]) -> Tally:
        """Returns the sums of the errors of a product's result."""
        if "product" not in self.request.statistics:
            return Tally.empty()
        outputs = results()
        tally = difference_of(outputs.exact, outputs.quantized).prefixed("product")
        if outputs.wide is not None:
            from_accumulation = difference_of(outputs.wide, outputs.quantized)
            tally = tally.join(from_accumulation.prefixed("accumulation"))
        return tally


def _identity(operand: Operand) -> tuple:
    """Returns a key that is equal for two operands of equal arrays and recipes."""
    return id(operand.value), id(operand.quantized), operand.recipe


def _padded(granularity: Granularity) -> Granularity:
    """Returns a granularity whose last blocks may be shorter than the others."""
    if isinstance(granularity, PerBlock):
        return dataclasses.replace(granularity, pad=True)
    return granularity


def monitor(
    fn: Callable[..., Any],
    rules: Rules,
    request: Monitoring = Monitoring(),
    *,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Monitored]:
    """Returns the state with which a step also returns statistics of its products.

    The state is passed to `jaxq.quantize_fn` in place of rules. Its gradient holds the statistics,
    because those of cotangents exist only in the backward pass:

        def step(params, state, batch):
            def objective(params, state):
                return jaxq.quantize_fn(loss, state)(params, batch)

            value, (gradients, seen) = jax.value_and_grad(objective, (0, 1))(params, state)
            return optimizer(params, gradients), state.update(seen), seen.statistics()

    The function's value and the gradient of its parameters do not change. Products in a scan over
    layers have one row of statistics per layer; runs of a product in any other loop, under `vmap`,
    or on the devices of a `shard_map` are merged. With `every=n`, `state.at(step)` switches the
    statistics on in every n-th step, and a `lax.cond` skips them in the others. Gradients of
    micro-batches are added, but their statistics are merged by `seen.merge(more)`.

    Arrays that the function marks by `jax.ad_checkpoint.checkpoint_name(x, name)` are monitored
    under that name, with one row per layer in a scan that slices parameters. If the name occurs
    twice or is that of a product, a number is added, as in `"hidden#2"`.

    Look-ups are not monitored. Products and marks are not monitored in a `while` loop, in a
    function with a custom derivative, or if no floating-point result depends on them
    differentiably, for example because of `stop_gradient`. NaN and infinity are counted and left
    out of all other statistics.

    Args:
      fn: as in `jaxq.quantize_fn`.
      rules: as in `jaxq.quantize_fn`; `[]` quantizes nothing. May be the state of
        `jaxq.delayed_scaling`.
      request: the statistics. Default: `Monitoring()`.
      argnums: as in `jaxq.quantize_fn`.

    Returns:
      `(*args) -> jaxq.models.Monitored`. Only the shapes and dtypes of the arguments are used.
      `seen.statistics()` has names such as `"lhs/sqnr_db"`, `"cotangent/amax"`,
      `"dlhs/cotangent/flushed"` (the cotangent as the product that gives the gradient of lhs
      quantizes it), `"lhs/mxfp4/sqnr_db"` (a counterfactual), `"drhs/product/cosine"` and
      `"output/accumulation/sqnr_db"`.

    Raises:
      TypeError: as in `jaxq.quantize_fn`.
      ValueError: as in `jaxq.quantize_fn`; or if a pattern of `products` matches no product that
        can be monitored.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> loss = lambda params, x: ((x @ params["w"]) ** 2).sum()
      >>> params, x = {"w": jnp.eye(2)}, jnp.array([[0.25, -3.0]])
      >>> state = monitor(loss, [], Monitoring(counterfactuals=["int4_tensor"]))(params, x)
      >>> objective = lambda params, state: jaxq.quantize_fn(loss, state)(params, x)
      >>> seen = jax.jit(jax.grad(objective, argnums=1))(params, state).flat()
      >>> seen["w/lhs/rms"], seen["w/cotangent/amax"]
      (2.1286..., 6.0)
      >>> seen["w/lhs/int4_tensor/sqnr_db"]
      24.53...
    """
    if not isinstance(request, Monitoring):
        raise TypeError(
            f"monitor: `request` must be a jaxq.analysis.Monitoring, got {described(request)}. "
            "Use Monitoring() for the default."
        )
    return make_monitored("monitor", fn, rules, _Statistics(request), request.products, argnums)
