"""A folder that stores solved products, so that an interrupted run can be resumed."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxq._jax import compat
from jaxq.interop import load, save
from jaxq.models import weight_of
from jaxq.ptq._calibration_calls import Calls, Model
from jaxq.ptq._reports import SolvedProduct
from jaxq.quantizers import Quantized

__all__ = ["Entry", "Journal", "journal_of"]

_RUN = "run.safetensors"


class Entry(NamedTuple):
    """A solved product in a journal.

    Attributes:
      row: its row of the report.
      packed: the packed leaves, or rows of leaves, of its weight.
    """

    row: SolvedProduct
    packed: list[Quantized]


@dataclasses.dataclass(frozen=True)
class Journal:
    """A folder with one file per solved product. Files appear in it only when they are complete.

    Attributes:
      folder: the folder.
    """

    folder: pathlib.Path

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:05}.safetensors"

    def read(self, number: int) -> Entry | None:
        """Returns the product at a position in the order of solving, or None if it is missing."""
        path = self._path(number)
        if not path.exists():
            return None
        tree = load(path)
        fields = dict(zip(tree["names"], np.asarray(tree["numbers"]).tolist(), strict=True))
        integers = {name: int(fields[name]) for name in ("tokens", "inputs")}
        row = SolvedProduct(**{**fields, **integers, **tree["texts"]})
        return Entry(row, tree["packed"])

    def write(self, number: int, entry: Entry) -> None:
        """Stores the product at a position in the order of solving."""
        fields = dataclasses.asdict(entry.row)
        texts = {name: value for name, value in fields.items() if isinstance(value, str)}
        names = [name for name in fields if name not in texts]
        tree = {
            "texts": texts,
            "names": names,
            "numbers": np.array([fields[name] for name in names], np.float64),
            "packed": entry.packed,
        }
        save(self._path(number), tree)


def journal_of(folder: pathlib.Path, calls: Calls, model: Model, settings: Any) -> Journal:
    """Returns the journal of a run in a folder, which is created if it does not exist.

    Args:
      folder: the folder.
      calls: the calls of the model, with the parameters and batches.
      model: the planned model.
      settings: the other settings of the run, compared by their `repr`.

    Raises:
      ValueError: if the folder holds another run or other files.
    """
    run = _fingerprint(calls, model, settings)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _RUN
    stored = load(path)["run"] if path.exists() else None
    if stored != run and (stored is not None or any(folder.iterdir())):
        contents = "products of another run" if stored else "other files"
        raise ValueError(
            f"{calls.owner}: `resume` must be a new folder, or that of a run with the same model, "
            f"rules, solver, params and batches, but {folder.name!r} holds {contents}. Pass "
            "another folder, or remove this one."
        )
    if stored is None:
        save(path, {"run": run})
    return Journal(folder)


def _fingerprint(calls: Calls, model: Model, settings: Any) -> str:
    """Returns a hash of everything on which the result depends."""
    planned = model.planned
    texts = [repr(settings), str(planned.traced.jaxpr)]
    for product, assigned in zip(planned.products, planned.chosen, strict=True):
        weight = None if assigned is None else weight_of(product, assigned)
        texts.append(f"{product.name} {None if assigned is None else assigned.recipe}")
        texts.append(str(None if weight is None else weight.recipes))
    # The addresses of functions differ between processes.
    text = re.sub(r"0x[0-9a-f]+", "", "\n".join(texts))
    digest = hashlib.sha256(text.encode())
    module = None if jax.tree_util.all_leaves([calls.fn]) else calls.fn
    for leaf in _arrays([module, calls.calls, calls.masks]):
        digest.update(repr((leaf.shape, leaf.dtype)).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _arrays(tree: Any) -> Sequence[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if compat.is_array(leaf)]
