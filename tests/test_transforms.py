"""Quantized functions, compared with the same functions written with quantized products."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

import jaxq
from tests import data
from tests.oracle import assert_same, assert_same_trees

NUMBERS = (((2,), (0,)), ((), ()))
TABLE = jaxq.Recipe("int8", jaxq.PerChannel(0))
OUT = jaxq.ProductRecipe(None, "int4_g32")
INT2 = jaxq.Recipe("int2", jaxq.PerChannel(-1))
RULES = [("embedding", "int8_channel"), ("layers", "w8a8"), ("out", OUT)]


@jax.jit
def helper(x, w):
    return x @ w


def model(params, ids):
    """Computes a look-up, scanned layers with jit and checkpoint, and two output layers."""
    x = params["embedding"][ids]

    def layer(x, p):
        with jax.named_scope("mlp"):
            h = jax.nn.gelu(helper(x, p["up"]))
            return x + jax.checkpoint(lambda h: h @ p["down"])(h), None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["out"], x @ params["embedding"].T


def by_hand(params, ids):
    dot = functools.partial(jaxq.dot_general, dimension_numbers=NUMBERS)
    x = jaxq.fake_quant(params["embedding"], TABLE)[ids]

    def layer(x, p):
        h = jax.nn.gelu(dot(x, p["up"], recipe="w8a8"))
        return x + dot(h, p["down"], recipe="w8a8"), None

    x, _ = lax.scan(layer, x, params["layers"])
    tied = dot(x, params["embedding"].T, recipe=jaxq.ProductRecipe(None, "int8_channel"))
    return dot(x, params["out"], recipe=OUT), tied


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (40, 32),
        "layers": {"up": (3, 32, 64), "down": (3, 64, 32)},
        "out": (32, 40),
    }
    return jax.tree.map(
        lambda shape: jax.device_put(np.float32(rng.standard_normal(shape) / 4)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


IDS = jnp.arange(32).reshape(4, 8)


def loss(fn):
    return loss_of(fn, IDS)


def loss_of(fn, ids):
    return lambda params: sum((y**2).mean() for y in fn(params, ids))


def test_matches_model_written_by_hand(params):
    quantized = jaxq.quantize_fn(model, RULES)
    got = jax.jit(jax.value_and_grad(loss(quantized)))(params)
    assert_same_trees(got, jax.jit(jax.value_and_grad(loss(by_hand)))(params))
    float32 = jax.jit(model)(params, IDS)
    # The float and the quantized function do not affect each other, in either order.
    assert_same_trees(jax.jit(model)(params, IDS), float32)
    inside = jaxq.quantize_fn(jax.jit(model), RULES)
    outputs = jax.jit(inside)(params, IDS)
    assert_same_trees(outputs, jax.jit(by_hand)(params, IDS))
    assert not np.array_equal(outputs[0], float32[0])


def test_scan_is_kept_and_compiles_once(params):
    count = []

    def counted(params, ids):
        count.append(1)
        return model(params, ids)

    quantized = jax.jit(jaxq.quantize_fn(counted, RULES))
    quantized(params, IDS)
    quantized(params, IDS + 1)
    assert len(count) == 1
    jaxpr = jax.make_jaxpr(jaxq.quantize_fn(model, RULES))(params, IDS)
    assert [e.primitive.name for e in jaxpr.eqns].count("scan") == 1


def test_stored_weights_match(params):
    quantized = jax.jit(jaxq.quantize_fn(model, RULES))
    stored = jaxq.quantize_weights(model, RULES)(params, IDS)
    layer = jax.vmap(lambda w: jaxq.fake_quant(w, "int8_channel"))
    assert_same(stored["embedding"].dequantize(), jaxq.fake_quant(params["embedding"], TABLE))
    assert_same(stored["layers"]["up"].dequantize(), layer(params["layers"]["up"]))
    blocks = jaxq.Recipe("int4", jaxq.PerBlock(32, axes=0))
    assert_same(stored["out"].dequantize(), jaxq.fake_quant(params["out"], blocks))
    compiled = quantized.lower(stored, IDS).compile()
    for got, want in zip(compiled(stored, IDS), quantized(params, IDS), strict=True):
        # XLA chooses the layout of operands and thus the order of sums.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    report = jaxq.explain(model, RULES)(params, IDS)
    by_weight = {row.product: row.bytes for row in report.rows}
    assert by_weight["layers/up"] == stored["layers"]["up"].nbytes == 3 * (32 * 64 + 4 * 64)
    reported = sum(by_weight[name] for name in ("embedding", "layers/up", "layers/down", "out"))
    assert sum(x.nbytes for x in jax.tree.leaves(stored)) == reported
    assert compiled.memory_analysis().argument_size_in_bytes == reported + IDS.nbytes
    other = [("embedding", "int4_channel"), *RULES[1:]]
    with pytest.raises(ValueError, match="'embedding' must be packed as its rule says"):
        jaxq.quantize_fn(model, other)(stored, IDS)


def test_explain_lists_all_products(params):
    table = jaxq.explain(model, RULES)(params, IDS)
    rows = {row.product: row for row in table.rows}
    assert list(rows) == ["embedding", "layers/up", "layers/down", "out", "embedding#2"]
    up = rows["layers/up"]
    assert (up.operation, up.scope, up.times) == ("dot_general", "mlp", 3)
    assert up.flops == 3 * 2 * 32 * 32 * 64
    assert up.recipe == "int8_token int8_channel"
    assert "test_transforms.py" in up.source
    assert rows["out"].bits == 4 + 32 / 32
    shapes = jax.eval_shape(lambda: params)
    assert jaxq.explain(model, RULES)(shapes, IDS) == table


@pytest.mark.parametrize(
    "operation",
    [
        lambda p, x: x @ p["w"],
        lambda p, x: jnp.dot(x, p["w"]),
        lambda p, x: jax.jit(lambda x: x @ p["w"])(x),
        lambda p, x: jax.checkpoint(lambda x: x @ p["w"])(x),
        lambda p, x: jnp.einsum("bi,io->bo", x, p["w"]),
        lambda p, x: (p["w"].T @ x.T).T,
        lambda p, x: jax.vmap(lambda x: x @ p["w"])(x),
        lambda p, x: lax.cond(x[0, 0] > 9, lambda x: x, lambda x: x @ p["w"], x),
        lambda p, x: lax.fori_loop(0, 1, lambda i, c: x @ p["w"], x),  # noqa: ARG005
        lambda p, x: lax.while_loop(lambda c: c[1] < 1, lambda c: (x @ p["w"], c[1] + 1), (x, 0))[0],  # noqa: E501
    ],
)  # fmt: skip
def test_products_inside_functions_and_control_flow_are_quantized(operation):
    """Covers products in functions and control flow, several of which Qwix leaves in float."""
    rng = np.random.default_rng(1)
    p, x = {"w": rng.standard_normal((16, 16))}, rng.standard_normal((4, 16))
    p, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x))
    want = jaxq.dot_general(x, p["w"], (((1,), (0,)), ((), ())), recipe="w4a16")
    got = jaxq.quantize_fn(operation, [("w", "w4a16")])(p, x)
    # Sums of 16 terms may differ in order.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert not np.allclose(want, x @ p["w"], rtol=1e-3)


def test_custom_derivatives_are_kept():
    w, x = jnp.full((2, 2), 0.3), jnp.ones((1, 2))

    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (f(x, w), x), lambda x, g: (7 * g, x.T @ g * 5))
    quantized = jaxq.quantize_fn(lambda p, x: f(x, p["w"]).sum(), [("w", INT2)])
    assert jax.grad(quantized)({"w": w}, x)["w"].tolist() == [[5.0, 5.0]] * 2
    assert_same(quantized({"w": w}, x), jaxq.fake_quant(w, INT2).sum())


def test_vmap_and_jvp_of_a_quantized_function_match_formulas():
    w = data.normal((8, 4), 2)
    x = data.normal((5, 8), 3)
    f = jaxq.quantize_fn(lambda p, x: x @ p["w"], [("w", "w4a16")])
    want = jnp.dot(x, jaxq.fake_quant(w, "int4_channel"))
    np.testing.assert_allclose(jax.vmap(lambda x: f({"w": w}, x))(x), want, rtol=1e-6)
    _, moved = jax.jvp(lambda x: f({"w": w}, x), (x,), (jnp.ones_like(x),))
    want = jnp.dot(jnp.ones_like(x), jaxq.fake_quant(w, "int4_channel"))
    np.testing.assert_allclose(moved, want, rtol=1e-6)


@pytest.mark.parametrize("recipe", ["int8_tensor", "int8_token"])
def test_scales_span_a_vmap_inside_the_function_but_not_around_it(recipe: str):
    """Multiplies by the identity, so that the results are the quantized inputs."""
    x = data.normal((4, 3, 8)) * jnp.float32([1, 10, 100, 0.1])[:, None, None]
    eye, rules = jnp.eye(8), [("", jaxq.ProductRecipe(recipe, None))]
    one = jaxq.quantize_fn(lambda w, x: x @ w, rules)
    many = jaxq.quantize_fn(lambda w, x: jax.vmap(lambda x: x @ w)(x), rules)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": (P(), P("batch")), "out_specs": P("batch")}
    on_devices = jaxq.quantize_fn(jax.shard_map(lambda w, x: x @ w, **specs), rules)
    separate = np.stack([jaxq.fake_quant(part, recipe) for part in x])
    assert_same(many(eye, x), jaxq.fake_quant(x, recipe))
    assert_same(jax.vmap(one, (None, 0))(eye, x), separate)
    assert_same(on_devices(eye, x), separate)
    assert_same(jax.shard_map(one, **specs)(eye, x), separate)
    assert np.array_equal(separate, many(eye, x)) == (recipe == "int8_token")


def test_rules_select_convolutions_by_scope_and_quantize_outputs():
    x, w = jnp.ones((1, 3, 6, 6)), {"k": jnp.full((4, 3, 3, 3), 0.37)}

    def conv(p, x):
        with jax.named_scope("stem"):
            return lax.conv_general_dilated(x, p["k"], (1, 1), "SAME")

    want = jaxq.conv_general_dilated(x, w["k"], (1, 1), "SAME", recipe="w8a8")
    assert_same(jaxq.quantize_fn(conv, [("k", "w8a8")])(w, x), want)
    rules = [jaxq.Rule(scope="stem", operation="conv_general_dilated", output="int8_tensor")]
    want = jaxq.fake_quant(conv(w, x), "int8_tensor")
    assert_same(jaxq.quantize_fn(conv, rules)(w, x), want)


def test_scan_steps_use_different_keys():
    w = jnp.full((2, 8, 8), 0.3)

    def f(p, x):
        return lax.scan(lambda x, w: (x, x @ w), x, p)[1]

    recipe = jaxq.ProductRecipe(None, jaxq.Recipe("int4", rounding="stochastic"))
    with pytest.raises(ValueError, match="`key` must be given, as"):
        jaxq.quantize_fn(f, [("", recipe)])(w, jnp.eye(8))
    got = jaxq.quantize_fn(f, [("", recipe)], key=jax.random.key(0))(
        w.at[:, 0, 0].set(1.0), jnp.eye(8)
    )
    assert not np.array_equal(got[0], got[1])
    with pytest.raises(ValueError, match="no recipe draws"):
        jaxq.quantize_fn(f, [("", "w4a16")], key=jax.random.key(0))(w, jnp.eye(8))


@pytest.mark.parametrize("execution", [data.slow("emulated"), "native"])
def test_float16_overflow_saturates_with_frozen_scales(execution: str):
    recipe = jaxq.ProductRecipe("int8_tensor", "int8_channel", execution=execution)
    f, p = lambda p, x: x @ p["w"], {"w": np.eye(3, dtype=np.float16)}
    rules = [("w", recipe)]
    static = jaxq.freeze(rules, jaxq.observe(f, rules)(p, np.ones((1, 3), np.float16))[1])
    y = jaxq.quantize_fn(f, static)(p, np.float16([[np.inf, 1, -1]]))
    np.testing.assert_allclose(np.asarray(y, np.float32), [[1, 1, -1]], atol=1e-2)


def test_observe_and_freeze(params):
    rules = [("layers", jaxq.ProductRecipe("int8_tensor", "int8_channel"))]
    observe = jax.jit(jaxq.observe(model, rules))
    (out, one), (_, two) = observe(params, IDS), observe(params, IDS[::-1] + 3)
    assert_same_trees(out, jax.jit(jaxq.quantize_fn(model, rules))(params, IDS))
    frozen = jaxq.freeze(rules, one)
    static = jax.jit(lambda params, rules, ids: jaxq.quantize_fn(model, rules)(params, ids))
    assert_same_trees(static(params, frozen, IDS), out)
    merged = jaxq.freeze(rules, one.merge(two)).scales["layers/up"][0].scale
    each = [jaxq.freeze(rules, state).scales["layers/up"][0].scale for state in (one, two)]
    assert merged.shape[0] == 3, "one scale per layer"
    assert_same(merged, np.maximum(*each))
    with pytest.raises(ValueError, match="must give some activation a recipe with one scale"):
        jaxq.observe(model, [("out", "w8a8")])(params, IDS)


STATIC = jaxq.ProductRecipe("int8_tensor", "int8_channel")
W = jnp.broadcast_to(jnp.eye(4) / 2, (3, 4, 4))  # Sums have one nonzero term, so they are exact.
X = jax.random.normal(jax.random.key(1), (8, 4))


def layers(w, x):
    return lax.scan(lambda x, w: (x @ w, None), x, w)[0]


def scales(fn):
    _, state = jax.jit(jaxq.observe(fn, [("", STATIC)]))(W, X)
    return state.finalize()[""][0].scale.ravel()


@pytest.mark.parametrize(
    "around",
    [
        lambda f, w, x: lax.cond(x[0, 0] > 9, lambda x: x, lambda x: f(w, x), x),
        lambda f, w, x: lax.while_loop(
            lambda c: c[1] < 1, lambda c: (f(w, c[0]), c[1] + 1), (x, 0)
        )[0],
        lambda f, w, x: lax.scan(lambda x, _: (f(w, x), None), x, None, length=2)[0],
    ],
    ids=["cond", "while", "scan"],
)
def test_layers_in_control_flow_have_separate_states(around):
    """Uses shrinking activations, so that a second iteration does not change the ranges."""
    want = scales(layers)
    assert len(np.unique(want)) == 3
    assert_same(scales(functools.partial(around, layers)), want)


def mapped(fn, check):
    """Maps a function over a 2 by 2 mesh, with rows sharded over the first axis."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    return jax.shard_map(fn, mesh=mesh, check_vma=check, **specs)


