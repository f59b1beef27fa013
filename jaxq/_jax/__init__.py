"""Everything that exists only because of how JAX or XLA behaves.

Each entry names the behavior, which was seen with XLA on CPU in JAX 0.10.2 and 0.12.0 unless it
says otherwise, and the check that passes without the workaround once the behavior has changed.

- `arithmetic.divide`: XLA computes `x / c` as `x * (1 / c)`, and its division on GPU is not
  correctly rounded. Remove it when `test_division_by_scalar_or_constant_is_exact` passes with `/`,
  also on GPU.
- `arithmetic.square_root`: LLVM may approximate a square root on GPU. Remove it when `jnp.sqrt`
  equals NumPy's square root there.
- `arithmetic.logarithm`: the last bits of a logarithm depend on the backend. Remove it when
  `jnp.log` is correctly rounded on all of them.
- `arithmetic.rounded`: a product and a sum are fused into one rounding. Remove it when
  `test_bytes_equal_libgguf` passes without it.
- `barriers.barrier`, in five places. `analysis` of two tensors: values that two passes compute are
  stored; remove it when `test_needs_no_temporary_of_tensor_size` passes.
  Statistics of a step: those of constants are computed while compiling, and others are fused with
  the step and may change its bits; remove it when `tests/test_training_statistics.py` passes.
  Products with adapters: a weight is dequantized before its product; remove it when
  `test_weights_stay_packed_in_the_backward_pass` passes. Searches and bytes of GGUF (`_ggml`,
  `interop/gguf/_blocks.py`): values with several uses are computed again for each of them; remove
  it when `benchmarks/checkpoints.py` shows equal times.
- `barriers.barrier_on_cpu`: kernels of scales, Hadamard transforms and random bits that differ only
  in how they read their operands are compiled separately. Remove it when `benchmarks/dots.py` shows
  equal times to compile and `test_products_of_equal_shape_share_kernels_in_a_loop` passes.
  `numerics.unpack`: codes of 1, 2 and 4 bits are unpacked several times as slowly while they are
  cut out of an array in a loop (JAX 0.12); remove it when `benchmarks/serving.py` shows equal
  times. (With JAX 0.10 it has no effect, because XLA removes barriers before it fuses.)
- `barriers.computed_once`: an operand of a product is computed twice, for its scales and for its
  codes, and a quantizer that is fused with a transpose is not vectorized. Training steps take up to
  1.6 times as long. Remove it when `benchmarks/models.py` shows equal times. `numerics.unpack`: as
  for `barrier_on_cpu`, for codes of other widths, also with JAX 0.10. Its second form can go with
  the support for JAX 0.10.
- `arithmetic.by_vectors`: kernels for arrays of equal size and different shape are compiled
  separately. Remove it when `test_product_compiles_few_kernels` passes without it.
- `arithmetic.materialize`: a value per block is computed again for each element; MX formats take 2
  to 7 times as long, products of K-quants in parts 4 times, and searches of GGUF twice (JAX 0.10).
  Remove it when `benchmarks/quantizers.py`, `benchmarks/serving.py` and `benchmarks/checkpoints.py`
  show equal times without it.
- `arithmetic.hidden_broadcast`: two divisions of a number per tensor are two kernels, which take
  long to compile. Remove it when `test_product_compiles_few_kernels` passes without it.
- `reductions`: a reduction of blocks is not vectorized; quantizers take up to 9 times as long.
  Remove it when `benchmarks/quantizers.py` shows equal times with `jnp.max`.
- `draws`: Threefry is a loop of kernels with large intermediate arrays. Remove it when
  `test_stochastic_rounding_needs_no_temporary` passes with `jax.random.bits`.
- `opaque.opaque`: the gradient of a scan moves constant parts of a function out of the loop. Remove
  it when `test_gradient_of_scan_keeps_quantizer_inside` passes without it.
- `opaque.by_platform`: `jax.lax.platform_dependent` traces every variant and emits a conditional.
  Remove it when `test_platform_function_is_chosen_at_lowering` passes with that function.
- `opaque.checked_inside`: the rules of `checkify` are private. Remove it when a public function
  adds one.
- `meshes`: operations with several possible shardings raise under explicit axes. Remove it when
  `tests/test_meshes.py` passes without it.
- `processes`: `numpy.asarray` raises for an array with parts on other processes. Remove
  `host_array` when it gathers them.
- `compat`: jaxprs are private and differ between versions. Remove the branch in `loop_counts` with
  the support for JAX 0.10.
- `serialization`: Flax looks up pytrees by class and `jax.export` by name. These are their
  interfaces, so this stays.

`models/_assigning/_storage.py` calls `lax.reduce_precision` directly, with the reason.
"""
