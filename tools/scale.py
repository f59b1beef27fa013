"""Counts the bytes and collectives of a model with 70 billion parameters on 64 devices.

    python tools/scale.py                     prints the tables
    python tools/scale.py --write             also writes them to docs/guides/scale_out.md
    python tools/scale.py --recipes w8a8      compiles only some recipes

The model has the shapes of Llama 3 70B without its embedding and head. Its training step is lowered
from shapes alone and compiled for 64 virtual CPU devices; no array is created. Each recipe takes
one to three minutes.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

if __name__ == "__main__":  # JAX reads the flag when it is imported.
    flag = "--xla_force_host_platform_device_count=64"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import collectives
import jax
import optax
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxq

RECIPES = ("w8a8", "fp8_training", "mxfp8_training", "nvfp4_training")
STORED = ("int8_channel", "mxfp8_e4m3", "int4_g128", "nvfp4", "nf4_g64")


class Model(NamedTuple):
    """The sizes of a transformer and of its batch.

    Attributes:
      layers: the number of layers.
      width: the size of the residual stream.
      hidden: the inner size of the gated feed-forward products.
      heads: the number of query heads.
      kv_heads: the number of key and value heads.
      head: the size of a head.
      sequences: the sequences of a step over all devices.
      tokens: the length of a sequence.
    """

    layers: int = 80
    width: int = 8192
    hidden: int = 28672
    heads: int = 64
    kv_heads: int = 8
    head: int = 128
    sequences: int = 8
    tokens: int = 4096


# Each weight is split over "data" (FSDP) and "model" (tensor parallel), and its layers are stacked.
_SPECS: Mapping[str, tuple[str, ...]] = {
    "q": ("data", "model"),
    "k": ("data", "model"),
    "v": ("data", "model"),
    "o": ("model", "data"),
    "gate": ("data", "model"),
    "up": ("data", "model"),
    "down": ("model", "data"),
}


def make_mesh(size: int) -> jax.sharding.Mesh:
    """Returns a mesh of `size * size` devices with the axes "data" and "model"."""
    return jax.make_mesh(
        (size, size),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: size * size],
    )


def parameters(model: Model, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of the model's weights, in bfloat16."""
    m = model
    shapes = {
        "q": (m.width, m.heads * m.head),
        "k": (m.width, m.kv_heads * m.head),
        "v": (m.width, m.kv_heads * m.head),
        "o": (m.heads * m.head, m.width),
        "gate": (m.width, m.hidden),
        "up": (m.width, m.hidden),
        "down": (m.hidden, m.width),
    }
    return {
        name: jax.ShapeDtypeStruct(
            (m.layers, *shape),
            jnp.bfloat16,
            sharding=NamedSharding(mesh, PartitionSpec(None, *_SPECS[name])),
        )
        for name, shape in shapes.items()
    }


