"""Named calibrators, and the lookup by name.

To add a calibrator, define it in `_ranges.py`, `_moments.py` or `_histograms.py` and list it in
`CALIBRATORS`. The contract tests then cover it.
"""

from jaxq._base.registry import Registry
from jaxq.recipes._histograms import Entropy, MeanSquaredError, Percentile
from jaxq.recipes._moments import AbsMean, Gaussian, Laplace, Sigmas
from jaxq.recipes._ranges import EMA, AbsMax, Calibrator

__all__ = ["CALIBRATORS", "get_calibrator"]

CALIBRATORS: Registry[Calibrator] = Registry(
    "calibrator",
    {
        "absmax": AbsMax(),
        "absmean": AbsMean(),
        "ema": EMA(),
        "sigmas": Sigmas(),
        "gaussian": Gaussian(),
        "laplace": Laplace(),
        "percentile": Percentile(),
        "mse": MeanSquaredError(),
        "entropy": Entropy(),
    },
    {
        "max": "absmax",
        "amax": "absmax",
        "minmax": "absmax",
        "mean": "absmean",
        "moving_average": "ema",
        "kl": "entropy",
        "std": "sigmas",
        "aciq": "gaussian",
    },
)


def get_calibrator(calibrator: str | Calibrator) -> Calibrator:
    """Returns the calibrator with a name, or the calibrator that is passed.

    Args:
      calibrator: a name in `jaxq.recipes.CALIBRATORS`, or a frozen record with the methods of
        `jaxq.recipes.Calibrator`.

    Returns:
      The calibrator.

    Raises:
      ValueError: if no calibrator has that name.
      TypeError: if the argument is neither a name nor a calibrator.

    Example:
      >>> get_calibrator("percentile")
      Percentile(digits=7, percent=99.99)
    """
    return CALIBRATORS.resolve(calibrator, "range", "measure")
