"""Shardings of the parts of a quantized tensor, derived from the sharding of the tensor."""

import dataclasses
import math
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jaxq._jax.meshes import axes_of
from jaxq.quantizers._quantized import Quantized

__all__ = ["quantized_sharding"]


def quantized_sharding(q: Quantized, sharding: NamedSharding) -> Any:
    """Returns shardings of codes, scales and zero points that match the sharding of a tensor.

    Codes are sharded like the tensor, and so are scales along every axis on which shards consist of
    whole blocks, or of whole super-blocks with `SuperBlocks`. Along other axes, and where one scale
    covers a whole axis, scales are replicated, as are outliers and the second level of other
    scalings.

    Args:
      q: a quantized tensor, or its shapes as returned by `jax.eval_shape`.
      sharding: the sharding of the tensor, `[..., n]`.

    Returns:
      A `Quantized` with shardings in place of arrays, for `jax.device_put(q, shardings)` and
      the `out_shardings` of `jax.jit`.

    Raises:
      ValueError: if an axis does not divide into shards, or a shard does not consist of whole
        bytes.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> spec = jax.sharding.PartitionSpec(None, "model")
      >>> q = jaxq.quantize(jnp.ones((8, 64)), "int4_g32")
      >>> quantized_sharding(q, jax.sharding.NamedSharding(mesh, spec)).scale.spec == spec
      True
    """
    mesh, names = sharding.mesh, tuple(sharding.spec)
    if len(names) > q.ndim:
        raise ValueError(
            f"quantized_sharding: `sharding` must have a spec of at most {q.ndim} axes, got "
            f"{sharding.spec}. Remove the other entries."
        )
    names = names + (None,) * (q.ndim - len(names))
    parts = [math.prod(mesh.shape[name] for name in axes_of(entry)) for entry in names]
    bits = q.recipe.element.bits
    for axis, (n, count) in enumerate(zip(q.shape, parts, strict=True)):
        packed = axis == q.ndim - 1 and bits not in (8, 16)
        if n % count or (packed and n // count * bits % 8):
            suffix = f" of whole bytes of {bits}-bit codes" if packed else ""
            raise ValueError(
                f"quantized_sharding: axis {axis} of shape {q.shape} does not divide into {count} "
                f"shards{suffix}. Leave that axis out of the spec, or choose another mesh."
            )
    counts, run = q.cut.counts, q.recipe.scaling.blocks_per_run
    runs = [n if b == 1 else n // run for n, b in zip(counts, q.cut.block, strict=True)]
    scale = PartitionSpec(
        *(
            name if blocks > 1 and blocks % count == 0 else None
            for name, blocks, count in zip(names, runs, parts, strict=True)
        )
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return dataclasses.replace(
        q,
        codes=NamedSharding(mesh, PartitionSpec(*names)),
        scale=NamedSharding(mesh, scale),
        second=tuple(everywhere if run == 1 else NamedSharding(mesh, scale) for _ in q.second),
        zero_point=None if q.zero_point is None else NamedSharding(mesh, scale),
        outliers=tuple(everywhere for _ in q.outliers),
    )
