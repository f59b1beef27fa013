"""`cast` and `encode`: values to a format's grid, in the value's own dtype or as codes."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq import codebooks, draws
from jaxq.attaching import Snap, attach, wants_neighbours
from jaxq.binary import snap
from jaxq.bits import Layout, where
from jaxq.catalog import get_format
from jaxq.codecs import code_dtype, codes_of, level_codes
from jaxq.formats import CodebookFormat, FloatFormat, Format, TaperedFormat
from jaxq.gradients import Gradient, get_gradient
from jaxq.grids import BinaryGrid
from jaxq.meshes import as_first, automatic
from jaxq.rounding import ALL as ROUNDINGS
from jaxq.rounding import Overflow, Rounding, Stochastic, down, get_rounding, nearest_even, up
from jaxq.tapered import encode_tapered, snap_tapered

__all__ = ["as_dtype", "cast", "enclosing", "encode", "floats", "widen"]

_FLOATS = ("float16", "bfloat16", "float32", "float64")


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
    """Snaps values to the grid of a number format.

    The result is what a conversion to the format and back would give, computed on bits: eager,
    jitted, vmapped and sharded calls agree to the last one, float32 subnormals included.

    Args:
      x: float16, bfloat16, float32 or (with x64 on) float64, any shape. The arithmetic is exact in
        each; float64 rounds once, not through float32.
      fmt: a format, its name or dtype as `jaxq.get_format` takes them; or a `BinaryGrid` whose
        widths may be traced (then x is float16, bfloat16 or float32).
      rounding: a mode in `jaxq.rounding.ALL`, `jaxq.Stochastic(bits, rule)`, or a function as
        `jaxq.rounding` describes.
      overflow: what a magnitude that rounds beyond the largest value becomes. None, as ml_dtypes
        does it: infinity if the format has one, else NaN if it has that, else the largest value.
        `"saturate"`: the largest value, for infinities too. `"propagate"`: the largest value for
        finite input; infinities as with None. Integers and codebooks always saturate. A rounding
        mode directed inward leaves finite input at the largest value (IEEE 754, section 7.4).
      gradient: an estimator in `jaxq.gradients.ALL` or a function as `jaxq.gradients` describes.
      key: a key of `jax.random`, for a mode that draws random bits, and only then.
      random_bits: the random bits themselves instead of a key: unsigned integers of x's shape.

    Returns:
      Values of the format in x's dtype and shape. Where that dtype does not hold a value of the
      format (int16's maximum in bfloat16, say) the value is rounded to it, half to even.

      NaN stays NaN where the format has one. Else an integer format makes it 0, a codebook what 0
      becomes, and a float format without NaN a zero of the other sign, as ml_dtypes does. In an
      unsigned format with a NaN a negative number is NaN, and without one, or with `"saturate"`,
      the lowest value.

    Raises:
      TypeError: x is not of a floating dtype.
      ValueError: an unknown name; a key missing, or given where none is used.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> x = jnp.array([0.3, 1.06, 464.0, 500.0])
      >>> jaxq.cast(x, "float8_e4m3fn")
      Array([3.125e-01, 1.000e+00, 4.480e+02,       nan], dtype=float32)
      >>> jax.grad(lambda x: jaxq.cast(x, "int4").sum())(x)
      Array([1., 1., 1., 1.], dtype=float32)

    References:
      OCP 8-bit Floating Point Specification 1.0; IEEE 754-2019; IEEE SA P3109, interim report 3.
    """
    kind = fmt if isinstance(fmt, BinaryGrid) else get_format(fmt)
    x = floats("cast", x)
    if isinstance(kind, BinaryGrid) and x.dtype == jnp.float64:
        raise TypeError("cast: a BinaryGrid takes float16, bfloat16 or float32, got float64.")
    mode = _mode("cast", rounding, overflow)
    random = _random("cast", x, mode, key, random_bits)
    traced, static = None, kind
    low, high = kind.min, kind.max
    if isinstance(kind, BinaryGrid) and not kind.static:
        traced, static = kind, None
    held, estimator = lax.stop_gradient(x), get_gradient(gradient)
    y = _cast(held, random, traced, static, mode, overflow)
    with np.errstate(over="ignore"):
        low, high = (lax.convert_element_type(end, x.dtype) for end in (low, high))
    snap = Snap(x, y, low, high)
    if wants_neighbours(estimator):
        snap = Snap(*snap[:4], *_neighbours(held, traced, static))
    return attach(estimator, snap)


def encode(
    x: jax.typing.ArrayLike,
    fmt: "str | Format | np.dtype | type",
    *,
    rounding: str | Rounding = "nearest_even",
    overflow: Overflow = None,
    key: jax.typing.ArrayLike | None = None,
    random_bits: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The codes of the values that `cast` would give.

    Args:
      x: as in `cast`.
      fmt: as in `cast`, but no `BinaryGrid`.
      rounding: as in `cast`.
      overflow: as in `cast`.
      key: as in `cast`.
      random_bits: as in `cast`.

    Returns:
      Codes in x's shape: uint8 for formats of at most 8 bits, else uint16 (uint32 for tf32 and
      float32). The same as ml_dtypes' where it has the type; a NaN gets the quiet NaN without
      payload, its sign kept where the format has NaNs of both signs. Integers are two's complement
      in their own width.

    Raises:
      TypeError: x is not of a floating dtype.
      ValueError: as in `cast`.

    Example:
      >>> import jax.numpy as jnp
      >>> encode(jnp.array([1.0, -448.0, jnp.inf]), "float8_e4m3fn")
      Array([ 56, 254, 127], dtype=uint8)
    """
    fmt = get_format(fmt)
    x = floats("encode", x)
    mode = _mode("encode", rounding, overflow)
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
        levels = [Layout.of(wide.dtype).float_type(v) for v in fmt.values]
        y = codebooks.choose(wide, fmt, rounding, random, levels)
        return as_dtype(y, x.dtype)
    if isinstance(fmt, TaperedFormat):
        return as_dtype(snap_tapered(wide, fmt, rounding, overflow, random), x.dtype)
    if fmt is not None:
        grid = fmt if isinstance(fmt, BinaryGrid) else BinaryGrid.of(fmt)
    assert grid is not None
    y = snap(wide, grid, rounding, overflow, random)
    # A coarser grid needs no more bits than x has, save at its ends.
    exact = grid.static and all(_holds(x.dtype, end) for end in (grid.max, grid.lowest))
    return as_dtype(y, x.dtype, exact=exact and grid.emin >= -126)


@functools.partial(jax.jit, static_argnames=("fmt", "rounding", "overflow"))
@automatic(as_first)
def _encode(
    x: jax.Array, random: jax.Array | None, fmt: Format, rounding: Rounding, overflow: Overflow
) -> jax.Array:
    wide = widen(x)
    if isinstance(fmt, CodebookFormat):
        codes = codebooks.choose(wide, fmt, rounding, random, level_codes(fmt))
        return codes.astype(code_dtype(fmt))
    if isinstance(fmt, TaperedFormat):
        return encode_tapered(wide, fmt, rounding, overflow, random).astype(code_dtype(fmt))
    y = snap(wide, BinaryGrid.of(fmt), rounding, overflow, random)
    return codes_of(y, fmt).astype(code_dtype(fmt))


@functools.partial(jax.jit, static_argnames="fmt")
@automatic(as_first)
def _neighbours(
    x: jax.Array, grid: BinaryGrid | None, fmt: Format | BinaryGrid | None
) -> tuple[jax.Array, jax.Array]:
    """The two values of a format between which each number lies."""
    kind, wide = grid if fmt is None else fmt, widen(x)
    assert kind is not None
    with np.errstate(over="ignore"):
        low, high = (lax.convert_element_type(end, wide.dtype) for end in (kind.min, kind.max))
    pair = enclosing(wide, low, high, lambda a, mode: _cast(a, None, grid, fmt, mode, "saturate"))
    return as_dtype(pair[0], x.dtype), as_dtype(pair[1], x.dtype)


def enclosing(
    x: jax.Array, low: jax.Array, high: jax.Array, snap: Callable[[jax.Array, Rounding], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Neighbours (below, above) on a grid, below <= x < above; beyond the ends the last two.

    Args:
      x: float32 or float64.
      low: the grid's lowest value.
      high: its largest.
      snap: rounds to the grid by a mode.
    """
    inside = jnp.clip(x, low, high)
    inside = where(inside < high, inside, -_next_up(-inside))
    return snap(inside, down), snap(_next_up(inside), up)


def _next_up(x: jax.Array) -> jax.Array:
    """The next larger float, by its bits: a subnormal is one too."""
    layout = Layout.of(x.dtype)
    bits, minus_zero = layout.bits(x), layout.sign
    bits = where(bits == minus_zero, layout.int_type(0), bits)
    return layout.floats(where(bits < 0, bits - layout.int_type(1), bits + layout.int_type(1)))


def widen(x: jax.Array) -> jax.Array:
    """A float16 or bfloat16 array as float32, exactly; others as they are."""
    if x.dtype == jnp.bfloat16:
        # By bits: a conversion may flush bfloat16's subnormals.
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << np.uint32(16), jnp.float32)
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def as_dtype(y: jax.Array, dtype: np.dtype, *, exact: bool = False) -> jax.Array:
    """Rounds float32 to another floating dtype, half to even, on every backend.

    XLA may drop a conversion to bfloat16 that is followed by one back (it allows itself excess
    precision on GPU), so the rounding is done on bits and the conversion has none left to do.

    Args:
      y: float32, or any array that is of `dtype` already.
      dtype: float16, bfloat16, float32 or float64.
      exact: promises that every value is one of `dtype`.
    """
    if y.dtype == dtype:
        return y
    if not exact and dtype in (jnp.float16, jnp.bfloat16):
        target = get_format(dtype)
        assert isinstance(target, FloatFormat)
        y = snap(y, BinaryGrid.of(target), nearest_even)
    if dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(y, jnp.uint32) >> np.uint32(16)
        return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return y.astype(dtype)


def _holds(dtype: np.dtype, value: float) -> bool:
    """Whether a dtype has a value exactly."""
    with np.errstate(over="ignore"):
        return float(np.float64(value).astype(dtype)) == value


def floats(name: str, x: jax.typing.ArrayLike) -> jax.Array:
    """The argument as an array of a floating dtype that the kernels take."""
    dtype = getattr(x, "dtype", None) or np.asarray(x).dtype
    if str(dtype) not in _FLOATS:
        raise TypeError(
            f"{name}: `x` must be of dtype {', '.join(_FLOATS)}, got {dtype}. "
            "Convert it first, e.g. x.astype(jnp.float32)."
        )
    return jnp.asarray(x)


def _mode(name: str, rounding: str | Rounding, overflow: Overflow) -> Rounding:
    if overflow not in (None, "saturate", "propagate"):
        raise ValueError(
            f"{name}: `overflow` must be None, 'saturate' or 'propagate', got {overflow!r}."
        )
    return get_rounding(rounding)


def _random(
    name: str,
    x: jax.Array,
    mode: Rounding,
    key: jax.typing.ArrayLike | None,
    random_bits: jax.typing.ArrayLike | None,
) -> jax.Array | None:
    """The random bits that a mode will use, drawn or checked."""
    given = key is not None or random_bits is not None
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
        return draws.bits(jnp.asarray(key), x.shape, dtype)
    bits = jnp.asarray(random_bits)
    if not jnp.issubdtype(bits.dtype, jnp.unsignedinteger) or bits.shape != x.shape:
        raise ValueError(
            f"{name}: `random_bits` must be unsigned integers of shape {x.shape}, got "
            f"{bits.dtype} of shape {bits.shape}."
        )
    if bits.dtype.itemsize < dtype.itemsize:
        raise ValueError(
            f"{name}: `random_bits` must be at least as wide as {dtype}, got {bits.dtype}."
        )
    return bits
