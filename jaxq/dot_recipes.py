"""Recipes for products: what is quantized, and how, in the three products of training.

To add a named one: a line in `ALL`. The contract tests then include it.
"""

import dataclasses
import difflib
from types import MappingProxyType
from typing import Literal

from jaxq.accumulation import Accumulation
from jaxq.blocks import PerBlock
from jaxq.formats import Format
from jaxq.hadamard import Hadamard
from jaxq.presets import get_quantizer
from jaxq.recipes import Quantizer
from jaxq.rounding import Stochastic, get_rounding

__all__ = ["ALL", "DotRecipe", "ProductRecipe", "get_dot_recipe", "is_stochastic"]


@dataclasses.dataclass(frozen=True)
class ProductRecipe:
    """How one product of two operands is quantized. Frozen, hashable, static in jit.

    A granularity means the operand as a matrix `[free, contract]`, wherever its axes are:
    `PerBlock(32)` are blocks along the contraction, `PerToken()` is one scale for each vector along
    it, `PerBlock((16, 16))` are tiles, `PerChannel(-1)` is one scale for each index of the last
    free axis, and `PerTensor()` one for all. Only the last one shares scales between the indices of
    batch axes. A quantizer that rounds stochastically draws from the product's key; a rounding
    function of the user's gets none.

    Attributes:
      lhs: the first operand's quantizer, as `jaxq.get_quantizer` takes it; None leaves it alone.
      rhs: the second operand's.
      hadamard: a `Hadamard`, or its size, to transform both operands along the contraction before
        they are quantized; None does not.
      execution: `"emulated"` multiplies what the quantizers give, in the operands' own dtype.
        `"native"` multiplies codes, integers to int32 and float8 to float32, and scales the result;
        blocks of an MX format go to `jax.nn.scaled_matmul`. It is an error where that cannot be.
        A `jaxq.Accumulation` emulates a narrower accumulator, which sums the elements without
        their scales where those do not lie along the contraction.

    Raises:
      ValueError: an unknown name, or fields that clash.
    """

    lhs: str | Format | Quantizer | None = None
    rhs: str | Format | Quantizer | None = None
    hadamard: Hadamard | int | None = None
    execution: Literal["emulated", "native"] | Accumulation = "emulated"

    def __post_init__(self) -> None:
        for name in ("lhs", "rhs"):
            spec = getattr(self, name)
            if spec is not None:
                object.__setattr__(self, name, get_quantizer(spec))
        if isinstance(self.hadamard, int):
            object.__setattr__(self, "hadamard", Hadamard(self.hadamard))
        if not isinstance(self.execution, Accumulation):
            if self.execution not in ("emulated", "native"):
                raise ValueError(
                    f"{self._owner}: `execution` must be 'emulated', 'native' or a "
                    f"jaxq.Accumulation, got {self.execution!r}."
                )
            if self.execution == "native" and None in (self.lhs, self.rhs):
                raise ValueError(
                    f"{self._owner}: execution='native' multiplies codes and needs both operands "
                    f"quantized, got lhs={self.lhs!r} and rhs={self.rhs!r}."
                )

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @property
    def operands(self) -> tuple[Quantizer | None, Quantizer | None]:
        """Both quantizers as records."""
        lhs, rhs = (None if q is None else get_quantizer(q) for q in (self.lhs, self.rhs))
        return lhs, rhs

    @property
    def plain(self) -> bool:
        """Whether the product is that of JAX."""
        return (
            self.operands == (None, None) and self.hadamard is None and self.execution == "emulated"
        )

    @property
    def draws(self) -> tuple[str, ...]:
        """Which fields draw from the key."""
        names = [
            name
            for name, quantizer in zip(("lhs", "rhs"), self.operands, strict=True)
            if quantizer is not None and is_stochastic(quantizer)
        ]
        drawn = isinstance(self.hadamard, Hadamard) and self.hadamard.signs is None
        return (*names, "hadamard") if drawn else tuple(names)


