"""The commands `jaxq memory` and `jaxq fits`: tables of models' memory use."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxq.analysis import fits_table, memory_table
from jaxq.cli._output import UsageError, bad_input, print_json, print_table

__all__ = ["fits", "memory"]


def _options(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Returns the options that were given; the others use the library's defaults."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


_SHARED = ("recipes", "context", "batch", "kv", "embeddings", "overhead")


def memory(args: argparse.Namespace) -> None:
    """Prints the memory of models under several recipes."""
    models = [*args.models, *(args.params or [])]
    if not models:
        raise UsageError("memory: name a model, or pass --params NUMBER")
    with bad_input():
        tables = [memory_table(model, **_options(args, _SHARED)) for model in models]
    _print(args, [row for table in tables for row in table.rows])


def fits(args: argparse.Namespace) -> None:
    """Prints the fit of models on accelerators."""
    models = [*args.models, *(args.params or [])]
    options = _options(args, (*_SHARED, "devices"))
    with bad_input():
        table = fits_table(models, **options) if models else fits_table(**options)
    _print(args, table.rows)


def _print(args: argparse.Namespace, rows: Sequence[Any]) -> None:
    records = [dataclasses.asdict(row) for row in rows]
    if args.json:
        print_json(records)
    else:
        print_table(records, left=["recipe", "device"])
