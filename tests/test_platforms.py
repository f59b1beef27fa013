"""Programs for GPU and TPU have CPU's bits, as computed by an interpreter of the lowered programs.

Each program is lowered for CUDA and TPU and interpreted twice (see `tests/interpreter.py`): with
the arithmetic of IEEE 754, and with a weak one that has the known defects of processors. All
results must equal those of XLA on CPU, whose fusions are thereby compared with an independent
implementation. `docs/platforms.md` says what this proves and what it does not.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import jaxq
from jaxq._ggml.searches import product, sums
from jaxq._jax.arithmetic import logarithm, square_root
from jaxq._jax.compat import bind, bodies, body, is_literal
from jaxq.formats import FORMATS
from jaxq.gradients import ESTIMATORS
from jaxq.interop import gguf
from jaxq.numerics import ROUNDINGS, Overflow
from jaxq.products import PRODUCT_RECIPES
from jaxq.ptq._solvers import _gptq_algorithm, _importance_matrix
from jaxq.ptq._transformations import _rotate_inputs
from jaxq.quantizers import (
    Levels,
    enclosing_grid_values,
    levels,
    snap,
    values_of,
    with_levels,
    with_minima,
)
from jaxq.recipes import CALIBRATORS, MX_RULES, RECIPES, SCALE_RULES
from jaxq.serving import CACHE_RECIPES, CacheScales, KVCache
from tests import data
from tests.interpreter import Program
from tests.oracle import same

pytestmark = pytest.mark.optimized

PLATFORMS = ("cuda", "tpu")
OVERFLOWS = (None, *get_args(get_args(Overflow)[0]))
INEXACT = ("sigmas", "gaussian", "laplace")  # Calibrators with float sums in XLA's order.
# Calibrators that are run with few bins and little data, since the interpreter is slow.
HISTOGRAMS = ("percentile", "mse", "entropy")
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
    function: Callable[..., Any],
    *arguments: Any,
    normal: slice = slice(None),
    maxima: bool = False,
) -> None:
    """Asserts that a function's programs for all platforms give the bits that XLA gives on CPU.

    Args:
      function: the function.
      arguments: its arguments.
      normal: the part of the results' first axis that does not depend on subnormals. Only this part
        is compared under IEEE arithmetic.
      maxima: True to allow maxima of floats, in a program in which none of them can be NaN.
    """
    program = Program(function, *arguments)
    # JAX 0.12 lowers cumulative sums differently for each platform.
    platforms = {program.text(platform): platform for platform in PLATFORMS}.values()
    want = jax.device_get(jax.jit(function)(*arguments))
    for platform in platforms:
        check_operations(program, platform, maxima)
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
            f"{name}: {len(wrong)} differ with {arithmetic}; (index, interpreter, CPU): {shown}"
        )
        compared["values"] += b.size


def check_operations(program: Program, platform: str, maxima: bool) -> None:
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
            assert maxima or not inner & extremes, "a maximum of floats, which may lose a NaN"
        if name == "stablehlo.scatter" and "f32" in types[0]:
            inner = {o.operation.name for o in operation.regions[0].blocks[0].operations}
            assert "stablehlo.add" not in inner, "a sum of floats by indices, in any order"
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
    maxima = recipe.scaling.searches_elements  # Elements that are not finite become zero before.
    f = jax.vmap(lambda x: quantized(recipe, x))
    assert_agree(f, x, normal=slice(TENSORS), maxima=maxima)


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


@pytest.mark.parametrize("name", data.each(("mse", "entropy"), ["entropy"]))
def test_losses_of_ranges_agree_on_all_platforms(name: str):
    """Looks inside, because ranges may be equal although the losses of all ranges differ."""
    calibrator = dataclasses.replace(CALIBRATORS[name], digits=3, tries=4)
    cut = jaxq.Recipe("int4", jaxq.PerBlock(64)).cut((1, 64))

    def losses(x: jax.Array) -> list[jax.Array]:
        found = []
        for two_sided in (False, True):
            state = calibrator.measure(cut.split(x), cut, two_sided)
            found.append(calibrator._losses(state, FORMATS["int4"], two_sided)[1])
        return found

    assert_agree(losses, np.random.default_rng(0).standard_cauchy((1, 64)).astype(np.float32))


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


def blocks() -> np.ndarray:
    """Returns 256 numbers: random ones, ties, zeros of both signs, and small ones."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(256).astype(np.float32)
    x[64:128] = rng.integers(-14, 15, 64) / 2
    x[128:160] = rng.choice(np.float32([0, -0.0]), 32)
    x[160:192] = np.abs(x[160:192])
    x[192:224] *= np.float32(1e-3)
    return x


