"""Counts the collectives of a small model for each sharding layout and recipe.

    python tools/collectives.py           prints the tables
    python tools/collectives.py --write   also writes them to docs/guides/scale_out.md

The counts come from programs that XLA compiles for eight virtual CPU devices; none of them runs. A
collective in a loop counts once per iteration. Bytes are the size of the collective's result on one
device. `tests/test_layouts.py` uses the layouts, the model and `count_collectives`.
"""

import argparse
import collections
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

if __name__ == "__main__":  # JAX reads the flag when it is imported.
    flag = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxq

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "guides" / "scale_out.md"


class Collective(NamedTuple):
    """A tensor that a compiled program sends between devices.

    Attributes:
      kind: XLA's name of the operation and of its reduction, as in `"all-reduce maximum"`.
      dtype: XLA's name of the dtype, as in `"f32"` or `"u8"`.
      shape: the shape of the result on one device.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the result on one device."""
        return math.prod(self.shape) * _bits(self.dtype) // 8


def count_collectives(text: str) -> collections.Counter[Collective]:
    """Counts how often a program runs each collective.

    Args:
      text: the text of the program, from `jax.jit(f).lower(*args).compile().as_text()`.

    Returns:
      The number of executions of each collective.
    """
    computations = dict(_computations(text))
    entry = next(name for name in computations if name.startswith("ENTRY "))

    @functools.cache
    def count_in(name: str) -> collections.Counter[Collective]:
        count: collections.Counter[Collective] = collections.Counter()
        for line in computations[name]:
            count.update(_parse_line(line, computations))
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for inner in re.findall(r"(?:body|calls|to_apply)=(%[\w.-]+)", line):
                for collective, times in count_in(inner).items():
                    count[collective] += times * (int(trips[1]) if trips else 1)
        return count

    return count_in(entry)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the name and the lines of every computation; the main one's name begins with ENTRY."""
    for match in re.finditer(r"^((?:ENTRY )?%[\w.-]+) \(.*\{\n((?:  .*\n)*)", text, re.MULTILINE):
        yield match[1], match[2].splitlines()


_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def _parse_line(line: str, computations: Mapping[str, list[str]]) -> Iterator[Collective]:
    """Yields the collectives of an instruction, one for each tensor that it sends."""
    match = re.search(rf" = (.*?) ({_KINDS})\(", line)
    if match is None:
        return
    kind = match[2]
    if combiner := re.search(r"to_apply=(%[\w.-]+)", line):
        (root,) = (inner for inner in computations[combiner[1]] if "ROOT" in inner)
        kind = f"{kind} {re.findall(r' ([a-z]+)[(]', root)[0]}"
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
        yield Collective(kind, dtype, tuple(int(n) for n in shape.split(",") if n))


