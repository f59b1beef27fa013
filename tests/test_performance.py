"""Deterministic performance bounds: temporary memory, equations, compilations and passes."""

import dataclasses
import math
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq._base.cutting import Cut
from jaxq.analysis import monitor
from jaxq.recipes import absmax
from tests import data

pytestmark = pytest.mark.optimized


def equations(jaxpr) -> int:
    """Counts the computing equations of a jaxpr, including those of inner calls."""
    total = 0
    for eqn in jaxpr.eqns:
        calls = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        if calls:
            total += sum(equations(getattr(v, "jaxpr", v)) for v in calls)
        else:
            total += eqn.primitive.name != "stop_gradient"
    return total


BINARY = [
    name
    for name, fmt in jaxq.formats.FORMATS.items()
    if isinstance(fmt, jaxq.FloatFormat | jaxq.IntFormat)
]
# In formats without mantissa bits, ties depend on the parity of the exponent.
OLD_JAX = jax.__version_info__ < (0, 11)
POWERS_OF_TWO = ("float8_e8m0fnu", "binary8p1se", "float4_e3m0")


@pytest.mark.parametrize("name", BINARY)
def test_cast_has_at_most_25_equations(name: str):
    jaxpr = jax.make_jaxpr(lambda x: jaxq.cast(x, name))(jnp.ones(8))
    assert 10 < equations(jaxpr.jaxpr) <= (30 if name in POWERS_OF_TWO else 25)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float6_e3m2fn", "float4_e2m1fn"])
def test_encode_computes_codes_without_values(name: str):
    """Checks the number of equations, which is 36 or more if the values are computed first."""
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert equations(jax.make_jaxpr(lambda x: jaxq.encode(x, name))(x).jaxpr) <= 25


@pytest.mark.parametrize(("name", "most"), [("takum8", 55), ("posit8", 33)])
def test_cast_to_tapered_format_has_few_equations(name: str, most: int):
    jaxpr = jax.make_jaxpr(lambda x: jaxq.cast(x, name))(jnp.ones(8))
    assert 25 < equations(jaxpr.jaxpr) <= most


@pytest.mark.parametrize("name", ["dynamic8", "udynamic8"])
def test_cast_to_256_levels_looks_up_two_tables(name: str):
    """Counts gathers, which take most of the time: one for the bucket and one for the level."""
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    text = jax.jit(lambda x: jaxq.cast(x, name)).lower(x).as_text()
    assert text.count('"stablehlo.gather"(') == 2


