"""Methods that initialize adapters and adjust the weights before they are quantized."""

import dataclasses
import math
from typing import Any, Protocol

import jax
import numpy as np
from jax import numpy as jnp

from jaxq._base.arguments import described, integer, number
from jaxq._base.registry import Registry
from jaxq.lora._matrices import Factors, low_rank
from jaxq.ptq import ObservedInputs

__all__ = ["METHODS", "EoRA", "LoftQ", "Method", "PiSSA", "QLoRA", "get_method"]


class Method(Protocol):
    """The interface of a method. All matrices are `[..., inputs, outputs]`.

    The weight w is quantized `iterations` times, each time after the current adapter is subtracted:
    first the result of `first`, then those of `fit`.
    """

    @property
    def iterations(self) -> int:
        """The number of times that weights are quantized, at least 1."""
        ...

    @property
    def scaling(self) -> float:
        """The factor by which the output of the adapter is multiplied."""
        ...

    def first(self, w: jax.Array) -> Factors | None:
        """Returns the factors that are subtracted from a weight before it is first quantized.

        Args:
          w: the weight.

        Returns:
          The factors; None to quantize the weight itself.
        """
        ...

    def fit(self, w: jax.Array, q: jax.Array, before: Factors | None, name: str) -> Factors:
        """Returns the factors of the adapter.

        Args:
          w: the weight.
          q: the dequantized weight.
          before: the factors that were subtracted from w before it was quantized.
          name: the name of the product.
        """
        ...


def _check_rank(method: Any) -> None:
    integer(type(method).__name__, "rank", method.rank, "Use, for example, 16.", least=1)


def _approximation(w: jax.Array, rank: int, **weights: Any) -> Factors:
    """Returns `low_rank` of matrices that may be too small for the rank of other adapters."""
    return low_rank(w, min(rank, *w.shape[-2:]), **weights)


