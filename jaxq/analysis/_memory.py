"""Memory use of a model under a recipe, including scales, and the accelerators that hold it."""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

from jaxq._base.arguments import integer, items_of, number
from jaxq._base.tables import Table, figure
from jaxq.analysis._arguments import FormatOrRecipe, format_or_recipe
from jaxq.analysis._sqnr import label
from jaxq.analysis.machines import DEVICES, MODELS, Device, Model, named
from jaxq.recipes import Recipe

__all__ = ["FitRow", "Memory", "MemoryRow", "fits_table", "memory", "memory_table"]

_SHAPE = (4096, 4096)  # The assumed matrix shape if only the number of parameters is known.
_RECIPES = ("float32", "bfloat16", "fp8_e4m3_channel", "int8_channel", "nvfp4", "mxfp4", "nf4_dq")


class Memory(NamedTuple):
    """The memory of a running model, in bytes.

    Attributes:
      weights: the bytes of all parameters, including their scales.
      kv_cache: the bytes of the cached keys and values of all tokens.
      overhead: the bytes of everything else.

    Example:
      >>> gib = 2**30
      >>> Memory(weights=6 * gib, kv_cache=2 * gib, overhead=1 * gib).total / gib
      9.0
    """

    weights: float
    kv_cache: float
    overhead: float

    @property
    def total(self) -> float:
        """The sum of all parts, in bytes."""
        return self.weights + self.kv_cache + self.overhead


def memory(
    model: "str | Model | float",
    recipe: FormatOrRecipe = "bfloat16",
    *,
    context: int = 8192,
    batch: int = 1,
    kv: FormatOrRecipe = "bfloat16",
    embeddings: FormatOrRecipe = "bfloat16",
    overhead: float = 0.1,
) -> Memory:
    """Returns the memory that a model takes during generation.

    Args:
      model: a name in `jaxq.analysis.machines.MODELS`, a `Model`, or a number of parameters, which
        are then treated as 4096 x 4096 matrices without a cache.
      recipe: the recipe or its name for the matrices of the layers; or a format or its name,
        which is stored without scales. Default: `"bfloat16"`.
      context: the number of cached tokens per sequence. Default: 8192.
      batch: the number of sequences. Default: 1.
      kv: the recipe or format of keys and values, stored as `[tokens * heads, head_dim]`.
      embeddings: the recipe or format of the embedding and the output layer. Norms, biases and
        routers are always bfloat16.
      overhead: the memory of activations, buffers and the runtime, as a fraction of the rest.
        Default: 0.1, a rule of thumb.

    Returns:
      A `Memory`.

    Raises:
      ValueError: if a name is unknown, a number is negative or infinite, or the blocks do not
        divide a matrix.

    Example:
      >>> m = memory("llama-3.1-8b", "int4_g128", context=8192)
      >>> [round(part / 2**30, 2) for part in m]
      [5.41, 1.0, 0.64]
    """
    integer("memory", "context", context, "Use, for example, 8192.", least=0)
    integer("memory", "batch", batch, "Use, for example, 1.", least=0)
    at_least_0, requirement = (lambda v: v >= 0), "a number of at least 0"
    number("memory", "overhead", overhead, requirement, at_least_0, "Use, for example, 0.1.")
    if not isinstance(model, str | Model):
        requirement = "a name, a Model or a number of parameters of at least 0"
        remedy = "Use, for example, 7e9, or a name in jaxq.analysis.machines.MODELS."
        number("memory", "model", model, requirement, at_least_0, remedy)
        weights, cache = model * _bits(recipe, _SHAPE) / 8, 0.0
        return Memory(weights, cache, overhead * weights)
    model = named("model", model, MODELS)
    bits = sum(math.prod(s) * count * _bits(recipe, s) for s, count in model.matrices)
    table = (model.vocabulary, model.hidden)
    bits += model.embeddings * _bits(embeddings, table) + 16 * model.others
    rows = context * batch * model.kv_heads
    cache = 2 * model.layers * rows * model.head_dim / 8
    cache *= _bits(kv, (rows, model.head_dim)) if rows else 0
    return Memory(bits / 8, cache, overhead * (bits / 8 + cache))


