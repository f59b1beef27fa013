"""The command `jaxq quantize`, which quantizes the tensors of a file one by one."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxq.analysis import Energies
from jaxq.analysis import total as total_of
from jaxq.cli._output import UsageError, bad_input, one_line, print_json, print_table
from jaxq.cli._progress import progress
from jaxq.cli._recipes import BLOCK_TYPES, NAMES, OTHER_TYPES
from jaxq.cli._targets import WRITERS, Job, Plan, shape_of, takes_importance
from jaxq.formats import FORMATS, IntFormat
from jaxq.interop import Entry, TensorFile, gguf, open_tensors, quantized_parts, read_json
from jaxq.quantizers import quantize
from jaxq.recipes import RECIPES, Affine, Recipe, Symmetric, get_recipe

__all__ = ["run"]

_TARGETS = {".safetensors": "safetensors", ".gguf": "gguf"}

# The names of embeddings and output layers, which vLLM does not quantize.
_NOT_LINEAR = r"embed|lm_head|\bwte\b|\bwpe\b"


def run(args: argparse.Namespace) -> None:
    """Quantizes a file and prints a summary."""
    target = args.to or _TARGETS.get(pathlib.Path(args.output).suffix)
    if target is None:
        raise UsageError(
            f"the output must end in .safetensors or .gguf, or --to must name its kind, got "
            f"{args.output}"
        )
    if args.dynamic_activations and target != "compressed-tensors":
        raise UsageError("--dynamic-activations applies to --to compressed-tensors only")
    rules = _rules(args, target)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_tensors(args.file))
        parts = sorted(quantized_parts(file))
        if parts:
            raise UsageError(
                f"{args.file}: it must hold no arrays that jaxq has quantized, but "
                f"{parts[0]!r:.120} is a part of one. Quantize the original file, or load it by "
                "jaxq.load and save the result of jaxq.dequantize_tree"
            )
        config = _config(file)
        conversion = _conversion(args, config) if target == "gguf" else None
        importance = _importance(args.imatrix) if args.imatrix else {}
        plans = _plans(file, conversion, rules, args, target)
        if importance:
            plans = [_without_importance(plan, importance) for plan in plans]
        if not any(plan.recipe is not None for plan in plans):
            notes = ", ".join(sorted({plan.note for plan in plans})) or "the file has no tensors"
            raise UsageError(f"{args.file}: no tensor would be quantized ({notes})")
        recipes = [plan.recipe for plan in plans if plan.recipe is not None]
        if importance and not any(isinstance(r, str) or takes_importance(r) for r in recipes):
            raise UsageError("--imatrix applies to the block types of GGUF only, and none is used")
        metadata = _tokenizer(args, plans, target)
        advance = stack.enter_context(
            progress("quantizing", sum(plan.work(plan.name in importance) for plan in plans))
        )
        energies = {plan.name: [] for plan in plans}
        job = Job(
            file=file,
            plans=plans,
            axis=args.axis,
            importance=importance,
            energies=energies,
            advance=advance,
            conversion=conversion,
            config=config,
            metadata=metadata,
            dynamic_activations=args.dynamic_activations,
        )
        try:
            WRITERS[target](args.output, job)
        except OSError as error:
            raise UsageError(f"cannot write {args.output}: {error.strerror or error}") from error
    _summary(args, plans, energies)
    if conversion is not None and not metadata:
        text = "it has no tokenizer, which llama.cpp needs; --tokenizer FILE takes one"
        print(f"jaxq: {args.output}: {text}", file=sys.stderr)


def _config(file: TensorFile) -> dict[str, Any]:
    """Returns the content of the `config.json` beside an input, or an empty dict."""
    folder = file.path if file.path.is_dir() else file.path.parent
    path = folder / "config.json"
    return read_json(path) if path.is_file() and file.kind in ("", ".safetensors") else {}


def _conversion(args: argparse.Namespace, config: dict[str, Any]) -> gguf.Conversion | None:
    """Returns the conversion of a Hugging Face model to GGUF; None to keep names."""
    if args.names == "keep" or "model_type" not in config:
        return None
    try:
        return gguf.conversion(config)
    except ValueError as error:
        raise UsageError(f"{one_line(error)} --names keep copies names as they are") from error


def _tokenizer(args: argparse.Namespace, plans: Sequence[Plan], target: str) -> dict[str, Any]:
    """Returns the metadata of a tokenizer in another GGUF file."""
    if args.tokenizer is None:
        return {}
    if target != "gguf":
        raise UsageError("--tokenizer applies to GGUF only; other kinds copy the model's files")
    with open_tensors(args.tokenizer) as file:
        metadata = {k: v for k, v in file.metadata.items() if k.startswith("tokenizer.")}
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise UsageError(f"{args.tokenizer}: it has no tokenizer.ggml.tokens; it must be GGUF")
    for plan in plans:
        if plan.name == "token_embd.weight" and plan.entry.shape[0] != len(tokens):
            raise UsageError(
                f"{args.tokenizer}: it has {len(tokens)} tokens, but the embedding has "
                f"{plan.entry.shape[0]} rows"
            )
    return metadata


def _rules(args: argparse.Namespace, target: str) -> list[tuple[re.Pattern[str], str | None]]:
    """Returns the rules given by the options. The first rule that matches a name applies."""
    rules: list[Any] = []
    with bad_input():
        if args.rules is not None:
            try:
                rules = json.loads(pathlib.Path(args.rules).read_text())
            except (OSError, ValueError, RecursionError) as error:
                raise UsageError(f"{args.rules}: {one_line(error)}") from error
            valid = isinstance(rules, list) and all(
                isinstance(r, list)
                and len(r) == 2
                and isinstance(r[0], str)
                and isinstance(r[1], str | None)
                for r in rules
            )
            if not valid:
                raise UsageError(
                    f"{args.rules}: it must be a list of pairs [expression, recipe or null]"
                )
        if args.recipe is not None:
            exceptions = [[_NOT_LINEAR, None]] if target == "compressed-tensors" else []
            rules = [*rules, *exceptions, ["", args.recipe]]
        if not rules:
            raise UsageError("quantize needs --recipe NAME or --rules FILE")
        for _, name in rules:
            if name is None or name in NAMES:
                continue
            if name in FORMATS:
                get_recipe(name)  # Raises an error that names recipes with this format.
            raise NAMES.unknown(name)
        try:
            return [(re.compile(pattern), name) for pattern, name in rules]
        except re.error as error:
            raise UsageError(f"{args.rules}: not a regular expression: {error}") from error


def _plans(
    file: TensorFile,
    conversion: gguf.Conversion | None,
    rules: Sequence,
    args: argparse.Namespace,
    target: str,
) -> list[Plan]:
    """Returns the treatment of each tensor; the rules apply to the names in the output."""
    plans = []
    for entry in file.entries:
        name = entry.name
        if conversion is not None:
            with bad_input():
                name = conversion.name(entry.name)
        if name is not None:
            plans.append(_plan(Plan(entry, name, None), rules, args, target))
    # Reading a tensor applies its scale, which must not be applied again.
    scales = [file.scale_of(plan.entry) for plan in plans if plan.recipe is not None]
    applied = {scale.name for scale in scales if scale is not None}
    return [plan for plan in plans if plan.entry.name not in applied]


def _plan(plan: Plan, rules: Sequence, args: argparse.Namespace, target: str) -> Plan:
    entry = plan.entry
    matches = [name for pattern, name in rules if pattern.search(plan.name)]
    if not matches or matches[0] is None:
        return dataclasses.replace(plan, note="kept by a rule" if matches else "no rule")
    name = matches[0]
    if not entry.is_float:
        return dataclasses.replace(plan, note=f"dtype {entry.dtype}")
    if len(entry.shape) < args.min_axes:
        return dataclasses.replace(plan, note=f"fewer than {args.min_axes} axes")
    by_blocks = name in BLOCK_TYPES and args.axis in (-1, len(entry.shape) - 1)
    if target != "gguf" and name in RECIPES and (target != "safetensors" or not by_blocks):
        recipe, note = get_recipe(name), ""
        if target == "compressed-tensors":
            recipe, note = _for_vllm(recipe, entry)
        try:
            jax.eval_shape(lambda x: quantize(x, recipe, axis=args.axis), shape_of(entry))
        except ValueError as error:
            return dataclasses.replace(plan, note=one_line(error))
        return dataclasses.replace(plan, recipe=recipe, note=note)
    if target == "compressed-tensors":
        raise UsageError(f"compressed-tensors has no type {name!r}; `jaxq recipes` lists recipes")
    if name in OTHER_TYPES:
        name = OTHER_TYPES[name]
    if name not in gguf.TYPES:
        raise UsageError(f"GGUF has no type {name!r}; it has {', '.join(gguf.TYPES)}")
    if not entry.shape:
        return dataclasses.replace(plan, note="a scalar")
    if args.axis not in (-1, len(entry.shape) - 1):
        raise UsageError(f"GGUF types need --axis -1, got {args.axis}; transpose the weights first")
    type_ = gguf.fallback(name, entry.shape[-1])
    if type_ == "f16":
        block = gguf.TYPES[name].block
        note = f"blocks of {block} do not divide rows of {entry.shape[-1]}"
        return dataclasses.replace(plan, note=note)
    note = "" if type_ == name else f"{type_} in place of {name}"
    return dataclasses.replace(plan, recipe=type_, note=note)


def _for_vllm(recipe: Recipe, entry: Entry) -> tuple[Recipe, str]:
    """Returns a recipe whose integer scales have the dtype of the model, as in vLLM."""
    narrow, scaling = entry.numpy_dtype in ("float16", "bfloat16"), recipe.scaling
    integers = isinstance(recipe.element, IntFormat)
    if narrow and integers and isinstance(scaling, Symmetric | Affine):
        scaling = dataclasses.replace(scaling, scale_format=str(entry.numpy_dtype))
        return dataclasses.replace(recipe, scaling=scaling), f"scales in {entry.numpy_dtype}"
    return recipe, ""


def _without_importance(plan: Plan, importance: dict[str, np.ndarray]) -> Plan:
    """Returns a plan that notes if the importance matrix lacks a tensor."""
    if plan.recipe is None or plan.name in importance or not takes_importance(plan.recipe):
        return plan
    note = ", ".join(filter(None, (plan.note, "not in the importance matrix")))
    return dataclasses.replace(plan, note=note)


def _importance(path: str) -> dict[str, np.ndarray]:
    """Returns the importance of the columns of each tensor, from a file of llama-imatrix."""
    with open_tensors(path) as file:
        entries = {entry.name: entry for entry in file.entries}
        result = {}
        for name, entry in entries.items():
            if name.endswith(".in_sum2"):
                base = name.removesuffix(".in_sum2")
                counts = entries.get(f"{base}.counts")
                if counts is None:
                    raise UsageError(f"{path}: {name} needs {base}.counts, as of llama-imatrix")
                # One row per expert; a single row applies to all rows of a tensor. As in llama.cpp,
                # all inputs of an expert that received no tokens are equally important.
                count = file.read(counts).reshape(-1, 1)
                sums = file.read(entry).reshape(len(count), -1)
                rows = np.where(count > 0, sums / np.maximum(count, 1), np.float32(1))
                result[base] = rows[0] if len(rows) == 1 else rows[:, None]
    if not result:
        raise UsageError(f"{path}: it must be a GGUF file of llama-imatrix, got no NAME.in_sum2")
    return result


def _summary(
    args: argparse.Namespace, plans: Sequence[Plan], energies: Mapping[str, Sequence[Energies]]
) -> None:
    output = pathlib.Path(args.output)
    files = output.glob("*.safetensors") if output.is_dir() else [output]
    after = sum(path.stat().st_size for path in files)
    before = sum(plan.entry.nbytes for plan in plans)
    done = [plan for plan in plans if plan.recipe is not None]
    parts = list(itertools.chain.from_iterable(energies.values()))
    row = {
        "quantized": len(done),
        "kept": len(plans) - len(done),
        "SQNR dB": total_of(parts).sqnr_db if parts else math.nan,
        "bytes before": before,
        "bytes after": after,
        "smaller by": before / after,
    }
    notes: dict[str, list[str]] = {}
    for plan in plans:
        if plan.note:
            notes.setdefault(plan.note, []).append(plan.name)
        if not all(np.isfinite(part.noise) for part in energies[plan.name]):
            notes.setdefault("NaNs or infinities after quantization", []).append(plan.name)
    if args.json:
        return print_json({**row, "notes": notes})
    print_table([row])
    for note, names in notes.items():
        print(f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {note}")
        for name in names[:3]:
            print(f"  {one_line(name)}")
    return None
