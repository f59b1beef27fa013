"""Inputs for rounding tests, and choices of formats and recipes that cover all features."""

import functools
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq.recipes import RECIPES


def cover(features: Mapping[Any, set], initial: Iterable = ()) -> list:
    """Returns `initial` and few other entries that together have every feature, chosen greedily."""
    chosen = list(initial)
    missing = set().union(*features.values()).difference(*(features[entry] for entry in chosen))
    while missing:
        chosen.append(max(features, key=lambda entry: len(features[entry] & missing)))
        missing -= features[chosen[-1]]
    return chosen


def each(entries: Iterable, fast: Iterable) -> list:
    """Returns test parameters for all entries, marked slow unless the entry is in `fast`."""
    fast = set(fast)
    return [
        pytest.param(entry, marks=() if entry in fast else pytest.mark.slow) for entry in entries
    ]


def slow(*values: Any) -> Any:
    """Returns one set of test parameters that is marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def each_format(formats: Iterable[jaxq.formats.Format]) -> list:
    """Returns test parameters for all formats, marked slow unless chosen by `cover`."""
    formats = list(formats)
    return each(formats, cover({fmt: format_features(fmt) for fmt in formats}))


def format_features(fmt: jaxq.formats.Format) -> set:
    """Returns the features of a format that decide which code runs for it."""
    kind, size = type(fmt), (fmt.bits > 8) + (fmt.bits > 16)
    found: set = {("size", kind, size), ("sign", kind, fmt.min < 0)}
    if isinstance(fmt, jaxq.FloatFormat):
        found |= {(field, getattr(fmt, field)) for field in FLOAT_FEATURES}
        found |= {("powers of two", fmt.mantissa_bits == 0), ("range", fmt.emin < -125, fmt.inf)}
    elif isinstance(fmt, jaxq.IntFormat):
        found |= {("narrow", fmt.narrow), ("fraction", fmt.fraction_bits > 0)}
        found |= {("least", fmt.bits == 1), ("packed", 8 % fmt.bits == 0, fmt.signed)}
    elif isinstance(fmt, jaxq.TaperedFormat):
        found |= {("exponent", fmt.exponent_bits), ("takum", size, fmt.exponent_bits is None)}
    else:
        found |= {("ties", fmt.ties), ("levels", fmt.num_values > 16, fmt.num_values > 2)}
    return found


# The remedy at the end of an error about a file.
REMEDY = re.compile(
    r"\. (?:(?:Add|Check|Convert|Correct|Download|If|Leave|Open|Quantize|Remove|Save|Split|Write)"
    r" [^.]*(?:\.\w[^.]*)*|raw=True \(--raw\) reads the tensors as stored)\.$"
)
FLOAT_FEATURES = ("inf", "nan", "signed", "zero", "subnormals", "parity")


def recipe_features(recipe: jaxq.Recipe) -> set:
    """Returns the kind of each field of a recipe."""
    return {
        ("element", type(recipe.element)),
        ("granularity", type(recipe.granularity)),
        ("scaling", type(recipe.scaling)),
        ("range", recipe.scaling.range),
        ("stored", recipe.scaling.stored),
        ("scale format", recipe.scale_format),
        ("search", len(recipe.scaling.search)),
    }


def has_narrow_scales(recipe: jaxq.Recipe) -> bool:
    """Returns whether scales are narrow copies, which may be 0 or infinite."""
    scaling = recipe.scaling
    return scaling.searches_elements or (not scaling.stored and recipe.scale_format.bits < 32)


@functools.cache
def kinds() -> list[str]:
    """Returns recipes without a search that together have every kind of each field."""
    return cover({name: recipe_features(recipe) for name, recipe in unsearched().items()})


def unsearched() -> dict[str, jaxq.Recipe]:
    """Returns the recipes that do not search over elements, which takes long to compile.

    `test_super_blocks.py` has fast tests of the others.
    """
    return {name: r for name, r in RECIPES.items() if not r.scaling.searches_elements}


@functools.cache
def few() -> list[str]:
    """Returns recipes that together have every kind of element and of scaling without a search."""
    fields = ("element", "scaling")
    return cover(
        {
            name: {feature for feature in recipe_features(recipe) if feature[0] in fields}
            for name, recipe in unsearched().items()
        }
    )


@functools.cache
def structures() -> list[str]:
    """Returns recipes that together have every kind of each field and important pairs of kinds.

    The pairs are every kind of element with every scale format, and every granularity with every
    zero point. Recipes that differ only in widths or block sizes compile to similar programs.
    """
    pairs = {
        name: {
            ("element and scales", type(recipe.element), recipe.scale_format),
            ("granularity and zero point", type(recipe.granularity), recipe.scaling.zero_point),
        }
        for name, recipe in unsearched().items()
    }
    return [*cover(pairs, initial=kinds()), "q4_k", "q6_k"]


@functools.cache
def product_kinds() -> list[str]:
    """Returns product recipes that together have every kind of each field."""
    features: dict[str, set] = {}
    for name, recipe in jaxq.products.PRODUCT_RECIPES.items():
        features[name] = {("residuals", recipe.residuals), ("draws", recipe.draws)}
        for product in ("dlhs", "drhs"):
            features[name].add((product, getattr(recipe, product).hadamard is not None))
        quantizers = (*recipe.operands, *recipe.dlhs.operands, *recipe.drhs.operands)
        for place, quantizer in enumerate(quantizers):
            of_one = {("none",)} if quantizer is None else recipe_features(quantizer)
            features[name] |= {(place, feature) for feature in of_one}
    return cover(features)


def normal(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> jax.Array:
    """Returns normally distributed float32 numbers, without compiling a conversion of dtypes."""
    numbers = scale * np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(numbers.astype(np.float32))


def in_pieces(function: Callable, *arrays: np.ndarray) -> Any:
    """Applies an elementwise function to flat arrays, 4096 elements at a time.

    Without jit each operation compiles once for every shape. This function leaves one shape.
    """
    count = arrays[0].size
    size = -(-count // 4096) * 4096
    pieces = zip(*(np.resize(a, size).reshape(-1, 4096) for a in arrays), strict=True)
    results = [function(*piece) for piece in pieces]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


def all_float16() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(np.float16)


def all_bfloat16() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def random_float32(count: int = 200_000, seed: int = 0) -> np.ndarray:
    """Returns float32 numbers with uniformly random bit patterns, including subnormals and NaN."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return bits.view(np.float32)


