"""Measurement of every tensor under every recipe, with one tensor in memory at a time.

A row without measurements gives the reason in its `note`; no tensor is skipped silently.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxq.analysis import Energies, format_or_recipe
from jaxq.analysis import total as total_of
from jaxq.cli._inputs import Inputs
from jaxq.cli._output import bad_input, one_line
from jaxq.cli._packing import pack_in_pieces
from jaxq.cli._pieces import (
    Errors,
    Numbers,
    Sums,
    errors_in,
    errors_in_pieces,
    errors_of,
    sums_of,
)
from jaxq.cli._recipes import BLOCK_TYPES
from jaxq.formats import Format
from jaxq.interop import Entry, gguf
from jaxq.quantizers import fake_quant
from jaxq.recipes import Recipe

__all__ = [
    "DEFAULT",
    "Row",
    "Selection",
    "Tensor",
    "Total",
    "kind_of",
    "measure",
    "rows_of",
    "totals",
]

DEFAULT = (
    "int8_tensor",
    "int8_token",
    "fp8_e4m3_tensor",
    "mxfp8_e4m3",
    "int4_g32",
    "nf4_g64",
    "mxfp4",
    "nvfp4",
)

_COUNTED = 2**20  # Elements that are read at a time to count those that are not finite.


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of one tensor under one recipe.

    If there is a note, the metrics are NaN and `bytes` is the tensor's original size.

    Attributes:
      tensor: the tensor's name.
      shape: the tensor's shape as text, such as 384x384.
      dtype: the name of the tensor's dtype in the file.
      recipe: the recipe's name.
      sqnr_db: the SQNR of the quantized tensor relative to the float32 one; infinite if equal.
      mse: the mean squared error.
      max_error: the largest absolute error.
      power: the mean square of the tensor.
      elements: the number of elements.
      bytes: the stored size, including scales and padding.
      bits: the stored bits per element.
      note: the reason why the recipe is not applied; empty if it is.
      energies: the sums from which totals are computed; None if there is a note.
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
    energies: Energies | None = dataclasses.field(repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """Returns the fields to print, all but `energies`."""
        fields = dataclasses.asdict(self)
        del fields["energies"]
        return fields


@dataclasses.dataclass(frozen=True)
class Selection:
    """The tensors of a file that are compared, and the others by reason.

    Attributes:
      chosen: the entries to compare.
      skipped: the names of the other tensors, by reason.
    """

    chosen: tuple[Entry, ...]
    skipped: dict[str, list[str]]

    def reasons(self) -> str:
        """Returns the number of skipped tensors for each reason, as text."""
        counts = [f"{len(names)} {reason}" for reason, names in self.skipped.items()]
        return ", ".join(counts) or "the file has no tensors"

    @staticmethod
    def of(file: Inputs, include: str | None, exclude: str | None) -> "Selection":
        """Selects the floating-point tensors that match `include` and do not match `exclude`.

        Args:
          file: the open files.
          include: a regular expression to search for in names; None includes all tensors.
          exclude: a regular expression to search for in names; None excludes no tensors.

        Raises:
          UsageError: if a pattern is not a valid regular expression.
        """
        with bad_input():
            try:
                patterns = [None if p is None else re.compile(p) for p in (include, exclude)]
            except re.error as error:
                raise ValueError(f"a pattern is not a valid regular expression: {error}") from error
        chosen, skipped = [], {}
        for entry in file.entries:
            if not entry.is_float:
                skipped.setdefault(f"dtype {entry.dtype}", []).append(entry.name)
            elif entry.name in file.parts:
                reason = "part of an array that jaxq has quantized"
                skipped.setdefault(reason, []).append(entry.name)
            elif patterns[0] is not None and not patterns[0].search(entry.name):
                skipped.setdefault("not included", []).append(entry.name)
            elif patterns[1] is not None and patterns[1].search(entry.name):
                skipped.setdefault("excluded", []).append(entry.name)
            else:
                chosen.append(entry)
        return Selection(tuple(chosen), skipped)


@functools.partial(jax.jit, static_argnames=("recipe", "axis"))
def _whole(x: jax.Array, recipe: Recipe, axis: int) -> jax.Array:
    """Returns a quantized tensor; compiled once per shape and recipe."""
    return fake_quant(x, recipe, axis=axis)


def kind_of(name: str) -> Format | Recipe | str:
    """Returns a recipe, a format for a cast, or the name of a block type of GGUF.

    Raises:
      ValueError: if the name is unknown.
    """
    if name in BLOCK_TYPES:
        return name
    return format_or_recipe(name)


def _bytes(shape: tuple[int, ...], recipe: Format | Recipe | str, axis: int) -> int:
    """Returns the stored size of a tensor in bytes.

    Raises:
      ValueError: if the recipe does not fit the shape.
    """
    if isinstance(recipe, str):
        layout, length = gguf.TYPES[recipe], shape[axis] if shape else 0
        if not length or length % layout.block:
            raise ValueError(f"blocks of {layout.block} do not divide rows of {length}")
        return math.prod(shape) // layout.block * layout.size
    if not isinstance(recipe, Recipe):
        return -(-math.prod(shape) * recipe.bits // 8)
    return recipe.along(axis, len(shape)).nbytes(shape)


class Tensor(NamedTuple):
    """A tensor to measure.

    Attributes:
      entry: its entry in the file.
      numbers: its numbers in float32.
      note: the reason why no recipe applies; empty if there is none.
      sums: sums over the tensor, which all recipes share.
    """

    entry: Entry
    numbers: Numbers
    note: str
    sums: Sums

    @staticmethod
    def of(entry: Entry, numbers: Numbers) -> "Tensor":
        """Returns the record of a tensor, made in one pass over its numbers."""
        sums = sums_of(numbers)
        note = "" if math.isfinite(sums.signal) else _unfit(numbers)
        return Tensor(entry, numbers, note, sums)


def measure(tensor: Tensor, recipes: Sequence[str], axis: int = -1) -> list[Row]:
    """Returns the rows of a tensor, one per recipe.

    Args:
      tensor: the tensor.
      recipes: the names of recipes, of block types of GGUF, or of formats, which mean a cast
        without a scale.
      axis: the contracted axis, as in `jaxq.fake_quant`.
    """
    entry, numbers, note, sums = tensor
    if note:
        return [_row(entry, recipe, note) for recipe in recipes]
    sizes: dict[str, int | str] = {}
    for recipe in recipes:
        try:
            sizes[recipe] = _bytes(numbers.shape, kind_of(recipe), axis)
        except ValueError as error:  # The blocks do not divide the shape, or an axis is missing.
            sizes[recipe] = one_line(error)
    targets = {r: kind_of(r) for r in recipes if isinstance(sizes[r], int)}
    cut = {r: target for r, target in targets.items() if not isinstance(target, str)}
    piecewise = errors_in_pieces(numbers, sums, list(cut.values()), axis)
    errors: dict[str, Errors | None] = dict(zip(cut, piecewise, strict=True))
    for recipe, target in targets.items():
        if isinstance(target, str):
            errors[recipe] = _packed_errors(numbers, target, axis)
        elif errors[recipe] is None:
            assert isinstance(target, Recipe)
            x = numbers.whole
            errors[recipe] = errors_of(x, np.asarray(_whole(x, target, axis)))
    return [
        _row(entry, recipe, size)
        if isinstance(size, str)
        else _row(entry, recipe, "", size, errors[recipe], sums.signal)
        for recipe, size in sizes.items()
    ]


def _packed_errors(numbers: Numbers, type: str, axis: int) -> Errors:
    """Returns the errors of a tensor in a block type of GGUF, whose blocks lie along an axis."""
    if axis not in (-1, len(numbers.shape) - 1):
        numbers = Numbers.of(np.moveaxis(numbers.whole, axis, -1))
    parts = (part.errors for part in pack_in_pieces(numbers, type, errors_in))
    return functools.reduce(operator.add, parts, Errors(0.0, 0.0))


def _row(
    entry: Entry,
    recipe: str,
    note: str,
    nbytes: int | None = None,
    errors: Errors | None = None,
    signal: float = 0.0,
) -> Row:
    """Returns a row with measurements, or with a note only."""
    metrics, energies = dict.fromkeys(("sqnr_db", "mse", "max_error", "power"), math.nan), None
    if errors is not None:
        energies = errors.energies(signal, entry.size)
        metrics = total_of([energies])._asdict() | {"max_error": errors.max_error}
    nbytes = entry.nbytes if nbytes is None else nbytes
    return Row(
        tensor=entry.name,
        shape="x".join(map(str, entry.shape)) or "scalar",
        dtype=entry.dtype,
        recipe=recipe,
        **metrics,
        elements=entry.size,
        bytes=nbytes,
        bits=8 * nbytes / entry.size if entry.size else math.nan,
        note=note,
        energies=energies,
    )


def _unfit(numbers: Numbers) -> str:
    """Returns the reason why no recipe applies to a tensor with numbers that are not finite."""
    counts = [(np.isnan(x).sum(), np.isinf(x).sum()) for x in numbers.stream(_COUNTED)]
    nan, infinite = (int(sum(column)) for column in zip(*counts, strict=True))
    return f"not finite: {nan} NaN, {infinite} infinite in float32"


def rows_of(
    file: Inputs,
    entries: Sequence[Entry],
    recipes: Sequence[str],
    least_axes: int,
    axis: int = -1,
) -> Iterator[list[Row]]:
    """Yields, for each tensor in turn, a list with one row per recipe."""
    for entry in entries:
        if len(entry.shape) < least_axes:
            note = f"fewer than {least_axes} axes"
            yield [_row(entry, recipe, note) for recipe in recipes]
            continue
        if not entry.size:  # NumPy cannot represent every empty shape.
            yield [_row(entry, recipe, "empty") for recipe in recipes]
            continue
        yield measure(Tensor.of(entry, file.numbers(entry)), recipes, axis)


@dataclasses.dataclass(frozen=True)
class Total:
    """The total over all tensors for one recipe.

    Tensors that the recipe does not apply to are not quantized and keep their size in the file.

    Attributes:
      recipe: the recipe's name.
      tensors: the number of tensors that the recipe applies to.
      kept: the number of tensors that it does not apply to.
      sqnr_db: the SQNR of all elements that the recipe applies to.
      bits: the stored bits per element of these tensors.
      bytes: the stored size of all tensors.
      ratio: the size of all tensors in the file divided by `bytes`.
      worst: the name of the tensor with the lowest SQNR; empty if there is none.
      worst_db: the SQNR of that tensor.
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
    """Returns one total per recipe.

    Args:
      rows: the rows of all tensors, from `rows_of`.
      recipes: the recipes in the order of the result.
      before: the size of the compared tensors in the file, in bytes.
    """
    result = []
    for recipe in recipes:
        recipe_rows = [row for row in rows if row.recipe == recipe]
        done = [row for row in recipe_rows if not row.note]
        elements = sum(row.elements for row in done)
        energies = [row.energies for row in done if row.energies is not None]
        after = sum(row.bytes for row in recipe_rows)
        worst = min(done, key=lambda row: row.sqnr_db, default=None)
        result.append(
            Total(
                recipe=recipe,
                tensors=len(done),
                kept=len(recipe_rows) - len(done),
                sqnr_db=total_of(energies).sqnr_db if done else math.nan,
                bits=8 * sum(row.bytes for row in done) / elements if elements else math.nan,
                bytes=after,
                ratio=before / after if after else math.nan,
                worst=worst.tensor if worst else "",
                worst_db=worst.sqnr_db if worst else math.nan,
            )
        )
    return result