@dataclasses.dataclass(frozen=True)
class DotRecipe(ProductRecipe):
    """How a product and the two products of its gradient are quantized.

    The recipe itself is that of the forward product of `lhs` and `rhs`. Its gradient is by
    definition, with a cotangent g and a residual of each operand,

    - for lhs: the product of g and the residual of rhs, by the recipe `dlhs`;
    - for rhs: the product of g and the residual of lhs, by the recipe `drhs`;

    and from there through the operand's own quantizer by its `gradient`. In both, the first operand
    (`lhs`) is the cotangent and the second (`rhs`) the residual, and blocks lie along what that
    product contracts. So `DotRecipe("int8_token", "int8_channel")` has the gradient of the product
    of two `fake_quant`, and nothing quantizes a cotangent.

    Attributes:
      dlhs: the recipe of the input's gradient.
      drhs: the recipe of the weight's gradient.
      residuals: `"quantized"`: what the forward product multiplied, which `dlhs` and `drhs` may
        quantize once more. `"original"`: the operands as they were before they were quantized (but
        after a Hadamard transform).

    Raises:
      ValueError: as in `ProductRecipe`.

    Example:
      >>> recipe = DotRecipe("int8_token", "int8_channel", dlhs=ProductRecipe("fp8_e5m2_tensor"))
      >>> recipe.draws, get_dot_recipe("nvfp4").draws
      ((), ('dlhs.lhs', 'drhs.lhs'))
    """

    _: dataclasses.KW_ONLY
    dlhs: ProductRecipe = ProductRecipe()
    drhs: ProductRecipe = ProductRecipe()
    residuals: Literal["quantized", "original"] = "quantized"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dlhs", "drhs"):
            if type(getattr(self, name)) is not ProductRecipe:
                raise ValueError(
                    f"DotRecipe: `{name}` must be a jaxq.ProductRecipe, got "
                    f"{getattr(self, name)!r}."
                )
        if self.residuals not in ("quantized", "original"):
            raise ValueError(
                f"DotRecipe: `residuals` must be 'quantized' or 'original', got {self.residuals!r}."
            )

    @property
    def forward(self) -> ProductRecipe:
        """The recipe of the forward product alone."""
        return ProductRecipe(self.lhs, self.rhs, self.hadamard, self.execution)

    @property
    def draws(self) -> tuple[str, ...]:
        """Which fields draw from the key, those of the gradient's products after a dot."""
        more = [
            f"{name}.{field}" for name in ("dlhs", "drhs") for field in getattr(self, name).draws
        ]
        return (*self.forward.draws, *more)


def _stochastic(recipe: Quantizer) -> Quantizer:
    return dataclasses.replace(recipe, rounding="stochastic")


def _everywhere(recipe: Quantizer) -> DotRecipe:
    """One quantizer for all operands, each quantized anew along what its product contracts."""
    both = ProductRecipe(recipe, recipe)
    return DotRecipe(recipe, recipe, dlhs=both, drhs=both, residuals="original")


_INT8 = get_quantizer("int8_token")
_E4M3_BLOCK = Quantizer("float8_e4m3fn", PerBlock(128))
_E5M2 = get_quantizer("fp8_e5m2_tensor")
# TransformerEngine rounds the scales of MXFP8 up, so that nothing is clipped.
_MXFP8 = dataclasses.replace(get_quantizer("mxfp8_e4m3"), scale="rceil")
_NVFP4 = get_quantizer("nvfp4")
_NVFP4_TILE = get_quantizer("nvfp4_tile16")
_NVFP4_GRADIENT = _stochastic(_NVFP4)
# The one vector of signs that TransformerEngine holds fixed through training.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)

