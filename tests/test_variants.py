"""The same bits with and without jit, for device and NumPy arrays, in each kind of function."""

import chex
import numpy as np
import pytest
from absl.testing import parameterized

import jaxq
from tests.oracle import assert_same, assert_same_trees

pytestmark = pytest.mark.optimized

W = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
FUNCTIONS = {
    "cast": lambda w: jaxq.cast(w, "float8_e4m3fn"),
    "encode": lambda w: jaxq.encode(w, "nf4"),
    "fake_quant": lambda w: jaxq.fake_quant(w, "mxfp4"),
    "quantize": lambda w: jaxq.quantize(w, "int4_g32"),
    "quantize_tree": lambda w: jaxq.quantize_tree({"w": w}, "nf4_g64", axis=-1),
}


class SameBits(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.named_parameters(*FUNCTIONS.items())
    def test_all_variants_give_the_bits_of_a_plain_call(self, function):
        want = function(W)
        assert_same_trees(self.variant(function)(W), want)

    @chex.variants(with_jit=True, without_jit=True, without_device=True)
    def test_stored_weights_give_the_product_of_simulated_ones(self):
        rules = [("w", "int8_channel")]
        quantized = jaxq.quantize_fn(lambda params, x: x @ params["w"], rules)
        packed = jaxq.quantize_tree({"w": W}, rules, axis=-2)
        multiply = self.variant(quantized)
        got, want = multiply(packed, X), multiply({"w": W}, X)
        chex.assert_shape(got, (2, 64))
        assert_same(got, want)
