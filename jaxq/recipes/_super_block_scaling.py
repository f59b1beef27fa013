"""The scaling of GGUF's K-quants, which searches for scales over the elements of super-blocks."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import choice
from jaxq._base.cutting import Cut, axis_of_blocks
from jaxq._base.shapes import is_symbolic
from jaxq._ggml.super_blocks import SUPER_BLOCK_RULES, SuperBlockRule
from jaxq._jax.arithmetic import materialize
from jaxq.formats import Format, IntFormat, get_format
from jaxq.numerics import decode, encode
from jaxq.recipes._columns import Columns, searched
from jaxq.recipes._ranges import Range
from jaxq.recipes._scaling import Scales, Scaling, StoredScales

__all__ = ["SuperBlocks"]

_FLOAT16 = get_format("float16")


@dataclasses.dataclass(frozen=True, repr=False)
class SuperBlocks(Scaling):
    """Scales that a search over the elements finds, as in GGUF's K-quants, IQ4 and 4-bit floats.

    A super-block of 256 elements has a float16 factor d, and each of its blocks of 16 or 32
    elements has a quantized scale s: y = d s q. In rules with minima, y = d s q - d' m, with a
    second factor d' and a quantized minimum m. (`"iq4_nl"` has one float16 scale per block of 32.)
    As in ggml, d and s minimize a weighted error over the elements, and the bits are the same. With
    the rounding mode `"nearest_even"`, the codes are those of ggml; another mode rounds the
    elements by the stored scales.

    The rules `"mxfp4_ggml"` and `"nvfp4_ggml"` compute the one scale of a block from its largest
    magnitude: 2^(floor(log2 amax) - 2) with a float32 logarithm, or amax / 6 rounded to E4M3 with
    ties away from zero. Elements are rounded with ties toward zero, and never to minus zero.

    Attributes:
      rule: the name of the rule, which fixes the element format and the block length: `"q2_k"`,
        `"q3_k"`, `"q4_k"`, `"q5_k"`, `"q6_k"`, `"iq4_nl"`, `"iq4_xs"`, `"mxfp4_ggml"` or
        `"nvfp4_ggml"`.

    Raises:
      ValueError: if the rule is unknown.

    References:
      ggml's quantize_row_q4_K_ref and the functions beside it.

    Example:
      >>> import jaxq
      >>> q4_k = jaxq.Recipe("uint4", jaxq.PerBlock(32), SuperBlocks("q4_k"))
      >>> q4_k == jaxq.get_recipe("q4_k"), q4_k.bits_per_weight((1, 256))
      (True, 4.5)
    """

    rule: str

    searches_elements: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choice("SuperBlocks", "rule", self.rule, tuple(SUPER_BLOCK_RULES), "Use 'q4_k'.")
        super().__post_init__()

    @property
    def _rule(self) -> SuperBlockRule:
        return SUPER_BLOCK_RULES[self.rule]

    @property
    def scale_format(self) -> Format:
        """The format of the quantized scales and minima."""
        return get_format(self._rule.scale_format)

    @property
    def zero_point(self) -> str | None:
        """`"minimum"` in a rule with minima, else None."""
        return "minimum" if self._rule.minimum else None

    @property
    def second_level(self) -> str | None:
        """`"blocks"` if super-blocks have several blocks, else None."""
        return "blocks" if self.blocks_per_run > 1 else None

    @property
    def takes_scales(self) -> bool:
        """False, because the search chooses scales together with codes."""
        return False

    def takes_importance(self, fmt: Format) -> bool:
        """Returns whether the rule searches, so that it can weight errors by an importance."""
        del fmt
        return self._rule.weighted

    @property
    def blocks_per_run(self) -> int:
        """The number of blocks in a super-block."""
        return self._rule.size // self._rule.length

    @property
    def largest_scale(self) -> float:
        """The largest finite scale."""
        return self.scale_format.max * (_FLOAT16.max if self.blocks_per_run > 1 else 1)

    def check_scale_format(self, scale_format: Format) -> None:
        """Accepts the format of the rule."""
        del scale_format

    def check(self, fmt: Format) -> None:
        """Raises ValueError unless the element format is that of the rule."""
        wanted = get_format(self._rule.element)
        requirement = f"rule={self.rule!r} needs the element format {wanted.name!r}"
        remedy = f"Use jaxq.get_recipe({self.rule!r})."
        self.require(fmt == wanted, requirement, fmt.name, remedy)

    def check_cut(self, cut: Cut) -> None:
        """Raises ValueError unless super-blocks divide one axis."""
        rule, lengths = self._rule, [n for n in cut.block if is_symbolic(n) or n != 1]
        axis = axis_of_blocks(cut.block)
        if not lengths and 0 in cut.shape:  # An axis of length 0 has blocks of 1.
            return
        if len(lengths) != 1 or is_symbolic(cut.shape[axis]):
            raise ValueError(
                f"{self.rule} needs blocks along one axis of known length, got blocks of "
                f"{cut.block} for shape {cut.shape}. Use PerBlock({rule.length})."
            )
        if cut.shape[axis] % rule.size:
            other = "Choose another recipe."
            if rule.fallback is not None:
                other = f"Use {rule.fallback!r}, as llama.cpp does, if 32 divides it."
            raise ValueError(
                f"{self.rule} needs an axis of blocks that {rule.size} divides, got axis {axis} "
                f"of shape {cut.shape}. {other}"
            )
        if lengths != [rule.length]:
            raise ValueError(
                f"{self.rule} needs blocks of {rule.length} elements, got {lengths[0]}. Use "
                f"PerBlock({rule.length})."
            )

    def element(self, fmt: Format) -> Format:
        """Returns the format of the grid values, which is the element format itself."""
        return fmt

    def restore(self, stored: StoredScales) -> jax.Array:
        """Reconstructs float32 block scales from the stored ones."""
        return _times(stored.scale, stored.second[0]) if stored.second else stored.scale

    def restore_minimum(self, stored: StoredScales) -> jax.Array | None:
        """Returns the minima that are added to the scaled grid values; None without minima."""
        return None if stored.minimum is None else -_times(stored.minimum, stored.second[1])

    def of_elements(
        self, x: jax.Array, cut: Cut, fmt: Format, importance: jax.Array | None
    ) -> Scales:
        """Returns the scales of a split tensor; see `Scaling.of_elements`."""
        columns = Columns.of(cut, self._rule.size)
        result = searched(self._rule.search, columns, x, importance)
        factor_format = _FLOAT16 if self.blocks_per_run > 1 else self.scale_format
        d, m = (None if a is None else encode(a, factor_format) for a in (result.d, result.m))
        if result.scales is None:
            assert d is not None
            stored = StoredScales(decode(columns.parts(d[:, None]), self.scale_format))
        else:
            codes = [
                None if c is None else columns.parts(c) for c in (result.scales, result.minima)
            ]
            scale, minimum = (None if c is None else c.astype(jnp.float32) for c in codes)
            assert scale is not None
            second = tuple(columns.factors(a) for a in (d, m) if a is not None)
            stored = StoredScales(scale, second, minimum)
        grid_values = result.codes.astype(jnp.float32)
        if not isinstance(fmt, IntFormat):
            grid_values = decode(result.codes.astype(jnp.uint8), fmt)
        step, minimum = self.restore(stored), self.restore_minimum(stored)
        ends = [step * np.float32(end) for end in (fmt.min, fmt.max)]
        low, high = lax.min(*ends), lax.max(*ends)  # A scale may be negative.
        if minimum is not None:
            low, high = low + minimum, high + minimum
        return Scales(
            divisor=step,
            step=step,
            storage=stored,
            low=low,
            high=high,
            minimum=minimum,
            origin=minimum,
            grid_values=columns.elements(grid_values, x.shape),
        )

    def scales(self, ends: Range, fmt: Format, factor: jax.Array | None = None) -> Scales:
        """Raises ValueError, because the scales depend on all elements."""
        del ends, fmt, factor
        raise ValueError(
            f"The scales of {self.rule} are found by a search over the elements and cannot be "
            "computed from a range. Use `of_elements`."
        )

    def nbytes(self, blocks: int, fmt: Format) -> int:
        """Returns the bytes that scales, minima and factors take for a number of blocks."""
        del fmt
        size = blocks * self.scale_format.bits // 8
        if self.blocks_per_run > 1:
            size += 2 * (blocks // self.blocks_per_run)
        return size * (2 if self._rule.minimum else 1)


def _times(scales: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns products of scales and the factors of their super-blocks.

    Args:
      scales: one number per block, with the axes of the tensor or in the layout of
        `Cut.align_scales`.
      codes: the float16 codes of the factors, with the axes of the tensor.
    """
    factors = decode(codes, _FLOAT16)
    if scales.ndim == 2 * factors.ndim:
        factors = factors.reshape([n for count in factors.shape for n in (count, 1)])
    pairs = zip(scales.shape, factors.shape, strict=True)
    for axis, (n, runs) in enumerate(pairs):
        if n != runs:
            factors = jnp.repeat(factors, n // runs, axis=axis)
    return materialize(scales * factors)
