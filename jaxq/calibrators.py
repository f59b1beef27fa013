"""Every named calibrator, and the look-up by name.

To add one: describe it in `ranges` or `histograms` and list it in `ALL`. The contract tests then
include it.
"""

from types import MappingProxyType

from jaxq.histograms import Entropy, MeanSquaredError, Percentile
from jaxq.ranges import (
    AbsMax,
    AbsMean,
    Calibrator,
    Ema,
    Extremum,
    Gaussian,
    Laplace,
    Sigmas,
)

__all__ = ["ALL", "get_calibrator"]

ALL: MappingProxyType[str, Calibrator] = MappingProxyType(
    {
        "absmax": AbsMax(),
        "extremum": Extremum(),
        "absmean": AbsMean(),
        "ema": Ema(),
        "sigmas": Sigmas(),
        "gaussian": Gaussian(),
        "laplace": Laplace(),
        "percentile": Percentile(),
        "mse": MeanSquaredError(),
        "entropy": Entropy(),
    }
)


def get_calibrator(spec: str | Calibrator) -> Calibrator:
    """The calibrator that a name or a calibrator stands for.

    Args:
      spec: a name in `jaxq.calibrators.ALL`, or a frozen record as `jaxq.ranges` describes.

    Returns:
      The calibrator.

    Raises:
      ValueError: no calibrator has that name.
      TypeError: the argument is neither.
    """
    if isinstance(spec, str):
        if spec not in ALL:
            raise ValueError(f"No calibrator is named {spec!r}. Known: {', '.join(ALL)}.")
        return ALL[spec]
    if isinstance(spec, type) or not hasattr(spec, "measure"):
        raise TypeError(f"`range` must be a name or a calibrator, got {spec!r}.")
    return spec
