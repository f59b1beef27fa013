"""Results for float32 tensors have the same bits with and without `jax_enable_x64`.

Programs are first compared as text, without compilation. Programs whose text differs, for example
in the dtype of constants, run in both modes.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import analysis, optim
from jaxq.formats import FORMATS
from jaxq.gradients import ESTIMATORS
from jaxq.numerics import ROUNDINGS
from jaxq.products import PRODUCT_RECIPES, Hadamard
from jaxq.quantizers import calibration
from jaxq.recipes import CALIBRATORS
from tests import data
from tests.oracle import assert_same

Program = tuple[str, Callable, tuple]

KEY = jax.random.key(0)
X = data.normal((128, 256))
CHANNEL = jaxq.PerChannel((-1,))


def casts() -> Iterator[Program]:
    for name, fmt in FORMATS.items():
        yield f"encode {name}", lambda x, f=fmt: jaxq.encode(x, f), (X,)
        codes = jnp.zeros(4, jax.eval_shape(lambda x, f=fmt: jaxq.encode(x, f), X).dtype)
        yield f"decode {name}", lambda c, f=fmt: jaxq.decode(c, f), (codes,)
    for mode in (*ROUNDINGS, jaxq.Stochastic(8, "B"), jaxq.Stochastic(16, "C")):
        key = KEY if mode == "stochastic" or isinstance(mode, jaxq.Stochastic) else None
        for fmt in ("float4_e2m1fn", "bfloat16", "nf4", "posit8"):
            cast = lambda x, f=fmt, m=mode, k=key: jaxq.cast(x, f, rounding=m, key=k)
            yield f"{fmt} {mode}", cast, (X,)
    widths = jnp.arange(2, 5, dtype=jnp.int32)
    yield "grid", lambda m: jax.vmap(lambda m: jaxq.cast(X[0], jaxq.float_grid(4, m)))(m), (widths,)
    packed = lambda c: jaxq.numerics.unpack(jaxq.numerics.pack(c, 6), 6, 32)
    yield "pack", packed, (jnp.arange(32, dtype=jnp.uint8),)


def recipes() -> Iterator[Program]:
    extra = {
        "search": jaxq.Recipe("int4", jaxq.PerBlock(32), jaxq.Symmetric(search=(1.0, 0.8))),
        "long search": jaxq.Recipe(
            "int4", jaxq.PerBlock(32), jaxq.Symmetric(search=(1.0, 0.9, 0.8, 0.7, 0.6))
        ),
        "outliers": jaxq.Recipe("int4", outliers=jaxq.Outliers(0.01, sigma=2.0)),
        "padded": jaxq.Recipe("int4", jaxq.PerBlock(48, pad=True)),
    }
    for name, recipe in {
        **{n: jaxq.recipes.RECIPES[n] for n in data.few()},
        **extra,
    }.items():
        yield f"fake_quant {name}", lambda x, r=recipe: jaxq.fake_quant(x, r), (X,)
        yield f"quantize {name}", lambda x, r=recipe: jaxq.quantize(x, r), (X,)
    drawn = jaxq.Recipe("int4", CHANNEL, rounding="stochastic")
    yield "stochastic", lambda x, k: jaxq.fake_quant(x, drawn, key=k), (X, KEY)
    yield "gguf", lambda x: jaxq.interop.gguf.pack(jaxq.quantize(x, "q5_1")), (X,)


def more_recipes() -> Iterator[Program]:
    for name in {*data.structures()} - {*data.few()}:
        yield f"fake_quant {name}", lambda x, n=name: jaxq.fake_quant(x, n), (X,)
        yield f"quantize {name}", lambda x, n=name: jaxq.quantize(x, n), (X,)


def ranges() -> Iterator[Program]:
    x = X[:2, :8]
    recipes = [jaxq.Recipe("int4", scaling=jaxq.recipes.SignedScale("float32", stored=True))]
    for name, calibrator in CALIBRATORS.items():
        recipes.append(jaxq.Recipe("int4", scaling=jaxq.Symmetric(name)))
        if calibrator.two_sided:
            recipes.append(jaxq.Recipe("uint4", scaling=jaxq.Affine(name)))
    for recipe in recipes:

        def calibrated(x: jax.Array, r: jaxq.Recipe = recipe) -> Any:
            state = calibration.update(calibration.init(x.shape, r), x, r)
            return calibration.finalize(calibration.merge(state, state, r), r)

        yield repr(recipe.scaling), calibrated, (x,)


def derivatives() -> Iterator[Program]:
    x, scale = X[:2, :8], jnp.full(8, 0.3)
    for name in ESTIMATORS:
        recipe = jaxq.Recipe("int4", CHANNEL, gradient=name)
        loss = lambda x, s, r=recipe: jaxq.fake_quant(x, r, scale=s).sum()
        yield f"gradient {name}", jax.grad(loss, (0, 1)), (x, scale)
    noise = lambda x: jaxq.qat.uniform_noise(x, *jaxq.neighbors(x, "int4_tensor"), KEY)
    yield "uniform_noise", noise, (x,)
    yield "lsq_scale", lambda x: jaxq.qat.lsq_scale(x, "int4_tensor"), (x,)


def products() -> Iterator[Program]:
    for name, recipe in PRODUCT_RECIPES.items():
        key = KEY if recipe.draws else None
        f = lambda x, w, n=name, k=key: jaxq.einsum("mk,kn->mn", x, w, recipe=n, key=k).sum()
        yield f"product {name}", jax.grad(f, (0, 1)), (X[:, :128], X[:, :128])
    more = {
        "native": jaxq.ProductRecipe("int8_token", "int8_tensor", execution="native"),
        "narrow sums": jaxq.ProductRecipe(
            "int8_token", "int8_tensor", execution=jaxq.Accumulation("float16", 8)
        ),
    }
    for name, recipe in more.items():
        f = lambda x, w, r=recipe: jaxq.einsum("mk,kn->mn", x, w, recipe=r)
        yield name, f, (X[:4, :16], X[:16, :4])
    yield "Hadamard signs", Hadamard(16).draw, (KEY,)


def other() -> Iterator[Program]:
    params = {"w": X}
    for kind in (
        optim.quantize_state(optax.sgd(0.1, 0.9)),
        optim.quantize_gradients("int8_tensor"),
    ):
        yield "optimizer", kind.update, (params, kind.init(params), params)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    updated = lambda p, u: optim.apply_updates(p, u, key=KEY)
    yield "apply_updates", updated, (half, params)
    yield "compare", lambda x: analysis.compare(x, x + 1, per=CHANNEL), (X,)
    for name in ("int4_channel", "float8_e4m3fn", "nf4_g64"):
        error = lambda x, n=name: analysis.quantization_error(x, n)
        yield f"quantization_error {name}", error, (X,)
        yield f"code_usage {name}", lambda x, n=name: analysis.code_usage(x, n), (X,)
        yield f"diagnostics {name}", lambda x, n=name: analysis.diagnostics(x, n), (X,)
    yield "kl_of_values", lambda x: analysis.kl_of_values(x, x + 1), (X,)


def text(function: Callable, arguments: tuple) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*arguments)))


GROUPS = (recipes, ranges, more_recipes, casts, derivatives, products, other)


@pytest.mark.parametrize("programs", data.each(GROUPS, (recipes, ranges)))
def test_x64_changes_no_bit(programs: Callable[[], Iterator[Program]]):
    for name, function, arguments in list(programs()):
        narrow = text(function, arguments)
        with jax.enable_x64(True):
            wide = text(function, arguments)
        if narrow == wide:
            continue
        want = jax.tree.leaves(jax.jit(function)(*arguments))
        with jax.enable_x64(True):
            got = jax.tree.leaves(jax.jit(function)(*arguments))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype, name
            assert_same(a, b)
