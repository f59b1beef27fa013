"""What a small model sends between devices, by layout and recipe: read from XLA's programs.

    python tools/collectives.py           prints the tables
    python tools/collectives.py --write   puts them into docs/guides/scale_out.md

Everything is compiled for eight virtual CPU devices, and nothing is run. A collective in a loop
counts once a turn. Bytes are those of the result on one device, what it holds afterwards, whichever
way the network takes. `tests/test_layouts.py` uses the layouts, the model and `found`.
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

if __name__ == "__main__":  # Before JAX sees its devices.
    more = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {more}"

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxq

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "guides" / "scale_out.md"


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
MICROBATCHES = 4
# Of the model in the tables.
LAYERS, TOKENS, MODEL, HIDDEN = 4, 1024, 512, 1024
RECIPES = ("w8a8", "mxfp8", "fp8", "nvfp4")
STORED = (None, "int8_channel", "mxfp8_e4m3", "int4_g128", "nvfp4")


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
        if recipe is None:
            return function
        key = jax.random.key(0) if jaxq.get_dot_recipe(recipe).draws else None
        return jaxq.quantize_fn(function, [("", recipe)], key=key)

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


def _arguments(layout: Layout) -> tuple[dict[str, Any], Any]:
    """Parameters and data of the tables: shapes that know how they lie."""
    of_params, of_data = layout.shardings
    shapes = {"up": (LAYERS, MODEL, HIDDEN), "down": (LAYERS, HIDDEN, MODEL)}

    def floats(shape: tuple[int, ...], sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {name: floats(shape, of_params[name]) for name, shape in shapes.items()}
    return params, floats((TOKENS, MODEL), of_data)


@functools.cache
def of_step(name: str, recipe: str | None) -> collections.Counter[Collective]:
    """The collectives of a step of training."""
    layout = LAYOUTS[name]
    jitted = step(layout, recipe, lambda y: (y * y).mean())
    return found(jitted.lower(*_arguments(layout)).compile().as_text())


def of_stored(weight: str | None) -> collections.Counter[Collective]:
    """Those of the forward pass under FSDP, of weights that are stored by a recipe."""
    layout = LAYOUTS["FSDP"]
    params, x = _arguments(layout)
    model: Any = functools.partial(stack, gathered=NamedSharding(layout.mesh, PartitionSpec()))
    if weight is not None:
        rules = [("", jaxq.DotRecipe(None, weight))]
        packed = jax.eval_shape(jaxq.quantize_weights(model, rules), params, x)
        model = jaxq.quantize_fn(model, rules)
        params = {
            name: jax.tree.map(
                lambda leaf, of: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of),
                q,
                jaxq.quantized_sharding(q, layout.shardings[0][name]),
            )
            for name, q in packed.items()
        }
    program = jax.jit(model).lower(params, x).compile().as_text()
    return found(program or "")


def summary(sent: collections.Counter[Collective]) -> str:
    """Collectives by their kinds: how many, and the bytes of all."""
    kinds: dict[str, list[int]] = {}
    for collective, times in sorted(sent.items()):
        count = kinds.setdefault(collective.kind, [0, 0])
        count[0] += times
        count[1] += times * collective.nbytes
    parts = (f"{count} {kind}: {_bytes(size)}" for kind, (count, size) in kinds.items())
    return "; ".join(parts) or "nothing"


def _bytes(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size / 1024:,.0f} KiB"


def beyond(name: str, recipe: str) -> str:
    """What a quantized step sends that the float one does not, and the other way round."""
    quantized, floats = of_step(name, recipe), of_step(name, None)
    less = floats - quantized
    return summary(quantized - floats) + (f" (without {summary(less)})" if less else "")


def table_of_steps() -> str:
    """What the float model sends in a step, and what quantizers add."""
    heads = ["layout", "float32", *(f"{recipe} adds" for recipe in RECIPES)]
    rows = [
        [name, summary(of_step(name, None)), *(beyond(name, recipe) for recipe in RECIPES)]
        for name in LAYOUTS
    ]
    return _table(heads, rows)


def table_of_stored() -> str:
    """What stored weights cost to gather."""
    rows, floats = [], 0
    for weight in STORED:
        sent = of_stored(weight)
        size = sum(c.nbytes * times for c, times in sent.items())
        floats = floats or size
        dtypes = ", ".join(sorted({c.dtype for c in sent}))
        rows.append([weight or "float32", dtypes, summary(sent), f"{size / floats:.1%}"])
    return _table(["weights", "sent as", "in a forward pass", "of float32"], rows)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the page")
    write, text = parser.parse_args().write, PAGE.read_text()
    for name, table in (("steps", table_of_steps()), ("stored", table_of_stored())):
        print(table, end="\n\n")
        place = rf"(<!-- {name}: .*? -->\n\n).*?(<!-- end -->)"
        text = re.sub(place, rf"\g<1>{table}\n\n\g<2>", text, count=1, flags=re.DOTALL)
    if write:
        PAGE.write_text(text)


if __name__ == "__main__":
    _main()
