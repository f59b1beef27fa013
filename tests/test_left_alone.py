"""Operations that are not quantized, and errors that `explain` shares with `quantize_fn`."""

import re

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas, sparse
from jax.interpreters import mlir

import jaxq
from jaxq.models import LEFT_ALONE, QUANTIZED
from tests.oracle import assert_same

SQUARE = np.eye(4, dtype=np.float32) + np.float32(0.1)
SPARSE = sparse.BCOO((SQUARE.ravel(), np.argwhere(SQUARE)), shape=(4, 4))
MATRIX = ("triangular_solve", "cholesky", "lu", "qr", "svd", "eigh", "fft")


def double(x):
    def kernel(x, out):
        out[...] = 2 * x[...]

    return pallas.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def on_host(x):
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def integers(w):
    return (w.astype(jnp.int8) @ jnp.ones((4, 4), jnp.int8)).astype(jnp.float32)


CASES = {
    "bcoo_dot_general": lambda w: sparse.BCOO((w, SPARSE.indices), shape=(4, 4)) @ SQUARE,
    "cholesky": lambda w: lax.linalg.cholesky(w, symmetrize_input=False),
    "dot_general": integers,
    "fft": lambda w: jnp.fft.fft(w).real,
    "lu": lambda w: jax.scipy.linalg.lu_factor(w)[0],
    "pallas_call": double,
    "pure_callback": on_host,
    "qr": lambda w: jnp.linalg.qr(w)[0],
    "triangular_solve": lambda w: jax.scipy.linalg.solve_triangular(w, SQUARE),
}


@pytest.mark.parametrize("operation", CASES)
def test_explain_lists_unquantized_operations(operation):
    function = CASES[operation]
    w = SPARSE.data if operation.startswith("bcoo") else SQUARE
    params = {"odd": w, "plain": SQUARE}
    model = lambda p: function(p["odd"]) @ p["plain"]
    rows = jaxq.explain(model, [("plain", "w8a8")])(params).rows
    row = next(row for row in rows if row.operation == operation)
    reason = LEFT_ALONE.get(operation, "multiplies int8 by int8")
    assert row.recipe.startswith(f"- ({reason}")
    assert "matches it" not in row.recipe
    # A rule that also matches this operation is noted; a rule that matches nothing else raises.
    everything = jaxq.explain(model, [("", "w8a8")])(params)
    noted = [row.recipe for row in everything.rows if "Rule('') matches it)" in row.recipe]
    assert len(noted) == 1
    assert_same(
        jaxq.quantize_fn(model, [("", "w8a8")])(params),
        jaxq.quantize_fn(model, [("plain", "w8a8")])(params),
    )
    for transform in (jaxq.explain, jaxq.quantize_fn):
        with pytest.raises(
            ValueError, match=r"Rule\('odd'\) matches only .*, which cannot be quantized"
        ):
            transform(model, [("odd", "w8a8")])(params)


def test_every_multiplying_primitive_is_listed():
    """Fails if a new JAX adds a multiplying primitive, which must then be listed."""
    tables = [mlir._lowerings, *mlir._platform_specific_lowerings.values()]
    names = {primitive.name for table in tables for primitive in table}
    multiplying = re.compile(
        r"dot|conv_|matm|matv|spm[mv]|solve|attention|fft|eig|^lu$|^qr$|svd|chol|schur|hess|house"
        r"|tridiag|_product|einsum|ffi|pallas|callback|exported"
    )
    others = {"conv_general_dilated_patches", "debug_callback", "custom_linear_solve"}
    found = {name for name in names if multiplying.search(name)} - others
    assert found <= {*QUANTIZED, *LEFT_ALONE}
    assert {"dot_general", "bcoo_dot_general", "ffi_call", *MATRIX} <= found


BLOCKS = jaxq.PerBlock(3)
INT8 = jaxq.get_recipe("int8_tensor")
ASYMMETRIC = jaxq.Recipe("uint8", scaling=jaxq.Affine())
REJECTED = {
    "float8 operands": ("w8a8", jnp.float8_e4m3fn, "must be of dtype"),
    "blocks": (jaxq.ProductRecipe(None, jaxq.Recipe("int8", BLOCKS)), None, "must divide"),
    "hadamard": (jaxq.ProductRecipe(hadamard=jaxq.Hadamard(8, (1,) * 8)), None, "must divide"),
    "native": (
        jaxq.ProductRecipe(INT8, "fp8_e5m2_tensor", execution="native"),
        None,
        "integers by int",
    ),
    "zero point": (jaxq.ProductRecipe(ASYMMETRIC, INT8, execution="native"), None, "no zero point"),
    "accumulation": (
        jaxq.ProductRecipe(execution=jaxq.Accumulation("float32")),
        None,
        "significant bits",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_explain_and_quantize_fn_raise_same_errors(name):
    recipe, dtype, message = REJECTED[name]
    params = {"w": SQUARE.astype(dtype or jnp.float32)}
    model = lambda p, x: lax.dot_general(
        x.astype(p["w"].dtype), p["w"], (((1,), (0,)), ((), ())), preferred_element_type="float32"
    )
    messages = []
    for transform in (jaxq.explain, jaxq.quantize_fn, jaxq.quantize_weights):
        with pytest.raises((TypeError, ValueError), match=message) as raised:
            transform(model, [("w", recipe)])(params, SQUARE)
        messages.append(str(raised.value).partition(": ")[2])
    assert messages[1:] == messages[:-1]


def test_explain_and_quantize_fn_reject_float8_outputs_and_tables():
    narrow = SQUARE.astype(jnp.float8_e4m3fn)
    look_up = lambda p: p["w"][jnp.arange(2)]
    product = lambda p: jnp.matmul(p["w"], p["w"])
    output = jaxq.Rule("w", output="int8_tensor")
    for model, rules in ((look_up, [("w", "int8_channel")]), (product, [output])):
        for transform in (jaxq.explain, jaxq.quantize_fn):
            with pytest.raises(TypeError, match="float8_e4m3fn"):
                transform(model, rules)({"w": narrow})


def test_explain_notes_missing_keys_and_gradients():
    model = lambda p, x: x @ p["w"]
    stochastic = jaxq.Recipe("int8", rounding="stochastic")

    def note_of(recipe):
        return jaxq.explain(model, [("w", recipe)])({"w": SQUARE}, SQUARE).rows[0].recipe

    assert note_of(stochastic) == "- int8_tensor (needs a key)"
    backward = jaxq.SingleProduct(stochastic)
    assert note_of(jaxq.ProductRecipe("int8_tensor", "int8_tensor", dlhs=backward)).endswith(
        "(its gradient needs a key)"
    )
    blocks = jaxq.SingleProduct(jaxq.Recipe("int8", BLOCKS))
    note = note_of(jaxq.ProductRecipe("int8_tensor", "int8_tensor", drhs=blocks))
    assert "(cannot be differentiated: dot_general, gradient of `rhs`: the cotangent" in note
