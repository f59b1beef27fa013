"""Rotations that are folded into weights, such as QuaRot's R1 and R2 (`fold_rotation`)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import array, described, integer, names_of, number
from jaxq._base.paths import leaf_path
from jaxq._base.registry import suggestion
from jaxq._jax.draws import checked_key
from jaxq._jax.processes import host_array
from jaxq.models import LOOK_UP, not_floating, plan
from jaxq.ptq._transformations._checks import relative_difference

__all__ = ["Norm", "fold_rotation", "random_rotation"]

_OWNER = "ptq.fold_rotation"


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm whose scale is folded into the weights that multiply its output.

    Attributes:
      scale: the path of the norm's scale.
      readers: the paths of all weights that multiply the norm's output.
      offset: the number that the model adds to the scale: 0 (the default), or 1 for a norm that
        multiplies by `1 + scale`.
      bias: the path of the vector that the norm adds to its output, as a LayerNorm does; None (the
        default) if it adds none.

    Raises:
      TypeError: if a field has another type.

    Example:
      >>> from jaxq import ptq
      >>> ptq.Norm("final_norm", ["head"]).readers
      ('head',)
    """

    scale: str
    readers: Sequence[str]
    offset: float = 0.0
    bias: str | None = None

    def __post_init__(self) -> None:
        remedy = "Use 0, or 1 for a norm that multiplies by 1 + scale."
        number("Norm", "offset", self.offset, "a finite number", lambda _: True, remedy)
        object.__setattr__(self, "readers", names_of("Norm", "readers", self.readers))


def random_rotation(n: int, key: jax.Array, *, keep_mean: bool = False) -> np.ndarray:
    """Returns a random orthogonal matrix: a Hadamard matrix with random signs if one is known.

    The matrix is `D H / sqrt(n)`, with a Hadamard matrix H and a diagonal matrix D of random signs.
    H comes from the constructions of Sylvester and Paley. They cover powers of two, and powers of
    two times 12, 20, 24, 28, 36 or another `q + 1` or `2 (q + 1)` with a suitable prime q. For all
    other n the matrix is the Q factor of a matrix with standard normal elements.

    Args:
      n: the size, at least 1.
      key: a key of `jax.random`.
      keep_mean: True for a matrix that maps the vector of ones to itself, so that it commutes with
        the subtraction of the mean in a LayerNorm; such a matrix is not a Hadamard matrix. False by
        default.

    Returns:
      A float64 NumPy array `[n, n]`.

    Raises:
      ValueError: if n is not positive.

    Example:
      >>> import jax, numpy as np
      >>> from jaxq import ptq
      >>> rotation = ptq.random_rotation(12, jax.random.key(0))
      >>> bool(np.allclose(rotation @ rotation.T, np.eye(12)))
      True
      >>> np.unique(np.abs(rotation * np.sqrt(12)).round(9)).tolist()
      [1.0]

    References:
      Paley, "On orthogonal matrices" (1933).
    """
    n = integer("random_rotation", "n", n, "Pass the vectors' length.", least=1)
    data = jax.random.key_data(checked_key("random_rotation", key))
    generator = np.random.default_rng(np.asarray(data).astype(np.uint32))
    if not keep_mean:
        return _rotation(n, generator)
    # Orthogonal in the space of vectors with mean 0; a reflection takes ones / sqrt(n) to e_1.
    inner = np.eye(n)
    inner[1:, 1:] = _rotation(n - 1, generator) if n > 1 else inner[1:, 1:]
    normal = -np.full(n, 1 / math.sqrt(n))
    normal[0] += 1
    power = normal @ normal
    reflection = np.eye(n) - (2 / power * np.outer(normal, normal) if power > 0 else 0)
    return reflection @ inner @ reflection


