"""`jaxq plot`: the pictures of `jaxq.analysis.plots`."""

import argparse
import inspect
import io
import pathlib
from typing import Any

import numpy as np

from jaxq.analysis import plots
from jaxq.cli.files import opened
from jaxq.cli.output import UsageError, atomic, bad_input, print_table

__all__ = ["image", "run"]

_OPTIONS = ("formats", "recipes", "models", "devices", "context", "batch", "title")
_ONE = {"fmt": "formats", "recipe": "recipes", "steps": "recipes"}


def run(args: argparse.Namespace) -> None:
    """Draws a picture, or lists them."""
    if args.name is None:
        lines = [{"name": name, "shows": plots.about(name)} for name in plots.ALL]
        return print_table(lines, left=["shows"])
    if args.name not in plots.ALL:
        raise UsageError(f"no picture is named {args.name!r}; there are {', '.join(plots.ALL)}")
    if args.output is None:
        raise UsageError("say where the picture goes: -o FILE.png or -o FILE.svg")
    kind = pathlib.Path(args.output).suffix[1:].lower()
    if kind not in ("png", "svg", "pdf"):
        raise UsageError(f"the file of a picture must end in .png, .svg or .pdf, got {args.output}")
    draw = plots.ALL[args.name]
    wanted = _arguments(args, list(inspect.signature(draw).parameters))
    with atomic(args.output, "wb") as file:
        with bad_input():
            figure = draw(**wanted)
        file.write(image(figure, kind))
    return None


def _arguments(args: argparse.Namespace, takes: list[str]) -> dict[str, Any]:
    """The options that were given, as the picture takes them."""
    wanted = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    for single, option in _ONE.items():
        if option in wanted and single in takes:
            value = wanted.pop(option)
            if single != "steps" and len(value) != 1:
                raise UsageError(f"plot {args.name} takes one of --{option}, got {len(value)}")
            wanted[single] = value if single == "steps" else value[0]
    for name in wanted:
        if name not in takes:
            raise UsageError(f"plot {args.name} has no --{name}; it takes {', '.join(takes)}")
    if "x" in takes:
        wanted["x"] = _numbers(args)
    elif args.file is not None:
        raise UsageError(f"plot {args.name} draws no numbers: leave --file out")
    return wanted


def _numbers(args: argparse.Namespace) -> np.ndarray:
    """A tensor of a file, or normal numbers."""
    if args.file is None:
        return np.random.default_rng(args.seed).standard_normal((256, 256)).astype(np.float32)
    with opened(args.file) as file:
        floating = [e for e in file.entries if e.numpy_dtype is not None]
        if args.tensor is None and len(floating) != 1:
            raise UsageError(f"say which of {len(floating)} tensors: --tensor NAME")
        for entry in floating:
            if args.tensor in (None, entry.name):
                return file.read(entry)
    raise UsageError(f"{args.file} has no floating tensor {args.tensor!r}")


def image(figure: Any, kind: str) -> bytes:
    """A matplotlib figure as bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()