@dataclasses.dataclass(frozen=True)
class QLoRA:
    """Adapters that are initially zero, as in QLoRA: b is 0 and a is random.

    The elements of a are uniform in `[-1 / sqrt(inputs), 1 / sqrt(inputs))`.

    Attributes:
      rank: the largest rank of the adapters, 16 by default; less for a smaller weight.
      alpha: the numerator of the factor `alpha / rank`; None (the default) means the rank.
      seed: the seed of the random numbers.

    Raises:
      ValueError: if the rank is below 1.
      TypeError: if a field has another type.

    Example:
      >>> QLoRA(rank=64, alpha=16).scaling
      0.25

    References:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), which uses NF4 with
      double quantization (the recipe `"nf4_dq"`), rank 64 and alpha 16; PEFT's default values of a.
    """

    rank: int = 16
    alpha: float | None = None
    seed: int = 0

    iterations = 1

    def __post_init__(self) -> None:
        _check_rank(self)
        remedy = "Use, for example, 0."
        integer("QLoRA", "seed", self.seed, remedy, least=0, most=2**32 - 1)
        if self.alpha is not None:
            remedy = "Use None for a factor of 1."
            number("QLoRA", "alpha", self.alpha, "a positive number", lambda a: a > 0, remedy)

    @property
    def scaling(self) -> float:
        """The factor by which the output of the adapter is multiplied."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def first(self, w: jax.Array) -> Factors | None:
        """Returns None: the weight itself is quantized."""
        del w

    def fit(self, w: jax.Array, q: jax.Array, before: Factors | None, name: str) -> Factors:
        """Returns random a and zero b."""
        del q, before
        *leading, inputs, outputs = w.shape
        seed = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
        key = jax.random.fold_in(jax.random.key(self.seed), seed)
        bound = 1 / math.sqrt(inputs)
        rank = min(self.rank, inputs, outputs)
        # Scaled afterwards: backends may round `uniform` between other bounds once or twice.
        a = jax.random.uniform(key, (*leading, inputs, rank), jnp.float32, -1, 1)
        b = jnp.zeros((*leading, rank, outputs), jnp.float32)
        return Factors(a * np.float32(bound), b)


@dataclasses.dataclass(frozen=True)
class LoftQ:
    """Adapters that approximate the quantization error, by alternating optimization.

    Starting from `a b = 0`, each iteration quantizes `w - a b` to q and approximates `w - q` by
    `a b`.

    Attributes:
      rank: the largest rank of the adapters, 16 by default; less for a smaller weight.
      iterations: the number of iterations; 5 by default, as in the paper. With 1, as in PEFT,
        the quantized weight is that of w itself.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if a field has another type.

    Example:
      >>> import jax.numpy as jnp
      >>> w, q = jnp.array([[3.25, 0.0], [0.0, 1.0]]), jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> a, b = LoftQ(rank=1).fit(w, q, None, "w")
      >>> jnp.abs(a @ b).round(4).tolist()
      [[0.25, 0.0], [0.0, 0.0]]

    References:
      Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models" (2023).
    """

    rank: int = 16
    iterations: int = 5

    scaling = 1.0

    def __post_init__(self) -> None:
        _check_rank(self)
        integer("LoftQ", "iterations", self.iterations, "Use, for example, 5.", least=1)

    def first(self, w: jax.Array) -> Factors | None:
        """Returns None: the weight itself is quantized first."""
        del w

    def fit(self, w: jax.Array, q: jax.Array, before: Factors | None, name: str) -> Factors:
        """Returns the low-rank approximation of the quantization error."""
        del before, name
        return _approximation(w - q, self.rank)


@dataclasses.dataclass(frozen=True)
class PiSSA:
    """Adapters that hold the largest singular values of the weight; the rest is quantized.

    Attributes:
      rank: the largest rank of the adapters, 16 by default; less for a smaller weight.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if a field has another type.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = PiSSA(rank=1).first(jnp.array([[3.0, 0.0], [0.0, 1.0]]))
      >>> jnp.abs(a @ b).round(4).tolist()
      [[3.0, 0.0], [0.0, 0.0]]

    References:
      Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
      Language Models" (2024): QPiSSA with one iteration.
    """

    rank: int = 16

    iterations = 1
    scaling = 1.0

    def __post_init__(self) -> None:
        _check_rank(self)

    def first(self, w: jax.Array) -> Factors | None:
        """Returns the approximation of the weight."""
        return _approximation(w, self.rank)

    def fit(self, w: jax.Array, q: jax.Array, before: Factors | None, name: str) -> Factors:
        """Returns the approximation of the weight, unchanged."""
        del w, q, name
        assert before is not None
        return before


@dataclasses.dataclass(frozen=True)
class EoRA:
    """Adapters that compensate the output error on calibration data, without training.

    Attributes:
      inputs: the statistics of the products' inputs, from `jaxq.ptq.observe` with the same rules.
      rank: the largest rank of the adapters, 16 by default; less for a smaller weight.
      damping: as in `low_rank`; 0.01 by default.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if a field has another type.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxq import ptq
      >>> seen = {"w": ptq.collect(jnp.eye(2))}
      >>> method = EoRA(ptq.ObservedInputs(seen, (("w", "w"),)), rank=8)
      >>> method.rank, method.damping
      (8, 0.01)

    References:
      Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank
      Approximation" (2024).
    """

    inputs: ObservedInputs
    rank: int = 16
    damping: float = 0.01

    iterations = 1
    scaling = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, ObservedInputs):
            raise TypeError(
                "EoRA: `inputs` must be the result of jaxq.ptq.observe(...)(params, batches), got "
                f"{described(self.inputs)}. Observe the function with the same rules."
            )
        _check_rank(self)
        requirement = "a number of at least 0"
        number("EoRA", "damping", self.damping, requirement, lambda d: d >= 0, "Use 0.01.")

    def first(self, w: jax.Array) -> Factors | None:
        """Returns None: the weight itself is quantized."""
        del w

    def fit(self, w: jax.Array, q: jax.Array, before: Factors | None, name: str) -> Factors:
        """Returns the approximation of the error, weighted by the Hessian."""
        del before
        hessian = self.inputs[name].hessian if name in self.inputs else None
        if hessian is None:
            raise ValueError(
                f"lora.EoRA: `inputs` must have the Hessian of product {name!r}, got those of "
                f"{', '.join([*self.inputs][:3])}. Observe the same function with the same rules."
            )
        return _approximation(w - q, self.rank, hessian=hessian, damping=self.damping)


METHODS: Registry[Method] = Registry(
    "adapter method", {"qlora": QLoRA(), "loftq": LoftQ(), "pissa": PiSSA()}
)


def get_method(method: str | Method) -> Method:
    """Returns the method with a name.

    Args:
      method: a name in `jaxq.lora.METHODS`, or a record of a method, which is returned unchanged.

    Returns:
      The record.

    Raises:
      ValueError: if no method has that name; the message suggests the nearest names.
      TypeError: if the argument is neither a name nor a method.

    Example:
      >>> get_method("loftq")
      LoftQ(rank=16, iterations=5)
    """
    return METHODS.resolve(method, "method", "fit")