def _rotation(n: int, generator: np.random.Generator) -> np.ndarray:
    """Returns a random orthogonal matrix, from a Hadamard matrix if one is known."""
    hadamard = _hadamard(n)
    if hadamard is None:
        q, r = np.linalg.qr(generator.standard_normal((n, n)))
        return q * np.sign(np.diagonal(r))
    return generator.choice([-1.0, 1.0], n)[:, None] * hadamard / math.sqrt(n)


def _hadamard(n: int) -> np.ndarray | None:
    """Returns a Hadamard matrix of size n, or None if no construction covers n."""
    if n == 1:
        return np.ones((1, 1))
    if n == 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])
    if n % 4:
        return None
    if _is_prime(n - 1):  # Paley's first construction, as n - 1 is 3 modulo 4.
        skew = np.zeros((n, n))
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _residues(n - 1)
        return skew + np.eye(n)
    half = n // 2
    if half % 4 == 2 and _is_prime(half - 1):  # Paley's second one, as n / 2 - 1 is 1 modulo 4.
        symmetric = np.zeros((half, half))
        symmetric[0, 1:] = symmetric[1:, 0] = 1
        symmetric[1:, 1:] = _residues(half - 1)
        plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(symmetric, plus) + np.kron(np.eye(half), minus)
    smaller = _hadamard(half)
    return None if smaller is None else np.kron(np.array([[1, 1], [1, -1]]), smaller)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _residues(q: int) -> np.ndarray:
    """Returns the matrix of the quadratic characters of i - j modulo the prime q."""
    character = np.full(q, -1.0)
    character[np.arange(q, dtype=np.int64) ** 2 % q] = 1
    character[0] = 0
    return character[np.subtract.outer(np.arange(q), np.arange(q)) % q]