def training_step(model: Model, mesh: jax.sharding.Mesh, recipe: str | None, gather: bool) -> Any:
    """Compiles the loss and gradients of a step.

    Args:
      model: the sizes.
      mesh: the mesh of `make_mesh`.
      recipe: the product recipe of the seven products of a layer; None multiplies in bfloat16.
      gather: True gathers the weights of a layer over "data" once, before they are quantized.

    Returns:
      The compiled program.
    """
    params = parameters(model, mesh)

    def constrain(x: jax.Array, *spec: str | None) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def normalize(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype)

    def layer(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        if gather:
            p = {
                name: constrain(w, *(axis if axis == "model" else None for axis in _SPECS[name]))
                for name, w in p.items()
            }
        h = normalize(x)
        q, k, v = ((h @ p[name]).reshape(*h.shape[:2], -1, model.head) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(*h.shape[:2], -1) @ p["o"]
        h = normalize(x)
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return constrain(x, "data")

    def forward(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, p: (jax.checkpoint(layer)(p, x), None), x, params)[0]

    def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        function = forward
        if recipe is not None:
            key = jax.random.key(0) if jaxq.get_product_recipe(recipe).draws else None
            function = jaxq.quantize_fn(forward, [("|".join(_SPECS), recipe)], key=key)
        return (function(params, x).astype(jnp.float32) ** 2).mean()

    shape = (model.sequences, model.tokens, model.width)
    data = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=data)
    shardings = (
        NamedSharding(mesh, PartitionSpec()),
        {name: p.sharding for name, p in params.items()},
    )
    step = jax.jit(jax.value_and_grad(loss), out_shardings=shardings)
    return step.lower(params, x).compile()


def shard_nbytes(tree: Any, devices: int) -> int:
    """Returns the bytes on one device of arrays that are split evenly over devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // devices


def stored_nbytes(params: Mapping[str, jax.ShapeDtypeStruct], recipe: str) -> int:
    """Returns the bytes on one device of weights stored by a tensor recipe."""
    total = 0
    for p in params.values():
        q = jax.eval_shape(lambda w: jaxq.quantize(w, recipe, axis=1), p)
        arrays = zip(
            jax.tree.leaves(q),
            jax.tree.leaves(jaxq.quantized_sharding(q, p.sharding)),
            strict=True,
        )
        total += sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in arrays)
    return total


def table_of_training(model: Model, mesh: jax.sharding.Mesh, recipes: Sequence[str]) -> str:
    """Returns the table of training steps: temporary memory and collectives."""
    heads = ["recipe", "temporary memory per device", "collectives of a step"]
    rows, floats = [], None
    for recipe in (None, *recipes):
        program = training_step(model, mesh, recipe, gather=True)
        counts = collectives.count_collectives(program.as_text())
        floats = floats or counts
        what = collectives.summary(counts)
        if recipe is not None:
            what = collectives.summary(counts - floats)
            if removed := floats - counts:
                what += f" (without {collectives.summary(removed)})"
        temporary = program.memory_analysis().temp_size_in_bytes
        rows.append(
            [
                recipe or "bfloat16",
                _gigabytes(temporary),
                what if recipe is None else f"adds {what}",
            ]
        )
        print(f"{rows[-1][0]}: {rows[-1][1]}, {rows[-1][2]}", file=sys.stderr, flush=True)
    return collectives.table(heads, rows)


def table_of_stored(model: Model, mesh: jax.sharding.Mesh) -> str:
    """Returns the table of bytes of weights and of optimizer states."""
    params, devices = parameters(model, mesh), mesh.size
    adam = optax.adam(1e-3)
    rows = [["weights", "bfloat16", _gigabytes(shard_nbytes(params, devices))]]
    rows += [["weights", name, _gigabytes(stored_nbytes(params, name))] for name in STORED]
    wide = {k: jax.ShapeDtypeStruct(p.shape, jnp.float32) for k, p in params.items()}
    for name, tx in (
        ("float32", adam),
        ("dynamic8 (`quantize_state`)", jaxq.optim.quantize_state(adam)),
    ):
        state = jax.eval_shape(tx.init, wide)
        rows.append(["Adam's moments", name, _gigabytes(shard_nbytes(state, devices))])
    return collectives.table(["arrays", "stored as", "on each device"], rows)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--write", action="store_true", help="also writes the tables to the page")
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="default: all of the page")
    arguments = parser.parse_args()
    model, mesh = Model(), make_mesh(8)
    tables = {
        "stored 70B": table_of_stored(model, mesh),
        "training 70B": table_of_training(model, mesh, arguments.recipes),
    }
    text = collectives.PAGE.read_text()
    for name, table in tables.items():
        print(table, end="\n\n")
        pattern = rf"(<!-- {name}: .*? -->\n\n).*?(<!-- end -->)"
        text = re.sub(pattern, rf"\g<1>{table}\n\n\g<2>", text, count=1, flags=re.DOTALL)
    if arguments.write:
        collectives.PAGE.write_text(text)


if __name__ == "__main__":
    _main()
