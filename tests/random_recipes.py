"""Random recipes, and their mean squared error on random numbers."""

import dataclasses

import numpy as np

import jaxq
from jaxq.analysis.distributions import DISTRIBUTIONS, get_distribution
from jaxq.numerics import ROUNDINGS
from jaxq.recipes import CALIBRATORS, MX_RULES, SCALE_RULES, SCALINGS, Scaling

ELEMENTS = [
    "int2",
    "int4",
    "int8",
    "ocp_int8",
    "uint4",
    "uint8",
    "nf4",
    "fp4_bnb",
    "posit8",
    "takum8",
]
ELEMENTS += ["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3fn", "float8_e5m2"]
SCALE_FORMATS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]


def draw(rng: np.random.Generator) -> tuple[jaxq.Recipe, tuple[int, int], str]:
    """Returns a random valid recipe, a shape of 2^18 numbers and the name of a distribution."""
    while True:
        block = int(rng.choice([1, 2, 8, 16, 32, 64, 128, 1024, 8192]))
        rounding = str(rng.choice(["nearest_even"] * 3 + list(ROUNDINGS)))
        element, name = str(rng.choice(ELEMENTS)), str(rng.choice(list(DISTRIBUTIONS)))
        try:
            scaling = draw_scaling(rng)
            recipe = jaxq.Recipe(element, jaxq.PerBlock(block), scaling, rounding=rounding)
        except ValueError:
            continue
        width = max(block, 512)
        return recipe, (2**18 // width, width), name


def draw_scaling(rng: np.random.Generator) -> Scaling:
    """Returns a random scaling without a search.

    Raises:
      ValueError: if the drawn fields are not supported together.
    """
    kind = rng.choice(np.array([jaxq.Symmetric, jaxq.MX, *SCALINGS]))
    fields = {
        "range": str(rng.choice(["absmax"] * 5 + list(CALIBRATORS))),
        "rule": str(rng.choice(list(MX_RULES if kind is jaxq.MX else SCALE_RULES))),
        "scale_format": str(rng.choice(SCALE_FORMATS)),
        "stored": bool(rng.random() < 0.8),
        "reciprocal": bool(rng.random() < 0.3),
    }
    own = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in fields.items() if name in own})


def sample_errors(
    recipe: jaxq.Recipe, shape: tuple[int, int], name: str, rng: np.random.Generator
) -> tuple[float, float]:
    """Returns the mean squared error on random numbers and its standard error over rows."""
    import jax

    x = get_distribution(name).sample(rng, shape).astype(np.float32)
    key = jax.random.key(0) if recipe.rounding == "stochastic" else None
    y = np.asarray(jaxq.fake_quant(x, recipe, key=key), np.float64)
    rows = np.square(y - x).mean(1)
    return float(rows.mean()), float(rows.std() / np.sqrt(len(rows) - 1))
