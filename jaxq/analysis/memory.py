"""How many bytes a model takes in a recipe, scales included, and which accelerators hold it."""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

from jaxq.analysis.machines import DEVICES, MODELS, Device, Model, named
from jaxq.analysis.specs import Spec, meaning
from jaxq.analysis.sqnr import label
from jaxq.recipes import Quantizer
from jaxq.tables import Table

__all__ = ["FitRow", "Memory", "MemoryRow", "fits_table", "memory", "memory_table"]

_SHAPE = (4096, 4096)  # Of a matrix, where only the number of parameters is known.
_RECIPES = ("float32", "bfloat16", "fp8_e4m3_channel", "int8_channel", "nvfp4", "mxfp4", "nf4_dq")


class Memory(NamedTuple):
    """Bytes of a model that runs.

    Attributes:
      weights: of all parameters, with their scales.
      kv_cache: of keys and values of all tokens.
      overhead: of all else.
    """

    weights: float
    kv_cache: float
    overhead: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.weights + self.kv_cache + self.overhead


def memory(
    model: "str | Model | float",
    recipe: Spec = "bfloat16",
    *,
    context: int = 8192,
    batch: int = 1,
    kv: Spec = "bfloat16",
    embeddings: Spec = "bfloat16",
    overhead: float = 0.1,
) -> Memory:
    """The bytes that a model takes when it generates.

    Args:
      model: a name in `jaxq.analysis.machines.MODELS`, a `Model`, or a number of parameters, for
        which all of them count as 4096 x 4096 matrices and there is no cache.
      recipe: of the layers' matrices; a preset's name or a recipe, or a format or its name, which
        is stored without scales.
      context: tokens in the cache, of each sequence.
      batch: sequences.
      kv: of keys and values, `[tokens and heads, head's width]`.
      embeddings: of embedding and output layer. Norms, biases and routers are bfloat16.
      overhead: what activations, buffers and the runtime take, as a share of the rest: a rule of
        thumb.

    Returns:
      A `Memory`.

    Raises:
      ValueError: an unknown name, a number that makes no sense, or blocks that do not divide a
        matrix.

    Example:
      >>> m = memory("llama-3.1-8b", "int4_g128", context=8192)
      >>> [round(part / 2**30, 2) for part in m]
      [5.41, 1.0, 0.64]
    """
    for name, value, least in (("context", context, 0), ("batch", batch, 0)):
        _check(value >= least, f"`{name}` must not be negative", value)
    _check(overhead >= 0, "`overhead` must not be negative", overhead)
    if not isinstance(model, str | Model):
        _check(0 <= model < math.inf, "the number of parameters must be finite, 0 or more", model)
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


def _bits(spec: Spec, shape: tuple[int, ...]) -> float:
    """Bits an element of a tensor."""
    kind = meaning(spec)
    return kind.bits_per_weight(shape) if isinstance(kind, Quantizer) else float(kind.bits)


def _check(ok: bool, requirement: str, got: object) -> None:
    if not ok:
        raise ValueError(f"memory: {requirement}, got {got!r}.")


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One recipe in a `memory_table`: bits a weight of all weights, GiB, the smallest device."""

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
    recipes: Iterable[Spec] = _RECIPES,
    *,
    params: float | None = None,
    context: int = 8192,
    batch: int = 1,
    kv: Spec = "bfloat16",
    embeddings: Spec = "bfloat16",
    overhead: float = 0.1,
) -> Table:
    """A model's memory in several recipes, and the smallest single device that holds it.

    Args:
      model: as in `memory`.
      recipes: as in `memory`, several.
      params: a number of parameters, instead of a model.
      context: as in `memory`.
      batch: as in `memory`.
      kv: as in `memory`.
      embeddings: as in `memory`.
      overhead: as in `memory`.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Raises:
      ValueError: as in `memory`; not one of `model` and `params`.

    Example:
      >>> print(memory_table(params=7e9, recipes=["bfloat16", "int4_g128"]))
      model     recipe  bits  weights_gib  kv_gib  overhead_gib  total_gib   device
      7e+09   bfloat16    16      13.0385       0       1.30385    14.3424  tpu-v5e
      7e+09  int4_g128  4.25      3.46336       0      0.346336    3.80969  tpu-v5e
    """
    if (model is None) == (params is None):
        raise ValueError(
            "memory_table: needs either a model or `params`, a number of parameters, got "
            f"{'neither' if model is None else 'both'}."
        )
    known = params if model is None else model
    assert known is not None
    rows = []
    for recipe in recipes:
        m = memory(
            known,
            recipe,
            context=context,
            batch=batch,
            kv=kv,
            embeddings=embeddings,
            overhead=overhead,
        )
        count = known if not isinstance(known, str | Model) else _parameters(known)
        holding = [d for d in DEVICES.values() if d.memory >= m.total]
        smallest = min(holding, key=lambda d: d.gib).name if holding else "none alone"
        bits = 8 * m.weights / count if count else math.nan
        rows.append(
            MemoryRow(
                model=_title(known),
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
    return model if isinstance(model, str) else f"{model:.4g}"


@dataclasses.dataclass(frozen=True)
class FitRow:
    """One model in one recipe on one device.

    Attributes:
      model: its name.
      recipe: its name.
      device: its name.
      total_gib: what the model takes.
      share: of the device's memory; above 1 it does not fit.
      fits: whether it does.
      devices: how many hold it, its weights and cache split evenly and without copies.
      tokens: how many the cache may hold, over all sequences, on one device; 0 if the weights alone
        are too large, -1 if nothing is known of the cache.
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
    recipes: Iterable[Spec] = ("bfloat16", "int8_channel", "int4_g128"),
    devices: "Iterable[str | Device]" = tuple(DEVICES),
    *,
    context: int = 8192,
    batch: int = 1,
    kv: Spec = "bfloat16",
    embeddings: Spec = "bfloat16",
    overhead: float = 0.1,
) -> Table:
    """Which model in which recipe fits which accelerator: a row for every combination.

    Args:
      models: as in `memory`, several.
      recipes: as in `memory`, several.
      devices: names in `jaxq.analysis.machines.DEVICES`, or `Device`s.
      context: as in `memory`.
      batch: as in `memory`.
      kv: as in `memory`.
      embeddings: as in `memory`.
      overhead: as in `memory`.

    Returns:
      A table whose `rows` are records and whose `str` is aligned text.

    Raises:
      ValueError: as in `memory`; an unknown device.

    Example:
      >>> print(fits_table(["llama-3.1-8b"], ["bfloat16", "int4_g128"], ["rtx-4090"]))
      model            recipe    device  total_gib     share  fits  devices  tokens
      llama-3.1-8b   bfloat16  rtx-4090    17.5533  0.731387  True        1   56202
      llama-3.1-8b  int4_g128  rtx-4090    7.05172  0.293822  True        1  134410
    """
    recipes, places = tuple(recipes), [named("device", d, DEVICES) for d in devices]
    rows = []
    for model in models:
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
