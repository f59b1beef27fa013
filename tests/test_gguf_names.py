"""Hugging Face models as GGUF: names, rows of queries and keys, norms and metadata."""

from typing import Any

import gguf as theirs
import numpy as np
import pytest

from jaxq.interop import gguf

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def config(kind: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, "sliding_window": 128, **fields}


@pytest.mark.parametrize("kind", gguf.ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(kind: str):
    model = gguf.conversion(config(kind))
    arch = next(a for a, n in theirs.MODEL_ARCH_NAMES.items() if n == model.architecture.name)
    names = theirs.get_tensor_name_map(arch, 6)
    modules = [f"model.layers.5.{module}" for module in model.architecture.layer]
    for name in (*modules, "model.embed_tokens", "model.norm"):
        wanted = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        assert model.name(f"{name}.weight") == wanted
    assert model.name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    tied = model.architecture.tied
    assert model.name("lm_head.weight") == (None if tied else "output.weight")


def rotated(x: np.ndarray, angles: np.ndarray, pairs: bool) -> np.ndarray:
    """Returns a vector of a head with pairs of its elements rotated.

    The pairs are neighbors, as in llama.cpp, or elements half a head apart, as in Hugging Face.
    """
    a, b = (x[0::2], x[1::2]) if pairs else np.split(x, 2)
    parts = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
    return np.stack(parts, axis=-1).reshape(-1) if pairs else np.concatenate(parts)


def test_scores_of_permuted_queries_and_keys_are_the_same():
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((rows, 32)).astype(np.float32) for rows in (32, 16)]
    x = rng.standard_normal((2, 32))
    angles = 10000.0 ** (-np.arange(4) / 4)
    model = gguf.conversion(config("llama"))
    names = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk"]
    permuted = [model.values(n, w) for n, w in zip(names, weights, strict=True)]

    def score(ws: list[np.ndarray], pairs: bool) -> float:
        q, k = (w.astype(np.float64) @ v for w, v in zip(ws, x, strict=True))
        return float(rotated(q[8:16], 5 * angles, pairs) @ rotated(k[:8], 2 * angles, pairs))

    assert score(permuted, True) == pytest.approx(score(weights, False), rel=1e-12)
    assert score(weights, True) != pytest.approx(score(weights, False))
    bias = np.arange(32, dtype=np.float32)
    assert model.values("model.layers.0.self_attn.q_proj.bias", bias)[:4].tolist() == [0, 4, 1, 5]
    assert model.values("model.layers.0.mlp.up_proj.weight", weights[0]) is weights[0]
    with pytest.raises(ValueError, match="multiple of 8 rows"):
        model.values(names[0], weights[0][:12])


@pytest.mark.parametrize("kind", gguf.ARCHITECTURES)
def test_only_llama_and_mistral_rotate_neighboring_elements(kind: str):
    """Compares with `llama_model_rope_type` of llama.cpp."""
    model = gguf.conversion(config(kind))
    permuted = model.changes("model.layers.0.self_attn.k_proj.weight")
    assert permuted == (kind in ("llama", "mistral"))


def test_norms_of_gemma_are_shifted():
    model, ones = gguf.conversion(config("gemma2")), np.ones(4, np.float32)
    for name in ("model.norm.weight", "model.layers.0.post_feedforward_layernorm.weight"):
        assert model.values(name, ones).tolist() == [2, 2, 2, 2]
    assert model.values("model.layers.0.self_attn.q_proj.weight", ones) is ones


def test_metadata_describe_the_model():
    keys = gguf.conversion(config("llama", rope_theta=5e5)).metadata
    assert keys["general.architecture"] == "llama"
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.freq_base"] == 5e5
    assert keys["llama.rope.dimension_count"] == keys["llama.attention.key_length"] == 8
    newer = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
    keys = gguf.conversion(config("llama", head_dim=16, **newer)).metadata
    assert keys["llama.rope.scaling.factor"] == 8.0
    assert keys["llama.rope.freq_base"] == 1e6
    assert keys["llama.attention.value_length"] == 16
    layers = {"full_attention": {"rope_type": "default", "rope_theta": 2e6}}
    keys = gguf.conversion(config("gemma3_text", rope_parameters=layers)).metadata
    assert keys["gemma3.rope.freq_base"] == 2e6
    assert keys["gemma3.attention.sliding_window"] == 128
    assert gguf.conversion(config("gemma2")).metadata["gemma2.final_logit_softcapping"] == 30.0


def test_llama3_frequencies_are_divided_by_the_published_factors():
    """Compares with the formula of Llama 3.1: long waves are stretched, short ones are not."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = gguf.conversion(config("llama", head_dim=64, rope_theta=5e5, rope_scaling=scaling))
    (got,) = model.tensors.values()
    wanted = []
    for i in range(32):
        wave = 2 * np.pi * 5e5 ** (2 * i / 64)
        if wave < 8192 / 4:
            wanted.append(1.0)
        elif wave > 8192:
            wanted.append(8.0)
        else:
            smooth = (8192 / wave - 1) / 3
            wanted.append(1 / ((1 - smooth) / 8 + smooth))
    assert {1.0, 8.0} < set(wanted)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "phi3"}, "No architecture is named 'phi3'"),
        ({"model_type": "gemma3"}, "Did you mean gemma3_text"),
        ({"hidden_size": "32"}, "a positive integer 'hidden_size'"),
        ({"rms_norm_eps": None, "rope_theta": "x"}, "a number 'rope_theta'"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' is not supported"),
        ({"rope_scaling": [1]}, "must be a table"),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": 4},
            "got sliding_window_pattern=4. Keep",
        ),
        (
            {"model_type": "gemma3_text", "rope_local_base_freq": 5e5},
            "got rope_local_base_freq=500000. Keep",
        ),
        (
            {
                "model_type": "gemma3_text",
                "num_hidden_layers": 6,
                "layer_types": ["full_attention"] * 6,
            },
            r"got layer_types=\[...\] with 'full_attention' for layer 0. Keep",
        ),
        (
            {"model_type": "gemma3_text", "num_hidden_layers": 6, "layer_types": ["x"]},
            "got layer_types=a list of 1 for 6 layers. Keep",
        ),
    ],
)
def test_unsupported_models_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        gguf.conversion({**config("llama"), **fields})
    assert len(str(caught.value)) < 300


def test_unknown_tensors_are_refused():
    model = gguf.conversion(config("llama"))
    for name in ("vision.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.x"):
        with pytest.raises(ValueError, match="has no tensor"):
            model.name(name)
