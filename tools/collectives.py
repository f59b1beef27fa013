"""What a step of a small model sends between devices, by layout and recipe: counted, not assumed.

    python tools/collectives.py           prints the tables
    python tools/collectives.py --write   puts them into docs/scale_out.md

Everything is compiled for eight virtual CPU devices and read from XLA's program. Collectives within
a loop count once a turn. Bytes are those of the result on one device: what it holds after the
collective, whichever way the network takes. `tests/test_layouts.py` uses the layouts and `found`.
"""

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

if __name__ == "__main__":  # Before JAX sees its devices.
    more = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {more}"

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxq

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "scale_out.md"


class Collective(NamedTuple):
    """A tensor that a compiled program sends between devices.

    Attributes:
      kind: XLA's name of the operation, with what a reduction does: `"all-reduce maximum"`.
      dtype: in XLA's words: `"f32"`, `"u8"`.
      shape: of the result on one device.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the result on one device."""
        return math.prod(self.shape) * _bits(self.dtype) // 8


def found(text: str) -> collections.Counter[Collective]:
    """The collectives of a program, and how often it runs each.

    Args:
      text: what `jax.jit(f).lower(*args).compile().as_text()` gives.
    """
    programs = dict(_programs(text))
    entry = next(name for name in programs if name.startswith("ENTRY "))

    @functools.cache
    def within(name: str) -> collections.Counter[Collective]:
        count: collections.Counter[Collective] = collections.Counter()
        for line in programs[name]:
            count.update(_of_line(line, programs))
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for inner in re.findall(r"(?:body|calls|to_apply)=(%[\w.-]+)", line):
                for collective, times in within(inner).items():
                    count[collective] += times * (int(turns[1]) if turns else 1)
        return count

    return within(entry)


def _programs(text: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of every computation by its name, the first of all with ENTRY before it."""
    for match in re.finditer(r"^((?:ENTRY )?%[\w.-]+) \(.*\{\n((?:  .*\n)*)", text, re.MULTILINE):
        yield match[1], match[2].splitlines()


_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def _of_line(line: str, programs: Mapping[str, list[str]]) -> Iterator[Collective]:
    """The collectives of an instruction: XLA may send several tensors at once."""
    match = re.search(rf" = (.*?) ({_KINDS})\(", line)
    if match is None:
        return
    kind = match[2]
    if combiner := re.search(r"to_apply=(%[\w.-]+)", line):
        (root,) = (own for own in programs[combiner[1]] if "ROOT" in own)
        kind = f"{kind} {re.findall(r' ([a-z]+)[(]', root)[0]}"
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
        yield Collective(kind, dtype, tuple(int(n) for n in shape.split(",") if n))


def _bits(dtype: str) -> int:
    """The width of a number in XLA's words."""
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the small model lies over devices.

    Attributes:
      axes: the mesh's axes and their sizes.
      x: the spec of the data, `[tokens, model]`.
      up: that of the weights that lead up, `[layers, model, hidden]`.
      down: that of those that lead down, `[layers, hidden, model]`.
      pipelined: whether every device has layers of its own, and batches wander through them.
    """

    axes: Mapping[str, int]
    x: tuple = ()
    up: tuple = ()
    down: tuple = ()
    pipelined: bool = False

    @property
    def mesh(self) -> Mesh:
        """The mesh, of as many devices as it takes."""
        count = math.prod(self.axes.values())
        kinds = (AxisType.Auto,) * len(self.axes)
        devices = jax.devices()[:count]
        return jax.make_mesh(
            tuple(self.axes.values()), tuple(self.axes), axis_types=kinds, devices=devices
        )

    @property
    def shardings(self) -> tuple[dict[str, NamedSharding], NamedSharding]:
        """Those of the parameters and of the data."""
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
RECIPES = (None, "w8a8", "mxfp8", "fp8", "nvfp4")
LAYERS, TOKENS, MODEL, HIDDEN = 4, 512, 256, 512
MICROBATCHES = 4


def layer(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """A layer of the model: a column-parallel product, then a row-parallel one."""
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def stack(
    params: Mapping[str, jax.Array], x: jax.Array, gathered: NamedSharding | None = None
) -> jax.Array:
    """All layers, by a scan; each one's weights laid out as is said before they are used."""

    def turn(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        if gathered is not None:
            explicit = gathered.mesh.axis_types[0] == AxisType.Explicit
            lay_out = jax.sharding.reshard if explicit else lax.with_sharding_constraint
            params = lay_out(params, gathered)
        return layer(params, x), None

    return lax.scan(turn, x, params)[0]


def pipeline(
    layer: Callable[..., jax.Array], params: Any, x: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """All layers at once, each on another microbatch; in every turn each moves on by one."""

    def laid_out(x: jax.Array, *spec: str | None) -> jax.Array:
        if mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    # Every device has some of every microbatch.
    batches = x.reshape(-1, MICROBATCHES, x.shape[-1]).swapaxes(0, 1)
    stages = jax.tree.leaves(params)[0].shape[0]

    def turn(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.roll(state, 1, axis=0).at[0].set(batch)
        state = jax.vmap(layer)(params, laid_out(state, "stage", "data"))
        return laid_out(state, "stage", "data"), laid_out(state[-1], "data")

    more = jnp.zeros((stages - 1, *batches.shape[1:]), x.dtype)
    start = jnp.zeros((stages, *batches.shape[1:]), x.dtype)
    filled = laid_out(jnp.concatenate([batches, more]), None, "data")
    out = lax.scan(turn, laid_out(start, "stage", "data"), filled)[1][stages - 1 :]
    return out.swapaxes(0, 1).reshape(x.shape)


def step(layout: Layout, recipe: Any, loss: Callable[..., jax.Array], sharded: bool = True) -> Any:
    """A jitted step of training: from parameters, data and more to loss, result and gradients.

    Args:
      layout: how everything lies.
      recipe: of all products; None is the float model.
      loss: of the result and more that lies as the data do.
      sharded: False is the same step on one device.
    """

    def quantized(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return function if recipe is None else jaxq.quantize_fn(function, [("", recipe)])

    def function(params: Any, x: jax.Array, *more: Any) -> tuple[jax.Array, jax.Array]:
        if layout.pipelined:
            y = pipeline(quantized(layer), params, x, layout.mesh if sharded else None)
        else:
            y = quantized(stack)(params, x)
        return loss(y, *more), y

    both = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    if not sharded:
        return jax.jit(both)
    of_params, of_data = layout.shardings
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return jax.jit(both, out_shardings=((everywhere, of_data), (of_params, of_data)))
