"""Models of Hugging Face as GGUF: the names of tensors, their layout, and the metadata.

To add an architecture, list it in `ARCHITECTURES`.

References:
  llama.cpp's convert_hf_to_gguf.py and llama-model.cpp.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxq._base.arguments import described
from jaxq._base.registry import Registry

__all__ = ["ARCHITECTURES", "Architecture", "Conversion", "conversion"]

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(.+)\.(weight|bias)")
# Buffers that some checkpoints store, and that llama.cpp computes.
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\..*")

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_TWO_NORMS = {"post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


class Architecture(NamedTuple):
    """The names and the layout of the tensors of an architecture.

    Attributes:
      name: the name of the architecture in GGUF.
      layer: the GGUF names of the modules in a layer, by their names in Hugging Face.
      permuted: True if the rows of queries and keys are permuted, because the rotary
        embedding of llama.cpp rotates neighboring elements.
      shifted_norms: True if 1 is added to the weights of norms.
      tied: True if the output layer uses the weight of the embedding.
      keys: a function from the configuration to the keys besides the common ones, without the name
        of the architecture.

    Example:
      >>> from jaxq.interop import gguf
      >>> llama, gemma = gguf.ARCHITECTURES["llama"], gguf.ARCHITECTURES["gemma"]
      >>> llama.layer["mlp.up_proj"], llama.permuted, gemma.permuted
      ('ffn_up', True, False)
    """

    name: str
    layer: Mapping[str, str]
    permuted: bool
    shifted_norms: bool
    tied: bool
    keys: Callable[[Any], dict[str, Any]]


_REMEDY = "Use the config.json that belongs to the weights."


class _Config(NamedTuple):
    """The content of a `config.json`."""

    fields: Mapping[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.fields.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(
                f"gguf.conversion: config.json needs a positive integer {key!r}, got "
                f"{value!r:.40}. {_REMEDY}"
            )
        return value

    def number(self, key: str, default: float) -> float:
        value = self.fields.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"gguf.conversion: config.json needs a number {key!r}, got {value!r:.40}. {_REMEDY}"
            )
        return float(value)

    @property
    def head_size(self) -> int:
        size = self.integer("hidden_size") // self.integer("num_attention_heads")
        return self.integer("head_dim", size)

    @property
    def kv_heads(self) -> int:
        return self.integer("num_key_value_heads", self.integer("num_attention_heads"))

    @property
    def rope(self) -> "_Config":
        """The parameters of the rotary embedding, of global layers if there are also local ones."""
        table = self.fields.get("rope_parameters") or self.fields.get("rope_scaling") or {}
        if isinstance(table, Mapping) and isinstance(table.get("full_attention"), Mapping):
            table = table["full_attention"]
        if not isinstance(table, Mapping):
            raise ValueError(
                f"gguf.conversion: `rope_scaling` must be a table, got {table!r:.40}. {_REMEDY}"
            )
        theta = self.fields.get("rope_theta")
        return _Config({**table, **({} if theta is None else {"rope_theta": theta})})


def _no_keys(config: _Config) -> dict[str, Any]:
    del config
    return {}


def _gemma2_keys(config: _Config) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": config.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": config.number("final_logit_softcapping", 30.0),
        "attention.sliding_window": config.integer("sliding_window", 4096),
    }


def _differing_layer(kinds: Any, wanted: list[str]) -> str:
    """Returns a short text of the first layer type that differs from the wanted ones."""
    if not isinstance(kinds, list):
        return f"{kinds!r:.40}"
    if len(kinds) != len(wanted):
        return f"a list of {len(kinds)} for {len(wanted)} layers"
    first = next(i for i, kind in enumerate(kinds) if kind != wanted[i])
    return f"[...] with {kinds[first]!r:.40} for layer {first}"


def _gemma3_keys(config: _Config) -> dict[str, Any]:
    # llama.cpp assumes that every sixth layer is global, and that the others have base 10000.
    kinds = config.fields.get("layer_types")
    pattern = config.integer("sliding_window_pattern", 6)
    usual = ["sliding_attention"] * 5 + ["full_attention"]
    wanted = [usual[i % 6] for i in range(config.integer("num_hidden_layers"))]
    local = config.number("rope_local_base_freq", 10000.0)
    got = None
    if pattern != 6:
        got = f"sliding_window_pattern={pattern}"
    elif kinds is not None and kinds != wanted:
        got = f"layer_types={_differing_layer(kinds, wanted)}"
    elif local != 10000.0:
        got = f"rope_local_base_freq={local:g}"
    if got is not None:
        raise ValueError(
            "gguf.conversion: llama.cpp runs gemma3 only if layers 5, 11, 17, ... are global, all "
            f"others are local, and the rotary base of local layers is 10000, got {got}. Keep "
            "this model in the layout of Hugging Face."
        )
    keys: dict[str, Any] = {"attention.sliding_window": config.integer("sliding_window")}
    if config.fields.get("final_logit_softcapping") is not None:
        keys["final_logit_softcapping"] = config.number("final_logit_softcapping", 0.0)
    return keys


_LLAMA = Architecture("llama", _PROJECTIONS | _TWO_NORMS, True, False, False, _no_keys)
ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture",
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": Architecture("qwen2", _PROJECTIONS | _TWO_NORMS, False, False, False, _no_keys),
        "qwen3": Architecture(
            "qwen3", _PROJECTIONS | _TWO_NORMS | _HEAD_NORMS, False, False, False, _no_keys
        ),
        "gemma": Architecture("gemma", _PROJECTIONS | _TWO_NORMS, False, True, True, _no_keys),
        "gemma2": Architecture(
            "gemma2", _PROJECTIONS | _FOUR_NORMS, False, True, True, _gemma2_keys
        ),
        "gemma3_text": Architecture(
            "gemma3", _PROJECTIONS | _FOUR_NORMS | _HEAD_NORMS, False, True, True, _gemma3_keys
        ),
    },
    {"gemma3": "gemma3_text"},
)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The conversion of a model of Hugging Face to GGUF.

    Attributes:
      architecture: the names and the layout of its tensors.
      metadata: the keys of the architecture that llama.cpp reads, and
        `general.quantization_version`; the tokenizer is not among them.
      tensors: further float32 tensors of the file, by name: `rope_freqs.weight` of Llama 3.1 and
        later.
      heads: the numbers of heads of queries and of keys.

    Example:
      >>> import numpy as np
      >>> from jaxq.interop import gguf
      >>> model = gguf.Conversion(gguf.ARCHITECTURES["llama"], {}, {}, heads=(1, 1))
      >>> name = "model.layers.0.self_attn.q_proj.weight"
      >>> model.name(name), model.values(name, np.arange(4)).tolist()
      ('blk.0.attn_q.weight', [0, 2, 1, 3])
    """

    architecture: Architecture
    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]
    heads: tuple[int, int]

    def name(self, name: str) -> str | None:
        """Returns the name of a tensor in GGUF.

        Args:
          name: its name in Hugging Face, such as `"model.layers.0.mlp.up_proj.weight"`.

        Returns:
          The name, such as `"blk.0.ffn_up.weight"`; None if the file does not need the tensor.

        Raises:
          ValueError: if the architecture has no such tensor.
        """
        if _BUFFERS.fullmatch(name) or (self.architecture.tied and name == "lm_head.weight"):
            return None
        match = _LAYER.fullmatch(name)
        if name in _WHOLE:
            return _WHOLE[name]
        if match is not None and match[2] in self.architecture.layer:
            return f"blk.{match[1]}.{self.architecture.layer[match[2]]}.{match[3]}"
        raise ValueError(
            f"gguf.Conversion: the architecture {self.architecture.name!r} has no tensor "
            f"{name!r:.120}. Leave it out of the checkpoint."
        )

    def changes(self, name: str) -> bool:
        """Returns whether `values` changes a tensor, given its name in Hugging Face."""
        shifted = self.architecture.shifted_norms and name.endswith("norm.weight")
        return shifted or self._is_permuted(name)

    def _is_permuted(self, name: str) -> bool:
        match = _LAYER.fullmatch(name)
        module = match[2] if match is not None else ""
        return self.architecture.permuted and module in ("self_attn.q_proj", "self_attn.k_proj")

    def values(self, name: str, x: np.ndarray) -> np.ndarray:
        """Returns a float32 tensor as GGUF stores it: permuted, or with 1 added, where necessary.

        Args:
          name: its name in Hugging Face.
          x: the tensor.

        Raises:
          ValueError: if the number of rows is not a multiple of twice the number of heads.
        """
        if self.architecture.shifted_norms and name.endswith("norm.weight"):
            return x + np.float32(1)
        if not self._is_permuted(name):
            return x
        heads = self.heads[".k_proj." in name]
        if x.shape[0] % (2 * heads):
            raise ValueError(
                f"gguf.Conversion: {name!r:.80} must have a multiple of {2 * heads} rows, got "
                f"{x.shape[0]}. Correct the numbers of heads in config.json."
            )
        return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def conversion(config: Mapping[str, Any]) -> Conversion:
    """Returns the conversion of a model of Hugging Face to GGUF.

    Args:
      config: the content of its `config.json`. `model_type` must be one of `ARCHITECTURES`:
        `"llama"`, `"mistral"`, `"qwen2"`, `"qwen3"`, `"gemma"`, `"gemma2"` or `"gemma3_text"`.

    Returns:
      The names and the layout of the tensors in GGUF, and the metadata of the architecture. For
      llama.cpp to process text, the file also needs the keys `tokenizer.*`.

    Raises:
      ValueError: if the architecture is unknown, a value is missing, or llama.cpp has no equivalent
        of a setting.

    Example:
      >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
      >>> sizes |= {"intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512}
      >>> model = conversion({"model_type": "llama", "rms_norm_eps": 1e-5, **sizes})
      >>> model.name("model.layers.1.self_attn.q_proj.weight"), model.metadata["llama.block_count"]
      ('blk.1.attn_q.weight', 2)

    References:
      llama.cpp's convert_hf_to_gguf.py.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"gguf.conversion: `config` must be the dictionary in config.json, got "
            f"{described(config)}. Read it with json.load."
        )
    kind = config.get("model_type")
    architecture = ARCHITECTURES.find(str(kind))
    values = _Config(config)
    heads, rope = values.integer("num_attention_heads"), values.rope
    keys = {
        "context_length": values.integer("max_position_embeddings"),
        "embedding_length": values.integer("hidden_size"),
        "block_count": values.integer("num_hidden_layers"),
        "feed_forward_length": values.integer("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": values.kv_heads,
        "attention.layer_norm_rms_epsilon": values.number("rms_norm_eps", 1e-6),
        "attention.key_length": values.head_size,
        "attention.value_length": values.head_size,
        "rope.dimension_count": values.head_size,
        "rope.freq_base": rope.number("rope_theta", 10000.0),
        "vocab_size": values.integer("vocab_size"),
        **architecture.keys(values),
    }
    tensors = {}
    scaling = rope.fields.get("rope_type", rope.fields.get("type", "default"))
    if scaling == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.number("factor", 1.0)}
    elif scaling == "llama3" and architecture.permuted:
        tensors["rope_freqs.weight"] = _llama3_factors(values, rope)
    elif scaling != "default":
        raise ValueError(
            f"gguf.conversion: RoPE scaling {scaling!r:.40} is not supported for {kind}; default, "
            "linear and, for llama, llama3 are. Keep this model in the layout of Hugging Face."
        )
    metadata = {
        "general.architecture": architecture.name,
        "general.quantization_version": 2,
        **{f"{architecture.name}.{key}": value for key, value in keys.items()},
    }
    return Conversion(architecture, metadata, tensors, (heads, values.kv_heads))


def _llama3_factors(config: _Config, rope: _Config) -> np.ndarray:
    """Returns the divisors of the frequencies of Llama 3.1's rotary embedding."""
    base, size = rope.number("rope_theta", 10000.0), config.head_size
    frequencies = base ** (-np.arange(0, size, 2) / size)
    length = rope.number("original_max_position_embeddings", 8192.0)
    factor = rope.number("factor", 8.0)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    rotations = length * frequencies / (2 * math.pi)
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
