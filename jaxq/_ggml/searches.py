"""ggml's searches for the scales of blocks, with bitwise equal results.

Sums are computed in the order of the elements, and every product is rounded before it is added, as
in ggml's C code without fused multiply-add. Arrays are `[elements, blocks]`.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.searching import number, search, selected
from jaxq._jax.arithmetic import divide, materialize, reciprocal, rounded
from jaxq._jax.barriers import barrier

__all__ = [
    "EPS",
    "AffineFit",
    "Steps",
    "SymmetricFit",
    "first",
    "fit_affine",
    "fit_by_descent",
    "fit_nonnegative",
    "fit_symmetric",
    "largest",
    "nearest_levels",
    "positive",
    "product",
    "quotient",
    "round_to_integer",
    "sums",
]

EPS = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: smaller blocks become zero.

# The number of elements that one loop adds. XLA on CPU is slower for more (JAX 0.12), and for one
# group in an iteration of a scan (JAX 0.10).
_GROUP = 8


class SymmetricFit(NamedTuple):
    """The scale of each block, and codes as integers."""

    scale: jax.Array
    codes: jax.Array


class AffineFit(NamedTuple):
    """The scale and the negative minimum of each block, and codes as integers."""

    scale: jax.Array
    minimum: jax.Array
    codes: jax.Array


def product(*factors: jax.Array | np.float32) -> jax.Array:
    """Multiplies factors from left to right and rounds after each multiplication."""
    result = jnp.asarray(factors[0])
    for factor in factors[1:]:
        result = rounded(result * factor)
    return result


def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns correctly rounded quotients, which XLA does not combine with other divisions.

    XLA on CPU (JAX 0.10) computes c / (d / x) as x * (c / d); remove this function when
    `test_bytes_equal_libgguf` passes with `divide`.
    """
    return rounded(divide(a, b))