def product_with_gradients(name: str):
    """Returns the shape of square operands, and a function that computes both gradients."""
    key = jax.random.key(0) if jaxq.get_product_recipe(name).draws else None

    def product(x, w, g):
        f = lambda x, w: jaxq.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=name, key=key)
        return jax.vjp(f, x, w)[1](g)

    return jax.ShapeDtypeStruct((256, 256), jnp.float32), product


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch):
    """Traces functions as on a single device."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


# Lines of StableHLO of a product with both gradients, which bound the time to compile it.
LINES = {"w8a8": 342, "int8_training": 740, "mxfp8_training": 621, "nvfp4_training": 1561}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", data.each(LINES, ["nvfp4_training"]))
def test_product_is_lowered_to_few_lines(name: str):
    x, function = product_with_gradients(name)
    lines = jax.jit(function).lower(x, x, x).as_text().count("\n")
    assert LINES[name] * 0.8 < lines <= LINES[name]


@pytest.mark.usefixtures("one_device")
def test_kernels_that_read_elements_do_not_change_shapes_to_vectors():
    """Checks blocks on axis 0, for which XLA on CPU (JAX 0.12) would not vectorize such kernels."""
    recipe = dataclasses.replace(jaxq.get_recipe("nvfp4"), granularity=jaxq.PerBlock(16, axes=0))
    entry = compiled_pass(recipe, (512, 1024)).as_text().split("ENTRY")[1]
    (x,) = re.findall(r"(%[\w.-]+) = f32\S+ parameter", entry)
    readers = re.findall(r"= \w+\[([\d,]*)\]\S* fusion\(([^)]*)\)", entry)
    shapes = [shape for shape, operands in readers if x in operands.split(", ")]
    assert len(shapes) == 2
    assert all("," in shape for shape in shapes)


@pytest.mark.usefixtures("one_device")
def test_operands_of_products_are_separated_on_cpu():
    """Counts barriers in the gradient, before its quantizers and after those it transposes.

    XLA on CPU would compute an operand twice, and not vectorize a quantizer with a transpose. It
    transposes an operand of each of the two products.
    """
    x, function = product_with_gradients("mxfp8_training")
    barrier = "stablehlo.remainder" if OLD_JAX else "optimization_barrier"

    def barriers(platform: str) -> int:
        traced = jax.jit(function).trace(x, x, x)
        return traced.lower(lowering_platforms=(platform,)).as_text().count(barrier)

    assert barriers("cpu") == barriers("cuda") + 4 + 2


# Loops in the compiled program of the gradients of a product. Each loop is a kernel, and XLA on CPU
# takes about as long to compile one as the whole product in float32, which has none.
LOOPS = {"w4a16": 3, "w8a8": 5, "int8_training": 5, "mxfp8_training": 8, "nvfp4_training": 24}
# The loops that copy operands with JAX 0.10: see `jaxq._jax.barriers.computed_once`.
COPIES = {"w4a16": 1, "w8a8": 2, "int8_training": 2, "mxfp8_training": 3, "nvfp4_training": 2}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", data.each(LOOPS, ["w8a8"]))
def test_product_compiles_few_kernels(name: str):
    x, function = product_with_gradients(name)
    text = jax.jit(function).lower(x, x, x).compile().as_text()
    assert text.count("kind=kLoop") == LOOPS[name] + (COPIES[name] if OLD_JAX else 0)


def different_loops(text: str) -> int:
    """Counts the loops of a compiled program that differ in more than their names."""
    parts = re.finditer(r"^%(\S+) \([^\n]*\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    bodies = {part[1]: re.sub(r", metadata=\{[^}]*\}", "", part[2]) for part in parts}
    different = set()
    for name in re.findall(r"kind=kLoop, calls=%([\w.-]+)", text):
        numbers: dict[str, str] = {}
        rename = lambda match: numbers.setdefault(match[0], str(len(numbers)))  # noqa: B023
        different.add(re.sub(r"%[\w.-]+", rename, bodies[name]))
    return len(different)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", data.each(LOOPS, ["nvfp4_training"]))
def test_products_of_equal_shape_share_kernels_in_a_loop(name: str):
    """Counts different loops, because XLA on CPU compiles equal ones once."""

    def loops(products: int) -> int:
        def loss(weights, x):
            def layer(x, parts):
                for w in parts:
                    x = jnp.sin(x @ w)
                return x, None

            return jax.lax.scan(layer, x, weights)[0].sum()

        def gradient(weights, x, key):
            key = key if jaxq.get_product_recipe(name).draws else None
            return jax.grad(jaxq.quantize_fn(loss, [("", name)], key=key))(weights, x)

        weights = [jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)] * products
        x, key = jax.eval_shape(lambda: (jnp.zeros((64, 64)), jax.random.key(0)))
        return different_loops(jax.jit(gradient).lower(weights, x, key).compile().as_text())

    assert loops(4) == loops(2)


@pytest.mark.usefixtures("one_device")
def test_kernel_of_two_level_scales_does_not_overwrite_its_operand():
    """Checks that no operand has the type of the result, so XLA on CPU compiles the kernel once.

    It may compute a result of the same type in place, depending on the surrounding program, and
    compiles another kernel for that.
    """
    if OLD_JAX:
        pytest.skip("XLA removes the barriers around this kernel and divides it in another way")
    text = compiled_pass(jaxq.get_recipe("nvfp4"), (64, 64)).as_text()
    heads = re.findall(r"^%fused\S* \((.*)\) -> f32\[256\] \{\n((?s:.*?))^\}", text, re.MULTILINE)
    scales = [operands for operands, body in heads if "round-nearest-even" in body]
    assert len(scales) == 1
    assert "f32[256]" not in scales[0]


@pytest.mark.parametrize("bits", range(1, 8))
def test_loop_unpacks_codes_in_kernels_of_their_own(bits: int):
    """Checks what would keep XLA on CPU from vectorizing these kernels.

    It would move the distances of shifts out of the loop, and unpack the codes in the kernel that
    cuts the bytes out of the stacked array (JAX 0.12; JAX 0.10 vectorizes that).
    """
    packed = jax.ShapeDtypeStruct((4, 64, 32 * bits), jnp.uint8)

    def function(packed):
        unpacked = lambda part: jaxq.numerics.unpack(part, bits, 256).astype(jnp.float32)
        return jax.lax.map(lambda part: unpacked(part) * 0.5, packed)

    text = jax.jit(function).lower(packed).compile().as_text()
    (state,) = re.findall(r"= \((.*)\) while\(", text)
    assert "u32" not in state
    kernels = [part for part in re.split(r"\n(?=%)", text) if "shift-right-logical(" in part]
    assert kernels
    assert OLD_JAX or not any("dynamic-slice(" in kernel for kernel in kernels)


@pytest.mark.parametrize("name", ["nf4", "fp4_bnb", "iq4"])
def test_codes_of_16_levels_are_decoded_without_look_ups(name: str):
    codes = jax.ShapeDtypeStruct((8,), jnp.uint8)
    text = jax.jit(lambda codes: jaxq.decode(codes, name)).lower(codes).as_text()
    assert "gather" not in text


@pytest.mark.parametrize("name", ["int8", "float4_e2m1fn"])
def test_stochastic_cast_has_no_minimum(name: str):
    """Counts minima of results, because LLVM takes long to compile those of random bits."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    function = jax.jit(lambda x, key: jaxq.cast(x, name, rounding="stochastic", key=key))
    text = function.lower(jax.ShapeDtypeStruct((8, 8), jnp.float32), key).as_text()
    assert "stablehlo.minimum" not in text
    assert re.findall(r"stablehlo.clamp.*f32", text) == []


