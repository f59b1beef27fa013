"""Distributions of numbers that the theory knows: symmetric around 0, of variance one.

SciPy, which JAX itself needs, has the special functions; it is imported when they are used. To add
one: a frozen dataclass with the methods of `Distribution`, listed in `ALL`.
"""

import dataclasses
import math
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

__all__ = [
    "ALL",
    "Distribution",
    "Gaussian",
    "Laplace",
    "StudentT",
    "Tail",
    "Uniform",
    "get_distribution",
]


class Tail(NamedTuple):
    """The integrals of f(x), x f(x) and x^2 f(x) from a number to infinity."""

    mass: np.ndarray
    first: np.ndarray
    second: np.ndarray


class Distribution(Protocol):
    """What a distribution looks like; all arrays are float64.

    Attributes:
      name: what tables call it.
      support: the largest number that there is; infinity if there is none.
    """

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def support(self) -> float:
        """The largest number that there is."""
        ...

    @property
    def entropy(self) -> float:
        """The differential entropy in bits."""
        ...

    def density(self, x: np.ndarray) -> np.ndarray:
        """The density f."""
        ...

    def tail(self, x: np.ndarray) -> Tail:
        """Integrals from x to infinity, x not negative, without loss of digits far out."""
        ...

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """The number that is exceeded with a chance of at most 1/2."""
        ...

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Random numbers."""
        ...


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Normally distributed: most weights, roughly."""

    @property
    def name(self) -> str:
        """Of Distribution."""
        return "gaussian"

    @property
    def support(self) -> float:
        """Of Distribution."""
        return math.inf

    @property
    def entropy(self) -> float:
        """Of Distribution."""
        return 0.5 * math.log2(2 * math.pi * math.e)

    def density(self, x: np.ndarray) -> np.ndarray:
        """Of Distribution."""
        return np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)

    def tail(self, x: np.ndarray) -> Tail:
        """Of Distribution."""
        from scipy import special

        mass, f = special.ndtr(-x), self.density(x)
        return Tail(mass, f, mass + x * f)

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Of Distribution."""
        from scipy import special

        return -special.ndtri(chance)

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Of Distribution."""
        return generator.standard_normal(shape)


@dataclasses.dataclass(frozen=True)
class Laplace:
    """Two exponentials back to back: many activations and gradients, roughly."""

    @property
    def name(self) -> str:
        """Of Distribution."""
        return "laplace"

    @property
    def support(self) -> float:
        """Of Distribution."""
        return math.inf

    @property
    def entropy(self) -> float:
        """Of Distribution."""
        return math.log2(math.sqrt(2) * math.e)

    def density(self, x: np.ndarray) -> np.ndarray:
        """Of Distribution."""
        return np.exp(-math.sqrt(2) * np.abs(x)) / math.sqrt(2)

    def tail(self, x: np.ndarray) -> Tail:
        """Of Distribution."""
        b, mass = math.sqrt(0.5), np.exp(-math.sqrt(2) * x) / 2
        return Tail(mass, (x + b) * mass, (x * x + 2 * b * x + 2 * b * b) * mass)

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Of Distribution."""
        return -np.log(2 * chance) * math.sqrt(0.5)

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Of Distribution."""
        return generator.laplace(0, math.sqrt(0.5), shape)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Evenly between -√3 and √3: what integers are made for."""

    @property
    def name(self) -> str:
        """Of Distribution."""
        return "uniform"

    @property
    def support(self) -> float:
        """Of Distribution."""
        return math.sqrt(3)

    @property
    def entropy(self) -> float:
        """Of Distribution."""
        return math.log2(2 * math.sqrt(3))

    def density(self, x: np.ndarray) -> np.ndarray:
        """Of Distribution."""
        return np.where(np.abs(x) <= self.support, 0.5 / self.support, 0.0)

    def tail(self, x: np.ndarray) -> Tail:
        """Of Distribution."""
        top = self.support
        x = np.minimum(x, top)
        parts = ((top**k - x**k) / (2 * k * top) for k in (1, 2, 3))
        return Tail(*parts)

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Of Distribution."""
        return self.support * (1 - 2 * chance)

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Of Distribution."""
        return generator.uniform(-self.support, self.support, shape)


@dataclasses.dataclass(frozen=True)
class StudentT:
    """Student's t, scaled to variance one: heavy tails, numbers with outliers.

    Attributes:
      df: degrees of freedom, more than 2, as there is no variance below. At 4 or fewer a measured
        mean squared error has no variance either, and settles slowly.

    Raises:
      ValueError: `df` is 2 or less.
    """

    df: float = 5.0

    @property
    def support(self) -> float:
        """Of Distribution."""
        return math.inf

    def __post_init__(self) -> None:
        if not 2 < self.df < math.inf:
            raise ValueError(
                f"StudentT: `df` must be above 2, where there is a variance, got {self.df}."
            )

    @property
    def name(self) -> str:
        """Of Distribution."""
        return f"student_t{self.df:g}"

    @property
    def _unit(self) -> float:
        """What a standard t is multiplied by."""
        return math.sqrt((self.df - 2) / self.df)

    @property
    def entropy(self) -> float:
        """Of Distribution."""
        from scipy import special

        v = self.df
        psi = special.digamma((v + 1) / 2) - special.digamma(v / 2)
        nats = (v + 1) / 2 * psi + math.log(v) / 2 + special.betaln(v / 2, 0.5)
        return float(nats) / math.log(2) + math.log2(self._unit)

    def density(self, x: np.ndarray) -> np.ndarray:
        """Of Distribution."""
        from scipy import special

        v, t = self.df, np.asarray(x) / self._unit
        log = -(v + 1) / 2 * np.log1p(t * t / v) - special.betaln(v / 2, 0.5) - math.log(v) / 2
        return np.exp(log) / self._unit

    def tail(self, x: np.ndarray) -> Tail:
        """Of Distribution."""
        from scipy import special

        v, unit = self.df, self._unit
        t = x / unit
        mass, f = special.stdtr(v, -t), self.density(x) * unit
        # x^2 f is a multiple of the density with two degrees of freedom less, less one of f.
        wider = special.stdtr(v - 2, -t * math.sqrt((v - 2) / v))
        second = v * (v - 1) / (v - 2) * wider - v * mass
        return Tail(mass, unit * (v + t * t) / (v - 1) * f, unit**2 * second)

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Of Distribution."""
        from scipy import special

        return -special.stdtrit(self.df, chance) * self._unit

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Of Distribution."""
        return generator.standard_t(self.df, shape) * self._unit


ALL: MappingProxyType[str, Distribution] = MappingProxyType(
    {"gaussian": Gaussian(), "laplace": Laplace(), "uniform": Uniform(), "student_t": StudentT()}
)


def get_distribution(spec: "str | Distribution") -> Distribution:
    """The distribution that a name in `ALL` stands for; others are returned as they are.

    Raises:
      ValueError: nothing has that name.
    """
    if not isinstance(spec, str):
        return spec
    if spec not in ALL:
        raise ValueError(f"No distribution is named {spec!r}. There are {', '.join(ALL)}.")
    return ALL[spec]