@pytest.mark.parametrize("check", [data.slow(True), False])
def test_observe_covers_all_devices_of_shard_map(check):
    def inside(w, x):
        return lax.cond(x.sum() < 99, lambda x: layers(w, x), lambda x: x, x)

    assert_same(scales(mapped(inside, check)), scales(layers))


@pytest.mark.parametrize("check", [True, data.slow(False)])
def test_devices_of_shard_map_use_different_keys(check):
    recipe = jaxq.ProductRecipe(jaxq.Recipe("int4", jaxq.PerToken(), rounding="stochastic"), None)
    rows, eye = jnp.broadcast_to(jnp.arange(1.0, 17)[None], (4, 16)), jnp.eye(16)
    f = mapped(lambda w, x: (x @ w)[None], check)
    key = jax.random.key(7)
    got = jax.jit(jaxq.quantize_fn(f, [("", recipe)], key=key))(eye, rows)
    numbers = (((1,), (0,)), ((), ()))
    by_hand = jax.jit(lambda k: jaxq.dot_general(rows[:2], eye, numbers, recipe=recipe, key=k))
    own = jax.random.fold_in(key, 0)  # The first product.
    for device, y in enumerate(got):
        drawn = jax.random.fold_in(own, device)
        if not check:  # JAX does not know that the value is the same along "model".
            drawn = jax.random.fold_in(drawn, 0)
        assert_same(y, by_hand(drawn))
    assert not np.array_equal(*got)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([("layer/up", "w8a8")], "matches no weight. Did you mean layers/up"),
        ([("", "w8a8"), ("out", "w4a16")], "the earlier Rule.* applies to"),
        (
            [(r"^out", jaxq.ProductRecipe(None, jaxq.Recipe("int4", jaxq.PerBlock(24))))],
            "'out'.*24",
        ),
        (
            [jaxq.Rule("emb", "int8_channel", operation="gather"), ("emb", "int4_channel")],
            "must have one recipe, got int8_channel in",
        ),
        ([("out", "w8b8")], "no recipe is named"),
        (
            [jaxq.Rule("^out", output=jaxq.Recipe("int4", jaxq.PerBlock(24)))],
            "^quantize_fn: dot_general 'out'.*24",
        ),
        ([jaxq.Rule(scope="nowhere")], "scopes are mlp"),
        (
            [jaxq.Rule("up", "w8a8", scope="mpl")],
            "'layers/up' .* but not its operation or its scope, 'mlp'",
        ),
        ([("gain", "w8a8")], "'gain', which is not an array but a float"),
        ([("count", "w8a8")], "'count', which has the dtype int32, and only products of floats"),
        ([("bias", "w8a8")], "'bias', which is never multiplied as a matrix"),
        ([("out", "w8a8", "w4a16")], r"a pair \(pattern, recipe\)"),
    ],
)
def test_invalid_rules_raise(params, rules, text):
    more = {"gain": 2.0, "count": jnp.int32([3]), "bias": jnp.ones(4)}
    with pytest.raises((ValueError, TypeError), match=text):
        jaxq.quantize_fn(model, rules)({**params, **more}, IDS)


