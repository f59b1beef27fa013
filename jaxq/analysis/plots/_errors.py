"""Plots of sources of error: outliers with their remedies, and chains of conversions."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxq.analysis._chains import chain_table
from jaxq.analysis._metrics import compare
from jaxq.analysis.plots._look import BLUE, GRAY, ORANGE, array, as_list, frame, new, picture
from jaxq.formats import Format, get_format
from jaxq.products import Hadamard
from jaxq.quantizers import fake_quant
from jaxq.recipes import Outliers, PerBlock, Percentile, PerChannel, Recipe, Symmetric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chain_errors", "outliers"]


class _Remedy(NamedTuple):
    """A way to quantize: its name, its bits per element, and the dequantized tensor."""

    name: str
    bits: float
    result: np.ndarray


@picture
def outliers(
    x: jax.typing.ArrayLike,
    fmt: str | Format = "int4",
    *,
    count: int | None = None,
    magnitude: float = 30.0,
    seed: int = 0,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws the error that outliers cause in all other numbers, and the error after each remedy.

    Some numbers of x are replaced by outliers of either sign. Bars show the root mean squared error
    of all other numbers, in units of the standard deviation of x; diamonds show the error of all
    numbers, including the outliers. The remedies are finer scales (channels, blocks), outliers
    stored separately in float16, a range that clips them (the percentile, the least squared error),
    and the Hadamard transform, which spreads them.

    Args:
      x: a finite float16, bfloat16 or float32 tensor `[…, n]`, with n a multiple of 32.
      fmt: the element format or its name, as in `jaxq.get_format`. Default: `"int4"`.
      count: the number of outliers. Default: None, one in a thousand.
      magnitude: the magnitude of the outliers, in standard deviations of x. Default: 30.
      seed: the seed of the outliers' positions, sizes and signs. Default: 0.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure with two axes: the numbers and the errors.

    Raises:
      TypeError: if x has another dtype.
      ValueError: if x is constant or not finite, if the length of its last axis is not a multiple
        of 32, or if `count` is below 1 or above a quarter of the numbers.

    Example:
      >>> import numpy as np
      >>> figure = outliers(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32))
      >>> [label.get_text() for label in figure.axes[1].get_yticklabels()][1:4]
      ['with outliers', 'one scale per channel', 'blocks of 32']
    """
    from matplotlib.patches import Patch

    data, element = array("outliers", x, ndim=1), get_format(fmt)
    changed, outlier_indices = _with_outliers(data, count, magnitude, seed)
    is_ordinary = np.ones(data.size, bool)
    is_ordinary[outlier_indices] = False
    unit = float(np.std(data))
    remedies = _remedies(data, changed, element, len(outlier_indices))
    ordinary_rmse, total_rmse = [], []
    for i, remedy in enumerate(remedies):
        source = data if i == 0 else changed  # The first remedy has no outliers.
        ordinary, total = _rmse(source, remedy.result, is_ordinary)
        ordinary_rmse.append(ordinary / unit)
        total_rmse.append(total / unit)
    figure = new(11.5, 4.6, size, title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    frame(left)
    frame(right, grid="x")
    x_limit = float(np.abs(changed).max()) / unit * 1.05
    bins = np.linspace(-x_limit, x_limit, 121).tolist()
    left.hist(changed.ravel()[is_ordinary] / unit, bins, color=BLUE, alpha=0.6, label="ordinary")
    left.hist(
        changed.ravel()[outlier_indices] / unit, bins, color=ORANGE, hatch="//", label="outliers"
    )
    left.set_yscale("log")
    left.set_xlabel("value, in standard deviations")
    left.set_ylabel("numbers")
    left.legend(loc="upper right")
    rows = np.arange(len(remedies))
    colors = [GRAY, ORANGE] + [BLUE] * (len(remedies) - 2)
    right.barh(rows, ordinary_rmse, color=colors, height=0.62, alpha=0.75)
    right.plot(total_rmse, rows, "D", color="#000000", markersize=4.5, label="error of all numbers")
    bar = Patch(color=BLUE, alpha=0.75, linewidth=0, label="of the ordinary numbers")
    diamond = right.get_lines()[0]
    right.set_yticks(rows, [r.name for r in remedies])
    right.invert_yaxis()
    right.set_xlim(0, 1.06 * max(*ordinary_rmse, *total_rmse))
    right.tick_params(axis="y", length=0)
    right_margin = right.get_yaxis_transform()
    for row, remedy in zip(rows, remedies, strict=True):
        right.text(1.09, row, f"{remedy.bits:.2f}", transform=right_margin, va="center", ha="right")
    right.text(1.09, -0.9, "bits", transform=right_margin, ha="right", va="bottom", color=GRAY)
    right.set_xlabel("root mean squared error, in standard deviations")
    right.legend(handles=[bar, diamond], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _rmse(x: np.ndarray, y: np.ndarray, is_ordinary: np.ndarray) -> tuple[float, float]:
    """Returns the root mean squared errors of the ordinary numbers and of all numbers."""
    ordinary = compare(x.ravel()[is_ordinary], y.ravel()[is_ordinary])
    return float(ordinary.mse) ** 0.5, float(compare(x, y).mse) ** 0.5


def _with_outliers(
    data: np.ndarray, count: int | None, magnitude: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tensor with outliers, and their indices in the flattened tensor."""
    number = max(1, data.size // 1000) if count is None else count
    if not 0 < number <= data.size // 4:
        raise ValueError(
            f"outliers: `count` must be at least 1 and at most a quarter of x's {data.size} "
            f"numbers, got {number}. Pass another count or a larger tensor."
        )
    deviation = np.std(data)
    if deviation == 0:
        raise ValueError(
            f"outliers: `x` must not be constant, got only {data.flat[0]:.3g}, whose standard "
            "deviation is 0. Pass a tensor with varying values."
        )
    generator = np.random.default_rng(seed)
    outlier_indices = generator.choice(data.size, number, replace=False)
    sizes = magnitude * generator.uniform(0.7, 1, number) * generator.choice([-1, 1], number)
    changed = data.copy()
    changed.reshape(-1)[outlier_indices] = (sizes * deviation).astype(np.float32)
    return changed, outlier_indices


def _remedies(data: np.ndarray, changed: np.ndarray, element: Format, count: int) -> list[_Remedy]:
    """Returns all ways to quantize; the first has no outliers and the second no remedy."""
    if data.shape[-1] % 32:
        raise ValueError(
            f"outliers: the length of the last axis of `x` must be a multiple of 32, got the shape "
            f"{data.shape}. Cut off the remainder: x[..., : {data.shape[-1] // 32 * 32}]."
        )
    plain = Recipe(element)
    percentile = Percentile(100 * (1 - 1.2 * count / data.size))  # Excludes all outliers.
    recipes = {
        "with outliers": plain,
        "one scale per channel": dataclasses.replace(plain, granularity=PerChannel((-1,))),
        "blocks of 32": dataclasses.replace(plain, granularity=PerBlock(32)),
        "stored in float16": dataclasses.replace(plain, outliers=Outliers(count / data.size)),
        "clipped, percentile": dataclasses.replace(plain, scaling=Symmetric(percentile)),
        "clipped, least MSE": dataclasses.replace(plain, scaling=Symmetric("mse")),
    }
    remedies = [
        _Remedy("without outliers", plain.bits_per_weight(data.shape), _quantized(data, plain))
    ]
    remedies += [
        _Remedy(name, recipe.bits_per_weight(data.shape), _quantized(changed, recipe))
        for name, recipe in recipes.items()
    ]
    rotated = _quantized(_rotated(changed, back=False), plain)
    rotated = _rotated(rotated, back=True)
    remedies.append(_Remedy("Hadamard, 32", plain.bits_per_weight(data.shape), rotated))
    return remedies


def _quantized(x: np.ndarray, recipe: Recipe) -> np.ndarray:
    return np.asarray(fake_quant(x, recipe))


def _rotated(x: np.ndarray, *, back: bool) -> np.ndarray:
    """Applies the Hadamard transform with random signs to blocks of 32, or its inverse."""
    transform, last = Hadamard(32), x.ndim - 1
    signs = transform.draw(jax.random.key(0))
    if not back:
        return np.asarray(transform.apply(jnp.asarray(x), {last: 32}, signs))
    y = np.asarray(transform.apply(jnp.asarray(x), {last: 32}, jnp.ones(32)))
    return y * np.tile(np.asarray(signs), x.shape[-1] // 32)


@picture
def chain_errors(
    x: jax.typing.ArrayLike,
    steps: Sequence[str | Format | Recipe] = (
        "float16",
        "float8_e4m3fn",
        "int8_tensor",
        "float32",
    ),
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws the error along a chain of conversions: the total after each step and the part it adds.

    Args:
      x: a finite float16, bfloat16 or float32 tensor.
      steps: the conversions, as in `jaxq.analysis.chain`.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      TypeError: if x has another dtype.
      ValueError: if a step is unknown, there are no steps, or x is not finite.

    Example:
      >>> import numpy as np
      >>> figure = chain_errors(np.float32([0.3, 2.0]), ["float16", "int8_tensor"])
      >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
      ['float16', 'int8_tensor']
    """
    data = array("chain_errors", x)
    rows = chain_table(data, as_list("chain_errors", "steps", steps)).rows
    power = float(compare(data, data).power)
    positions = np.arange(len(rows))
    total, added = (
        np.sqrt(np.array([getattr(r, name) for r in rows]) / (power or 1))
        for name in ("mse", "added_mse")
    )
    figure = new(max(6.5, 1.5 * len(rows) + 2.5), 4.6, size, title)
    axes = frame(figure.add_subplot(), grid="y")
    positive = [v for v in (*total, *added) if 0 < v < np.inf]
    floor = min(positive, default=1e-6) / 4
    # Zeros are drawn at the bottom of the axis; values that are not finite are not drawn.
    line, bars = (np.where(np.isfinite(v), np.maximum(v, floor), np.nan) for v in (total, added))
    axes.bar(
        positions,
        np.nan_to_num(bars, nan=floor),
        0.5,
        color=BLUE,
        alpha=0.55,
        label="added by the step",
    )
    axes.plot(positions, line, "D-", color=ORANGE, label="since the beginning")
    axes.set_yscale("log")
    axes.set_ylim(floor, max(positive, default=1.0) * 6)
    for position, row, value in zip(positions, rows, total, strict=True):
        text = "exact" if row.mse == 0 else f"{row.sqnr_db:.1f} dB"
        shown, offset = max(value, floor), (-5, 5)
        if not np.isfinite(value):
            text, shown, offset = "not finite", floor, (20, 5)
        note = {"textcoords": "offset points", "ha": "right", "fontsize": 8.5, "color": ORANGE}
        axes.annotate(text, (position, shown), offset, **note)
        if row.added_mse == 0 and row.mse:
            axes.annotate(
                "adds nothing",
                (position, floor),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=BLUE,
            )
    axes.set_xticks(positions, [r.step for r in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylabel("relative root mean squared error")
    axes.set_xlabel("conversions, in order (above the points: SQNR)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure
