"""Tensors by recipes: one row each, with one tensor in memory at a time.

A row that has no numbers says why in its `note`; nothing is left out silently.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxq.analysis import Comparison, compare
from jaxq.analysis.specs import meaning
from jaxq.casting import cast
from jaxq.cli.files import Entry, TensorFile
from jaxq.cli.output import bad_input, one_line
from jaxq.formats import Format
from jaxq.quantizers import fake_quant, quantize
from jaxq.recipes import Quantizer

__all__ = ["DEFAULT", "Row", "Selection", "Total", "measure", "rows_of", "totals"]

# For files of PyTorch's layout, [outputs, inputs]: "token" is one scale an output there.
DEFAULT = (
    "int8_tensor",
    "int8_token",
    "fp8_e4m3_tensor",
    "mxfp8_e4m3",
    "int4_g32",
    "nf4",
    "mxfp4",
    "nvfp4",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor by one recipe; numbers are NaN, and bytes the tensor's own, where a note says why.

    Attributes:
      tensor: its name.
      shape: its shape, as in 384x384.
      dtype: as the file calls it.
      recipe: the recipe's name.
      sqnr_db: of the tensor in float32 and what the recipe makes of it; infinite if equal.
      mse: the mean squared error.
      max_error: the largest.
      power: the mean square of the tensor.
      elements: how many numbers.
      bytes: with scales and padding.
      bits: the same for each number.
      note: why the recipe is not applied; empty if it is.
    """

    tensor: str
    shape: str
    dtype: str
    recipe: str
    sqnr_db: float
    mse: float
    max_error: float
    power: float
    elements: int
    bytes: int
    bits: float
    note: str


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which tensors of a file are compared, and which are not, with the reason.

    Attributes:
      chosen: the entries.
      left: for each reason, the names of the others.
    """

    chosen: tuple[Entry, ...]
    left: dict[str, list[str]]

    @staticmethod
    def of(file: TensorFile, include: str | None, exclude: str | None) -> "Selection":
        """The floating tensors whose names a pattern finds, and another does not.

        Raises:
          UsageError: a pattern is no regular expression.
        """
        with bad_input():
            try:
                patterns = [None if p is None else re.compile(p) for p in (include, exclude)]
            except re.error as error:
                raise ValueError(f"a pattern is no regular expression: {error}") from error
        chosen, left = [], {}
        for entry in file.entries:
            if entry.numpy_dtype is None:
                left.setdefault(f"dtype {entry.dtype}", []).append(entry.name)
            elif patterns[0] is not None and not patterns[0].search(entry.name):
                left.setdefault("not included", []).append(entry.name)
            elif patterns[1] is not None and patterns[1].search(entry.name):
                left.setdefault("excluded", []).append(entry.name)
            else:
                chosen.append(entry)
        return Selection(tuple(chosen), left)


@functools.partial(jax.jit, static_argnames="kind")
def _measured(x: jax.Array, kind: Format | Quantizer) -> Comparison:
    """One program for each shape and recipe."""
    quantizer = isinstance(kind, Quantizer)
    return compare(x, fake_quant(x, kind) if quantizer else cast(x, kind, overflow="saturate"))


@functools.cache
def _bytes(shape: tuple[int, ...], kind: Format | Quantizer) -> int:
    """What a stored tensor takes.

    Raises:
      ValueError: the recipe does not fit the shape.
    """
    if not isinstance(kind, Quantizer):
        return -(-math.prod(shape) * kind.bits // 8)
    stored = jax.eval_shape(
        lambda x: quantize(x, kind), jax.ShapeDtypeStruct(shape, np.dtype(np.float32))
    )
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(stored))


def measure(x: np.ndarray, entry: Entry, recipe: str) -> Row:
    """The row of a tensor and a recipe.

    Args:
      x: float32.
      entry: what the file says of it.
      recipe: a preset's name, or a format's, which is a cast without a scale.
    """
    kind, note = meaning(recipe), _unfit(x)
    if note:
        return _row(entry, recipe, note)
    try:
        taken = _bytes(x.shape, kind)
        errors = jax.device_get(_measured(x, kind))
    except ValueError as error:  # Blocks that do not divide, axes that are not there.
        return _row(entry, recipe, one_line(error))
    return _row(entry, recipe, "", taken, errors)


def _row(
    entry: Entry,
    recipe: str,
    note: str,
    taken: int | None = None,
    errors: Comparison | None = None,
) -> Row:
    """A row of numbers, or of a note only."""
    names = ("sqnr_db", "mse", "max_error", "power")
    numbers = {n: math.nan if errors is None else float(getattr(errors, n)) for n in names}
    taken = entry.nbytes if taken is None else taken
    return Row(
        tensor=entry.name,
        shape="x".join(map(str, entry.shape)) or "scalar",
        dtype=entry.dtype,
        recipe=recipe,
        **numbers,
        elements=entry.size,
        bytes=taken,
        bits=8 * taken / entry.size if entry.size else math.nan,
        note=note,
    )


def _unfit(x: np.ndarray) -> str:
    """Why no recipe applies to a tensor, or nothing."""
    if not x.size:
        return "empty"
    finite = np.isfinite(x)
    if finite.all():
        return ""
    nan = int(np.isnan(x).sum())
    return f"not finite: {nan} NaN, {x.size - int(finite.sum()) - nan} infinite in float32"


def rows_of(
    file: TensorFile, entries: Sequence[Entry], recipes: Sequence[str], least_axes: int
) -> Iterator[list[Row]]:
    """The rows of each tensor in turn, a recipe each."""
    for entry in entries:
        if len(entry.shape) < least_axes:
            note = f"fewer than {least_axes} axes"
            yield [_row(entry, recipe, note) for recipe in recipes]
            continue
        x = file.read(entry)
        yield [measure(x, entry, recipe) for recipe in recipes]
        del x  # Before the next one is read.


@dataclasses.dataclass(frozen=True)
class Total:
    """All tensors by one recipe; those that it does not apply to keep their own bytes.

    Attributes:
      recipe: its name.
      tensors: how many it applies to.
      kept: how many it does not.
      sqnr_db: of all numbers that it applies to.
      bits: bits of each of these.
      bytes: of all tensors.
      ratio: the bytes in the file over these.
      worst: the tensor with the lowest ratio.
      worst_db: that ratio.
    """

    recipe: str
    tensors: int
    kept: int
    sqnr_db: float
    bits: float
    bytes: int
    ratio: float
    worst: str
    worst_db: float


def totals(rows: Sequence[Row], recipes: Sequence[str], before: int) -> list[Total]:
    """One total a recipe.

    Args:
      rows: what `rows_of` gave.
      recipes: in the order that is wanted.
      before: the bytes of the tensors in the file.
    """
    result = []
    for recipe in recipes:
        mine = [row for row in rows if row.recipe == recipe]
        done = [row for row in mine if not row.note]
        elements = sum(row.elements for row in done)
        noise = math.fsum(row.mse * row.elements for row in done)
        signal = math.fsum(row.power * row.elements for row in done)
        db = math.nan
        if done:
            db = math.inf if noise == 0 else -math.inf
            if noise > 0 and signal > 0 and math.isfinite(noise):
                db = 10 * math.log10(signal / noise)
        after = sum(row.bytes for row in mine)
        worst = min(done, key=lambda row: row.sqnr_db, default=None)
        result.append(
            Total(
                recipe=recipe,
                tensors=len(done),
                kept=len(mine) - len(done),
                sqnr_db=db,
                bits=8 * sum(row.bytes for row in done) / elements if elements else math.nan,
                bytes=after,
                ratio=before / after if after else math.nan,
                worst=worst.tensor if worst else "",
                worst_db=worst.sqnr_db if worst else math.nan,
            )
        )
    return result