def _bits(dtype: str) -> int:
    """Returns the width in bits of a dtype with XLA's name."""
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sharding of the small model over devices.

    Attributes:
      axes: the mesh's axes and their sizes.
      x: the partition spec of the data, `[tokens, model]`.
      up: the partition spec of the up-projection weights, `[layers, model, hidden]`.
      down: the partition spec of the down-projection weights, `[layers, hidden, model]`.
      pipelined: True if microbatches pass through stages that have one layer each.
    """

    axes: Mapping[str, int]
    x: tuple = ()
    up: tuple = ()
    down: tuple = ()
    pipelined: bool = False

    @property
    def mesh(self) -> Mesh:
        """The mesh over the first devices, as many as the axes need."""
        count = math.prod(self.axes.values())
        kinds = (AxisType.Auto,) * len(self.axes)
        devices = jax.devices()[:count]
        return jax.make_mesh(
            tuple(self.axes.values()), tuple(self.axes), axis_types=kinds, devices=devices
        )

    @property
    def shardings(self) -> tuple[dict[str, NamedSharding], NamedSharding]:
        """The shardings of the parameters and of the data."""
        up, down, x = (
            NamedSharding(self.mesh, PartitionSpec(*s)) for s in (self.up, self.down, self.x)
        )
        return {"up": up, "down": down}, x


LAYOUTS: MappingProxyType[str, Layout] = MappingProxyType(
    {
        "data": Layout({"data": 8}, ("data",)),
        "tensor": Layout({"model": 8}, (), (None, None, "model"), (None, "model")),
        "FSDP": Layout({"data": 8}, ("data",), (None, "data"), (None, None, "data")),
        "FSDP and tensor": Layout(
            {"data": 4, "model": 2}, ("data",), (None, "data", "model"), (None, "model", "data")
        ),
        "pipeline": Layout({"stage": 4, "data": 2}, ("data",), ("stage",), ("stage",), True),
    }
)
MICROBATCHES = 4
# The sizes of the model in the tables.
LAYERS, TOKENS, MODEL, HIDDEN = 4, 1024, 512, 1024
RECIPES = ("w8a8", "mxfp8_training", "fp8_training", "nvfp4_training")
STORED = (None, "int8_channel", "mxfp8_e4m3", "int4_g128", "nvfp4")


def layer(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Computes one layer: a column-parallel product, then a row-parallel product."""
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def stack(
    params: Mapping[str, jax.Array], x: jax.Array, gathered: NamedSharding | None = None
) -> jax.Array:
    """Computes all layers in a scan, with each layer's weights first resharded to `gathered`."""

    def scan_step(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        if gathered is not None:
            explicit = gathered.mesh.axis_types[0] == AxisType.Explicit
            reshard = jax.sharding.reshard if explicit else lax.with_sharding_constraint
            params = reshard(params, gathered)
        return layer(params, x), None

    return lax.scan(scan_step, x, params)[0]


def pipeline(
    layer: Callable[..., jax.Array], params: Any, x: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """Computes all layers as a pipeline: each step runs every layer on another microbatch."""

    def constrain(x: jax.Array, *spec: str | None) -> jax.Array:
        if mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    # Microbatches are strided, so that every device holds rows of each.
    batches = x.reshape(-1, MICROBATCHES, x.shape[-1]).swapaxes(0, 1)
    stages = jax.tree.leaves(params)[0].shape[0]

    def scan_step(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.roll(state, 1, axis=0).at[0].set(batch)
        state = jax.vmap(layer)(params, constrain(state, "stage", "data"))
        return constrain(state, "stage", "data"), constrain(state[-1], "data")

    padding = jnp.zeros((stages - 1, *batches.shape[1:]), x.dtype)
    start = jnp.zeros((stages, *batches.shape[1:]), x.dtype)
    filled = constrain(jnp.concatenate([batches, padding]), None, "data")
    out = lax.scan(scan_step, constrain(start, "stage", "data"), filled)[1][stages - 1 :]
    return out.swapaxes(0, 1).reshape(x.shape)


def step(layout: Layout, recipe: Any, loss: Callable[..., jax.Array], sharded: bool = True) -> Any:
    """Returns a jitted training step, without an optimizer.

    Args:
      layout: the sharding of the model and the data.
      recipe: the product recipe of all products; None computes in float32.
      loss: a function from the model's output and extra arrays to a scalar.
      sharded: False compiles the same step for one device. Default True.

    Returns:
      A function from parameters, data and the extra arrays of `loss` to `(loss, output)` and the
      gradients of the parameters and the data.
    """

    def quantized(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        if recipe is None:
            return function
        key = jax.random.key(0) if jaxq.get_product_recipe(recipe).draws else None
        return jaxq.quantize_fn(function, [("", recipe)], key=key)

    def function(params: Any, x: jax.Array, *extra: Any) -> tuple[jax.Array, jax.Array]:
        if layout.pipelined:
            y = pipeline(quantized(layer), params, x, layout.mesh if sharded else None)
        else:
            y = quantized(stack)(params, x)
        return loss(y, *extra), y

    value_and_gradients = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    if not sharded:
        return jax.jit(value_and_gradients)
    of_params, of_data = layout.shardings
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    shardings = ((replicated, of_data), (of_params, of_data))
    return jax.jit(value_and_gradients, out_shardings=shardings)


def _arguments(layout: Layout) -> tuple[dict[str, Any], Any]:
    """Returns sharded shape structs for the parameters and the data of the tables."""
    of_params, of_data = layout.shardings
    shapes = {"up": (LAYERS, MODEL, HIDDEN), "down": (LAYERS, HIDDEN, MODEL)}

    def floats(shape: tuple[int, ...], sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {name: floats(shape, of_params[name]) for name, shape in shapes.items()}
    return params, floats((TOKENS, MODEL), of_data)


@functools.cache
def step_collectives(name: str, recipe: str | None) -> collections.Counter[Collective]:
    """Counts the collectives of a training step in a layout of `LAYOUTS`."""
    layout = LAYOUTS[name]
    jitted = step(layout, recipe, lambda y: (y * y).mean())
    return count_collectives(jitted.lower(*_arguments(layout)).compile().as_text())


def stored_weight_collectives(weight: str | None) -> collections.Counter[Collective]:
    """Counts the collectives of an FSDP forward pass with weights quantized by a recipe."""
    layout = LAYOUTS["FSDP"]
    params, x = _arguments(layout)
    model: Any = functools.partial(stack, gathered=NamedSharding(layout.mesh, PartitionSpec()))
    if weight is not None:
        rules = [("", jaxq.ProductRecipe(None, weight))]
        packed = jax.eval_shape(jaxq.quantize_weights(model, rules), params, x)
        model = jaxq.quantize_fn(model, rules)
        params = {
            name: jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                q,
                jaxq.quantized_sharding(q, layout.shardings[0][name]),
            )
            for name, q in packed.items()
        }
    program = jax.jit(model).lower(params, x).compile().as_text()
    return count_collectives(program or "")


def summary(counts: collections.Counter[Collective]) -> str:
    """Returns the number and the total bytes of each kind of collective as text."""
    kinds: dict[str, list[int]] = {}
    for collective, times in sorted(counts.items()):
        count = kinds.setdefault(collective.kind, [0, 0])
        count[0] += times
        count[1] += times * collective.nbytes
    parts = (f"{count} {kind}: {_bytes(size)}" for kind, (count, size) in kinds.items())
    return "; ".join(parts) or "nothing"


def _bytes(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size / 1024:,.0f} KiB"


def added_collectives(name: str, recipe: str) -> str:
    """Returns the collectives that quantization adds to a step and removes from it, as text."""
    quantized, floats = step_collectives(name, recipe), step_collectives(name, None)
    removed = floats - quantized
    return summary(quantized - floats) + (f" (without {summary(removed)})" if removed else "")


def table_of_steps() -> str:
    """Returns the table of collectives in a float32 step and those that each recipe adds."""
    heads = ["layout", "float32", *(f"{recipe} adds" for recipe in RECIPES)]
    rows = [
        [
            name,
            summary(step_collectives(name, None)),
            *(added_collectives(name, recipe) for recipe in RECIPES),
        ]
        for name in LAYOUTS
    ]
    return table(heads, rows)


def table_of_stored() -> str:
    """Returns the table of collectives that gather stored weights in a forward pass."""
    rows, floats = [], 0
    for weight in STORED:
        counts = stored_weight_collectives(weight)
        size = sum(c.nbytes * times for c, times in counts.items())
        floats = floats or size
        dtypes = ", ".join(sorted({c.dtype for c in counts}))
        rows.append([weight or "float32", dtypes, summary(counts), f"{size / floats:.1%}"])
    return table(["weights", "sent as", "in a forward pass", "of float32"], rows)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--write", action="store_true", help="also writes the tables to the page")
    write, text = parser.parse_args().write, PAGE.read_text()
    for name, table in (("steps", table_of_steps()), ("stored", table_of_stored())):
        print(table, end="\n\n")
        pattern = rf"(<!-- {name}: .*? -->\n\n).*?(<!-- end -->)"
        text = re.sub(pattern, rf"\g<1>{table}\n\n\g<2>", text, count=1, flags=re.DOTALL)
    if write:
        PAGE.write_text(text)


if __name__ == "__main__":
    _main()
