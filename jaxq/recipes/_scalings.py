"""The list of scalings.

To add a scaling, write a record that derives from `Scaling` in a module of its own, and list it
here.
"""

from jaxq.recipes._affine import Affine, ScaleAndMin
from jaxq.recipes._scaling import Scaling
from jaxq.recipes._super_block_scaling import SuperBlocks
from jaxq.recipes._symmetric import MX, SignedScale, Symmetric
from jaxq.recipes._two_level import DoubleQuant, TwoLevel

__all__ = ["SCALINGS"]

SCALINGS: tuple[type[Scaling], ...] = (
    Symmetric,
    Affine,
    MX,
    TwoLevel,
    DoubleQuant,
    SignedScale,
    ScaleAndMin,
    SuperBlocks,
)
