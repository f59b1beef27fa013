"""Writers of the file formats that `jaxq quantize` supports."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxq.analysis import Energies
from jaxq.cli._output import UsageError, bad_input, one_line
from jaxq.cli._packing import pack_in_pieces
from jaxq.cli._pieces import Errors, Numbers, energy, errors_of
from jaxq.interop import Entry, TensorFile, compressed_tensors, gguf, save_streamed
from jaxq.quantizers import quantize
from jaxq.recipes import Recipe

__all__ = ["WRITERS", "Job", "Plan", "shape_of", "takes_importance"]

# The types of GGUF with the same bytes as a dtype.
_PLAIN = {f"float{bits}": f"f{bits}" for bits in (16, 32, 64)} | {"bfloat16": "bf16"}
_PLAIN |= {f"int{bits}": f"i{bits}" for bits in (8, 16, 32, 64)}
# Files of a model that are copied along with its tensors.
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = ("config.json", "quantize_config.json", "hf_quant_config.json")

# Nanoseconds per number on one core, for the estimate of the progress bar: without and with an
# importance matrix.
_COSTS = {
    "q2_k": (22, 38),
    "q3_k": (17, 19),
    "q4_k": (26, 35),
    "q5_k": (22, 34),
    "q6_k": (16, 18),
    "iq4_nl": (24, 26),
    "iq4_xs": (25, 29),
    "q4_0": (3, 20),
    "q4_1": (3, 44),
    "q5_0": (6, 21),
    "q5_1": (7, 46),
}
_COST, _COPY = (10, 10), 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The output name and recipe of one tensor.

    Attributes:
      entry: the tensor in the input.
      name: its name in the output.
      recipe: a recipe, a block type of GGUF, or None to keep the tensor.
      note: a remark for the summary; may be empty.
    """

    entry: Entry
    name: str
    recipe: Recipe | str | None
    note: str = ""

    def work(self, important: bool) -> int:
        """Returns the estimated time in nanoseconds, with or without an importance matrix."""
        if self.recipe is None:
            return self.entry.size * _COPY
        cost = _COSTS.get(self.recipe, _COST) if isinstance(self.recipe, str) else _COST
        return self.entry.size * cost[important]


