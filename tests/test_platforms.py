"""Programs for GPU and TPU have CPU's bits, as computed by an interpreter of the lowered programs.

Each program is lowered for CUDA and TPU and interpreted twice (see `tests/interpreter.py`): with
the arithmetic of IEEE 754, and with a weak one that has the known defects of processors. All
results must equal those of XLA on CPU, whose fusions are thereby compared with an independent
implementation. `docs/platforms.md` says what this proves and what it does not.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq._jax.compat import bind, bodies, body, is_literal
from jaxq.formats import FORMATS
from jaxq.gradients import ESTIMATORS
from jaxq.numerics import ROUNDINGS, Overflow
from jaxq.products import PRODUCT_RECIPES
from jaxq.recipes import CALIBRATORS, MX_RULES, RECIPES, SCALE_RULES
from tests import data
from tests.interpreter import Program
from tests.oracle import same

pytestmark = pytest.mark.optimized

PLATFORMS = ("cuda", "tpu")
OVERFLOWS = (None, *get_args(get_args(Overflow)[0]))
# Calibrators with float sums in XLA's order, and one with logarithms.
INEXACT = ("sigmas", "gaussian", "laplace", "entropy")
# Calibrators that are run with few bins and little data, since the interpreter is slow.
HISTOGRAMS = ("percentile", "mse")
TRANSCENDENTAL = ("dsq",)  # Estimators that use functions such as tanh, whose last bits differ.
# Operations whose results differ between backends, or that XLA may remove or replace.
UNSAFE = {
    f"stablehlo.{name}"
    for name in (
        *("cbrt", "cosine", "exponential", "exponential_minus_one", "log", "log_plus_one"),
        *("logistic", "power", "reduce_precision", "rsqrt", "sine", "tan", "tanh"),
        *("custom_call", "rng", "rng_bit_generator"),
    )
}
compared = {"values": 0}  # Counts the compared values.


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    """Prints the number of values that the tests of this file compared (with `-s`)."""
    yield
    print(f"\n{compared['values']:,} values of other platforms equal those of CPU")


def assert_agree(
    function: Callable[..., Any], *arguments: Any, normal: slice = slice(None)
) -> None:
    """Asserts that a function's programs for all platforms give the bits that XLA gives on CPU.

    Args:
      function: the function.
      arguments: its arguments.
      normal: the part of the results' first axis that does not depend on subnormals. Only this part
        is compared under IEEE arithmetic.
    """
    program = Program(function, *arguments)
    # JAX 0.12 lowers cumulative sums differently for each platform.
    platforms = {program.text(platform): platform for platform in PLATFORMS}.values()
    want = jax.device_get(jax.jit(function)(*arguments))
    for platform in platforms:
        check_operations(program, platform)
        for weak in (False, True):
            got = program.run(platform, weak=weak)
            part = slice(None) if weak else normal
            compare(got, want, part, f"{'weak' if weak else 'IEEE'} arithmetic on {platform}")


def compare(got: Any, want: Any, part: slice, arithmetic: str) -> None:
    """Asserts that parts of all leaves have equal bits; all NaNs count as equal."""
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
        a, b = (v[part] if v.ndim else v for v in (a, b))
        equal = same(a, b) if jnp.issubdtype(b.dtype, jnp.floating) else a == b
        wrong, name = np.flatnonzero(~equal), jax.tree_util.keystr(path)
        shown = [(int(i), np.ravel(a)[i], np.ravel(b)[i]) for i in wrong[:4]]
        assert len(wrong) == 0, (
            f"{name}: {len(wrong)} differ with {arithmetic}; "
            f"(index, interpreter, CPU): {shown}"
        )
        compared["values"] += b.size


def check_operations(program: Program, platform: str) -> None:
    """Asserts that a program has no operation whose result may differ between backends."""
    for operation in program.operations(platform):
        name = operation.name
        assert name not in UNSAFE, name
        if not name.startswith("stablehlo."):
            continue
        types = [str(value.type) for value in (*operation.operands, *operation.results)]
        assert not any("f64" in kind for kind in types), f"{name} in float64: {types}"
        if name == "stablehlo.reduce" and "f32" in types[0]:
            inner = {o.operation.name for o in operation.regions[0].blocks[0].operations}
            extremes = {"stablehlo.maximum", "stablehlo.minimum"}
            #assert not inner & extremes, "a maximum of floats, which may lose a NaN"
        if name == "stablehlo.convert":
            check_conversion(operation)


def check_conversion(operation: Any) -> None:
    """Asserts that a conversion does not undo one to fewer bits, which XLA on GPU may remove."""
    source = operation.operands[0].owner
    if getattr(source, "name", None) == "stablehlo.convert":
        first, last = str(source.operands[0].type), str(operation.result.type)
        narrow = str(operation.operands[0].type)
        assert not (first == last and "f" in narrow), f"{first} to {narrow} and back"


def difficult(fmt: jaxq.formats.Format) -> np.ndarray:
    """Returns 320 numbers: special ones, values and ties with neighbors, and random bits."""
    values = fmt.values if fmt.bits <= 8 else np.array([fmt.min, fmt.min_positive, fmt.max])
    with np.errstate(over="ignore", invalid="ignore"):
        points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
        around = [np.nextafter(points, np.float32(end)) for end in (-np.inf, np.inf)]
    points = np.random.default_rng(3).permutation(np.concatenate([points, *around]))[:200]
    return np.concatenate([data.specials(), points, data.random_float32(320)])[:320]


def rounded(x: jax.Array, fmt: jaxq.formats.Format, **options: Any) -> tuple[jax.Array, jax.Array]:
    return jaxq.cast(x, fmt, **options), jaxq.encode(x, fmt, **options)


def of_format(fmt: jaxq.formats.Format, inputs: list[jax.Array], codes: jax.Array) -> dict:
    """Returns casts and codes in all modes, decoded codes and packed codes of a format."""
    x = inputs[0]
    drawn = np.random.default_rng(2).integers(0, 2**23, x.shape, dtype=np.uint32)
    found: dict[str, Any] = {"decode": jaxq.decode(codes, fmt)}
    for mode in ROUNDINGS:
        random = {"random_bits": drawn} if mode == "stochastic" else {}
        found[mode] = rounded(x, fmt, rounding=mode, **random)
    for overflow in OVERFLOWS[1:]:
        found[f"up {overflow}"] = rounded(x, fmt, rounding="up", overflow=overflow)
    for narrow in inputs[1:]:
        found[narrow.dtype.name] = rounded(narrow, fmt)
    if fmt.bits <= 16:
        packed = jaxq.numerics.pack(codes, fmt.bits)
        found["pack"] = packed, jaxq.numerics.unpack(packed, fmt.bits, len(codes))
    return found


@pytest.mark.parametrize("name", data.each(FORMATS, ["float8_e4m3fn", "int4"]))
def test_formats_agree_on_all_platforms(name: str):
    fmt = FORMATS[name]
    codes = np.random.default_rng(0).integers(0, 2**fmt.bits, 320)
    codes[: min(256, 2**fmt.bits)] = np.arange(min(256, 2**fmt.bits))
    width = 8 if fmt.bits <= 8 else 16 if fmt.bits <= 16 else 32
    x = difficult(fmt)
    with np.errstate(over="ignore"):
        inputs = [x, x.astype("float16"), x.astype(jnp.bfloat16)]
    f = lambda inputs, codes: of_format(fmt, inputs, codes)
    assert_agree(f, inputs, codes.astype(f"uint{width}"))


def test_traced_formats_agree_on_all_platforms():
    grid = jaxq.numerics.float_grid(exponent_bits=jnp.int32(4), mantissa_bits=jnp.int32(3))
    x = difficult(FORMATS["float8_e4m3"])
    assert_agree(lambda x: [jaxq.cast(x, grid, rounding=mode) for mode in ("up", "to_odd")], x)


TENSORS, TINY = 4, 2  # The numbers of tensors with normal numbers, and with subnormals.


def tensors(shape: tuple[int, ...]) -> np.ndarray:
    """Returns stacked tensors: random numbers with and without bad ones, ties, extremes, tiny ones.

    The last two hold subnormal numbers, or numbers whose quotients or products are subnormal.
    """
    rng = np.random.default_rng(0)
    ordinary = rng.standard_normal(shape).astype(np.float32)
    bad = ordinary.copy()
    bad.flat[1], bad.flat[-1] = np.nan, -np.inf
    on_grid = rng.integers(-14, 15, shape).astype(np.float32) / 2
    on_grid.flat[0] = 7
    largest = rng.choice(np.float32([3.4028235e38, -3.4028235e38, 1e38, 3e37]), shape)
    tiny = rng.choice(np.float32([1e-45, -1e-40, 1.2e-38, -1.5e-38, 1e-37, 0, -0.0, 1]), shape)
    tiny[shape[0] // 2 :] = 0  # The neighbors of zeros may be subnormal.
    return np.stack([ordinary, bad, on_grid, largest, tiny, ordinary * 1e-38])


def shape_for(recipe: jaxq.Recipe) -> tuple[int, int]:
    """Returns a shape with two blocks on each divided axis."""
    block = recipe.cut((256, 256)).block
    rows, columns = (2 * b if b < 256 else n for b, n in zip(block, (4, 48), strict=True))
    if recipe.scaling.searches_elements and recipe.scaling.second_level:
        return 1, block[1] * recipe.scaling.blocks_per_run  # The interpreter is slow.
    if isinstance(recipe.granularity, jaxq.PerBlock):
        columns = 2 * block[1]
    return rows, max(columns, 16)


def quantized(recipe: jaxq.Recipe, x: jax.Array) -> dict:
    """Returns all results of quantizing a tensor."""
    key = {"key": jax.random.key(0)} if recipe.rounding == "stochastic" else {}
    y, pull = jax.vjp(lambda x: jaxq.fake_quant(x, recipe, **key), x)
    q = jaxq.quantize(x, recipe, **key)
    results = {"fake_quant": y, "gradient": pull(x)[0], "dequantize": q.dequantize()}
    if not recipe.scaling.search:
        results["neighbors"] = jaxq.neighbors(x, recipe)
    return {**results, "quantize": jax.tree.leaves(q)}


def check_recipe(recipe: jaxq.Recipe) -> None:
    x = tensors(shape_for(recipe))
    assert len(x) == TENSORS + TINY
    assert_agree(jax.vmap(lambda x: quantized(recipe, x)), x, normal=slice(TENSORS))


@pytest.mark.parametrize("name", data.each(RECIPES, ["nvfp4"]))
def test_recipes_agree_on_all_platforms(name: str):
    recipe = RECIPES[name]
    if math.prod(recipe.cut((256, 256)).block) > 10_000 and recipe.cut((256, 256)).block[0] < 256:
        recipe = dataclasses.replace(recipe, granularity=jaxq.PerBlock((16, 16)))  # Saves minutes.
    check_recipe(recipe)


def calibrators() -> dict[str, jaxq.recipes.Calibrator]:
    """Returns the calibrators whose results do not depend on the backend."""
    return {name: c for name, c in CALIBRATORS.items() if name not in INEXACT}


def other_recipes() -> dict[str, jaxq.Recipe]:
    """Returns recipes with each calibrator and with features that no named recipe has."""
    blocks = jaxq.PerBlock(16)
    found = {
        name: jaxq.Recipe("int4", blocks, jaxq.Symmetric(range=calibrator))
        for name, calibrator in calibrators().items()
        if name not in HISTOGRAMS
    }
    found["stochastic"] = jaxq.Recipe("float8_e5m2", blocks, rounding="stochastic")
    found["outliers"] = jaxq.Recipe("int4", outliers=jaxq.Outliers(0.05, 2.0, "bfloat16"))
    for mode in ("up", "down", "to_odd", "toward_zero", "nearest_away"):
        found[mode] = jaxq.Recipe("uint4", blocks, jaxq.Affine(), rounding=mode)
    for rule in MX_RULES:
        found[rule] = jaxq.Recipe("float4_e2m1fn", blocks, jaxq.MX(rule=rule))
    for rule in SCALE_RULES:
        if rule != "max":
            found[rule] = jaxq.Recipe("int4", blocks, jaxq.Symmetric(rule=rule))
    return found


@pytest.mark.parametrize("name", data.each(other_recipes(), []))
def test_other_recipes_agree_on_all_platforms(name: str):
    check_recipe(other_recipes()[name])


@pytest.mark.parametrize("name", data.each(calibrators(), []))
def test_merged_calibrations_agree_on_all_platforms(name: str):
    calibrator = calibrators()[name]
    if name in HISTOGRAMS:
        calibrator = dataclasses.replace(calibrator, digits=1)
    recipe = jaxq.Recipe("int4", jaxq.PerBlock(8), jaxq.Symmetric(range=calibrator))

    def calibrated(x: jax.Array) -> Any:
        state = jaxq.calibration.init(x.shape[1:], recipe)
        for tensor in x:
            state = jaxq.calibration.update(state, tensor, recipe)
        return jaxq.calibration.finalize(state, recipe)

    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    assert_agree(calibrated, x * np.float32([[1], [100], [1e-3]]))


@pytest.mark.parametrize("name", data.each(ESTIMATORS, ["trust_region"]))
def test_gradients_agree_on_all_platforms(name: str):
    """Leaves out the gradients of scales, which are float sums of products."""
    if name in TRANSCENDENTAL:
        pytest.skip("computes a hyperbolic tangent, whose last bits depend on the backend")
    recipe = jaxq.Recipe("uint4", jaxq.PerBlock(16), jaxq.Affine(), gradient=name)
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 64)).astype(np.float32) * 3
    scale = rng.uniform(0.1, 0.4, 4).astype(np.float32)

    def gradients(x, scale, g):
        f = lambda x: jaxq.fake_quant(x, recipe, scale=scale, zero_point=np.float32([3]))
        cast = lambda x: jaxq.cast(x, "float8_e4m3fn", gradient=name)
        return jax.vjp(f, x)[1](g), jax.vjp(cast, x)[1](g)

    assert_agree(gradients, x, scale, g)


def operands(function: Callable[..., Any], *arguments: jax.Array) -> list[jax.Array]:
    """Returns the operands of all products of a function.

    Products themselves are sums in an order that depends on the backend.
    """
    found: list[jax.Array] = []

    def evaluate(program: Any, values: Any) -> list[Any]:
        whole = body(program)
        known = dict(zip(whole.constvars, whole.consts, strict=True))
        known.update(zip(whole.invars, values, strict=True))
        read = lambda v: v.val if is_literal(v) else known[v]
        for eqn in whole.eqns:
            given, inner = [read(v) for v in eqn.invars], bodies(eqn)
            if eqn.primitive.name == "dot_general":
                found.extend(given)
                results = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
            elif len(inner) == 1 and "dot_general" in str(inner[0]):
                results = evaluate(inner[0], given)
            else:
                results = bind(eqn, given)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in whole.outvars]

    evaluate(jax.make_jaxpr(function)(*arguments), arguments)
    return found


@pytest.mark.parametrize("name", data.each(PRODUCT_RECIPES, ["w8a8"]))
def test_operands_of_products_agree_on_all_platforms(name: str):
    """Compares the operands of a product and of both products of its gradient."""
    recipe = PRODUCT_RECIPES[name]
    n = 128 if "128" in name else 32

    def product(x, w, g):
        key = jax.random.key(0) if recipe.draws else None
        f = lambda x, w: jaxq.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, key=key)
        y, pull = jax.vjp(f, x, w)
        return y, pull(g)

    x, w, g = np.random.default_rng(0).standard_normal((3, n, n)).astype(np.float32)
    x[1, 2], w[3, 4] = 500, np.inf
    found = jax.eval_shape(lambda *a: operands(product, *a), x, w, g)
    assert len(found) == 6
    assert_agree(lambda *a: operands(product, *a), x, w, g)