ALL: MappingProxyType[str, DotRecipe] = MappingProxyType(
    {
        # Quantization-aware training: the gradient is straight through.
        "w8a8": DotRecipe(_INT8, "int8_channel"),
        "w8": DotRecipe(None, "int8_channel"),
        "w4": DotRecipe(None, "int4_channel"),
        "w4_g128": DotRecipe(None, "int4_g128"),
        # AQT's int8 training: the input's gradient too, its cotangent rounded stochastically; the
        # weight's gradient is left in float.
        "int8": DotRecipe(
            _INT8, _INT8, dlhs=ProductRecipe(_stochastic(_INT8), _INT8), residuals="original"
        ),
        # Micikevicius et al. (2022); TransformerEngine's Float8CurrentScaling, hybrid.
        "fp8": DotRecipe(
            "fp8_e4m3_tensor",
            "fp8_e4m3_tensor",
            dlhs=ProductRecipe(_E5M2),
            drhs=ProductRecipe(_E5M2),
        ),
        # DeepSeek-AI (2024), "DeepSeek-V3 Technical Report", section 3.3.1: E4M3 in all products,
        # in blocks of 128 and, for weights, tiles of 128 by 128.
        "fp8_block128": DotRecipe(
            _E4M3_BLOCK,
            "fp8_e4m3_tile128",
            dlhs=ProductRecipe(_E4M3_BLOCK, "fp8_e4m3_tile128"),
            drhs=ProductRecipe(_E4M3_BLOCK, _E4M3_BLOCK),
            residuals="original",
        ),
        # TransformerEngine's MXFP8BlockScaling: E4M3 in all products.
        "mxfp8": _everywhere(_MXFP8),
        # Rouhani et al. (2023), "Microscaling Data Formats for Deep Learning": all in MXFP6, and
        # weights in MXFP4.
        "mxfp6": _everywhere(get_quantizer("mxfp6_e3m2")),
        "mxfp4_weights": DotRecipe(
            "mxfp6_e3m2",
            "mxfp4",
            dlhs=ProductRecipe("mxfp6_e3m2", "mxfp4"),
            drhs=ProductRecipe("mxfp6_e3m2", "mxfp6_e3m2"),
            residuals="original",
        ),
        "mxfp4": _everywhere(get_quantizer("mxfp4")),
        # NVIDIA (2025), "Pretraining Large Language Models with NVFP4"; TransformerEngine's
        # NVFP4BlockScaling: tiles for weights, cotangents rounded stochastically, and a Hadamard
        # transform on the inputs of the weight's gradient.
        "nvfp4": DotRecipe(
            _NVFP4,
            _NVFP4_TILE,
            dlhs=ProductRecipe(_NVFP4_GRADIENT, _NVFP4_TILE),
            drhs=ProductRecipe(_NVFP4_GRADIENT, _NVFP4, hadamard=Hadamard(16, _SIGNS)),
            residuals="original",
        ),
    }
)


def get_dot_recipe(spec: str | DotRecipe) -> DotRecipe:
    """The recipe that a name or a recipe stands for.

    Args:
      spec: a name in `jaxq.dot_recipes.ALL`, or a `DotRecipe`, which is returned as it is.

    Returns:
      The recipe.

    Raises:
      ValueError: nothing has that name; the text gives the nearest names.
      TypeError: the argument is neither.
    """
    if isinstance(spec, DotRecipe):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"A recipe for a product must be a name or a jaxq.DotRecipe, got {spec!r}.")
    if spec not in ALL:
        near = difflib.get_close_matches(spec, ALL, n=3, cutoff=0.5)
        raise ValueError(
            f"No recipe for products is named {spec!r}. Known: {', '.join(near or ALL)}. For "
            "quantizers of one tensor write jaxq.DotRecipe(lhs, rhs)."
        )
    return ALL[spec]


def is_stochastic(quantizer: Quantizer) -> bool:
    """Whether a quantizer draws from a key."""
    return isinstance(get_rounding(quantizer.rounding), Stochastic)