def fold_rotation(
    fn: Callable[..., Any],
    rotation: jax.typing.ArrayLike,
    axes: Mapping[str, int],
    *,
    norms: Sequence[Norm] = (),
) -> Callable[..., Any]:
    """Returns a function that rotates vectors inside a model by changing only its weights.

    A vector x of the model, such as the residual stream, becomes `x R`. `axes` maps the path of
    each weight that writes x or reads x to the axis whose length is that of x. This axis is
    multiplied by R::

        axes = {"embed": -1, "layers/q": -2, "layers/o": -1, "layers/up": -2, "layers/down": -1,
                "head": -2}                          # R1: the residual stream.
        axes = {"layers/v": -1, "layers/o": -2}      # R2: within each head, R of its size.

    Between these leaves, the model may only add vectors x, multiply x by matrices, or divide x by
    its norm. The scale of each norm is therefore first multiplied into the weights that read its
    output, and becomes 1. An RMSNorm then commutes with any R. A LayerNorm commutes with a
    rotation from `random_rotation(..., keep_mean=True)`. Its bias b, with the scale g, becomes
    `(b / g) R`, so that the product of its readers stays the same. New weights are computed in
    float64, and the outputs are compared with those of the original model.

    Args:
      fn: a function of the parameters and the inputs.
      rotation: an orthogonal matrix `[n, n]`, as `random_rotation` returns it.
      axes: a mapping from the path of each leaf to its axis along x, a negative number. The axis
        has length n, or a multiple of n, in which case each group of n neighbors is rotated. Layers
        stacked for a scan are leading axes.
      norms: the norms whose scales are folded. All their readers must be in `axes`.

    Returns:
      A function `(params, *args) -> params` with the arguments of `fn`. The new parameters have the
      dtypes of the old ones.

    Raises:
      ValueError: if R is not orthogonal; if a leaf does not exist, is not a float array, or has the
        wrong length; if a reader of a norm is also looked up (a tied embedding); if the bias of
        a norm is not 0 where its scale is; or if the outputs change by more than rounding errors,
        for example because a leaf is missing in `axes`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxq import ptq
      >>> def model(params, tokens):
      ...     x = params["embed"][tokens]
      ...     x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * params["norm"][None]
      ...     return x @ params["head"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"embed": jax.random.normal(keys[0], (5, 8)), "norm": jnp.arange(1.0, 9.0),
      ...           "head": jax.random.normal(keys[1], (8, 5))}
      >>> fold = ptq.fold_rotation(
      ...     model, ptq.random_rotation(8, keys[2]), {"embed": -1, "head": -2},
      ...     norms=[ptq.Norm("norm", ["head"])])
      >>> new = fold(params, jnp.arange(5))
      >>> new["norm"].tolist() == [1.0] * 8
      True

    References:
      Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024). Liu et al.,
      "SpinQuant: LLM Quantization with Learned Rotations" (2024).
    """
    remedy = "Use ptq.random_rotation(n, key)."
    array(_OWNER, "rotation", rotation, "an orthogonal matrix", remedy)
    matrix = np.asarray(rotation, np.float64)
    n = len(matrix) if matrix.ndim else 0
    tolerance = 1e-5 if np.asarray(rotation).dtype != np.float64 else 1e-9
    if matrix.shape != (n, n) or not np.allclose(matrix @ matrix.T, np.eye(n), atol=tolerance):
        raise ValueError(
            f"{_OWNER}: `rotation` must be an orthogonal matrix, got an array of shape "
            f"{matrix.shape}. Use ptq.random_rotation(n, key)."
        )
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"{_OWNER}: `axes` must be a mapping from paths to axes, got {described(axes)}. Pass, "
            "for example, {'embed': -1, 'head': -2}."
        )
    if isinstance(norms, Norm) or not all(isinstance(norm, Norm) for norm in norms):
        raise TypeError(
            f"{_OWNER}: `norms` must be a list of ptq.Norm, got {described(norms)}. Put a single "
            "one into a list."
        )
    norms = tuple(norms)
    for norm in norms:
        for path in norm.readers:
            if path not in axes:
                raise ValueError(
                    f"{_OWNER}: `axes` must contain all readers of norm {norm.scale!r}, but lacks "
                    f"{path!r}. Add its axis, such as -2 for a kernel [inputs, outputs]."
                )

    def folded(params: Any, *args: Any) -> Any:
        pairs, structure = jax.tree_util.tree_flatten_with_path(params)
        paths = [leaf_path(path) for path, _ in pairs]
        leaves = dict(zip(paths, (leaf for _, leaf in pairs), strict=True))
        norm_paths = [
            path for norm in norms for path in (norm.scale, norm.bias) if path is not None
        ]
        for path in (*axes, *norm_paths):
            _check_leaf(path, leaves)
        if norms:
            _check_not_tied(fn, params, args, norms)
        new = _fold_leaves(leaves, matrix, axes, norms)
        result = jax.tree.unflatten(structure, [new[path] for path in paths])
        error = relative_difference(fn(params, *args), fn(result, *args))
        if error:
            raise ValueError(
                f"{_OWNER}: the rotation must not change the outputs, but they differ by "
                f"{error:.2g} relative to their norm. Add the missing leaves to `axes`, and norms "
                "with a scale or a bias to `norms`; use keep_mean=True for norms that subtract "
                "the mean."
            )
        return result

    return folded


def _fold_leaves(
    leaves: Mapping[str, Any],
    matrix: np.ndarray,
    axes: Mapping[str, int],
    norms: Sequence[Norm],
) -> dict[str, Any]:
    """Returns the leaves after the scales of norms and a rotation are folded into them."""
    wide = {path: host_array(leaves[path]).astype(np.float64) for path in axes}
    new = dict(leaves)
    for norm in norms:
        scale = host_array(leaves[norm.scale]).astype(np.float64) + norm.offset
        for path in norm.readers:
            wide[path] = _scale_axis(path, wide[path], scale, axes[path])
        if norm.bias is not None:
            bias = host_array(leaves[norm.bias]).astype(np.float64)
            bias = _rotate_axis(norm.bias, _divide_bias(norm, bias, scale), matrix, -1)
            new[norm.bias] = _convert_like(bias, leaves[norm.bias])
        ones = np.full(scale.shape, 1 - norm.offset)
        new[norm.scale] = _convert_like(ones, leaves[norm.scale])
    for path, axis in axes.items():
        new[path] = _convert_like(_rotate_axis(path, wide[path], matrix, axis), leaves[path])
    return new