def test_invalid_patterns_and_recipes_raise():
    for pattern in ("(", 3):
        with pytest.raises(ValueError, match="`weight` must be a regular expression"):
            jaxq.Rule(pattern, "w8a8")
    with pytest.raises(ValueError, match=r"Rule: no recipe is named 'w8b8'. Did you mean w8a8"):
        jaxq.Rule("out", "w8b8")


RNG = np.random.default_rng(5)
LORA = {
    name: jax.device_put(np.float32(RNG.standard_normal(shape)))
    for name, shape in {"w": (8, 6), "a": (8, 2), "b": (2, 6), "scale": (1, 6)}.items()
}


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda p: p["w"] + p["a"] @ p["b"], "computed(w, a, b)"),
        (
            lambda p: p["scale"] * p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True),
            "computed(w, scale)",
        ),
        (lambda p: jnp.clip(p["w"].T, -1, 1).T, "computed(w)"),
        (lambda p: jnp.where(p["w"] > 0, p["w"], 0), "computed(w)"),
        (lambda p: jnp.concatenate([p["w"], jnp.zeros((0, 6))]) * p["scale"], "computed(w, scale)"),
    ],
    ids=["LoRA", "weight normalization", "clipped", "masked", "padded"],
)
def test_computed_weight_is_quantized_after_computation(compute, name):
    x = data.normal((3, 8), 6)

    def model(p, x):
        return x @ compute(p)

    numbers = (((1,), (0,)), ((), ()))
    want = jaxq.dot_general(x, compute(LORA), numbers, recipe="w8a8")
    for rules in ([("", "w8a8")], [("w", "w8a8")]):
        assert_same(jaxq.quantize_fn(model, rules)(LORA, x), want)
        rows = {row.product: row for row in jaxq.explain(model, rules)(LORA, x).rows}
        assert rows[name].stored.startswith("no: computed from w")
        assert all(row.recipe == f"- (part of {name})" for n, row in rows.items() if n != name)


