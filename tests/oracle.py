"""A slow rounding oracle that chooses between the two enclosing values of the enumerated grid.

The oracle shares no code with jaxq: it reads the stored fields of a format (widths, bias, special
values) and nothing that jaxq derives from them. It computes in float64, which represents the values
of the formats used here, their midpoints and every float32 number exactly.
"""

import math

import chex
import numpy as np

import jaxq


def magnitudes(fmt: jaxq.FloatFormat) -> tuple[list[float], float]:
    """Returns the finite magnitudes in code order, and the value that the next code would have."""
    codes = 2 ** (fmt.exponent_bits + fmt.mantissa_bits)
    if fmt.nan == "ieee":
        codes -= 2**fmt.mantissa_bits
    else:
        codes -= (fmt.nan == "all_ones") + fmt.inf
    bias = fmt.bias
    assert bias is not None

    def value(code: int) -> float:
        exponent, mantissa = code >> fmt.mantissa_bits, code % 2**fmt.mantissa_bits
        fraction = mantissa / 2**fmt.mantissa_bits
        if exponent == 0 and fmt.zero:
            return 2.0 ** (1 - bias) * fraction if fmt.subnormals else 0.0
        return 2.0 ** (exponent - bias) * (1 + fraction)

    return [value(code) for code in range(codes)], value(codes)


def cast(
    x: np.ndarray, fmt: jaxq.FloatFormat, mode: str = "nearest_even", overflow: str | None = None
) -> np.ndarray:
    """Casts numbers to a format, in float64.

    Formats with zero=False or parity='significand' are not supported.
    """
    grid, next_value = magnitudes(fmt)
    # In a format without subnormals several codes are 0, which must be one grid point.
    distinct = [0] + [i for i in range(1, len(grid)) if grid[i] > grid[i - 1]]
    points = np.array([grid[i] for i in distinct] + [next_value])
    parity = np.array([i % 2 for i in distinct] + [len(grid) % 2])
    largest = grid[-1]
    result = np.empty(x.shape, np.float64)
    for where, number in np.ndenumerate(np.asarray(x, np.float64)):
        result[where] = _cast_one(float(number), fmt, points, parity, largest, mode, overflow)
    return result


def _cast_one(x, fmt, points, parity, largest, mode, overflow):
    if math.isnan(x):
        return math.nan if fmt.nan else (0.0 if not fmt.signed else -math.copysign(0.0, x))
    negative = math.copysign(1, x) < 0
    a = abs(x)
    inside = {"toward_zero": True, "up": negative, "down": not negative}.get(mode, False)
    if a >= points[-1]:
        y = points[-1]
    else:
        i = int(np.searchsorted(points, a, side="right")) - 1
        low, high = points[i], points[i + 1]
        if a == low:
            y = low
        elif mode == "nearest_even":
            middle = (low + high) / 2
            y = low if a < middle or (a == middle and parity[i] == 0) else high
        elif mode == "nearest_away":
            y = low if a < (low + high) / 2 else high
        elif mode == "to_odd":
            y = low if parity[i] == 1 else high
        else:
            y = low if inside else high
    if y > largest:
        # Under to_odd a finite number becomes infinite if the code of infinity is the odd one.
        stays = not fmt.inf or parity[-1] == 0 if mode == "to_odd" else inside
        if overflow in ("propagate", "SatPropagate"):
            stays = True
        special = math.nan if fmt.nan and overflow in (None, "propagate") else largest
        special = math.inf if fmt.inf else special
        saturated = overflow in ("saturate", "SatFinite") or (stays and math.isfinite(x))
        y = largest if saturated else special
    if negative and not fmt.signed:
        if y == 0 or not fmt.nan:
            return 0.0
        if overflow == "SatNone" and inside:
            return math.nan if math.isinf(x) else 0.0
        if overflow == "propagate":
            return math.nan if math.isinf(x) else 0.0
        return math.nan if overflow in (None, "SatNone") else 0.0
    if y == 0 and fmt.nan == "negative_zero":
        return 0.0
    return -y if negative else y


def nearest_level(x: np.ndarray, levels: list[float], ties: str) -> np.ndarray:
    """Returns the nearest level of a codebook; a tie gives the lower ("down") or the upper one."""
    ordered = sorted(set(levels))
    x = np.nan_to_num(np.asarray(x, np.float64), nan=0.0)[..., None]
    # Infinite distances, and numbers too small to change a distance in float64, would tie.
    x = np.clip(np.where((x != 0) & (np.abs(x) < 1e-12), np.copysign(1e-12, x), x), -1e6, 1e6)
    distance = np.abs(x - np.array(ordered))
    if ties == "down":
        return np.array(ordered)[np.argmin(distance, -1)]
    return np.array(ordered)[len(ordered) - 1 - np.argmin(distance[..., ::-1], -1)]


def same(a, b) -> np.ndarray:
    """Returns where two float arrays have equal bits; all NaNs count as equal."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        nan = np.isnan(a.astype(np.float64)) & np.isnan(b.astype(np.float64))
    return (a.view(unsigned) == b.view(unsigned)) | nan


def assert_same(a, b, x=None) -> None:
    """Asserts that two float arrays have equal bits, and shows the first differences."""
    wrong = np.flatnonzero(~same(a, b))
    shown = [
        (None if x is None else np.ravel(x)[i], np.ravel(a)[i], np.ravel(b)[i]) for i in wrong[:4]
    ]
    assert len(wrong) == 0, f"{len(wrong)} differ; (input, first, second): {shown}"


def assert_same_trees(*trees) -> None:
    """Asserts that pytrees have the same structure and, in each leaf, the same shape and bits."""
    chex.assert_trees_all_equal_comparator(_same_leaf, _difference, *trees)


def _same_leaf(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and bool(same(a, b).all())


def _difference(a, b) -> str:
    a, b = np.asarray(a), np.asarray(b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype}{a.shape} and {b.dtype}{b.shape}"
    at = tuple(np.argwhere(~same(a, b))[0])
    return f"first at {tuple(map(int, at))}: {a[at]} and {b[at]}"
