"""Probability distributions for the error theory: symmetric around 0, with variance one.

The special functions come from SciPy, a dependency of JAX, which is imported when they are used.
To add a distribution, write a frozen dataclass with the methods of `Distribution` and list it in
`DISTRIBUTIONS`.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol

import numpy as np

from jaxq._base.arguments import number
from jaxq._base.registry import Registry

__all__ = [
    "DISTRIBUTIONS",
    "Distribution",
    "Gaussian",
    "Laplace",
    "StudentT",
    "Tail",
    "Uniform",
    "get_distribution",
]


class Tail(NamedTuple):
    """The integrals of the density f(x), of x f(x) and of x^2 f(x), from a bound to infinity.

    Attributes:
      mass: the integral of f(x), which is the probability of a value above the bound.
      first: the integral of x f(x).
      second: the integral of x^2 f(x).

    Example:
      >>> import numpy as np
      >>> mass, first, second = Gaussian().tail(np.array(2.0))
      >>> round(2 * float(second - 4 * first + 4 * mass), 4)  # The error of clipping at -2 and 2.
      0.0115
    """

    mass: np.ndarray
    first: np.ndarray
    second: np.ndarray


class Distribution(Protocol):
    """The interface of a distribution; all arrays are float64.

    Attributes:
      name: the distribution's name in tables.
      support: the largest possible value; infinity if the distribution is unbounded.
    """

    @property
    def name(self) -> str:
        """The distribution's name in tables."""
        ...

    @property
    def support(self) -> float:
        """The largest possible value; infinity if the distribution is unbounded."""
        ...

    @property
    def entropy(self) -> float:
        """The differential entropy, in bits."""
        ...

    def density(self, x: np.ndarray) -> np.ndarray:
        """Returns the probability density at `x`."""
        ...

    def tail(self, x: np.ndarray) -> Tail:
        """Returns the integrals from nonnegative `x` to infinity, accurate even far out."""
        ...

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Returns the value that is exceeded with probability `chance`, at most 1/2."""
        ...

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Returns random samples of the given shape."""
        ...


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The normal distribution, a rough model of most weights.

    Example:
      >>> import numpy as np
      >>> float(Gaussian().tail(np.zeros(())).mass)
      0.5
    """

    @property
    def name(self) -> str:
        """The name in tables."""
        return "gaussian"

    @property
    def support(self) -> float:
        """The largest possible value."""
        return math.inf

    @property
    def entropy(self) -> float:
        """The differential entropy, in bits."""
        return 0.5 * math.log2(2 * math.pi * math.e)

    def density(self, x: np.ndarray) -> np.ndarray:
        """Returns the probability density at `x`."""
        return np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)

    def tail(self, x: np.ndarray) -> Tail:
        """Returns the integrals from nonnegative `x` to infinity."""
        from scipy import special

        mass, f = special.ndtr(-x), self.density(x)
        return Tail(mass, f, mass + x * f)

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Returns the value that is exceeded with probability `chance`."""
        from scipy import special

        return -special.ndtri(chance)

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Returns random samples of the given shape."""
        return generator.standard_normal(shape)


@dataclasses.dataclass(frozen=True)
class Laplace:
    """The Laplace distribution, a rough model of many activations and gradients.

    Example:
      >>> round(Laplace().entropy, 3)
      1.943
    """

    @property
    def name(self) -> str:
        """The name in tables."""
        return "laplace"

    @property
    def support(self) -> float:
        """The largest possible value."""
        return math.inf

    @property
    def entropy(self) -> float:
        """The differential entropy, in bits."""
        return math.log2(math.sqrt(2) * math.e)

    def density(self, x: np.ndarray) -> np.ndarray:
        """Returns the probability density at `x`."""
        return np.exp(-math.sqrt(2) * np.abs(x)) / math.sqrt(2)

    def tail(self, x: np.ndarray) -> Tail:
        """Returns the integrals from nonnegative `x` to infinity."""
        b, mass = math.sqrt(0.5), np.exp(-math.sqrt(2) * x) / 2
        return Tail(mass, (x + b) * mass, (x * x + 2 * b * x + 2 * b * b) * mass)

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Returns the value that is exceeded with probability `chance`."""
        return -np.log(2 * chance) * math.sqrt(0.5)

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Returns random samples of the given shape."""
        return generator.laplace(0, math.sqrt(0.5), shape)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The uniform distribution on [-√3, √3], the best case for integer formats.

    Example:
      >>> round(Uniform().entropy, 3)
      1.792
    """

    @property
    def name(self) -> str:
        """The name in tables."""
        return "uniform"

    @property
    def support(self) -> float:
        """The largest possible value."""
        return math.sqrt(3)

    @property
    def entropy(self) -> float:
        """The differential entropy, in bits."""
        return math.log2(2 * math.sqrt(3))

    def density(self, x: np.ndarray) -> np.ndarray:
        """Returns the probability density at `x`."""
        return np.where(np.abs(x) <= self.support, 0.5 / self.support, 0.0)

    def tail(self, x: np.ndarray) -> Tail:
        """Returns the integrals from nonnegative `x` to infinity."""
        top = self.support
        x = np.minimum(x, top)
        parts = ((top**k - x**k) / (2 * k * top) for k in (1, 2, 3))
        return Tail(*parts)

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Returns the value that is exceeded with probability `chance`."""
        return self.support * (1 - 2 * chance)

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Returns random samples of the given shape."""
        return generator.uniform(-self.support, self.support, shape)


