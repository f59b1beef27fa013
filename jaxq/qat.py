"""Differentiable functions for quantization-aware training that change the quantized values.

Gradient rules do not change the values and are arguments of a recipe: see `jaxq.gradients`. This
module has pure functions that JAX differentiates: transforms of weights (DoReFa), values between
two neighbors on the grid (soft rounding, noise, AdaRound), a fractional number of bits, and the
initial value of a learned scale (LSQ).

`jaxq.neighbors(x, recipe)` returns the two neighbors, for every format and granularity.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer
from jaxq._jax.draws import checked_key
from jaxq.formats import IntFormat
from jaxq.numerics import cast, floats, widen
from jaxq.recipes import AbsMean, Recipe, get_recipe

__all__ = [
    "adaround",
    "adaround_init",
    "adaround_penalty",
    "dorefa",
    "fractional_bits",
    "lsq_scale",
    "rectified_sigmoid",
    "rectified_sigmoid_inverse",
    "soft_round",
    "uniform_noise",
    "unit_tanh",
]

# AdaRound stretches a sigmoid to [_GAMMA, _ZETA], and then clips it to [0, 1].
_ZETA, _GAMMA = 1.1, -0.1


def lsq_scale(x: jax.typing.ArrayLike, recipe: "str | Recipe") -> jax.Array:
    """Returns the initial scales of LSQ, 2 mean|x| / sqrt(Qp) of each block.

    Args:
      x: the tensor: weights, or a first batch of activations.
      recipe: the recipe. Qp is the largest value of its format.

    Returns:
      Float32 scales, one per block, for `jaxq.fake_quant(x, recipe, scale=...)`. A block of zeros
      has scale 0, which is not learned.

    Raises:
      TypeError: if x does not have a floating dtype.
      ValueError: as in `jaxq.fake_quant`.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp, numpy as np
      >>> w = jnp.array([[0.5, -1.0], [0.25, 0.0]])
      >>> recipe = jaxq.Recipe("int2", jaxq.PerChannel((0,)), gradient="lsq")
      >>> scale = lsq_scale(w, recipe)
      >>> scale.tolist()
      [[1.5], [0.25]]
      >>> jax.grad(lambda s: jaxq.fake_quant(w, recipe, scale=s).sum())(scale).shape
      (2, 1)

    References:
      Esser et al., "Learned Step Size Quantization" (2020), section 2.1.
    """
    recipe, x = get_recipe(recipe), floats("lsq_scale", x)
    return _lsq_scale(x, recipe)


@functools.partial(jax.jit, static_argnames="recipe")
def _lsq_scale(x: jax.Array, recipe: Recipe) -> jax.Array:
    cut = recipe.cut(x.shape)
    mean = AbsMean().measure(cut.split(x.astype(jnp.float32)), cut, two_sided=False).magnitude
    return (mean * np.float32(2 / math.sqrt(recipe.element.scaled_max))).reshape(cut.counts)


def unit_tanh(w: jax.Array) -> jax.Array:
    """Returns DoReFa's transform of weights, tanh(w) / max|tanh(w)|, within [-1, 1].

    Any recipe can quantize the result. The gradient includes that of the maximum.

    Args:
      w: the weights, of a floating dtype and any shape.

    Returns:
      An array like w; zeros if all weights are zero.

    Example:
      >>> import jaxq, jax.numpy as jnp, numpy as np
      >>> t = unit_tanh(jnp.array([0.1, -2.0, 0.7]))
      >>> print(np.array(jaxq.fake_quant(t, "int4_tensor", scale=1 / 7)).round(3))
      [ 0.143 -1.     0.571]

    References:
      Zhou et al., "DoReFa-Net" (2016), section 2.3.
    """
    w = floats("unit_tanh", w, argument="w")
    bounded = jnp.tanh(widen(w))  # XLA on CPU divides by float16 subnormals as if they were 0.
    largest = jnp.max(jnp.abs(bounded), initial=0)
    return (bounded / jnp.where(largest == 0, 1, largest)).astype(w.dtype)


def dorefa(w: jax.Array, bits: int) -> jax.Array:
    """Returns DoReFa's weights, 2 q(t / 2 + 1/2) - 1, with t = `unit_tanh(w)`.

    q rounds to multiples of 1 / (2^bits - 1) with a straight-through gradient. There are 2^bits
    levels, which include -1 and 1 but not 0.

    Args:
      w: the weights, float16, bfloat16 or float32, of any shape.
      bits: the number of bits, 2 to 16.

    Returns:
      An array like w.

    Raises:
      ValueError: if `bits` is out of range.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> print(np.array(dorefa(jnp.array([0.1, -2.0, 0.7]), 2)).round(3))
      [ 0.333 -1.     0.333]

    References:
      Zhou et al., "DoReFa-Net" (2016), equations 9 and 10.
    """
    bits = integer("dorefa", "bits", bits, "Use 'binary' for 1 bit.", least=2, most=16)
    w = floats("dorefa", w, argument="w")
    steps = 2**bits - 1
    units = (unit_tanh(w).astype(jnp.float32) * 0.5 + 0.5) * steps
    return (cast(units, IntFormat("dorefa", bits, signed=False)) * (2 / steps) - 1).astype(w.dtype)


def soft_round(
    x: jax.Array, below: jax.Array, above: jax.Array, *, alpha: jax.typing.ArrayLike = 0.2
) -> jax.Array:
    """Rounds softly, by a staircase of tanh that approaches true rounding as alpha goes to 0.

    In the interval of width w around its center c, with t = (x - c) / w,

        y = c + w/2 tanh(k t) / tanh(k/2),   k = ln(2 / alpha - 1)

    Beyond the grid, y is the end of the grid. Its derivative is the estimator `jaxq.gradients.DSQ`.

    Args:
      x: the values to round, of a floating dtype and any shape.
      below: the grid value below each element, from `jaxq.neighbors`.
      above: the grid value above each element.
      alpha: the softness in (0, 1), a number or a traced scalar, so that it can be learned or
        annealed.

    Returns:
      An array like x.

    Example:
      >>> import jaxq, jax.numpy as jnp, numpy as np
      >>> x = jnp.array([0.4, 0.5, 0.6, 9.0])
      >>> print(np.array(soft_round(x, *jaxq.neighbors(x, "int4_tensor", scale=1.0))).round(3))
      [0.365 0.5   0.635 7.   ]

    References:
      Gong et al., "Differentiable Soft Quantization" (2019), section 3.1; Agustsson and Theis,
      "Universally Quantized Neural Compression" (2020), section 4.
    """
    x, below, above = _triple("soft_round", "x", x, below, above)
    a, low, high = (v.astype(jnp.float32) for v in (x, below, above))
    width = high - low
    is_positive, inside = width > 0, (low <= a) & (a <= high)
    t = (jnp.where(inside, a, low) - low) / _nonzero(width) - 0.5
    k = jnp.log(2 / jnp.asarray(alpha, jnp.float32) - 1)
    y = low + width * (0.5 + 0.5 * jnp.tanh(k * t) / jnp.tanh(k / 2))
    y = jnp.where(inside, y, jnp.clip(lax.stop_gradient(a), low, high))
    return jnp.where(is_positive, y, a).astype(x.dtype)


def uniform_noise(x: jax.Array, below: jax.Array, above: jax.Array, key: jax.Array) -> jax.Array:
    """Adds uniform noise instead of rounding: x + (above - below) (U - 1/2), U in [0, 1).

    On an evenly spaced grid the noise has the mean and the variance of a rounding error. The
    derivative is exactly the identity.

    Args:
      x: as in `soft_round`.
      below: as in `soft_round`.
      above: as in `soft_round`.
      key: a `jax.random` key.

    Returns:
      An array like x. Values beyond the grid are not clipped.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp
      >>> x = jnp.zeros(1000)
      >>> y = uniform_noise(x, *jaxq.neighbors(x, "int4_tensor", scale=0.5), jax.random.key(0))
      >>> bool(jnp.abs(y).max() <= 0.25)
      True

    References:
      Balle et al., "End-to-end Optimized Image Compression" (2017), section 3; Baskin et al.,
      "UNIQ" (2018).
    """
    x, below, above = _triple("uniform_noise", "x", x, below, above)
    share = jax.random.uniform(checked_key("uniform_noise", key), x.shape, jnp.float32) - 0.5
    noise = (above - below).astype(jnp.float32) * share
    return (x.astype(jnp.float32) + lax.stop_gradient(noise)).astype(x.dtype)


def rectified_sigmoid(v: jax.Array) -> jax.Array:
    """Returns AdaRound's rectified sigmoid, clip(1.2 sigmoid(v) - 0.1, 0, 1).

    Args:
      v: the learned variables, of any shape.

    Returns:
      The fraction of the interval by which each element is rounded up, from 0 to 1.

    Example:
      >>> import jax.numpy as jnp
      >>> rectified_sigmoid(jnp.array([-9.0, 0.0, 9.0])).tolist()
      [0.0, 0.5, 1.0]

    References:
      Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020),
      equation 23.
    """
    v = floats("rectified_sigmoid", v, argument="v")
    return jnp.clip(jax.nn.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA, 0, 1)


def rectified_sigmoid_inverse(h: jax.Array) -> jax.Array:
    """Returns the v for which `rectified_sigmoid(v)` equals h, clipped to [0, 1].

    Args:
      h: fractions of the interval, of any shape.

    Returns:
      The variables, in the shape of h.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> v = rectified_sigmoid_inverse(jnp.array([0.0, 0.3, 1.0]))
      >>> print(np.array(rectified_sigmoid(v)).round(5))
      [0.  0.3 1. ]
    """
    h = floats("rectified_sigmoid_inverse", h, argument="h")
    return -jnp.log((_ZETA - _GAMMA) / (jnp.clip(h, 0, 1) - _GAMMA) - 1)


def adaround_init(w: jax.Array, below: jax.Array, above: jax.Array) -> jax.Array:
    """Returns the initial variables of AdaRound, for which `adaround` returns w itself.

    Args:
      w: the weights.
      below: as in `soft_round`.
      above: as in `soft_round`.

    Returns:
      An array like w. For weights beyond the grid, `adaround` initially returns the end of the
      grid. Variables of intervals of width 0 start at 0.

    Example:
      >>> import jax.numpy as jnp
      >>> abs(float(adaround_init(jnp.float32(0.5), jnp.float32(0), jnp.float32(1)))) < 1e-6
      True

    References:
      As for `rectified_sigmoid`.
    """
    w, below, above = _triple("adaround_init", "w", w, below, above)
    width = above - below
    return rectified_sigmoid_inverse(jnp.where(width > 0, w - below, 0.5) / _nonzero(width))


def adaround(v: jax.Array, below: jax.Array, above: jax.Array) -> jax.Array:
    """Returns AdaRound's soft weights, below + (above - below) h(v), with h = `rectified_sigmoid`.

    Args:
      v: the learned variables, in the shape of the weights, initialized by `adaround_init`.
      below: as in `soft_round`.
      above: as in `soft_round`.

    Returns:
      The soft weights. After training, `jnp.where(v >= 0, above, below)` gives weights on the grid.

    Example:
      >>> import jaxq, jax.numpy as jnp, numpy as np
      >>> w = jnp.array([0.3, -1.2])
      >>> below, above = jaxq.neighbors(w, "int4_tensor", scale=1.0)
      >>> v = adaround_init(w, below, above)
      >>> print(np.array(adaround(v, below, above)).round(4))
      [ 0.3 -1.2]

    References:
      As for `rectified_sigmoid`, equation 22.
    """
    v, below, above = _triple("adaround", "v", v, below, above)
    return below + (above - below) * rectified_sigmoid(v)


def adaround_penalty(v: jax.Array, beta: jax.typing.ArrayLike) -> jax.Array:
    """Returns AdaRound's penalty, the sum of 1 - |2 h(v) - 1|^beta, which drives h(v) to 0 or 1.

    Args:
      v: as in `adaround`.
      beta: the exponent. The paper anneals it from 20 to 2 and weighs the sum by 0.01.

    Returns:
      A scalar; 0 if every h(v) is 0 or 1.

    Example:
      >>> import jax.numpy as jnp
      >>> adaround_penalty(jnp.array([-9.0, 0.0, 9.0]), 2.0)
      Array(1., dtype=float32)

    References:
      As for `rectified_sigmoid`, equation 24.
    """
    v = floats("adaround_penalty", v, argument="v")
    return jnp.sum(1 - jnp.abs(2 * rectified_sigmoid(v) - 1) ** beta)


def fractional_bits(at: Callable[[jax.Array], jax.Array], bits: jax.Array) -> jax.Array:
    """Interpolates a function of an integer bit width linearly, so that the width can be learned.

        y = (1 - f) at(n) + f at(n + 1),   n = floor(bits), f = bits - n

    The derivative with respect to the bits is at(n + 1) - at(n). At integers, y is exactly at(n)
    and this is the derivative from the right.

    Args:
      at: a function of an int32 scalar, such as a cast to `jaxq.int_grid(n)` or to
        `jaxq.float_grid(e, n)`. Because the width is traced, one compilation covers all widths.
      bits: a float32 scalar. The grid must support the widths n and n + 1; clip `bits` to ensure
        this.

    Returns:
      An array like those that `at` returns.

    Example:
      >>> import jax, jaxq, jax.numpy as jnp, numpy as np
      >>> x = jnp.array([0.3, -1.0, 0.62])
      >>> def at(n):
      ...     grid = jaxq.int_grid(n, narrow=True)
      ...     scale = jnp.abs(x).max() / grid.max
      ...     return jaxq.cast(x / scale, grid) * scale
      >>> print(np.array(fractional_bits(at, jnp.float32(2.5))).round(3))
      [ 0.167 -1.     0.833]
      >>> error = lambda b: ((fractional_bits(at, b) - x) ** 2).sum()
      >>> bool(jax.grad(error)(jnp.float32(2.5)) < 0)  # More bits, less error.
      True

    References:
      Yang and Jin, "FracBits: Mixed Precision Quantization via Fractional Bit-Widths" (2020).
    """
    bits = floats("fractional_bits", bits, argument="bits")
    whole = lax.stop_gradient(jnp.floor(bits))
    n = whole.astype(jnp.int32)
    lower, upper = at(n), at(n + 1)
    return lower + (bits - whole).astype(lower.dtype) * (upper - lower)


def _triple(
    owner: str,
    argument: str,
    x: jax.typing.ArrayLike,
    below: jax.typing.ArrayLike,
    above: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns an array and its neighbors on the grid, after checking their dtypes and shapes."""
    x, low, high = (
        floats(owner, value, argument=name)
        for name, value in ((argument, x), ("below", below), ("above", above))
    )
    for name, neighbor in (("below", low), ("above", high)):
        lengths = zip(neighbor.shape[::-1], x.shape[::-1], strict=False)
        if neighbor.ndim > x.ndim or any(n not in (1, m) for n, m in lengths):
            raise ValueError(
                f"{owner}: `{name}` must broadcast to the shape {x.shape} of `{argument}`, got "
                f"{neighbor.shape}. Use the results of jaxq.neighbors."
            )
    return x, low, high


def _nonzero(width: jax.Array) -> jax.Array:
    """Returns the width as a divisor, with 1 in place of 0."""
    return jnp.where(width > 0, width, 1)
