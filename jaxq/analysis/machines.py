"""Shapes of published models and memory sizes of accelerators, with their sources.

To add one, add a line to `MODELS` or `DEVICES`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from jaxq._base.arguments import described
from jaxq._base.registry import suggestion

__all__ = ["DEVICES", "MODELS", "Device", "Model"]


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of a decoder with gated feed-forward layers, as in its `config.json`.

    Attributes:
      name: the model's name in tables.
      layers: the number of layers.
      hidden: the width of the residual stream.
      intermediate: the width of the feed-forward layer (of one expert).
      heads: the number of query heads.
      kv_heads: the number of key and value heads.
      head_dim: the width of a head.
      vocabulary: the number of tokens in the vocabulary.
      tied: True if the output layer shares the embedding's weights.
      bias: True if the query, key and value projections have a bias.
      experts: the number of feed-forward experts per layer; above 1, each layer has a router.

    Example:
      >>> MODELS["llama-2-7b"].parameters
      6738415616
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    bias: bool = False
    experts: int = 1

    @property
    def matrices(self) -> tuple[tuple[tuple[int, int], int], ...]:
        """The shapes `[inputs, outputs]` of the layers' matrices, with the count of each."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        feed = self.layers * self.experts
        return (
            ((self.hidden, q), self.layers),
            ((self.hidden, kv), 2 * self.layers),
            ((q, self.hidden), self.layers),
            ((self.hidden, self.intermediate), 2 * feed),
            ((self.intermediate, self.hidden), feed),
        )

    @property
    def embeddings(self) -> int:
        """The number of parameters of the embedding and the output layer."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def others(self) -> int:
        """The number of parameters of norms, biases and routers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden + (q + 2 * kv) * self.bias
        layer += self.hidden * self.experts * (self.experts > 1)
        return self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        """The total number of parameters."""
        inner = sum(rows * columns * count for (rows, columns), count in self.matrices)
        return inner + self.embeddings + self.others


# Sources: the `config.json` of each model's repository on the Hugging Face hub: meta-llama/
# Llama-2-7b-hf, Llama-3.2-1B, Llama-3.1-8B, -70B and -405B; mistralai/Mistral-7B-v0.1 and
# Mixtral-8x7B-v0.1; Qwen/Qwen2.5-7B. The totals equal the published numbers of parameters.
MODELS = MappingProxyType(
    {
        model.name: model
        for model in (
            Model("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
            Model("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000),
            Model("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32000),
            Model("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064, bias=True),
            Model("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256),
            Model("mixtral-8x7b", 32, 4096, 14336, 32, 8, 128, 32000, experts=8),
            Model("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256),
            Model("llama-3.1-405b", 126, 16384, 53248, 128, 8, 128, 128256),
        )
    }
)


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
      name: the device's name in tables.
      gib: its memory in GiB. Vendors write GB but mean 2^30 bytes, of which the driver and error
        correction reserve a few percent.

    Example:
      >>> Device("my-gpu", gib=24).memory
      25769803776
    """

    name: str
    gib: float

    @property
    def memory(self) -> int:
        """The memory in bytes."""
        return int(self.gib * 2**30)


# Sources: NVIDIA's product pages and data sheets (GeForce RTX 4090 and 5090, L4, L40S, A100, H100
# SXM, H200; DGX B200: 1,440 GB for eight); AMD's page of the Instinct MI300X; Google Cloud's pages
# "TPU v5e", "TPU v5p" and "TPU v6e" (HBM capacity per chip).
DEVICES = MappingProxyType(
    {
        device.name: device
        for device in (
            Device("tpu-v5e", 16),
            Device("rtx-4090", 24),
            Device("l4", 24),
            Device("tpu-v6e", 32),
            Device("rtx-5090", 32),
            Device("a100-40gb", 40),
            Device("l40s", 48),
            Device("a100-80gb", 80),
            Device("h100", 80),
            Device("tpu-v5p", 95),
            Device("h200", 141),
            Device("b200", 180),
            Device("mi300x", 192),
        )
    }
)


_Record = TypeVar("_Record", Model, Device)


def named(noun: str, spec: "str | _Record", known: Mapping[str, _Record]) -> _Record:
    """Returns the record of `MODELS` or `DEVICES` with a name; a record is returned unchanged.

    Raises:
      ValueError: if the name is unknown; the message suggests similar names.
      TypeError: if the argument is neither a name nor a record.
    """
    if isinstance(spec, Model | Device):
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            f"A {noun} must be a name or a jaxq.analysis.{noun.capitalize()}, got "
            f"{described(spec)}. {suggestion('', known)}"
        )
    if spec not in known:
        raise ValueError(f"No {noun} is named {spec!r}. {suggestion(spec, known)}")
    return known[spec]