@dataclasses.dataclass(frozen=True)
class StudentT:
    """Student's t-distribution with variance one, a model of tensors with outliers.

    Attributes:
      df: the degrees of freedom, above 2, so that the variance is finite. Default: 5. With 4 or
        fewer, a measured mean squared error has infinite variance and converges slowly.

    Raises:
      ValueError: if `df` is 2 or less, or infinite.
      TypeError: if a field has another type.

    Example:
      >>> StudentT(df=4).name
      'student_t4'
    """

    df: float = 5.0

    @property
    def support(self) -> float:
        """The largest possible value."""
        return math.inf

    def __post_init__(self) -> None:
        requirement = "a finite number above 2, for a finite variance"
        number("StudentT", "df", self.df, requirement, lambda df: df > 2, "Use 5.")

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"student_t{self.df:g}"

    @property
    def _unit(self) -> float:
        """The factor that scales a standard t variable to variance one."""
        return math.sqrt((self.df - 2) / self.df)

    @property
    def entropy(self) -> float:
        """The differential entropy, in bits."""
        from scipy import special

        v = self.df
        psi = special.digamma((v + 1) / 2) - special.digamma(v / 2)
        nats = (v + 1) / 2 * psi + math.log(v) / 2 + special.betaln(v / 2, 0.5)
        return float(nats) / math.log(2) + math.log2(self._unit)

    def density(self, x: np.ndarray) -> np.ndarray:
        """Returns the probability density at `x`."""
        from scipy import special

        v, t = self.df, np.asarray(x) / self._unit
        log = -(v + 1) / 2 * np.log1p(t * t / v) - special.betaln(v / 2, 0.5) - math.log(v) / 2
        return np.exp(log) / self._unit

    def tail(self, x: np.ndarray) -> Tail:
        """Returns the integrals from nonnegative `x` to infinity."""
        from scipy import special

        v, unit = self.df, self._unit
        t = x / unit
        mass, f = special.stdtr(v, -t), self.density(x) * unit
        # x^2 f is a multiple of the density with df - 2 degrees of freedom, minus a multiple of f.
        wider = special.stdtr(v - 2, -t * math.sqrt((v - 2) / v))
        second = v * (v - 1) / (v - 2) * wider - v * mass
        return Tail(mass, unit * (v + t * t) / (v - 1) * f, unit**2 * second)

    def beyond(self, chance: np.ndarray) -> np.ndarray:
        """Returns the value that is exceeded with probability `chance`."""
        from scipy import special

        return -special.stdtrit(self.df, chance) * self._unit

    def sample(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Returns random samples of the given shape."""
        return generator.standard_t(self.df, shape) * self._unit


DISTRIBUTIONS: Registry[Distribution] = Registry(
    "distribution",
    {"gaussian": Gaussian(), "laplace": Laplace(), "uniform": Uniform(), "student_t": StudentT()},
    {"normal": "gaussian", "t": "student_t"},
)


def get_distribution(spec: "str | Distribution") -> Distribution:
    """Returns the distribution with a name.

    Args:
      spec: a name in `jaxq.analysis.distributions.DISTRIBUTIONS`, or a `Distribution`, which is
        returned unchanged.

    Returns:
      The distribution.

    Raises:
      ValueError: if the name is unknown. The message suggests similar names.
      TypeError: if the argument is neither a name nor a `Distribution`.

    Example:
      >>> get_distribution("student_t")
      StudentT(df=5.0)
    """
    return DISTRIBUTIONS.resolve(spec, "distribution", "sample")