@dataclasses.dataclass(frozen=True)
class Job:
    """The input and the options of a writer.

    Attributes:
      file: the open input.
      plans: the treatment of each tensor.
      axis: the contracted axis.
      importance: the importance of the inputs of tensors, by name.
      energies: the lists, by output name, to which the energies of quantized tensors are added.
      advance: a progress callback that takes the work done, in the units of `Plan.work`.
      conversion: the conversion of a Hugging Face model to GGUF; None to keep names and layouts.
      config: the content of the model's `config.json`.
      metadata: further metadata of a GGUF file, such as the tokenizer.
      dynamic_activations: as in `compressed_tensors.write`.
    """

    file: TensorFile
    plans: Sequence[Plan]
    axis: int
    importance: Mapping[str, np.ndarray]
    energies: Mapping[str, list[Energies]]
    advance: Callable[..., None]
    conversion: gguf.Conversion | None
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    dynamic_activations: bool

    def values(self, plan: Plan) -> np.ndarray:
        """Returns the tensor of a plan in float32, in the layout of the output."""
        x = self.file.read(plan.entry)
        return x if self.conversion is None else self.conversion.values(plan.entry.name, x)

    def packed(self, plan: Plan) -> Iterator[np.ndarray]:
        """Yields the bytes of a plan's block type of GGUF, part by part."""
        assert isinstance(plan.recipe, str)
        entry, read = plan.entry, functools.partial(self.values, plan)
        if self.conversion is not None and self.conversion.changes(entry.name):
            numbers = Numbers.of(read())
        else:
            numbers = Numbers(entry.shape, functools.partial(self.file.stream, entry), read)
        with _named(entry.name):
            for part in pack_in_pieces(numbers, plan.recipe, _noise, self._importance(plan)):
                self.energies[plan.name].append(part.errors.energies(part.signal, part.count))
                self.advance(self._work(plan) * part.count / entry.size)
                yield part.data

    def quantized(self, plan: Plan) -> Any:
        """Returns the quantized tensor of a plan."""
        if isinstance(plan.recipe, str):
            data = np.concatenate([*self.packed(plan)]).reshape(_bytes_of(plan.entry, plan.recipe))
            return _unpacked(data, plan.recipe)
        assert plan.recipe is not None
        x = self.values(plan)
        with _named(plan.entry.name):
            q = quantize(x, plan.recipe, axis=self.axis, importance=self._importance(plan))
        return self._measured(plan, x, q)

    def _importance(self, plan: Plan) -> np.ndarray | None:
        """Returns the importance of the inputs of a tensor, if its recipe uses it."""
        weights, shape = self.importance.get(plan.name), plan.entry.shape
        if weights is None or plan.recipe is None or not takes_importance(plan.recipe):
            return None
        try:
            fits = np.broadcast_shapes(weights.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits or weights.shape[-1] != shape[-1]:
            raise ValueError(
                f"its importance has the shape {weights.shape}, but it has the shape {shape}; the "
                "importance matrix must be of this model"
            )
        return weights

    def fused(self, plan: Plan) -> Any:
        """Quantizes the tensor of a plan together with the tensors that vLLM fuses with it."""
        recipe = plan.recipe
        assert isinstance(recipe, Recipe)
        if recipe.scaling.second_level != "tensor":
            return self.quantized(plan)
        plans = {plan.name: plan for plan in self.plans}
        names = [n for n in compressed_tensors.fused_with(plan.name) if n in plans]
        weights = [self.values(plans[name]) for name in names]
        with _named(plan.entry.name):
            q = compressed_tensors.quantize_together(weights, recipe)[names.index(plan.name)]
        return self._measured(plan, weights[names.index(plan.name)], q)

    def _measured(self, plan: Plan, x: np.ndarray, q: Any) -> Any:
        self._add(plan, x, errors_of(x, np.asarray(q.dequantize())))
        return q

    def _add(self, plan: Plan, x: np.ndarray, errors: Errors) -> None:
        self.energies[plan.name].append(errors.energies(energy(x.reshape(-1)), x.size))
        self.advance(self._work(plan))

    def _work(self, plan: Plan) -> int:
        return plan.work(plan.name in self.importance)

    def unchanged(self, plan: Plan) -> Any:
        """Returns the tensor of a plan unchanged."""
        self.advance(self._work(plan))
        return self.file.quantized(plan.entry)

    def unchanged_bytes(self, plan: Plan) -> np.ndarray:
        """Returns the bytes of the tensor of a plan, or its numbers if it has no block type."""
        self.advance(self._work(plan))
        return self.file.raw(plan.entry)


# Compiled once per shape, as the pieces of a tensor are.
_unpacked = jax.jit(gguf.unpack, static_argnames="type")


def _noise(error: np.ndarray) -> Errors:
    """Returns errors without the largest one, which the summary does not show."""
    return Errors(energy(error), 0.0)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {one_line(error)}") from error


def takes_importance(recipe: Recipe | str) -> bool:
    """Returns whether a recipe, or a block type of GGUF, searches by an importance."""
    if isinstance(recipe, str):
        recipe = gguf.recipe_of(recipe)
    return recipe.scaling.takes_importance(recipe.element)


def shape_of(entry: Entry) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a tensor as read: float32."""
    return jax.ShapeDtypeStruct(entry.shape, np.dtype(np.float32))


def _write_safetensors(path: str, job: Job) -> None:
    shapes: dict[str, Any] = {}
    plans = {plan.name: plan for plan in job.plans}
    for name, plan in plans.items():
        entry, recipe = plan.entry, plan.recipe
        if recipe is None and entry.layout is not None:
            recipe = entry.layout.recipe
            if recipe is None:
                shapes[name] = shape_of(entry)
                continue
            make = functools.partial(quantize, recipe=recipe)
            shapes[name] = jax.eval_shape(make, shape_of(entry))
            continue
        type = recipe if isinstance(recipe, str) else entry.packed if recipe is None else None
        if type is not None:
            data = jax.ShapeDtypeStruct(_bytes_of(entry, type), np.dtype(np.uint8))
            shapes[name] = jax.eval_shape(functools.partial(gguf.unpack, type=type), data)
        elif recipe is not None:
            make = functools.partial(quantize, recipe=recipe, axis=job.axis)
            shapes[name] = jax.eval_shape(make, shape_of(entry))
        elif entry.numpy_dtype is not None:
            dtype = np.dtype(entry.numpy_dtype).newbyteorder("=")
            shapes[name] = jax.ShapeDtypeStruct(entry.shape, dtype)
        else:
            raise UsageError(
                f"{name}: the dtype {entry.dtype} cannot be copied; leave the tensor out of IN"
            )

    def read(name: str) -> Any:
        plan = plans[name]
        return job.unchanged(plan) if plan.recipe is None else job.quantized(plan)

    save_streamed(path, shapes, read)


def _bytes_of(entry: Entry, type: str) -> tuple[int, ...]:
    """Returns the shape of an entry in the bytes of a block type."""
    layout = gguf.TYPES[type]
    return (*entry.shape[:-1], entry.shape[-1] // layout.block * layout.size)


def _write_gguf(path: str, job: Job) -> None:
    tensors = []
    for plan in job.plans:
        entry = plan.entry
        dtype = None if entry.numpy_dtype is None else np.dtype(entry.numpy_dtype).name
        changed = entry.layout is not None or (
            job.conversion is not None and entry.is_float and entry.packed is None
        )
        if isinstance(plan.recipe, str):
            kind, read = plan.recipe, functools.partial(job.packed, plan)
        elif changed:
            # llama.cpp multiplies vectors, such as those of norms, in float32 only.
            wide = len(entry.shape) < 2 or dtype not in ("float16", "bfloat16")
            kind = "f32" if wide else _PLAIN[dtype or ""]
            read = functools.partial(_plain_values, job, plan, kind)
        elif entry.packed is not None or dtype in _PLAIN:
            kind = entry.packed or _PLAIN[dtype or ""]
            read = functools.partial(job.unchanged_bytes, plan)
        else:
            raise UsageError(
                f"{entry.name}: {entry.dtype} cannot be copied to GGUF; add a rule with a "
                "recipe, or leave the tensor out of IN"
            )
        tensors.append(gguf.Tensor(plan.name, kind, entry.shape, read))
    metadata = {"general.architecture": "unknown", "general.quantization_version": 2}
    metadata |= _gguf_metadata(job.file)
    if job.conversion is not None:
        metadata |= job.conversion.metadata
        tensors += [
            gguf.Tensor(name, "f32", x.shape, functools.partial(np.asarray, x))
            for name, x in job.conversion.tensors.items()
        ]
    with bad_input():
        gguf.write(path, tensors, {**metadata, **job.metadata})


def _plain_values(job: Job, plan: Plan, kind: str) -> np.ndarray:
    job.advance(plan.work(False))
    dtypes = {name: dtype for dtype, name in _PLAIN.items()}
    return job.values(plan).astype(np.dtype(dtypes[kind]))


def _gguf_metadata(file: TensorFile) -> dict[str, Any]:
    """Returns the metadata of a GGUF input, except the type that described its tensors."""
    if "general.architecture" not in file.metadata:  # Metadata of another kind of file.
        return {}
    return {key: value for key, value in file.metadata.items() if key != "general.file_type"}


def _write_compressed_tensors(path: str, job: Job) -> None:
    shapes: dict[str, Any] = {}
    plans = {plan.name: plan for plan in job.plans}
    for name, plan in plans.items():
        entry, recipe = plan.entry, plan.recipe
        if recipe is not None:
            make = functools.partial(quantize, recipe=recipe, axis=job.axis)
            shapes[name] = jax.eval_shape(make, shape_of(entry))
        elif entry.layout is not None or entry.numpy_dtype is None:
            raise UsageError(
                f"{name}: the dtype {entry.dtype} cannot be copied; add a rule with a recipe"
            )
        else:
            dtype = np.dtype(entry.numpy_dtype).newbyteorder("=")
            shapes[name] = jax.ShapeDtypeStruct(entry.shape, dtype)

    def read(name: str) -> Any:
        plan = plans[name]
        return job.unchanged(plan) if plan.recipe is None else job.fused(plan)

    config = {key: value for key, value in job.config.items() if key != "quantization"}
    folder = job.file.path if job.file.path.is_dir() else job.file.path.parent
    files = [] if not config else sorted(f for f in folder.iterdir() if _is_copied(f))
    task = compressed_tensors.Checkpoint(shapes, read, config, job.dynamic_activations, files)
    try:
        compressed_tensors.write_streamed(path, task)
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def _is_copied(path: pathlib.Path) -> bool:
    excluded = path.name in _NOT_COPIED or path.name.endswith(".index.json")
    return path.is_file() and path.suffix in _COPIED and not excluded


WRITERS: dict[str, Callable[[str, Job], None]] = {
    "safetensors": _write_safetensors,
    "gguf": _write_gguf,
    "compressed-tensors": _write_compressed_tensors,
}
