"""Changes of a model that make it easier to quantize, or that correct it afterwards.

Input scales and input rotations define a new function; folded rotations and corrected biases change
parameters only. To add a method for input scales, list it in `INPUT_SCALERS`
(`_scaling_methods.py`).
"""

from jaxq.ptq._transformations._changed_functions import InputScales
from jaxq.ptq._transformations._correct_biases import BiasChange, BiasReport, correct_biases
from jaxq.ptq._transformations._fold_rotation import Norm, fold_rotation, random_rotation
from jaxq.ptq._transformations._rotate_inputs import InputRotations, rotate_inputs
from jaxq.ptq._transformations._scale_inputs import scale_inputs
from jaxq.ptq._transformations._scaling_methods import (
    AWQ,
    INPUT_SCALERS,
    InputProblem,
    InputScaler,
    SmoothQuant,
    get_input_scaler,
)

__all__ = [
    "AWQ",
    "INPUT_SCALERS",
    "BiasChange",
    "BiasReport",
    "InputProblem",
    "InputRotations",
    "InputScaler",
    "InputScales",
    "Norm",
    "SmoothQuant",
    "correct_biases",
    "fold_rotation",
    "get_input_scaler",
    "random_rotation",
    "rotate_inputs",
    "scale_inputs",
]
