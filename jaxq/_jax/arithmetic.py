"""Operations that XLA would otherwise change: exact division, and values computed only once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.bits import FloatLayout, where
from jaxq._base.shapes import is_symbolic
from jaxq._jax.barriers import barrier_on_cpu
from jaxq._jax.opaque import by_platform

__all__ = [
    "by_vectors",
    "divide",
    "hidden_broadcast",
    "logarithm",
    "materialize",
    "reciprocal",
    "rounded",
    "square_root",
    "uses_vectors",
]

_FLOAT32 = FloatLayout.of(np.dtype(np.float32))


def materialize(x: jax.Array) -> jax.Array:
    """Returns values, one per block, unchanged and computed only once.

    XLA on CPU recomputes such a value for every element that uses it, unless the last operation is
    one that XLA considers expensive: here a remainder by 2^32 - 1, which is larger than the
    bits of any number.
    """
    bits = lax.rem(lax.bitcast_convert_type(x, jnp.uint32), np.uint32(2**32 - 1))
    return lax.bitcast_convert_type(bits, jnp.float32)


def by_vectors(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Applies an elementwise function to arrays with one value per block, in kernels of its own.

    On a single device the function gets vectors, so that XLA on CPU, which compiles equal kernels
    once, compiles one for all tensors with the same number of blocks. On several devices an axis
    may be sharded, so the arrays keep their shape.

    Barriers keep the changes of shape out of the neighboring kernels. Without them, the kernels of
    the function would differ between tensors, and those that compute its arguments or use its
    results would not be vectorized for blocks on axis 0 (JAX 0.12).

    Args:
      function: a function of arrays of equal shape that returns a tree of arrays of that shape and
        of scalars.
      arrays: its arguments.
    """
    shape = arrays[0].shape
    used = (math.prod(shape),) if uses_vectors(shape) else shape
    results = function(*(_apart(x, used) for x in arrays))
    return jax.tree.map(lambda y: _apart(y, shape) if y.ndim else y, results)


