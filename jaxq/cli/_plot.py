"""The command `jaxq plot`: the plots of `jaxq.analysis.plots`."""

import argparse
import inspect
import pathlib
from typing import Any

import numpy as np

from jaxq._base.registry import suggestion
from jaxq.analysis import plots
from jaxq.cli._inputs import opened
from jaxq.cli._measure import Selection
from jaxq.cli._output import UsageError, atomic, bad_input, print_table

__all__ = ["run"]

_OPTIONS = ("formats", "recipes", "models", "devices", "context", "batch", "title", "axis")
_ONE = {"fmt": "formats", "recipe": "recipes", "steps": "recipes"}


def run(args: argparse.Namespace) -> None:
    """Draws a plot, or lists all plots."""
    if args.name is None:
        lines = [{"name": name, "shows": plots.about(name)} for name in plots.PLOTS]
        return print_table(lines, left=["shows"])
    if args.name not in plots.PLOTS:
        raise UsageError(f"no plot is named {args.name!r}. {suggestion(args.name, plots.PLOTS)}")
    if args.output is None:
        raise UsageError("plot needs an output file: -o FILE.png or -o FILE.svg")
    kind = pathlib.Path(args.output).suffix[1:].lower()
    if kind not in ("png", "svg", "pdf"):
        raise UsageError(f"the output file must end in .png, .svg or .pdf, got {args.output}")
    draw = plots.PLOTS[args.name]
    arguments = _arguments(args, list(inspect.signature(draw).parameters))
    with atomic(args.output, "wb") as file:
        with bad_input():
            figure = draw(**arguments)
        file.write(plots.image(figure, kind))
    return None


def _arguments(args: argparse.Namespace, takes: list[str]) -> dict[str, Any]:
    """Returns the given options as keyword arguments of the plot function."""
    arguments = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    for single, option in _ONE.items():
        if option in arguments and single in takes:
            value = arguments.pop(option)
            if single != "steps" and len(value) != 1:
                raise UsageError(f"plot {args.name} takes one name in --{option}, got {len(value)}")
            arguments[single] = value if single == "steps" else value[0]
    for name in arguments:
        if name not in takes:
            raise UsageError(f"plot {args.name} has no --{name}; it takes {', '.join(takes)}")
    if "x" in takes:
        arguments["x"] = _numbers(args)
    elif args.file is not None:
        raise UsageError(f"plot {args.name} does not draw a tensor: leave --file out")
    return arguments


def _numbers(args: argparse.Namespace) -> np.ndarray:
    """Returns a tensor from a file, or random normal numbers."""
    if args.file is None:
        return np.random.default_rng(args.seed).standard_normal((256, 256)).astype(np.float32)
    with opened([args.file]) as file:
        floating = [e for e in file.entries if e.is_float]
        if args.tensor is None and len(floating) != 1:
            if not floating:
                left = Selection.of(file, None, None).reasons()
                raise UsageError(f"{args.file}: no floating-point tensor to draw: {left}")
            raise UsageError(
                f"{args.file} has {len(floating)} floating-point tensors: choose one by --tensor"
            )
        for entry in floating:
            if args.tensor in (None, entry.name):
                return file.read(entry)
        dtype = next((e.dtype for e in file.entries if e.name == args.tensor), None)
    why = "" if dtype is None else f": its dtype is {dtype}"
    raise UsageError(f"{args.file} has no floating-point tensor {args.tensor!r}{why}")