def test_gradient_of_scan_keeps_one_array_of_keys():
    """Counts arrays, because each one that a loop keeps is a kernel in both loops."""

    def loss(x, weights, keys):
        def step(x, parts):
            w, key = parts
            product = (((1,), (0,)), ((), ()))
            return jaxq.dot_general(x, w, product, recipe="nvfp4_training", key=key), None

        return jax.lax.scan(step, x, (weights, keys))[0].sum()

    x = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    weights = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weights, keys).jaxpr
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    kept = [v for v in forward.outvars if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key)]
    assert len(kept) == 1


def test_statistics_of_equal_tensors_are_traced_once():
    """Counts reductions: inner functions that are traced again would appear again in the text.

    Each product reduces its two operands for their scales; its statistics add no reductions.
    """

    def reductions(layers: int) -> int:
        params = {f"w{i}": jnp.ones((8, 8)) for i in range(layers)}

        def loss(params, x):
            for w in params.values():
                x = x @ w
            return x

        def objective(params, state):
            return jaxq.quantize_fn(loss, state)(params, jnp.ones((4, 8))).sum()

        state = monitor(loss, {"": "int8_tensor"})(params, jnp.ones((4, 8)))
        return jax.jit(jax.grad(objective, (0, 1))).lower(params, state).as_text().count("reduce(")

    assert reductions(4) == reductions(2) + 2 * 2


@pytest.mark.parametrize(
    "fmt", data.each_format(jaxq.formats.FORMATS.values()), ids=lambda fmt: fmt.name
)
def test_cast_with_gradient_needs_no_temporary(fmt):
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)

    def both(x, cotangent):
        y, pull = jax.vjp(lambda x: jaxq.cast(x, fmt), x)
        return y, pull(cotangent)[0]

    compiled = jax.jit(both).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0


FIRST_PROGRAM = """
import jax, numpy, jaxq

compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: event.endswith("backend_compile_duration") and compilations.append(1)
)
f = jax.jit(lambda x: jaxq.fake_quant(x, "int8_channel"))
g = jax.jit(lambda x: jaxq.grad_cast(x, "int8_channel"))
for x in numpy.eye(3, dtype="float32"), numpy.ones((3, 3), "float32"):
    f(x), g(x)
print(len(compilations))
"""


def test_first_program_compiles_once():
    """Runs in a new process, because other tests have imported modules that load on demand."""
    run = subprocess.run([sys.executable, "-c", FIRST_PROGRAM], capture_output=True, text=True)
    assert run.stdout == "2\n", run.stderr  # One program per function.


@pytest.mark.parametrize("name", data.each(data.structures(), data.few()))
def test_quantizer_temporaries_are_bounded(name: str):
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)

    def both(x, cotangent):
        y, pull = jax.vjp(lambda x: jaxq.fake_quant(x, name), x)
        return y, pull(cotangent)[0]

    compiled = jax.jit(both).lower(x, x).compile()
    blocks = np.prod(jaxq.get_recipe(name).cut(x.shape).counts)
    # Range, scale, inverse scale and zero point of each block, or partial maxima of long rows.
    bound = 36 * blocks + 9 * x.size // 32
    if jaxq.get_recipe(name).scaling.searches_elements:  # Also the elements in blocks, and codes.
        bound = 10 * x.size
    assert compiled.memory_analysis().temp_size_in_bytes <= bound