def _check_leaf(path: str, leaves: Mapping[str, Any]) -> None:
    """Raises a ValueError unless a path names a float array."""
    if path not in leaves:
        raise ValueError(
            f"{_OWNER}: {path!r} must be the path of a leaf of `params`. "
            f"{suggestion(path, sorted(leaves), most=3)}"
        )
    reason = not_floating(leaves[path])
    if reason:
        raise ValueError(
            f"{_OWNER}: leaf {path!r} must be a float array, but it {reason}. Fold before "
            "quantization."
        )


def _check_not_tied(fn: Callable[..., Any], params: Any, args: Any, norms: Sequence[Norm]) -> None:
    """Raises a ValueError if a reader of a norm is also an embedding table (a tied embedding)."""
    planned = plan(_OWNER, fn, [], 0, (params, *args), {})
    tables = {
        path
        for product in planned.products
        if product.operation == LOOK_UP
        for origin in product.origins[:1]
        if origin is not None
        for path in origin.leaves
    }
    for norm in norms:
        for path in tables & {*norm.readers}:
            raise ValueError(
                f"{_OWNER}: the scale of norm {norm.scale!r} cannot be folded into {path!r}, which "
                "is also looked up (a tied embedding). Copy the embedding to a separate leaf for "
                "the head, and pass a function that uses this leaf."
            )


def _scale_axis(path: str, leaf: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """Multiplies a leaf by a norm's scale along an axis; layers are leading axes of both."""
    stacks, at = scale.shape[:-1], leaf.ndim + axis
    if at < len(stacks) or leaf.shape[: len(stacks)] != stacks or leaf.shape[at] != scale.shape[-1]:
        raise ValueError(
            f"{_OWNER}: leaf {path!r} must match its norm's scale of shape {scale.shape} in its "
            f"leading axes and axis {axis}, got the shape {leaf.shape}. Correct the axis in `axes`."
        )
    shape = [m if i < len(stacks) or i == at else 1 for i, m in enumerate(leaf.shape)]
    return leaf * scale.reshape(shape)


def _divide_bias(norm: Norm, bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Divides a norm's bias by its scale, which is folded into the weights that read its output."""
    if bias.shape != scale.shape or np.any((scale == 0) & (bias != 0)):
        raise ValueError(
            f"{_OWNER}: the bias {norm.bias!r} must have the shape of the scale {norm.scale!r} and "
            f"be 0 where that is 0, got the shapes {bias.shape} and {scale.shape}. Leave the norm "
            "and its readers out of the rotated vectors."
        )
    return np.divide(bias, scale, out=np.zeros_like(bias), where=scale != 0)


def _rotate_axis(path: str, leaf: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    """Multiplies each group of n neighbors along an axis of a leaf by the rotation `[n, n]`."""
    n = len(matrix)
    if not -leaf.ndim <= axis < 0 or leaf.shape[axis] % n:
        raise ValueError(
            f"{_OWNER}: `axes` must give a negative axis of {path!r} whose length is a multiple of "
            f"{n}, got {axis} for the shape {leaf.shape}. Pass the axis along the rotated vectors."
        )
    last = np.moveaxis(leaf, axis, -1)
    rotated = last.reshape(*last.shape[:-1], -1, n) @ matrix
    return np.moveaxis(rotated.reshape(last.shape), -1, axis)


def _convert_like(x: np.ndarray, leaf: Any) -> Any:
    """Converts an array to the dtype and array type (NumPy or JAX) of a leaf."""
    new = x.astype(leaf.dtype)
    return new if isinstance(leaf, np.ndarray) else jnp.asarray(new)