@pytest.mark.parametrize("name", data.each(gguf.TYPES, ["q4_0", "tq1_0"]))
def test_bytes_of_gguf_agree_on_all_platforms(name: str):
    """Compares quantization to bytes, with and without importance, and what is read from them."""
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 256, (12, gguf.TYPES[name].size), dtype=np.uint8)
    stored[:, 0] |= 8  # Scales of MXFP4 whose products with codes are normal numbers.

    def converted(x, importance, stored):
        q = gguf.unpack(stored, name)
        return {
            "plain": gguf.quantize_with_values(x, name),
            "importance": gguf.quantize(x, name, importance=importance),
            "read": (gguf.dequantize(stored, name), q.dequantize()),
            "unpacked": jax.tree.leaves(q),
            "packed": gguf.pack(q, name),
        }

    importance = rng.uniform(0.1, 2, 256).astype(np.float32)
    assert_agree(converted, blocks(), importance, stored, maxima=True)


@pytest.mark.parametrize("name", data.each(gguf.TYPES, ["q4_0"]))
def test_large_numbers_in_gguf_agree_on_all_platforms(name: str):
    """Compares what is read from the bytes, and codes where it is a number.

    Sums of large numbers overflow. A scale may then be NaN; its bits and codes may differ.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 256)).astype(np.float32) * np.float32(1e19)
    x[0] = rng.choice(np.float32([3.4028235e38, -3.4028235e38, 1e38, 3e37]), 256)

    def converted(x, importance):
        found = []
        for options in ({}, {"importance": importance}):
            q = gguf.unpack(gguf.quantize(x, name, **options), name)
            values = q.dequantize()
            codes = jnp.where(jnp.isnan(values), 0, q.unpack().astype(jnp.int32))
            found.append((values, codes))
        return found

    assert_agree(converted, x, rng.uniform(0.1, 2, 256).astype(np.float32), maxima=True)


def test_square_roots_agree_on_all_platforms():
    assert_agree(square_root, difficult(FORMATS["float16"]))


def test_logarithms_agree_on_all_platforms():
    x = np.abs(difficult(FORMATS["float16"]))
    x = x[np.isfinite(x) & (x >= np.finfo(np.float32).tiny)]
    near_one = np.random.default_rng(0).uniform(0.5, 2, 2000).astype(np.float32)
    assert_agree(logarithm, np.concatenate([x, near_one]))


def test_sums_in_order_of_ggml_agree_on_all_platforms():
    x = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    assert_agree(lambda x: sums(lambda v: (product(v, v, v),), x), x)


def adapted_model(scaling: float) -> tuple[Callable[..., Any], Any, Any]:
    """Returns a model, its stored parameters and adapters whose sums are exact in any order."""
    rng = np.random.default_rng(0)
    model = lambda params, x: x @ params["w"]
    params = {"w": rng.standard_normal((32, 8)).astype(np.float32)}
    a, b = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((32, 2), (2, 8)))
    state = jaxq.lora.Adapted({"w": jaxq.lora.LoRA(a, b, scaling)}, (jaxq.Rule("w", "int4_g32"),))
    return model, jaxq.quantize_weights(model, state.rules)(params, np.eye(32)), state


def test_initial_adapters_agree_on_all_platforms():
    method = jaxq.lora.QLoRA(rank=4)
    w = np.random.default_rng(0).standard_normal((48, 8)).astype(np.float32)
    assert_agree(lambda w: method.fit(w, w, None, "layers/w"), w)


def test_products_with_adapters_agree_on_all_platforms():
    """Multiplies by the identity; the factor of the adapter is a power of two."""
    model, packed, state = adapted_model(0.5)

    def results(packed, state, g):
        run = lambda state: jaxq.quantize_fn(model, state)(packed, np.eye(32, dtype=np.float32))
        y, pull = jax.vjp(run, state)
        return y, pull(g)[0].adapters

    g = np.random.default_rng(0).integers(-3, 4, (32, 8)).astype(np.float32)
    assert_agree(results, packed, state, g)


def test_merged_adapters_agree_on_all_platforms():
    """Leaves out the errors, which are quotients of norms."""
    model, packed, state = adapted_model(1 / 3)

    def merged(packed, state):
        found = jaxq.lora.merge(model, state)(packed, np.eye(32, dtype=np.float32))
        return found.params, jax.tree.leaves(found.packed)

    assert_agree(merged, packed, state)


def steps(tx: optax.GradientTransformation, gradients: Any, updates: bool = True) -> Any:
    """Returns an optimizer's state after steps with stacked gradients, and the updates or None."""

    def step(state: Any, gradient: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # Adam divides by `decay ** count`.
            update, state = tx.update(gradient, state, gradient)
        return state, update if updates else None

    return jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], gradients)), gradients)


