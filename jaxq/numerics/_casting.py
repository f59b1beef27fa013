"""The functions `cast` and `encode`, which round values to a format's grid or to its codes."""

import functools
from collections.abc import Callable
from typing import get_args

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import array
from jaxq._base.bits import FloatLayout, where
from jaxq._jax import draws
from jaxq._jax.meshes import as_first, automatic
from jaxq.formats import CodebookFormat, FloatFormat, Format, TaperedFormat, get_format
from jaxq.gradients import Gradient, Snap, attach, get_gradient, passed, wants_neighbors
from jaxq.numerics import _codebooks
from jaxq.numerics._binary import snap
from jaxq.numerics._codecs import (
    code_dtype,
    codes_of,
    level_codes,
    nearest_codes,
    rounds_to_codes,
)
from jaxq.numerics._grids import BinaryGrid
from jaxq.numerics._rounding import (
    ROUNDINGS,
    Overflow,
    Rounding,
    Stochastic,
    down,
    get_rounding,
    nearest_even,
    up,
)
from jaxq.numerics._tapered import encode_tapered, snap_tapered

__all__ = ["as_dtype", "cast", "converted", "enclosing", "encode", "floats", "widen"]

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_REMEDY = "Pass an array of floats."


def cast(
    x: jax.typing.ArrayLike,
    fmt: "str | Format | np.dtype | type | BinaryGrid",
    *,
    rounding: str | Rounding = "nearest_even",
    overflow: Overflow = None,
    gradient: str | Gradient = "straight_through",
    key: jax.typing.ArrayLike | None = None,
    random_bits: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Rounds values to a number format and returns them in their own dtype.

    The result equals a conversion to the format and back, and is computed on bits: eager, jitted,
    vmapped and sharded calls agree bit for bit, including float32 subnormals.

    Args:
      x: float16, bfloat16, float32 or (with x64 enabled) float64 values of any shape. The
        arithmetic is exact for each dtype; float64 is rounded once, not through float32.
      fmt: a format, or its name or dtype, in any form that `jaxq.get_format` accepts; or a
        `BinaryGrid` whose widths may be traced (then x must be float16, bfloat16 or float32).
      rounding: a mode in `jaxq.numerics.ROUNDINGS`, `jaxq.Stochastic(bits, rule)`, or a function
        with the signature of `jaxq.numerics.Rounding`.
      overflow: the treatment of magnitudes that round beyond the largest value. None, as in
        ml_dtypes: infinity if the format has one, else NaN if it has one, else the largest value.
        `"saturate"`: the largest value, also for infinities. `"propagate"`: the largest value for
        finite inputs; infinities as for None. `"SatFinite"`, `"SatPropagate"` and `"SatNone"`: as
        defined by P3109. These differ for formats without infinity, where they give the largest
        value instead of NaN, and below the range of an unsigned format. Integers and codebooks
        always saturate, and so do finite values in tapered formats. With a rounding mode directed
        inward, finite inputs stay at the largest value (IEEE 754, section 7.4); with `"to_odd"`
        they do so unless the code of the infinity is odd.
      gradient: an estimator in `jaxq.gradients.ESTIMATORS`, or a function as described in
        `jaxq.gradients`.
      key: a `jax.random` key, only for rounding modes that draw random bits.
      random_bits: random bits to use instead of a key: unsigned integers with the shape of x.

    Returns:
      Values of the format, in the dtype and shape of x. A value that this dtype cannot represent
      (such as the maximum of int16 in bfloat16) is rounded to it, half to even.

      NaN stays NaN if the format has one: it keeps its sign if the format has NaNs of both signs,
      and has the sign bit set if its code is the code of -0. Otherwise NaN becomes 0 in integer
      formats, the result for 0 in codebooks, and a zero of the opposite sign in float formats
      without NaN, as in ml_dtypes. In unsigned formats, a negative number becomes NaN if the format
      has one, and the lowest value if it has none or with `"saturate"`.

    Raises:
      TypeError: if x does not have a floating dtype, or `key` is not a random key.
      ValueError: if a name is unknown, a required key is missing, or an unused key is given.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> x = jnp.array([0.3, 1.06, 464.0, 500.0])
      >>> jaxq.cast(x, "float8_e4m3fn")
      Array([3.125e-01, 1.000e+00, 4.480e+02,       nan], dtype=float32)
      >>> jax.grad(lambda x: jaxq.cast(x, "int4").sum())(x)
      Array([1., 1., 1., 1.], dtype=float32)

    References:
      OCP 8-bit Floating Point Specification 1.0; IEEE 754-2019; IEEE SA P3109, interim report
      4.0 (June 2026), sections 4.7.4 and 4.7.5.
    """
    target = fmt if isinstance(fmt, BinaryGrid) else get_format(fmt)
    x = floats("cast", x)
    if isinstance(target, BinaryGrid) and x.dtype == jnp.float64:
        raise TypeError(
            "cast: `x` must be float16, bfloat16 or float32 if `fmt` is a BinaryGrid, got float64. "
            "Convert it first: x.astype(jnp.float32)."
        )
    mode, overflow = _modes("cast", rounding, overflow)
    random = _random("cast", x, mode, key, random_bits)
    traced, static = None, target
    low, high = target.min, target.max
    if isinstance(target, BinaryGrid) and not target.static:
        traced, static = target, None
    constant, estimator = lax.stop_gradient(x), get_gradient(gradient)
    y = _cast(constant, random, traced, static, mode, overflow)
    wide = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    with np.errstate(over="ignore"):
        low, high = (lax.convert_element_type(end, wide) for end in (low, high))
    snap = Snap(x.astype(wide), widen(y), low, high)
    if wants_neighbors(estimator):
        snap = Snap(*snap[:4], *_neighbors(constant, traced, static))
    return attach(estimator, snap, None, y)


def encode(
    x: jax.typing.ArrayLike,
    fmt: "str | Format | np.dtype | type",
    *,
    rounding: str | Rounding = "nearest_even",
    overflow: Overflow = None,
    key: jax.typing.ArrayLike | None = None,
    random_bits: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Returns the codes of the values that `cast` returns.

    Args:
      x: as in `cast`.
      fmt: as in `cast`, except that a `BinaryGrid` is not accepted.
      rounding: as in `cast`.
      overflow: as in `cast`.
      key: as in `cast`.
      random_bits: as in `cast`.

    Returns:
      Codes with the shape of x: uint8 for formats of at most 8 bits, else uint16 (uint32 for tf32
      and float32). They are those of ml_dtypes if it has the type. NaN becomes the quiet NaN
      without payload and keeps its sign if the format has NaNs of both signs. Integers are in two's
      complement in their own width.

    Raises:
      TypeError: as in `cast`.
      ValueError: as in `cast`.

    Example:
      >>> import jax.numpy as jnp
      >>> encode(jnp.array([1.0, -448.0, jnp.inf]), "float8_e4m3fn")
      Array([ 56, 254, 127], dtype=uint8)
    """
    fmt = get_format(fmt)
    x = floats("encode", x)
    mode, overflow = _modes("encode", rounding, overflow)
    random = _random("encode", x, mode, key, random_bits)
    return _encode(lax.stop_gradient(x), random, fmt, mode, overflow)


@functools.partial(jax.jit, static_argnames=("fmt", "rounding", "overflow"))
@automatic(as_first)
def _cast(
    x: jax.Array,
    random: jax.Array | None,
    grid: BinaryGrid | None,
    fmt: Format | BinaryGrid | None,
    rounding: Rounding,
    overflow: Overflow,
) -> jax.Array:
    wide = widen(x)
    if isinstance(fmt, CodebookFormat):
        levels = [FloatLayout.of(wide.dtype).float_type(v) for v in fmt.values]
        y = _codebooks.choose(wide, fmt, rounding, random, levels)
        return as_dtype(y, x.dtype)
    if isinstance(fmt, TaperedFormat):
        return as_dtype(snap_tapered(wide, fmt, rounding, overflow, random), x.dtype)
    if fmt is not None:
        grid = fmt if isinstance(fmt, BinaryGrid) else BinaryGrid.of(fmt)
    assert grid is not None
    y = snap(wide, grid, rounding, overflow, random)
    # Values of a grid that is coarser than x's dtype fit in that dtype, except perhaps its ends.
    exact = grid.static and all(_holds(x.dtype, end) for end in (grid.max, grid.lowest))
    return as_dtype(y, x.dtype, exact=exact and grid.emin >= -126)


@functools.partial(jax.jit, static_argnames=("fmt", "rounding", "overflow"))
@automatic(as_first)
def _encode(
    x: jax.Array, random: jax.Array | None, fmt: Format, rounding: Rounding, overflow: Overflow
) -> jax.Array:
    wide = widen(x)
    if isinstance(fmt, CodebookFormat):
        codes = _codebooks.choose(wide, fmt, rounding, random, level_codes(fmt))
        return codes.astype(code_dtype(fmt))
    if isinstance(fmt, TaperedFormat):
        return encode_tapered(wide, fmt, rounding, overflow, random).astype(code_dtype(fmt))
    if (
        rounding is nearest_even
        and overflow in (None, "saturate")
        and rounds_to_codes(fmt, FloatLayout.of(wide.dtype))
    ):
        return nearest_codes(wide, fmt, overflow)
    y = snap(wide, BinaryGrid.of(fmt), rounding, overflow, random)
    return codes_of(y, fmt, wide, overflow).astype(code_dtype(fmt))


@functools.partial(jax.jit, static_argnames="fmt")
@automatic(as_first)
def _neighbors(
    x: jax.Array, grid: BinaryGrid | None, fmt: Format | BinaryGrid | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the two representable values that enclose each element, as `widen` converts it."""
    target, wide = grid if fmt is None else fmt, widen(x)
    assert target is not None
    with np.errstate(over="ignore"):
        low, high = (lax.convert_element_type(end, wide.dtype) for end in (target.min, target.max))
    return enclosing(wide, low, high, lambda a, mode: _cast(a, None, grid, fmt, mode, "saturate"))


def enclosing(
    x: jax.Array, low: jax.Array, high: jax.Array, snap: Callable[[jax.Array, Rounding], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the grid neighbors (below, above) of each element, with below <= x < above.

    Elements outside the range of the grid get its two outermost values.

    Args:
      x: float32 or float64 values.
      low: the lowest value of the grid.
      high: the largest value of the grid.
      snap: a function that rounds an array to the grid with a given rounding mode.
    """
    inside = jnp.clip(x, low, high)
    inside = where(inside < high, inside, -_next_up(-inside))
    return snap(inside, down), snap(_next_up(inside), up)


def _next_up(x: jax.Array) -> jax.Array:
    """Returns the next larger float, computed on bits so that subnormals are not flushed."""
    layout = FloatLayout.of(x.dtype)
    bits, minus_zero = layout.bits(x), layout.sign
    bits = where(bits == minus_zero, layout.int_type(0), bits)
    return layout.floats(where(bits < 0, bits - layout.int_type(1), bits + layout.int_type(1)))


def widen(x: jax.Array) -> jax.Array:
    """Converts float16 and bfloat16 arrays exactly to float32; returns other arrays unchanged."""
    if x.dtype == jnp.bfloat16:
        # Done on bits, because a conversion may flush bfloat16 subnormals.
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << np.uint32(16), jnp.float32)
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def as_dtype(
    y: jax.Array, dtype: np.dtype, *, exact: bool = False, overflow: Overflow = None
) -> jax.Array:
    """Rounds float32 to another floating dtype, half to even, on every backend.

    XLA may remove a conversion to bfloat16 and back (it allows itself excess precision on GPU), so
    the values are rounded on bits first and the conversion is exact.

    Args:
      y: a float32 array, or an array that already has the dtype `dtype`.
      dtype: float16, bfloat16, float32 or float64.
      exact: True if the caller guarantees that `dtype` represents every value exactly.
      overflow: as in `cast`.
    """
    if y.dtype == dtype:
        return y
    if not exact and dtype in (jnp.float16, jnp.bfloat16):
        target = get_format(dtype)
        assert isinstance(target, FloatFormat)
        y = snap(y, BinaryGrid.of(target), nearest_even, overflow)
    if dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(y, jnp.uint32) >> np.uint32(16)
        return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return y.astype(dtype)


def converted(y: jax.Array, dtype: np.dtype, *, overflow: Overflow = None) -> jax.Array:
    """Returns the result of `as_dtype` with a derivative, which operations on bits do not have."""
    if y.dtype == dtype:
        return y
    return passed(as_dtype(lax.stop_gradient(y), dtype, overflow=overflow), y)


def _holds(dtype: np.dtype, value: float) -> bool:
    """Returns whether a dtype represents a value exactly."""
    with np.errstate(over="ignore"):
        return float(np.float64(value).astype(dtype)) == value


def floats(
    name: str, x: jax.typing.ArrayLike, *, argument: str = "x", float64: bool = True
) -> jax.Array:
    """Returns the argument as an array, after checking that it has a supported floating dtype.

    Args:
      name: the name of the caller in errors.
      x: the argument.
      argument: the name of the argument in errors.
      float64: True if the caller also supports float64. Without 64-bit mode, JAX converts Python
        floats and float64 arrays of NumPy to float32, which every caller supports.

    Raises:
      TypeError: if the argument is no array of a supported dtype.
    """
    supported = _FLOATS if float64 else _FLOATS[:-1]
    requirement = f"{', '.join(supported[:-1])} or {supported[-1]}"
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        x = array(name, argument, x, requirement, _REMEDY)
        dtype = x.dtype
    if str(dtype) in _FLOATS:
        x = array(name, argument, x, requirement, _REMEDY)
        if x.dtype != jnp.float64 or float64:
            return x
    raise TypeError(
        f"{name}: `{argument}` must be {requirement}, got {dtype}. Convert it first: "
        f"{argument}.astype(jnp.float32)."
    )


def _modes(name: str, rounding: str | Rounding, overflow: Overflow) -> tuple[Rounding, Overflow]:
    """Returns the rounding function and the overflow mode, with "SatFinite" as "saturate"."""
    known = get_args(get_args(Overflow)[0])
    if overflow is not None and not (isinstance(overflow, str) and overflow in known):
        raise ValueError(
            f"{name}: `overflow` must be None, 'saturate', 'propagate', or P3109's 'SatFinite', "
            f"'SatPropagate' or 'SatNone', got {overflow!r}."
        )
    return get_rounding(rounding), "saturate" if overflow == "SatFinite" else overflow


def _random(
    name: str,
    x: jax.Array,
    mode: Rounding,
    key: jax.typing.ArrayLike | None,
    random_bits: jax.typing.ArrayLike | None,
) -> jax.Array | None:
    """Returns the random bits for a rounding mode, drawn from the key or checked."""
    key, given = draws.checked_key(name, key), key is not None or random_bits is not None
    if not isinstance(mode, Stochastic):
        known = [label for label, function in ROUNDINGS.items() if function == mode]
        if given and known:
            raise ValueError(
                f"{name}: rounding {known[0]!r} draws no random bits, got a key or random bits. "
                "Leave them out, or use rounding='stochastic'."
            )
        if not given:
            return None
    if (key is None) == (random_bits is None):
        raise ValueError(
            f"{name}: stochastic rounding needs either `key` (jax.random.key(seed)) or "
            f"`random_bits`, got {'both' if given else 'neither'}."
        )
    dtype = mode.random_dtype if isinstance(mode, Stochastic) else jnp.dtype(jnp.uint32)
    if key is not None:
        return draws.bits(key, x.shape, dtype)
    requirement = f"unsigned integers of shape {x.shape}"
    bits = array(name, "random_bits", random_bits, requirement, "Or pass `key`.")
    if not jnp.issubdtype(bits.dtype, jnp.unsignedinteger) or bits.shape != x.shape:
        raise ValueError(
            f"{name}: `random_bits` must be unsigned integers of shape {x.shape}, got "
            f"{bits.dtype} of shape {bits.shape}. Draw them with "
            f"jax.random.bits(key, x.shape, '{dtype}')."
        )
    if bits.dtype.itemsize < dtype.itemsize:
        raise ValueError(
            f"{name}: `random_bits` must have at least {8 * dtype.itemsize} bits per element, got "
            f"{bits.dtype}. Draw them with jax.random.bits(key, x.shape, '{dtype}')."
        )
    return bits