def _apart(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns an array in another shape, with a barrier on each side of the change."""
    x = barrier_on_cpu(x)
    return x if x.shape == shape else barrier_on_cpu(x.reshape(shape))


def uses_vectors(shape: tuple[Any, ...]) -> bool:
    """Returns whether `by_vectors` flattens arrays of a shape."""
    return jax.device_count() == 1 and not any(map(is_symbolic, shape))


def hidden_broadcast(bits: jax.Array, like: jax.Array) -> jax.Array:
    """Returns an int32 scalar, copied to the shape of a float32 array in a way hidden from XLA.

    XLA on CPU computes with a broadcast scalar before the broadcast, in a kernel for each division.
    Computing once for each block instead takes no kernel of its own.
    """
    return bits | _FLOAT32.bits(_zeros(like))


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns correctly rounded float32 quotients on every backend, for nonzero divisors.

    XLA does not guarantee this: it multiplies by the reciprocal if the divisor is a constant or a
    broadcast, and its division on GPU has errors of up to two ulps
    (https://github.com/openxla/xla/issues/37181). Subnormal operands and quotients count as zero.
    Infinities and NaN follow IEEE 754.

    XLA also computes `(a / b) / c` as `a / (b * c)`, so an operation on bits must stand between two
    divisions.
    """
    b = jnp.broadcast_to(b, a.shape)
    return by_platform(_divide_by_array, _divide_in_integers, a, b)


def reciprocal(x: jax.Array, numerator: float = 1.0) -> jax.Array:
    """Returns a positive number divided by each element, correctly rounded on every backend.

    XLA on CPU does not rewrite the division of a constant, so unlike in `divide` the operands are
    not hidden from it. Zeros and subnormal numbers give an infinity of their sign.
    """
    return by_platform(lax.div, _reciprocal_in_integers, jnp.full_like(x, numerator), x)


def square_root(x: jax.Array) -> jax.Array:
    """Returns correctly rounded float32 square roots on every backend.

    XLA does not guarantee this: on GPU, LLVM may approximate a root
    (https://github.com/llvm/llvm-project/issues/131749). Subnormal numbers count as zero. The roots
    of other dtypes are XLA's.
    """
    if x.dtype != jnp.float32:
        return lax.sqrt(x)
    return by_platform(lax.sqrt, _square_root_in_integers, x)


def logarithm(x: jax.Array) -> jax.Array:
    """Returns natural logarithms of positive normal float32 numbers, the same on every backend.

    Errors are below two ulps. The last bits of XLA's logarithm depend on the backend.
    """
    bits = _FLOAT32.bits(x)
    exponent = (bits - _FLOAT32.bits(np.float32(0.5**0.5))) >> np.int32(23)
    y = _FLOAT32.floats(bits - (exponent << np.int32(23)))  # From sqrt(1/2) to sqrt(2).
    ratio = rounded(divide(y - np.float32(1), y + np.float32(1)))
    # log(y) = 2 artanh(ratio), whose series has an error below 2^-28 here.
    square, series = rounded(ratio * ratio), np.float32(0)
    for n in (9, 7, 5, 3):
        series = rounded(series * square) + np.float32(1 / n)
    result = ratio + rounded(rounded(ratio * square) * series)
    return result * np.float32(2) + rounded(exponent.astype(jnp.float32) * np.float32(math.log(2)))


def _divide_by_array(a: jax.Array, b: jax.Array) -> jax.Array:
    """Divides on platforms with correctly rounded division, hiding the broadcast from XLA."""
    return lax.div(a, lax.add(b, _zeros(a)))


def _reciprocal_in_integers(a: jax.Array, b: jax.Array) -> jax.Array:
    """Divides by an array that may hold zeros, on platforms without correctly rounded division."""
    bits = _FLOAT32.bits(b)
    infinity = _FLOAT32.floats(bits & _FLOAT32.sign | _FLOAT32.inf)
    is_zero = (bits & _FLOAT32.magnitude_mask) < _FLOAT32.shifted(1)
    return where(is_zero, infinity, _divide_in_integers(a, b))


def _zeros(like: jax.Array) -> jax.Array:
    """Returns zeros that XLA takes for different numbers."""
    # Only bits of numbers below 2 are used, because infinity times 0 is NaN.
    small = lax.bitwise_and(_FLOAT32.bits(like), _FLOAT32.field(1) - np.int32(1))
    return lax.mul(_FLOAT32.floats(small), np.float32(0))


def _divide_in_integers(a: jax.Array, b: jax.Array, quotient: Callable = lax.div) -> jax.Array:
    """Divides with correct rounding, given a quotient of significands within 3 ulps."""
    layout = FloatLayout.of(np.dtype(np.float32))
    low, one = np.int32(2**23 - 1), layout.field(0)
    a_bits, b_bits = (layout.bits(v) & layout.magnitude_mask for v in (a, b))
    a_significand, b_significand = (bits & low | np.int32(2**23) for bits in (a_bits, b_bits))
    below = (a_significand < b_significand).astype(jnp.int32)
    approximate = quotient(layout.floats(a_bits & low | one), layout.floats(b_bits & low | one))
    # The 24-bit quotient, too low by 0 to 6, and its remainder. The two products may overflow, but
    # their difference is exact.
    scaled = approximate * (1 + below).astype(jnp.float32) * np.float32(2**23)
    integer = scaled.astype(jnp.int32) - 3
    remainder = (a_significand << (23 + below)) - integer * b_significand
    for step in (4, 2, 1):
        more = (remainder >= b_significand * step).astype(jnp.int32) * step
        integer, remainder = integer + more, remainder - b_significand * more
    # A quotient is never half way between two integers.
    integer = integer + (2 * remainder > b_significand).astype(jnp.int32)
    exponent = (a_bits >> 23) - (b_bits >> 23) - below + (integer >> 24) + layout.bias
    magnitude = (exponent << 23) + (integer & low)
    infinite = (exponent > 2 * layout.bias) | (a_bits == layout.inf)
    magnitude = where(infinite, layout.inf, magnitude)
    zero = (exponent < 1) | (a_bits <= low) | (b_bits == layout.inf)
    magnitude = where(zero & (a_bits < layout.inf), np.int32(0), magnitude)
    number = (a_bits <= layout.inf) & (b_bits <= layout.inf)
    number = number & (lax.min(a_bits, b_bits) < layout.inf)  # inf / inf is NaN.
    magnitude = where(number, magnitude, layout.nan)
    return layout.floats(magnitude | ((layout.bits(a) ^ layout.bits(b)) & layout.sign))


def _square_root_in_integers(x: jax.Array, root: Callable = lax.sqrt) -> jax.Array:
    """Returns correctly rounded roots, given roots of numbers from 1 to 4 within 3 ulps."""
    layout = FloatLayout.of(np.dtype(np.float32))
    bits, low = layout.bits(x), np.int32(2**23 - 1)
    magnitude = bits & layout.magnitude_mask
    exponent = (magnitude >> 23) - np.int32(layout.bias)
    odd = exponent & np.int32(1)
    approximate = root(layout.floats(magnitude & low | layout.field(0) + (odd << 23)))
    # The 24-bit root, too low by 0 to 6, and its remainder. The two products may overflow, but
    # their difference is exact.
    integer = (approximate * np.float32(2**23)).astype(jnp.int32)
    integer = lax.min(integer, np.int32(2**24 - 1)) - 3  # From 2 on, an ulp is two of these units.
    significand = magnitude & low | np.int32(2**23)
    remainder = (significand << (23 + odd)) - integer * integer
    for step in (4, 2, 1):
        square = (2 * integer + step) * step  # The difference of two squares.
        more = (remainder >= square).astype(jnp.int32)
        integer, remainder = integer + more * step, remainder - more * square
    # A root is never half way between two integers.
    integer = integer + (remainder > integer).astype(jnp.int32)
    result = integer + ((((exponent - odd) >> 1) + np.int32(layout.bias - 1)) << 23)
    result = where(magnitude == layout.inf, layout.inf, result)
    result = where((bits < 0) | (magnitude > layout.inf), layout.nan, result)
    return layout.floats(where(magnitude < layout.shifted(1), bits & layout.sign, result))


def rounded(x: jax.Array) -> jax.Array:
    """Returns float32 products unchanged, rounded before anything is added to them.

    LLVM may fuse a product and a sum into one rounding (seen with XLA on CPU, JAX 0.10 to 0.12).
    A minimum of the bits, which changes only one NaN, separates the two. Remove it when
    `test_bytes_equal_libgguf` passes without it.
    """
    bits = lax.min(lax.bitcast_convert_type(x, jnp.uint32), np.uint32(2**32 - 2))
    return lax.bitcast_convert_type(bits, jnp.float32)