def compiled_pass(recipe: jaxq.Recipe, shape: tuple[int, ...]):
    """Compiles the forward pass of `fake_quant` under `jax.vjp`."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(lambda x: jax.vjp(lambda x: jaxq.fake_quant(x, recipe), x)[0]).lower(x).compile()


def instructions(compiled) -> dict[str, tuple[int, str]]:
    """Returns the number of elements and the expression of each instruction of a program."""
    entry = compiled.as_text().split("ENTRY")[1].split("\n}")[0]
    results = re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]\S* (.*)", entry)
    return {
        name: (math.prod(int(n) for n in shape.split(",") if n), expression)
        for name, shape, expression in results
    }


@pytest.mark.parametrize(
    ("name", "size", "passes"),
    [
        *[(name, None, 2) for name in ("int8_channel", "fp8_e4m3_tile128", "nvfp4")],
        *[data.slow(name, None, 2) for name in ("int8_token", "int8_tensor", "int4_g128")],
        *[data.slow(name, None, 2) for name in ("nf4_g64", "mxfp8_e4m3")],
        *[("uint4_g128", None, 3), ("q4_0", None, 3)],
        *[data.slow(name, None, 3) for name in ("uint8_channel", "q4_1")],
        ("mxfp4", 32, 2),
        *[data.slow(*case) for case in (("int4_g128", 128, 2), ("nf4_g64", 64, 2))],
        data.slow("nvfp4", 16, 2),
    ],
)
def test_quantizer_reads_tensor_once_per_range_end_and_once_more(name, size, passes):
    """Checks the number of passes, and that the tensor is neither copied nor transposed.

    Recipes with a two-sided range need one more pass. `size` is a block size along axis 0.
    """
    recipe = jaxq.get_recipe(name)
    if size:
        recipe = dataclasses.replace(recipe, granularity=jaxq.PerBlock(size, axes=0))
    steps = instructions(compiled_pass(recipe, (256, 512)))
    (x,) = [name for name, (_, expression) in steps.items() if expression.startswith("parameter")]
    assert (
        sum(f"{x})" in expression or f"{x}," in expression for _, expression in steps.values())
        == passes
    )
    large = [expression for size, expression in steps.values() if size >= 256 * 512]
    assert sum(not expression.startswith(("parameter", "bitcast(")) for expression in large) == 1


@pytest.mark.parametrize(
    ("granularity", "one_in"),
    [
        *[data.slow(jaxq.PerBlock(size), None) for size in (16, 64, 128)],
        (jaxq.PerBlock(32), None),
        *[(jaxq.PerToken(), None), (jaxq.PerTensor(), 32), (jaxq.PerChannel(-1), 16)],
        *[(jaxq.PerBlock(128, axes=0), 16), (jaxq.PerBlock((128, 128)), 100)],
    ],
    ids=str,
)
def test_absmax_needs_little_temporary_memory(granularity, one_in: int | None):
    x = jax.ShapeDtypeStruct((512, 1003 if granularity == jaxq.PerToken() else 1024), jnp.float32)
    cut = Cut(x.shape, granularity.block(x.shape))
    compiled = jax.jit(lambda x: absmax(cut.split(x), cut)).lower(x).compile()
    bound = 4 * x.size // one_in if one_in else 0
    assert compiled.memory_analysis().temp_size_in_bytes <= bound


@pytest.mark.parametrize(
    "name",
    data.each(
        ["int4_g128", "nf4_g64", "mxfp4", "nvfp4", "int2_g64", "binary_absmean"],
        ["mxfp4", "int2_g64"],
    ),
)
def test_packing_needs_no_temporary_of_codes(name: str):
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    compiled = jax.jit(lambda x: jaxq.quantize(x, name)).lower(x).compile()
    blocks = np.prod(jaxq.get_recipe(name).cut(x.shape).counts)
    # Codes would need a byte per element; partial sums of a mean take a fifth of that.
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * blocks + x.size // 4


@pytest.mark.parametrize("bits", range(1, 17))
def test_unpack_has_few_equations(bits: int):
    """Checks that equations combine the bytes of eight codes, but do not compute each code."""
    packed = jax.ShapeDtypeStruct((4, 16 * bits), jnp.uint8)
    jaxpr = jax.make_jaxpr(lambda packed: jaxq.numerics.unpack(packed, bits, 128))(packed)
    assert equations(jaxpr.jaxpr) <= (15 if bits in (1, 2, 4, 8, 16) else 8 * bits + 35)


@pytest.mark.parametrize("name", data.each(["int3_g128", "q5_0", "mxfp6_e2m3"], ["mxfp6_e2m3"]))
def test_codes_that_share_bytes_are_computed_once(name: str):
    """Checks that the step that writes the bytes reads packed words, not the tensor."""
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    compiled = jax.jit(lambda x: jaxq.quantize(x, name)).lower(x).compile()
    steps, size = instructions(compiled), x.size * jaxq.get_recipe(name).element.bits // 8
    (tensor,) = [name for name, (_, text) in steps.items() if text.startswith("parameter")]
    (written,) = [text for n, text in steps.values() if n == size]
    assert tensor not in re.findall(r"%[\w.-]+", written.split(")")[0])
