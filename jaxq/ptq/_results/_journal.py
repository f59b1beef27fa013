"""A folder that stores solved products or learned blocks, so that a run can be resumed."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import path
from jaxq._jax import compat
from jaxq._jax.processes import holds_on_all_processes, host_array, spans_processes
from jaxq.interop import is_temporary, load, save
from jaxq.models import weight_of
from jaxq.ptq._calibration_runs import Calls, Model
from jaxq.quantizers import Quantized

__all__ = ["Entry", "Journal", "folder_of", "journal_of"]

_RUN = "run.safetensors"


class Entry(NamedTuple):
    """A solved product or a learned block in a journal.

    Attributes:
      row: its row of the report, a flat record of strings and numbers, or None for a default.
      packed: its packed leaves, or rows of leaves.
    """

    row: Any
    packed: Sequence[Quantized]


@dataclasses.dataclass(frozen=True)
class Journal:
    """A folder with one file per entry. Files appear in it only when they are complete.

    Attributes:
      folder: the folder.
      row_type: the class of the rows.
      is_shared: True if several processes compute the entries together. An entry is then read only
        if all of them have it.
    """

    folder: pathlib.Path
    row_type: type
    is_shared: bool

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:05}.safetensors"

    def read(self, number: int) -> Entry | None:
        """Returns the entry at a position in the order of the run, or None if it is missing."""
        file = self._path(number)
        exists = file.exists()
        if not (holds_on_all_processes(exists) if self.is_shared else exists):
            return None
        tree = load(file)
        fields = dict(zip(tree["names"], np.asarray(tree["numbers"]).tolist(), strict=True))
        integers = {
            field.name: int(fields[field.name])
            for field in dataclasses.fields(self.row_type)
            if field.type is int
        }
        row = self.row_type(**{**fields, **integers, **tree["texts"]})
        return Entry(row, tree["packed"])

    def write(self, number: int, entry: Entry) -> None:
        """Stores the entry at a position in the order of the run."""
        fields = dataclasses.asdict(entry.row)
        texts = {name: value for name, value in fields.items() if isinstance(value, str)}
        names = [n for n, value in fields.items() if n not in texts and value is not None]
        tree = {
            "texts": texts,
            "names": names,
            "numbers": np.array([fields[name] for name in names], np.float64),
            "packed": jax.tree.map(host_array, entry.packed),
        }
        save(self._path(number), tree)


def folder_of(owner: str, resume: Any) -> pathlib.Path | None:
    """Returns the argument `resume` of a function as the path of a folder, or None.

    Raises:
      TypeError: if it is not a path.
      ValueError: if it names something other than a folder.
    """
    if resume is None:
        return None
    folder = path(owner, "resume", resume)
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{owner}: `resume` must be a folder, but {folder.name!r:.80} is a file. Pass the path "
            "of a new folder."
        )
    return folder


def journal_of(
    folder: pathlib.Path, calls: Calls, model: Model, settings: Any, row_type: type
) -> Journal:
    """Returns the journal of a run in a folder, which is created if it does not exist.

    If several processes run the model together, each has a folder of its own in this folder.

    Args:
      folder: the folder.
      calls: the calls of the model, with the parameters and batches.
      model: the planned model.
      settings: the other settings of the run, compared by their `repr`.
      row_type: the class of the rows.

    Raises:
      ValueError: if the folder holds another run or other files.
    """
    run = _fingerprint(calls, model, settings)
    is_shared = any(map(spans_processes, _arrays(calls)))
    if is_shared:
        folder = folder / f"process{jax.process_index()}"
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / _RUN
    stored = load(run_file)["run"] if run_file.exists() else None
    # A run that was killed while it stored its first file leaves only a temporary file.
    others = [other for other in folder.iterdir() if not is_temporary(other, run_file)]
    if stored != run and (stored is not None or others):
        contents = "parts of another run" if stored else "other files"
        raise ValueError(
            f"{calls.owner}: `resume` must be a new folder, or that of a run with the same model, "
            f"rules, settings, params and batches, but {folder.name!r} holds {contents}. Pass "
            "another folder, or remove this one."
        )
    if stored is None:
        save(run_file, {"run": run})
    return Journal(folder, row_type, is_shared)


def _fingerprint(calls: Calls, model: Model, settings: Any) -> str:
    """Returns a hash of everything on which the result depends."""
    planned = model.planned
    texts = [_full_text(settings), str(planned.traced.jaxpr)]
    for product, assigned in zip(planned.products, planned.chosen, strict=True):
        weight = None if assigned is None else weight_of(product, assigned)
        texts.append(f"{product.name} {_full_text(None if assigned is None else assigned.recipe)}")
        texts.append(_full_text(None if weight is None else weight.recipes))
    # The addresses of functions differ between processes.
    text = re.sub(r"0x[0-9a-f]+", "", "\n".join(texts))
    digest = hashlib.sha256(text.encode())
    for leaf in (*_arrays(calls), *_closed_over(planned.traced.jaxpr)):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        values = host_array(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(repr((values.shape, values.dtype)).encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _full_text(value: Any) -> str:
    """Returns the text of nested records with all fields, such as the levels of a codebook."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_full_text, value))})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    names = [field.name for field in dataclasses.fields(value)]
    fields = [f"{name}={_full_text(getattr(value, name))}" for name in names]
    return f"{type(value).__name__}({', '.join(fields)})"


def _closed_over(jaxpr: Any) -> Iterator[Any]:
    """Yields the arrays that a program and the programs in it close over."""
    body = compat.body(jaxpr)
    yield from body.consts
    for eqn in body.eqns:
        for inner in compat.bodies(eqn):
            yield from _closed_over(inner)


def _arrays(calls: Calls) -> list[Any]:
    """Returns the parameters, the arrays of all batches and their masks."""
    module = None if jax.tree_util.all_leaves([calls.fn]) else calls.fn
    leaves = jax.tree.leaves([module, calls.calls, calls.masks])
    return [leaf for leaf in leaves if compat.is_array(leaf)]