def sums(terms: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns sums over the first axis, added in the order of the elements.

    Args:
      terms: a function from one slice of each array to the terms of the sums, which are rounded.
      arrays: arrays `[elements, blocks]`.
    """
    n = arrays[0].shape[0]
    group = math.gcd(n, _GROUP)
    kinds = jax.eval_shape(lambda *a: terms(*(x[0] for x in a)), *arrays)
    start = tuple(jnp.zeros(kind.shape, jnp.float32) for kind in kinds)

    def step(totals: tuple, groups: tuple) -> tuple[tuple, None]:
        for i in range(group):
            new = terms(*(x[i] for x in groups))
            totals = tuple(a + rounded(b) for a, b in zip(totals, new, strict=True))
        return barrier(totals), None

    groups = tuple(x.reshape(n // group, group, *x.shape[1:]) for x in arrays)
    return lax.scan(step, start, groups, unroll=2 if n > 2 * group else 1)[0]


def round_to_integer(x: jax.Array) -> jax.Array:
    """Returns the nearest integers, ties to even, by adding 1.5 · 2^23 as ggml does."""
    bits = lax.bitcast_convert_type(rounded(x) + np.float32(12582912), jnp.int32)
    return (bits & np.int32(0x7FFFFF)) - np.int32(0x400000)


def first(beats: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns the first element of each block that no other one beats, as a loop in C does.

    XLA on CPU (JAX 0.12) compiles a loop to one function only if it has no maximum over an axis,
    and an index of the minimum is not vectorized. K-quants with minima take 1.3 times as long then.
    """
    chosen = functools.reduce(lambda best, new: jnp.where(beats(new, best), new, best), x)
    return materialize(chosen)


def largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the amax of each block, and the first element with that magnitude, or 0."""
    signed = first(lambda new, best: jnp.abs(new) > jnp.abs(best), x)
    return jnp.abs(signed), jnp.where(signed == 0, np.float32(0), signed)  # Never -0.


def positive(x: jax.Array) -> jax.Array:
    """Returns positive numbers, and 0 in place of others.

    Unlike that of a maximum, the sign of a zero does not depend on the processor.
    """
    return jnp.where(x > 0, x, np.float32(0))


def _ratio(a: jax.Array, b: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns a / b where `valid`, else 0."""
    return jnp.where(valid, quotient(a, jnp.where(valid, b, np.float32(1))), np.float32(0))


def _const(value: float, like: jax.Array) -> jax.Array:
    """Returns a float32 array of one value, in the shape of another array."""
    return jnp.full(like.shape, value, jnp.float32)


def _chosen(better: jax.Array, new: tuple, old: tuple) -> tuple:
    """Returns the new values of blocks where `better` is True, and the old values elsewhere."""
    return tuple(jnp.where(better, a, b) for a, b in zip(new, old, strict=True))


def fit_symmetric(x: jax.Array, limit: int, weights: jax.Array) -> SymmetricFit:
    """Returns the best scale for codes from -limit to limit - 1 (ggml's make_qx_quants)."""
    amax, signed = largest(x)
    empty = amax < EPS
    signed = jnp.where(empty, np.float32(1), signed)

    def codes(inverse: jax.Array) -> jax.Array:
        return jnp.clip(round_to_integer(inverse[None] * x), -limit, limit - 1)

    wx = barrier(product(weights, x))

    def fit(inverse: jax.Array) -> tuple[jax.Array, ...]:
        def terms(q: jax.Array, w: jax.Array, wx: jax.Array) -> tuple[jax.Array, ...]:
            return product(wx, q), product(w, q, q)

        # XLA on CPU would compute the codes again for each of the two sums.
        return sums(terms, barrier(_f(codes(inverse))), weights, wx)

    def attempt(i: jax.Array, best: tuple) -> tuple:
        score = best[-1]
        step = jnp.where(i < 9, i - 9, i - 8)  # -9 to 9 without 0.
        factor = np.float32(limit) + product(np.float32(0.1), step.astype(jnp.float32))
        tried = quotient(jnp.broadcast_to(-factor, signed.shape), signed)
        sum_lx, sum_l2 = fit(tried)
        better = (sum_l2 > 0) & (product(sum_lx, sum_lx) > product(score, sum_l2))
        new = _ratio(sum_lx, sum_l2, better)
        return _chosen(better, (tried, new, product(new, sum_lx)), best)

    inverse = quotient(_const(-limit, signed), signed)
    sum_lx, sum_l2 = fit(inverse)
    scale = _ratio(sum_lx, sum_l2, sum_l2 != 0)
    inverse, scale, _ = lax.fori_loop(0, 18, attempt, (inverse, scale, product(scale, sum_lx)))
    scale = jnp.where(empty, np.float32(0), scale)
    return SymmetricFit(scale, jnp.where(empty[None], np.int32(-limit), codes(inverse)))


class _Codes(NamedTuple):
    """The sums Σ w x q and Σ w q² of each block, and the codes q."""

    sum_lx: jax.Array
    sum_l2: jax.Array
    q: jax.Array


def _sweep(
    x: jax.Array, weights: jax.Array, wx: jax.Array, codes: _Codes, low: int, high: int
) -> _Codes:
    """Changes each code in turn to the value with the smallest error, given all other codes."""
    positive = low == 0

    def element(totals: tuple, slices: tuple) -> tuple[tuple, jax.Array]:
        sum_lx, sum_l2 = totals
        x, w, wx, q = slices
        lx = sum_lx - product(wx, _f(q))
        l2 = sum_l2 - product(w, _f(q), _f(q))
        usable = (lx > 0) & ((l2 > 0) if positive else True)
        new = jnp.clip(round_to_integer(quotient(x * l2, lx)), low, high)
        lx2 = lx + product(wx, _f(new))
        l22 = l2 + product(w, _f(new), _f(new))
        gain = lx2 * lx2 * sum_l2 > sum_lx * sum_lx * l22
        better = usable & (new != q) & gain & (positive | (l22 > 0))
        # XLA on CPU would compute all of this again for each of the three results.
        new = barrier(jnp.where(better, new, q))
        changed = (lx + product(wx, _f(new)), l2 + product(w, _f(new), _f(new)))
        return _chosen(new != q, changed, totals), new

    (sum_lx, sum_l2), q = lax.scan(element, codes[:2], (x, weights, wx, codes.q))
    return _Codes(sum_lx, sum_l2, q)


def _sweeps(x: jax.Array, weights: jax.Array, start: jax.Array, low: int, high: int) -> _Codes:
    """Returns the codes after five sweeps.

    ggml stops after a sweep that changes nothing. The result is the same, because all later sweeps
    then change nothing either.
    """
    wx = barrier(product(weights, x))

    def terms(w: jax.Array, wx: jax.Array, q: jax.Array) -> tuple[jax.Array, ...]:
        return product(wx, _f(q)), product(w, _f(q), _f(q))

    sum_lx, sum_l2 = sums(terms, weights, wx, start)
    codes = _Codes(sum_lx, sum_l2, start)
    return lax.fori_loop(0, 5, lambda _, codes: _sweep(x, weights, wx, codes, low, high), codes)


def _f(q: jax.Array) -> jax.Array:
    """Returns codes as float32."""
    return q.astype(jnp.float32)


def fit_by_descent(x: jax.Array, limit: int) -> SymmetricFit:
    """Returns the fit of Q3_K without an importance matrix (ggml's make_q3_quants)."""
    amax, signed = largest(x)
    empty = amax < EPS
    inverse = quotient(_const(-limit, signed), jnp.where(empty, np.float32(1), signed))
    start = jnp.clip(round_to_integer(inverse[None] * x), -limit, limit - 1)
    sum_lx, sum_l2, q = _sweeps(x, product(x, x), start, -limit, limit - 1)
    return SymmetricFit(
        _ratio(sum_lx, sum_l2, ~empty & (sum_l2 > 0)), jnp.where(empty[None], -limit, q)
    )


def fit_nonnegative(x: jax.Array, limit: int, weights: jax.Array) -> SymmetricFit:
    """Returns the best scale for codes from 0 to limit (ggml's make_qp_quants)."""
    top = positive(first(jnp.greater, x))
    empty = top < EPS
    top = jnp.where(empty, np.float32(1), top)

    def total_error(inverse: jax.Array, bound: bool) -> jax.Array:
        scale = rounded(reciprocal(inverse))

        def terms(x: jax.Array, w: jax.Array) -> tuple[jax.Array]:
            q = round_to_integer(inverse * x)
            error = x - product(scale, _f(jnp.minimum(q, limit) if bound else q))
            return (product(w, error, error),)

        return sums(terms, x, weights)[0]

    def attempt(i: jax.Array, best: tuple) -> tuple:
        step = jnp.where(i < 4, i - 4, i - 3).astype(jnp.float32)  # -4 to 4 without 0.
        factor = product(np.float32(0.1), step) + np.float32(limit)
        inverse = quotient(jnp.broadcast_to(factor, top.shape), top)
        squares = total_error(inverse, True)
        better = squares < best[1]
        return _chosen(better, (inverse, squares), best)

    inverse = quotient(_const(limit, top), top)
    inverse, _ = lax.fori_loop(0, 8, attempt, (inverse, total_error(inverse, False)))
    start = jnp.minimum(round_to_integer(inverse[None] * x), limit)
    sum_lx, sum_l2, q = _sweeps(x, weights, start, 0, limit)
    scale = _ratio(sum_lx, sum_l2, ~empty & (sum_l2 > 0))  # No weight may be positive.
    return SymmetricFit(scale, jnp.where(empty[None], 0, q))


class Steps(NamedTuple):
    """The divisors of a block's range that `fit_affine` tries.

    The divisors are limit + first + i · step, for i from 0 to count; limit is the largest code.
    """

    first: float
    step: float
    count: int


def fit_affine(
    x: jax.Array, limit: int, weights: jax.Array, steps: Steps, absolute: bool = False
) -> AffineFit:
    """Returns the best scales and minima for codes from 0 to limit (ggml's make_qkx2_quants).

    Args:
      x: the elements.
      limit: the largest code.
      weights: the weights of the errors.
      steps: the divisors to try.
      absolute: True to minimize absolute errors, False (the default) for squared errors.
    """
    low, high = first(jnp.less, x), first(jnp.greater, x)
    low = jnp.where(low > 0, np.float32(0), low)
    flat = high <= low
    width = jnp.where(flat, np.float32(1), high - low)
    sum_w, sum_x = sums(lambda x, w: (w, product(w, x)), x, weights)

    def codes(inverse: jax.Array, offset: jax.Array) -> jax.Array:
        return jnp.clip(round_to_integer(inverse[None] * (x - offset[None])), 0, limit)

    def total_error(scale: jax.Array, minimum: jax.Array, q: jax.Array) -> jax.Array:
        def terms(x: jax.Array, w: jax.Array, q: jax.Array) -> tuple[jax.Array]:
            error = product(scale, q) + minimum - x
            return (product(w, jnp.abs(error) if absolute else product(error, error)),)

        return sums(terms, x, weights, q)[0]

    def attempt(i: jax.Array, best: tuple) -> tuple:
        # As in ggml, each attempt starts at the best minimum so far.
        offset, least_error = best[1], best[-1]
        width = high - offset
        # Rounded, because XLA adds the two constants first (JAX 0.10 to 0.12).
        factor = np.float32(steps.first) + product(np.float32(steps.step), i.astype(jnp.float32))
        factor = jnp.broadcast_to(rounded(factor) + np.float32(limit), width.shape)
        inverse = quotient(factor, jnp.where(flat, np.float32(1), width))

        # XLA on CPU would compute the codes again for each of the four sums.
        q = barrier(_f(codes(inverse, offset)))

        def terms(x: jax.Array, w: jax.Array, q: jax.Array) -> tuple[jax.Array, ...]:
            wq = product(w, q)
            return wq, product(wq, q), product(wq, x)

        sum_l, sum_l2, sum_xl = sums(terms, x, weights, q)
        d = product(sum_w, sum_l2) - product(sum_l, sum_l)
        solvable = d > 0
        new_scale = _ratio(product(sum_w, sum_xl) - product(sum_x, sum_l), d, solvable)
        new_min = _ratio(product(sum_l2, sum_x) - product(sum_l, sum_xl), d, solvable)
        above = new_min > 0
        new_scale = jnp.where(above, _ratio(sum_xl, sum_l2, solvable), new_scale)
        new_min = jnp.where(above, np.float32(0), new_min)
        new_error = total_error(new_scale, new_min, q)
        better = solvable & (new_error < least_error)
        return _chosen(better, (new_scale, new_min, inverse, offset, new_error), best)

    inverse = quotient(_const(limit, width), width)
    scale = rounded(reciprocal(inverse))  # Infinite where the width overflows.
    start_error = total_error(scale, low, _f(codes(inverse, low)))
    start = (scale, low, inverse, low, start_error)
    scale, minimum, inverse, offset, _ = lax.fori_loop(0, steps.count + 1, attempt, start)
    q = codes(inverse, offset)
    scale, minimum = jnp.where(flat, np.float32(0), scale), -jnp.where(flat, low, minimum)
    return AffineFit(scale, minimum, jnp.where(flat[None], 0, q))


def nearest_levels(
    x: jax.Array, values: np.ndarray, outputs: np.ndarray | None = None
) -> jax.Array:
    """Returns the nearest of sorted levels as indices, or as entries of `outputs`; ties go up.

    Args:
      x: float32 numbers.
      values: the levels, integers.
      outputs: the results for each level, of one dtype; None for the indices.
    """
    thresholds = _thresholds(tuple(values.tolist()))
    digits = search(x, [np.nextafter(t, np.float32(-np.inf)) for t in thresholds])
    return number(digits) if outputs is None else selected(digits, list(outputs))


@functools.cache
def _thresholds(values: tuple[int, ...]) -> tuple[np.float32, ...]:
    """Returns, for each level but the lowest, the smallest number that ggml rounds to it."""

    def prefers(x: np.float32, below: np.float32, above: np.float32) -> bool:
        # In float32, as ggml compares the two distances.
        return bool(x - below >= above - x)

    thresholds = []
    for pair in itertools.pairwise(np.array(values, np.float32)):
        x = np.float32(sum(pair) / 2)
        assert x != 0, "the search would step through all subnormal numbers"
        while prefers(np.nextafter(x, np.float32(-np.inf)), *pair):
            x = np.nextafter(x, np.float32(-np.inf))
        while not prefers(x, *pair):
            x = np.nextafter(x, np.float32(np.inf))
        thresholds.append(x)
    return tuple(thresholds)