def _bits(recipe: FormatOrRecipe, shape: tuple[int, ...]) -> float:
    """Returns the bits per element of a tensor, including scales."""
    target = format_or_recipe(recipe)
    return target.bits_per_weight(shape) if isinstance(target, Recipe) else float(target.bits)


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One recipe in a `memory_table`: bits per weight, sizes in GiB, and the smallest device."""

    model: str
    recipe: str
    bits: float
    weights_gib: float
    kv_gib: float
    overhead_gib: float
    total_gib: float
    device: str


def memory_table(
    model: "str | Model | float | None" = None,
    recipes: Iterable[FormatOrRecipe] = _RECIPES,
    *,
    params: float | None = None,
    context: int = 8192,
    batch: int = 1,
    kv: FormatOrRecipe = "bfloat16",
    embeddings: FormatOrRecipe = "bfloat16",
    overhead: float = 0.1,
) -> Table:
    """Returns a model's memory under several recipes, and the smallest device that holds it.

    Args:
      model: the model, as in `memory`.
      recipes: the recipes to compare, each as in `memory`.
      params: a number of parameters, instead of `model`.
      context: as in `memory`.
      batch: as in `memory`.
      kv: as in `memory`.
      embeddings: as in `memory`.
      overhead: as in `memory`.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Raises:
      ValueError: as in `memory`; or if not exactly one of `model` and `params` is given.

    Example:
      >>> print(memory_table(params=7e9, recipes=["bfloat16", "int4_g128"]))
      model       recipe  bits  weights_gib  kv_gib  overhead_gib  total_gib   device
      7 × 10⁹   bfloat16    16        13.04       0         1.304      14.34  tpu-v5e
      7 × 10⁹  int4_g128  4.25        3.463       0        0.3463       3.81  tpu-v5e
    """
    if (model is None) == (params is None):
        raise ValueError(
            "memory_table: either `model` or `params`, a number of parameters, must be given, got "
            f"{'neither' if model is None else 'both'}. Pass, for example, params=7e9."
        )
    spec = params if model is None else model
    assert spec is not None
    rows = []
    for recipe in items_of("memory_table", "recipes", recipes):
        m = memory(
            spec,
            recipe,
            context=context,
            batch=batch,
            kv=kv,
            embeddings=embeddings,
            overhead=overhead,
        )
        count = _parameters(spec) if isinstance(spec, str | Model) else spec
        holding = [d for d in DEVICES.values() if d.memory >= m.total]
        smallest = min(holding, key=lambda d: d.gib).name if holding else "none alone"
        bits = 8 * m.weights / count if count else math.nan
        rows.append(
            MemoryRow(
                model=_title(spec),
                recipe=label(recipe),
                bits=bits,
                weights_gib=m.weights / 2**30,
                kv_gib=m.kv_cache / 2**30,
                overhead_gib=m.overhead / 2**30,
                total_gib=m.total / 2**30,
                device=smallest,
            )
        )
    return Table(tuple(rows))


def _parameters(model: "str | Model") -> int:
    return named("model", model, MODELS).parameters


def _title(model: "str | Model | float") -> str:
    if isinstance(model, Model):
        return model.name
    return model if isinstance(model, str) else figure(model)


@dataclasses.dataclass(frozen=True)
class FitRow:
    """One model in one recipe on one device.

    Attributes:
      model: the model's name.
      recipe: the recipe's name.
      device: the device's name.
      total_gib: the memory that the model takes, in GiB.
      share: the fraction of the device's memory that it takes; above 1 it does not fit.
      fits: True if the model fits on one device.
      devices: the number of devices needed if weights and cache are split evenly without copies.
      tokens: the number of tokens, over all sequences, whose cache fits on one device; 0 if the
        weights alone are too large, -1 if the size of the cache is unknown.
    """

    model: str
    recipe: str
    device: str
    total_gib: float
    share: float
    fits: bool
    devices: int
    tokens: int


def fits_table(
    models: "Iterable[str | Model | float]" = tuple(MODELS),
    recipes: Iterable[FormatOrRecipe] = ("bfloat16", "int8_channel", "int4_g128"),
    devices: "Iterable[str | Device]" = tuple(DEVICES),
    *,
    context: int = 8192,
    batch: int = 1,
    kv: FormatOrRecipe = "bfloat16",
    embeddings: FormatOrRecipe = "bfloat16",
    overhead: float = 0.1,
) -> Table:
    """Returns the fit of every combination of model, recipe and accelerator, one per row.

    Args:
      models: the models, each as in `memory`.
      recipes: the recipes, each as in `memory`.
      devices: names in `jaxq.analysis.machines.DEVICES`, or `Device`s.
      context: as in `memory`.
      batch: as in `memory`.
      kv: as in `memory`.
      embeddings: as in `memory`.
      overhead: as in `memory`.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Raises:
      ValueError: as in `memory`; or if a device is unknown.

    Example:
      >>> print(fits_table(["llama-3.1-8b"], ["bfloat16", "int4_g128"], ["rtx-4090"]))
      model            recipe    device  total_gib   share  fits  devices  tokens
      llama-3.1-8b   bfloat16  rtx-4090      17.55  0.7314  True        1   56202
      llama-3.1-8b  int4_g128  rtx-4090      7.052  0.2938  True        1  134410
    """
    recipes = items_of("fits_table", "recipes", recipes)
    places = [named("device", d, DEVICES) for d in items_of("fits_table", "devices", devices)]
    rows = []
    for model in items_of("fits_table", "models", models):
        for recipe in recipes:
            m = memory(
                model,
                recipe,
                context=context,
                batch=batch,
                kv=kv,
                embeddings=embeddings,
                overhead=overhead,
            )
            for device in places:
                share = m.total / device.memory
                room = device.memory / (1 + overhead) - m.weights
                tokens = -1
                if m.kv_cache:
                    tokens = max(0, int(room * context * batch / m.kv_cache))
                rows.append(
                    FitRow(
                        model=_title(model),
                        recipe=label(recipe),
                        device=device.name,
                        total_gib=m.total / 2**30,
                        share=share,
                        fits=share <= 1,
                        devices=max(1, math.ceil(share)),
                        tokens=tokens,
                    )
                )
    return Table(tuple(rows))