def specials() -> np.ndarray:
    """Returns zeros, infinities, NaN and the limits of float32, of both signs."""
    f32 = np.finfo(np.float32)
    positive = [0.0, np.inf, np.nan, 1e-45, 1e-40, 1.1754942e-38, f32.tiny, f32.max, 1.0]
    positive += [2.0**-127, 1.5 * 2.0**-127, 1.5 * 2.0**127]
    a = np.array(positive, np.float32)
    return np.concatenate([a, -a])


@functools.cache
def critical(fmt: jaxq.FloatFormat) -> np.ndarray:
    """Returns all values and midpoints of a format, each with its two float32 neighbors."""
    points = np.abs(fmt.values) if fmt.bits <= 8 else _few_values(fmt)
    points = np.unique(points)
    step = points[-1] - points[-2] if len(points) > 1 else points[-1]
    points = np.concatenate([points, [points[-1] + step, points[-1] * 2]])
    middles = (points[:-1] + points[1:]) / 2
    quarters = (points[:-1] * 3 + points[1:]) / 4
    with np.errstate(over="ignore"):
        exact = np.concatenate([points, middles, quarters]).astype(np.float32)
        up = np.nextafter(exact, np.float32(np.inf))
        down = np.nextafter(exact, np.float32(-np.inf))
    positive = np.concatenate([exact, up, down])
    return np.concatenate([positive, -positive])


def _few_values(fmt: jaxq.FloatFormat) -> np.ndarray:
    """Returns values at both ends of each binade, for formats with too many values."""
    exponents = range(max(fmt.emin, -126), fmt.emax + 1)
    edges = [math.ldexp(1 + k * fmt.eps, e) for e in exponents for k in (0, 1, 2)]
    low = [fmt.min_positive * k for k in range(4)]
    return np.array([*low, *edges, fmt.max])


def run_two(name: str, folder: pathlib.Path) -> list[list[np.ndarray]]:
    """Runs a program of `tests/one_of_two.py` in two processes with two devices each.

    Args:
      name: the name of the program.
      folder: an empty folder for the results.

    Returns:
      The leaves of the results of each process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    root = str(pathlib.Path(__file__).parent.parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.one_of_two", name, str(number), port, str(folder)],
            **{"cwd": root, "env": os.environ | flags, "text": True},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    files = [np.load(folder / f"{number}.npz") for number in range(2)]
    return [[file[leaf] for leaf in file.files] for file in files]
