"""Recipes, the frozen records that describe how a tensor is quantized, and the named ones.

A recipe consists of an element format, a granularity, a scaling, a rounding mode and a gradient
estimator. The scaling is one of a few records, which name a calibrator and a rule for the scale. To
add a scaling, list it in `SCALINGS` (`_scalings.py`); a scale rule, in `SCALE_RULES` or `MX_RULES`
(`_scale_rules.py`); a calibrator, in `CALIBRATORS` (`_calibrators.py`); a named recipe, in
`RECIPES` (`_catalog.py`).
"""

from jaxq.recipes._affine import Affine, ScaleAndMin
from jaxq.recipes._arithmetic import (
    E8M0,
    absmax,
    finite,
    in_units,
    powers,
    span,
    times,
    zero_point_of,
)
from jaxq.recipes._calibrators import CALIBRATORS, get_calibrator
from jaxq.recipes._catalog import RECIPES, get_recipe, title_of
from jaxq.recipes._granularity import Granularity, PerBlock, PerChannel, PerTensor, PerToken
from jaxq.recipes._histograms import Entropy, MeanSquaredError, Percentile
from jaxq.recipes._moments import AbsMean, Gaussian, Laplace, Moments, Sigmas
from jaxq.recipes._outliers import Outliers
from jaxq.recipes._ranges import EMA, AbsMax, Calibrator, Extremum, Range
from jaxq.recipes._recipe import Recipe, records
from jaxq.recipes._scale_rules import MX_RULES, SCALE_RULES, ScaleRule
from jaxq.recipes._scaling import Scales, Scaling, StoredScales, limits
from jaxq.recipes._scalings import SCALINGS
from jaxq.recipes._super_block_scaling import SuperBlocks
from jaxq.recipes._symmetric import MX, SignedScale, Symmetric
from jaxq.recipes._two_level import DoubleQuant, TwoLevel

__all__ = [
    "CALIBRATORS",
    "EMA",
    "MX",
    "MX_RULES",
    "RECIPES",
    "SCALE_RULES",
    "SCALINGS",
    "AbsMax",
    "AbsMean",
    "Affine",
    "Calibrator",
    "DoubleQuant",
    "Entropy",
    "Gaussian",
    "Granularity",
    "Laplace",
    "MeanSquaredError",
    "Outliers",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PerToken",
    "Percentile",
    "Range",
    "Recipe",
    "ScaleAndMin",
    "ScaleRule",
    "Scales",
    "Scaling",
    "Sigmas",
    "SignedScale",
    "StoredScales",
    "SuperBlocks",
    "Symmetric",
    "TwoLevel",
    "get_calibrator",
    "get_recipe",
]