def test_rule_for_inner_product_of_computed_weight():
    def model(p, x):
        return x @ (p["w"] + p["a"] @ p["b"])

    x, rules = jnp.ones((3, 8)), [("^b$", "int4_channel")]
    rows = {row.product: row for row in jaxq.explain(model, rules)(LORA, x).rows}
    assert (rows["b"].recipe, rows["computed(w, a, b)"].recipe) == ("- int4_channel", "-")
    # An operand computed from parameters alone, but multiplied by a parameter, is an activation.
    rows = jaxq.explain(lambda p: jnp.tanh(p["a"].T + 1) @ p["w"], [("", "w8a8")])(LORA).rows
    assert [row.product for row in rows] == ["w"]
    rows = jaxq.explain(lambda p, x: x @ (p["a"] @ p["b"]), [("b", "w8a8")])(LORA, x).rows
    assert rows[1].recipe == "- (an operand is computed from a, b)"


def test_concatenated_weights_have_combined_name_and_one_recipe_along_the_contraction():
    params = {"cell": {name: {"kernel": jnp.eye(4)} for name in ("hi", "hf")}}

    def model(p, x):
        return x @ jnp.concatenate([gate["kernel"] for gate in p["cell"].values()], 1)

    for rules in ([("cell", "w4a16")], [("hf", "w4a16"), ("hi", "w4a16")]):
        (row,) = jaxq.explain(model, rules)(params, jnp.ones((2, 4))).rows
        assert (row.product, row.recipe) == ("cell/{hf,hi}/kernel", "- int4_channel")
        assert (row.bits, row.bytes) == (4 + 32 / 4, 48)

    def contracted(p, x):
        return x @ jnp.concatenate([gate["kernel"] for gate in p["cell"].values()])

    for rules in ([("hf", "w4a16")], [("hf", "w4a16"), ("hi", "w8a16")]):
        with pytest.raises(ValueError, match="must give one recipe to the weights that"):
            jaxq.explain(contracted, rules)(params, jnp.ones((2, 8)))