# If a decay and its complement are powers of two, no product in Adam's moments is rounded.
STATES = {
    "adam8bit": jaxq.optim.ADAM8BIT,
    "stochastic": jaxq.Recipe("float8_e4m3fn", jaxq.PerBlock(64), rounding="stochastic"),
    "affine": jaxq.Recipe("uint4", jaxq.PerBlock(32), jaxq.Affine()),
}


@pytest.mark.parametrize("name", data.each(STATES, ["stochastic"]))
def test_states_of_optimizers_agree_on_all_platforms(name: str):
    """Leaves out the updates, which are quotients by sums."""
    key = jax.random.key(0) if name == "stochastic" else None
    tx = jaxq.optim.quantize_state(optax.scale_by_adam(0.5, 0.5), STATES[name], min_size=1, key=key)
    gradients = np.random.default_rng(0).standard_normal((2, 2, 64)).astype(np.float32)
    gradients[:, 0, :8] *= np.float32([0, 1e-30, 1e30, 1e-3, 1e-4, 1e-5, 1e-6, -1e-7])
    gradients[1, 1, 5] = np.nan
    assert_agree(lambda g: steps(tx, {"w": g}, updates=False), gradients)


def test_quantized_gradients_agree_on_all_platforms():
    """Compares the quantized gradients and the residuals of three steps."""
    rules = [("f32", "int4_g32"), ("bf16", jaxq.Recipe("float8_e5m2", rounding="stochastic"))]
    tx = jaxq.optim.quantize_gradients(rules, key=jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((3, 2, 32)).astype(np.float32)
    gradients = {"f32": x.copy(), "bf16": (x * 7).astype(jnp.bfloat16)}
    gradients["f32"][1, 0, 3] = np.inf
    assert_agree(lambda g: steps(tx, g), gradients)


def test_updates_of_parameters_agree_on_all_platforms():
    w, u = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    params = {"f32": w, "bf16": w.astype(jnp.bfloat16), "f16": w.astype(np.float16)}
    rules = {"f32": "float8_e4m3fn"}

    def updated(params, u):
        updates = jax.tree.map(lambda p: u.astype(p.dtype), params)
        apply = functools.partial(jaxq.optim.apply_updates, params, updates, fmt=rules)
        return apply(key=jax.random.key(0)), apply(rounding="nearest_even")

    assert_agree(updated, params, u * np.float32(1e-2))


def measured(x: jax.Array, y: jax.Array, w: jax.Array) -> dict[str, Any]:
    """Returns the results of the analysis functions that do not depend on the backend."""
    blocks, found = jaxq.PerBlock(12), {}
    for name, recipe in (("format", "float8_e4m3fn"), ("recipe", "int4_g32"), ("affine", "q4_1")):
        for per in (None, blocks):
            usage = jaxq.analysis.code_usage(x, recipe, per=per)
            found[f"codes of {name} per {per}"] = usage.counts, usage.used
        found[f"diagnostics of {name}"] = jaxq.analysis.diagnostics(x, recipe)
    for fmt in ("float8_e5m2", "nf4", "posit8", "int8"):
        found[f"ulps of {fmt}"] = jaxq.analysis.ulp_error(x, y, fmt)
    for per in (None, blocks):
        errors = jaxq.analysis.compare(x, y, per=per)
        found[f"errors per {per}"] = errors.max_error, errors.lost, errors.skipped
    swamped = jaxq.analysis.update_statistics({"w": y}, {"w": w})
    return {**found, "updates": swamped["w"].swamped}


def test_analysis_agrees_on_all_platforms():
    """Compares counts, extremes and elementwise errors; means and logarithms may differ."""
    x = np.random.default_rng(0).standard_normal((2, 96)).astype(np.float32)
    x[0, :8] = 0, np.nan, np.inf, 1e30, -500, 1e-30, 1e-3, 3
    y = (x * np.float32(1.01)).astype(np.float32)
    y[1, :2] = np.nan, x[1, 1]
    # No error is NaN.
    assert_agree(measured, x, y, (50 * x).astype(jnp.bfloat16), maxima=True)


EXACT = (
    *("amax", "smallest", "zeros", "nonfinite", "exponents", "lost", "clipped", "flushed"),
    *("codes_used", "scale_amax", "scale_smallest", "scale_ends"),
)


@pytest.mark.slow
def test_monitored_counts_and_extremes_agree_on_all_platforms():
    request = jaxq.analysis.Monitoring(
        tensors=("lhs", "rhs"), statistics=EXACT, counterfactuals=["nvfp4", "int8_token"]
    )
    loss = lambda w, x: (x @ w).sum()
    x, w = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
    x[0, :8] = 0, np.nan, np.inf, 1e30, -500, 1e-30, 1e-3, 3
    state = jaxq.analysis.monitor(loss, "fp8_training", request)(w, x)

    def statistics(w, x):
        objective = lambda state: jaxq.quantize_fn(loss, state)(w, x)
        return jax.grad(objective)(state).statistics()

    assert_agree(statistics, w, x)


@pytest.mark.parametrize("name", data.each(CACHE_RECIPES, ["kv_int8"]))
def test_caches_agree_on_all_platforms(name: str):
    """Compares what is stored and dequantized; attention computes exponentials and sums."""
    recipe = CACHE_RECIPES[name]
    recipe = dataclasses.replace(recipe, residual_length=min(recipe.residual_length, 4))
    count = max(2 * recipe.step, 8)
    static = [isinstance(half.granularity, jaxq.PerTensor) for half in recipe.recipes]
    scales = CacheScales(*(0.01 if is_static else None for is_static in static))

    def stored(keys, values):
        cache = KVCache.empty((count, 1, 32), recipe, scales=scales)
        for tokens in (slice(count // 2 + 1), slice(count // 2 + 1, None)):
            cache = cache.append(keys[tokens], values[tokens])
        return jax.tree.leaves(cache), cache.dequantize()

    keys, values = np.random.default_rng(0).standard_normal((2, count + 3, 1, 32))
    assert_agree(stored, keys.astype(np.float32), values.astype(np.float32))


STORED = ("int4_g32", "nf4_dq", "nvfp4", "q4_1", "q6_k")


@pytest.mark.parametrize("name", data.each(STORED, ["nvfp4"]))
def test_stored_products_agree_on_all_platforms(name: str):
    """Multiplies by the identity, so that sums are exact in any order."""
    w = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    q = jaxq.quantize(w, name)

    def multiplied(x, q):
        return jaxq.products.stored_dot_general(x, q, (((1,), (1,)), ((), ())), chunk=256)

    assert_agree(multiplied, np.eye(256, dtype=np.float32)[:40], q)


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


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the interpreter of JAX 0.10 overwrites the common start of two variables of a loop",
)
def test_loop_of_gptq_agrees_on_all_platforms():
    """Looks inside, because the factors of a Hessian depend on the backend.

    All products with these factors and their sums are exact, so they do not depend on the order.
    """
    rng = np.random.default_rng(0)
    recipe, n = jaxq.Recipe("int4", jaxq.PerBlock(2)), 40
    weight = rng.integers(-48, 49, (n, 3)).astype(np.float32) / 32
    steps = Levels(np.exp2(rng.integers(-3, -1, weight.shape)).astype(np.float32), None, None)
    errors = np.triu(rng.integers(-2, 3, (n, n)).astype(np.float32) / 4)
    shifts = np.triu(rng.integers(-1, 2, (n, n)).astype(np.float32), 1)
    shifts[4:] = 0  # So that values do not grow.

    def solved(weight, levels, errors, shifts, diagonal):
        feedback = [_gptq_algorithm._Feedback(errors, each) for each in (None, shifts)]
        rounded = [_gptq_algorithm._rounded(weight, levels, each, recipe) for each in feedback]
        return rounded, [
            _gptq_algorithm._order(diagonal, order, recipe) for order in ("static", "group")
        ]

    diagonal = rng.integers(0, 9, n).astype(np.float32)
    assert_agree(solved, weight, steps, errors, shifts, diagonal, maxima=True)


# Recipes of weights with every way to store a zero point, and with narrow scales.
WEIGHTS = {
    "int4_g32": jaxq.get_recipe("int4_g32"),
    "nvfp4": jaxq.get_recipe("nvfp4"),
    "affine": jaxq.Recipe("uint4", jaxq.PerBlock(16), jaxq.Affine()),
    "minima": jaxq.Recipe("uint4", jaxq.PerBlock(16), jaxq.recipes.ScaleAndMin(stored=True)),
}


@pytest.mark.parametrize("name", data.each(WEIGHTS, ["affine"]))
def test_choices_of_solvers_agree_on_all_platforms(name: str):
    """Compares what is stored for chosen values, scales, minima and variables of learned rounding.

    The sums that choose them depend on the backend.
    """
    recipe = WEIGHTS[name]
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 64)).astype(np.float32)
    q = jaxq.quantize(w, recipe)
    factor = rng.uniform(0.4, 1, q.scale.shape).astype(np.float32)
    offset = rng.uniform(-0.5, 0.5, w.shape).astype(np.float32)
    # The sums of these elements and their offsets are near ties.
    step, (below, above) = levels(q), enclosing_grid_values(w, levels(q), recipe)
    middle = values_of((below + above) / 2, step, recipe)
    w[4:] = (middle - offset * (above - below) * step.step)[4:]

    def stored(w, q, factor, offset):
        grid_values, values = snap(w, levels(q), recipe)
        found = {"snapped": (values, jax.tree.leaves(with_levels(q, grid_values)))}
        problem = jaxq.ptq.RoundingProblem(w, q)
        for scales in (False, True):
            variables = {"offset": offset, **({"factor": factor} if scales else {})}
            found[f"signround {scales}"] = jaxq.ptq.SignRound().rounded(variables, problem, recipe)
        found["adaround"] = jaxq.ptq.AdaRound().rounded(offset, problem, recipe)
        if recipe.scaling.zero_point == "minimum":
            found["minima"] = with_minima(q, -factor * q.scales)
        return jax.tree.leaves(found)

    assert_agree(stored, w, q, factor, offset)


