"""The command `jaxq compare`: the error and size of a checkpoint's tensors under recipes."""

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

from jaxq.analysis import plots
from jaxq.cli._compare_page import Report, html, sorted_by_sqnr
from jaxq.cli._inputs import Inputs, opened
from jaxq.cli._measure import DEFAULT, Row, Selection, Total, kind_of, rows_of, totals
from jaxq.cli._output import (
    UsageError,
    atomic,
    bad_input,
    number,
    one_line,
    print_csv,
    print_json,
    print_table,
    safe,
)
from jaxq.cli._progress import progress
from jaxq.interop import gguf
from jaxq.recipes import RECIPES

__all__ = ["convention", "run"]


def run(args: argparse.Namespace) -> None:
    """Compares the tensors of files, and prints or writes the requested output."""
    recipes = list(dict.fromkeys(args.recipes or DEFAULT))
    for recipe in recipes:
        with bad_input():
            kind_of(recipe)
    if args.worst is not None and args.worst < 1:
        raise UsageError(f"--worst must be at least 1, got {args.worst}; use 10")
    with opened(args.files) as file, contextlib.ExitStack() as stack:
        selection = Selection.of(file, args.include, args.exclude)
        if not selection.chosen:
            raise UsageError(
                f"{file.title}: no floating-point tensor is left to compare: "
                f"{selection.reasons()}; change --include or --exclude, or choose other files"
            )
        # Opened first, so that an unwritable path fails before the work.
        page = stack.enter_context(atomic(args.html)) if args.html else None
        rows: list[Row] = []
        work = sum(entry.size for entry in selection.chosen)
        with progress("comparing", work) as advance:
            for tensor_rows in rows_of(file, selection.chosen, recipes, args.min_axes, args.axis):
                rows += tensor_rows
                advance(tensor_rows[0].elements, tensor_rows[0].tensor)
        before = sum(entry.nbytes for entry in selection.chosen)
        sums = totals(rows, recipes, before)
        if page is not None:
            pictures, missing = _pictures(file, rows, args.axis)
            report = Report(
                name=file.title,
                rows=rows,
                sums=sums,
                skipped=selection.skipped,
                convention=convention(args.axis),
                pictures=pictures,
                missing=missing,
            )
            page.write(html(report))
            if missing:
                print(f"jaxq: {args.html}: {missing}", file=sys.stderr)
    records = [row.record() for row in rows]
    if args.json:
        print_json(
            {
                "axis": args.axis,
                "tensors": records,
                "totals": list(map(dataclasses.asdict, sums)),
                "left": selection.skipped,
            }
        )
    elif args.csv:
        print_csv(records)
    else:
        print(convention(args.axis), end="\n\n")
        _print(rows, sums, selection.skipped, args.worst)


def convention(axis: int) -> str:
    """Returns a sentence that states the axis along which recipes are applied."""
    layout = {
        -1: ", as in weights [outputs, inputs]; use --axis -2 for kernels [inputs, outputs] (Flax)",
        -2: ", as in kernels [inputs, outputs]",
    }
    return f"Products contract axis {axis}{layout.get(axis, '')}."


def _print(
    rows: Sequence[Row], sums: Sequence[Total], skipped: dict[str, list[str]], worst: int | None
) -> None:
    """Prints the tensors (or the worst of each recipe), the totals, and the skipped tensors."""
    if worst is None:
        table: dict[str, dict[str, Any]] = {}
        for row in rows:
            line = table.setdefault(row.tensor, {"tensor": row.tensor, "shape": row.shape})
            line[row.recipe] = "-" if row.note else f"{row.sqnr_db:.2f}"
        done = {row.tensor for row in rows if not row.note}
        print_table([line for name, line in table.items() if name in done], "SQNR in dB")
    else:
        chosen = []
        for total in sums:
            recipe_rows = [row for row in rows if row.recipe == total.recipe and not row.note]
            chosen += sorted(recipe_rows, key=lambda row: row.sqnr_db)[:worst]
        lines = [
            {
                "recipe": row.recipe,
                "tensor": row.tensor,
                "shape": row.shape,
                "SQNR dB": f"{row.sqnr_db:.2f}",
                "max error": f"{row.max_error:.3g}",
                "bits": f"{row.bits:.4g}",
            }
            for row in chosen
        ]
        print_table(lines, f"The {worst} worst of each recipe", left=["tensor"])
    print()
    shown = [
        {
            "recipe": t.recipe,
            "tensors": t.tensors,
            "kept": t.kept,
            "SQNR dB": _fixed(t.sqnr_db),
            "bits": number(t.bits, 4),
            "bytes": t.bytes,
            "smaller by": _fixed(t.ratio),
            "worst dB": _fixed(t.worst_db),
            "worst tensor": t.worst,
        }
        for t in sums
    ]
    print_table(
        shown, "All tensors; those that a recipe does not apply to are kept", ["worst tensor"]
    )
    reasons: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row.note:
            reasons.setdefault(row.note, []).append((row.recipe, row.tensor))
    for note, cases in reasons.items():
        recipes, tensors = (list(dict.fromkeys(c[i] for c in cases)) for i in (0, 1))
        by = "all recipes" if len(recipes) == len(sums) else ", ".join(recipes)
        print(f"kept by {by}: {_abbreviated(tensors)}: {note}")
    for reason, names in skipped.items():
        print(f"not compared: {_abbreviated(names)}: {reason}")


def _fixed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _abbreviated(names: Sequence[str]) -> str:
    """Returns the first names of a list and the number of all others, as text."""
    few = ", ".join(safe(name) for name in names[:2])
    return few if len(names) <= 2 else f"{few} and {len(names) - 2} more"


_PICTURES = 4  # The number of tensors that have a picture in the report.


def _pictures(file: Inputs, rows: Sequence[Row], axis: int) -> tuple[list[tuple[str, bytes]], str]:
    """Returns captions and SVG images of the worst tensors, and the reason if there are none."""
    drawn = [row for row in rows if not row.note and math.isfinite(row.sqnr_db)]
    if not drawn:
        return [], "no picture: no tensor has an error that is finite and not 0"
    pictures = []
    for name in list(dict.fromkeys(row.tensor for row in sorted_by_sqnr(drawn)))[:_PICTURES]:
        entry = next(e for e in file.entries if e.name == name)
        recipes = [row.recipe for row in drawn if row.tensor == name]
        recipes = [recipe for recipe in recipes if recipe in RECIPES or recipe not in gguf.TYPES]
        if not recipes:
            return [], "no picture: block types of GGUF that are no recipes have none"
        try:
            figure = plots.PLOTS["compression"](file.read(entry), recipes, axis=axis)
        except ImportError as error:
            return [], f"no picture: {one_line(error)}"
        pictures.append((f"Bits and SQNR of {safe(name)}", plots.image(figure, "svg")))
    return pictures, ""
