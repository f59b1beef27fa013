"""ggml's searches for one scale per block with an importance matrix: Q4_0 to Q5_1."""

import jax

from jaxq._ggml.blocks import IMPORTANCE_STEPS, FloatBlocks, QuantizedBlocks, error_weights
from jaxq._ggml.searches import fit_affine, fit_symmetric

__all__ = ["with_minimum", "without_minimum"]


def without_minimum(blocks: FloatBlocks, limit: int) -> QuantizedBlocks:
    """Returns the scales, and codes from -limit to limit - 1, as for Q4_0 and Q5_0."""
    d, codes = fit_symmetric(blocks.x, limit, _weights(blocks))
    return QuantizedBlocks(d, None, codes.T)


def with_minimum(blocks: FloatBlocks, limit: int) -> QuantizedBlocks:
    """Returns the scales, the minima, and codes from 0 to limit, as for Q4_1 and Q5_1."""
    d, minimum, codes = fit_affine(blocks.x, limit, _weights(blocks), IMPORTANCE_STEPS)
    return QuantizedBlocks(d, None, codes.T, minimum)


def _weights(blocks: FloatBlocks) -> jax.Array:
    return error_weights(blocks.weights, blocks.x, blocks.row_square)