def test_errors_name_product_path_and_line(params):
    """Checks also errors that occur later, when JAX differentiates a jitted function."""
    quantized = jaxq.quantize_fn(model, [("up", "mxfp8_training")])
    text = (
        r"^dot_general 'layers/up' \(.*test_transforms.py:\d+ \(helper\)\), gradient of `rhs`.* 32 "
    )
    for f in (quantized, jax.jit(quantized)):
        with pytest.raises(ValueError, match=text):
            jax.grad(loss_of(f, IDS[:1, :5]))(params)

    def twice(p, x):
        with jax.named_scope("one"):
            x = x @ p["w"]
        return x @ p["w"]

    rules = [jaxq.Rule("w", "w4a16", scope="one"), ("w", "w8a16")]
    text = r"'w' must have one recipe.*'w' \(.*\(.*twice\)\) and int8.*'w#2' \(.*\(.*twice\)\)"
    with pytest.raises(ValueError, match=text):
        jaxq.quantize_fn(twice, rules)({"w": jnp.eye(2)}, jnp.eye(2))


def test_untraceable_functions_raise():
    def inner(x):
        return np.asarray(x)

    for fn in (lambda p, x: x if x.sum() > 0 else p, lambda p, x: p + inner(x)):
        line = (
            rf"values of arrays in .*test_transforms.py:\d+ \(.*({fn.__name__}|inner)\): .*\. Pass"
        )
        with pytest.raises(TypeError, match=line):
            jaxq.quantize_fn(fn, [])(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="`argnums` must name positional arguments, got 3"):
        jaxq.quantize_fn(lambda p: p, [], argnums=3)(jnp.ones(2))
    static = jaxq.quantize_fn(lambda p, n: (p["w"] @ p["w"], p["f"](n)), [("w", "w4a16")])
    assert static({"w": jnp.eye(2), "f": len}, "abc")[1] == 3
