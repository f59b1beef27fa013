"""Inputs that find mistakes in a rounding."""

import functools
import math

import ml_dtypes
import numpy as np

import jaxq


def structures() -> list[str]:
    """One preset of each structure: those that differ in widths or block sizes compile alike."""
    found: dict[tuple, str] = {}
    for name, recipe in jaxq.presets.ALL.items():
        kind = (type(recipe.element), type(recipe.granularity), recipe.zero_point, recipe.range)
        kind += (recipe.scale, recipe.held, type(recipe.second_level), recipe.stored_scale)
        found.setdefault((*kind, len(recipe.search)), name)
    return list(found.values())


def all_float16() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(np.float16)


def all_bfloat16() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def random_float32(count: int = 200_000, seed: int = 0) -> np.ndarray:
    """Float32 bit patterns, all equally likely: every binade, subnormals, NaN."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return bits.view(np.float32)


def specials() -> np.ndarray:
    """Zeros, infinities, NaN of both signs, the ends of float32's ranges."""
    f32 = np.finfo(np.float32)
    positive = [0.0, np.inf, np.nan, 1e-45, 1e-40, 1.1754942e-38, f32.tiny, f32.max, 1.0]
    positive += [2.0**-127, 1.5 * 2.0**-127, 1.5 * 2.0**127]
    a = np.array(positive, np.float32)
    return np.concatenate([a, -a])


@functools.cache
def critical(fmt: jaxq.FloatFormat) -> np.ndarray:
    """Every value of the grid and every midpoint, each with its two float32 neighbours."""
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
    """Values at both ends of each binade, for formats too large to use whole."""
    exponents = range(max(fmt.emin, -126), fmt.emax + 1)
    edges = [math.ldexp(1 + k * fmt.eps, e) for e in exponents for k in (0, 1, 2)]
    low = [fmt.tiny * k for k in range(4)]
    return np.array([*low, *edges, fmt.max])