def test_statistics_of_inputs_agree_on_all_platforms():
    """Compares counts and largest magnitudes, and the importance that given sums define."""
    x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
    x[0, 2, 2] = np.nan
    mask = np.array([True, False, True, True, True, False])

    def found(x, sums):
        first, second = (jaxq.ptq.collect(tokens, mask, hessian=False) for tokens in x)
        both = first.merge(second)
        known = dataclasses.replace(both, square=sums)
        return both.tokens, both.amax, _importance_matrix._mean_squares(known)

    sums = np.random.default_rng(1).uniform(0, 9, 8).astype(np.float32)
    assert_agree(found, x, sums, maxima=True)  # `collect` takes a NaN from the sum.


def test_changed_inputs_agree_on_all_platforms():
    """Compares the operands of products with factors and rotations, and folded factors."""
    model = lambda params, x: x @ params["w"]
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 16, 16)).astype(np.float32)
    factors = {"w": rng.uniform(0.1, 4, 16).astype(np.float32)}
    signs = {"w": rng.choice(np.float32([-1, 1]), 16)}

    def changed(factors, signs, w, x):
        scales = jaxq.ptq.InputScales(factors, (("w", "w"),), ())
        rotations = jaxq.ptq.InputRotations(signs, (("w", 16),), (("w", "w"),), ())
        found = []
        for change in (scales, rotations):
            quantized = jaxq.quantize_fn(change.apply(model), "w8a8")
            found.append(operands(lambda w, x, run=quantized: run({"w": w}, x), w, x))
            assert len(found[-1]) == 2
        rotated = _rotate_inputs._rotated(w[None], signs["w"][None], 16)
        return found, rotated, scales.fold({"w": w, "norm": x}, {"w": "norm"})[0]

    assert_agree(changed, factors, signs, w, x)


@pytest.mark.parametrize("name", data.each(PRODUCT_RECIPES, ["w8a8"]))
def test_operands_of_products_agree_on_all_platforms(name: str):
    """Compares the operands of a product and of both products of its gradient."""
    recipe = PRODUCT_RECIPES[name]
    n = 128 if "128" in name else 32

    def gradients(x, w, g):
        key = jax.random.key(0) if recipe.draws else None
        f = lambda x, w: jaxq.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, key=key)
        y, pull = jax.vjp(f, x, w)
        return y, pull(g)

    x, w, g = np.random.default_rng(0).standard_normal((3, n, n)).astype(np.float32)
    x[1, 2], w[3, 4] = 500, np.inf
    found = jax.eval_shape(lambda *a: operands(gradients, *a), x, w, g)
    assert len(found) == 6
    assert_agree(lambda *a: operands(gradients, *a), x, w, g)
