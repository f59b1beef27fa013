"""The command `jaxq quantize`: a file with its tensors quantized, one in memory at a time."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.analysis import Energies
from jaxq.analysis import measure as energies_of
from jaxq.analysis import total as total_of
from jaxq.cli._output import UsageError, bad_input, one_line, print_json, print_table, progress
from jaxq.cli._recipes import NAMES
from jaxq.formats import FORMATS
from jaxq.interop import Entry, TensorFile, gguf, open_tensors, save_streamed
from jaxq.quantizers import quantize
from jaxq.recipes import RECIPES, Recipe, get_recipe

__all__ = ["run"]

# The types of GGUF with the same bytes as a dtype.
_PLAIN = {f"float{bits}": f"f{bits}" for bits in (16, 32, 64)} | {"bfloat16": "bf16"}
_PLAIN |= {f"int{bits}": f"i{bits}" for bits in (8, 16, 32, 64)}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The treatment of a tensor: a recipe, a block type of GGUF, or neither."""

    entry: Entry
    recipe: Recipe | str | None
    note: str = ""


def run(args: argparse.Namespace) -> None:
    """Quantizes a file and prints a summary."""
    to_gguf = pathlib.Path(args.output).suffix == ".gguf"
    if not to_gguf and pathlib.Path(args.output).suffix != ".safetensors":
        raise UsageError(f"the output must end in .safetensors or .gguf, got {args.output}")
    rules = _rules(args)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_tensors(args.file))
        importance = _importance(args.imatrix) if args.imatrix else {}
        plans = [_plan(entry, rules, args, to_gguf) for entry in file.entries]
        if importance:
            plans = [_without_importance(plan, importance) for plan in plans]
        if not any(plan.recipe is not None for plan in plans):
            notes = ", ".join(sorted({plan.note for plan in plans}))
            raise UsageError(f"{args.file}: no tensor would be quantized ({notes})")
        if importance and not any(isinstance(plan.recipe, str) for plan in plans):
            raise UsageError("--imatrix applies to the block types of GGUF only, and none is used")
        advance = stack.enter_context(
            progress("quantizing", sum(plan.entry.nbytes for plan in plans))
        )
        energies: list[Energies] = []
        write = _write_gguf if to_gguf else _write_safetensors
        job = _Job(file, plans, args.axis, importance, energies, advance)
        try:
            write(args.output, job)
        except OSError as error:
            raise UsageError(f"cannot write {args.output}: {error.strerror or error}") from error
    _summary(args, plans, energies)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Everything that writing needs.

    Attributes:
      file: the open input.
      plans: the treatment of each tensor.
      axis: the contracted axis.
      importance: the importance of the inputs of tensors, by name.
      energies: the list to which the energies of each quantized tensor are added.
      advance: a function to call with the number of bytes that are done.
    """

    file: TensorFile
    plans: Sequence[_Plan]
    axis: int
    importance: dict[str, np.ndarray]
    energies: list[Energies]
    advance: Callable[..., None]

    def quantized(self, plan: _Plan) -> Any:
        """Returns the quantized tensor of a plan."""
        x = jax.device_put(self.file.read(plan.entry))
        with _naming(plan.entry.name):
            if isinstance(plan.recipe, str):
                weights = self.importance.get(plan.entry.name)
                q = gguf.quantize(x, plan.recipe, importance=weights)
            else:
                assert plan.recipe is not None
                q = quantize(x, plan.recipe, axis=self.axis)
        self.energies.append(jax.device_get(energies_of(x, q.dequantize())[1]))
        self.advance(plan.entry.nbytes)
        return q

    def kept(self, plan: _Plan) -> np.ndarray:
        """Returns the tensor of a plan as it is in the file."""
        self.advance(plan.entry.nbytes)
        return self.file.raw(plan.entry)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {one_line(error)}") from error


def _rules(args: argparse.Namespace) -> list[tuple[re.Pattern[str], str | None]]:
    """Returns the rules of the options, of which the first that matches a name counts."""
    rules: list[Any] = []
    with bad_input():
        if args.rules is not None:
            try:
                rules = json.loads(pathlib.Path(args.rules).read_text())
            except (OSError, ValueError, RecursionError) as error:
                raise UsageError(f"{args.rules}: {one_line(error)}") from error
            good = isinstance(rules, list) and all(
                isinstance(r, list) and len(r) == 2 and isinstance(r[0], str) for r in rules
            )
            if not good:
                raise UsageError(f"{args.rules}: it must be a list of pairs [expression, recipe]")
        if args.recipe is not None:
            rules = [*rules, ["", args.recipe]]
        if not rules:
            raise UsageError("quantize needs --recipe NAME or --rules FILE")
        for _, name in rules:
            if name is None or name in NAMES:
                continue
            if name in FORMATS:
                get_recipe(name)  # Raises an error that names recipes with this format.
            raise NAMES.unknown(str(name), NAMES.near(str(name)))
        try:
            return [(re.compile(pattern), name) for pattern, name in rules]
        except re.error as error:
            raise UsageError(f"{args.rules}: not a regular expression: {error}") from error


def _plan(entry: Entry, rules: Sequence, args: argparse.Namespace, to_gguf: bool) -> _Plan:
    found = [name for pattern, name in rules if pattern.search(entry.name)]
    if not found or found[0] is None:
        return _Plan(entry, None, "kept by a rule" if found else "no rule")
    name = found[0]
    if not entry.is_float:
        return _Plan(entry, None, f"dtype {entry.dtype}")
    if len(entry.shape) < args.min_axes:
        return _Plan(entry, None, f"fewer than {args.min_axes} axes")
    if not to_gguf and name in RECIPES:
        recipe = get_recipe(name)
        try:
            jax.eval_shape(lambda x: quantize(x, recipe, axis=args.axis), _shape_of(entry))
        except ValueError as error:
            return _Plan(entry, None, one_line(error))
        return _Plan(entry, recipe)
    if name not in gguf.TYPES:
        raise UsageError(f"GGUF has no type {name!r}; it has {', '.join(gguf.TYPES)}")
    if not entry.shape:
        return _Plan(entry, None, "a scalar")
    if args.axis not in (-1, len(entry.shape) - 1):
        raise UsageError(f"GGUF types need --axis -1, got {args.axis}; transpose the weights first")
    type_ = gguf.fallback(name, entry.shape[-1])
    if type_ == "f16":
        block = gguf.TYPES[name].block
        return _Plan(entry, None, f"blocks of {block} do not divide rows of {entry.shape[-1]}")
    return _Plan(entry, type_, "" if type_ == name else f"{type_} in place of {name}")


def _without_importance(plan: _Plan, importance: dict[str, np.ndarray]) -> _Plan:
    """Returns a plan that notes if the importance matrix lacks a tensor."""
    if not isinstance(plan.recipe, str) or plan.entry.name in importance:
        return plan
    note = ", ".join(filter(None, (plan.note, "not in the importance matrix")))
    return dataclasses.replace(plan, note=note)


def _shape_of(entry: Entry) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(entry.shape, np.dtype(np.float32))


def _write_safetensors(path: str, job: _Job) -> None:
    shapes: dict[str, Any] = {}
    plans = {plan.entry.name: plan for plan in job.plans}
    for name, plan in plans.items():
        entry, recipe = plan.entry, plan.recipe
        if isinstance(recipe, str):
            make = functools.partial(gguf.quantize, type=recipe)
            shapes[name] = jax.eval_shape(make, _shape_of(entry))
        elif recipe is not None:
            make = functools.partial(quantize, recipe=recipe, axis=job.axis)
            shapes[name] = jax.eval_shape(make, _shape_of(entry))
        elif entry.packed is not None:
            data = jax.ShapeDtypeStruct(_bytes_of(entry), np.dtype(np.uint8))
            packed = gguf.Packed(jnp.zeros(0), entry.packed, np.dtype(np.float32))
            shapes[name] = jax.tree.map(lambda _, data=data: data, packed)
        elif entry.numpy_dtype is not None:
            dtype = np.dtype(entry.numpy_dtype).newbyteorder("=")
            shapes[name] = jax.ShapeDtypeStruct(entry.shape, dtype)
        else:
            raise UsageError(f"{name}: the dtype {entry.dtype} cannot be copied")

    def read(name: str) -> Any:
        plan = plans[name]
        return job.kept(plan) if plan.recipe is None else job.quantized(plan)

    save_streamed(path, shapes, read)


def _bytes_of(entry: Entry) -> tuple[int, ...]:
    assert entry.packed is not None
    layout = gguf.TYPES[entry.packed]
    return (*entry.shape[:-1], entry.shape[-1] // layout.block * layout.size)


def _write_gguf(path: str, job: _Job) -> None:
    tensors = []
    for plan in job.plans:
        entry = plan.entry
        dtype = None if entry.numpy_dtype is None else np.dtype(entry.numpy_dtype).name
        if isinstance(plan.recipe, str):
            kind, read = plan.recipe, functools.partial(_packed_bytes, job, plan)
        elif entry.packed is not None or dtype in _PLAIN:
            kind = entry.packed or _PLAIN[dtype or ""]
            read = functools.partial(job.kept, plan)
        else:
            raise UsageError(f"{entry.name}: {entry.dtype} cannot be copied to GGUF")
        tensors.append(gguf.Tensor(entry.name, kind, entry.shape, read))
    metadata = {"general.architecture": "unknown", "general.quantization_version": 2}
    with bad_input():
        gguf.write(path, tensors, {**metadata, **_gguf_metadata(job.file)})


def _packed_bytes(job: _Job, plan: _Plan) -> jax.Array:
    return job.quantized(plan).data


def _gguf_metadata(file: TensorFile) -> dict[str, Any]:
    """Returns the metadata of a GGUF input, except the type that described its tensors."""
    if "general.architecture" not in file.metadata:  # Metadata of another kind of file.
        return {}
    return {key: value for key, value in file.metadata.items() if key != "general.file_type"}


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
                    raise UsageError(f"{path}: {base} has no counts")
                # One row per expert; a single row serves all rows of a tensor. As in llama.cpp,
                # all inputs of an expert that saw no token are equally important.
                count = file.read(counts).reshape(-1, 1)
                sums = file.read(entry).reshape(len(count), -1)
                rows = np.where(count > 0, sums / np.maximum(count, 1), np.float32(1))
                result[base] = rows[0] if len(rows) == 1 else rows[:, None]
    if not result:
        raise UsageError(f"{path}: it is not an importance matrix in GGUF (NAME.in_sum2)")
    return result


def _summary(
    args: argparse.Namespace, plans: Sequence[_Plan], energies: Sequence[Energies]
) -> None:
    after = pathlib.Path(args.output).stat().st_size
    before = sum(plan.entry.nbytes for plan in plans)
    done = [plan for plan in plans if plan.recipe is not None]
    row = {
        "quantized": len(done),
        "kept": len(plans) - len(done),
        "SQNR dB": total_of(energies).sqnr_db if energies else math.nan,
        "bytes before": before,
        "bytes after": after,
        "smaller by": before / after,
    }
    notes: dict[str, list[str]] = {}
    for plan in plans:
        if plan.note:
            notes.setdefault(plan.note, []).append(plan.entry.name)
    if args.json:
        return print_json({**row, "notes": notes})
    print_table([row])
    for note, names in notes.items():
        print(f"{len(names)} tensors: {note}: {one_line(', '.join(names[:3]))}")
    return None
