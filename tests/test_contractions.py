"""Blocks of operands, compared with operands transposed to `[batch, free, contract]` in NumPy."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxq
from jaxq.products import of_conv, of_dot, of_einsum, placed
from tests.data import slow
from tests.oracle import assert_same

GRANULARITIES = {
    "tensor": jaxq.PerTensor(),
    "token": jaxq.PerToken(),
    "channel": jaxq.PerChannel(-1),
    "block": jaxq.PerBlock(4),
    "long block": jaxq.PerBlock(8),
    "tile": jaxq.PerBlock((2, 4)),
    "tile by axes": jaxq.PerBlock((4, 2), axes=(1, 0)),
}
EINSUMS = ["mk,kn->mn", "km,nk->nm", "bmk,bnk->bmn", "mbk,kbn->nbm", "abk,ckd->bcad", "xym,xyn->mn"]
SIZES = {"a": 2, "b": 4, "c": 4, "d": 2, "k": 16, "m": 8, "n": 24, "x": 4, "y": 4}


def shape(labels: str) -> tuple[int, ...]:
    return tuple(SIZES[label] for label in labels)


def data(labels: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape(labels)).astype(np.float32)


def members(granularity, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the number of each element's block."""
    blocks = [np.arange(n) // b for n, b in zip(shape, granularity.block(shape), strict=True)]
    numbers = np.zeros(shape, int)
    for axis, block in enumerate(blocks):
        numbers = numbers * 1000 + block.reshape(
            [-1 if i == axis else 1 for i in range(len(shape))]
        )
    return numbers


def in_normal_form(granularity, own: str, other: str, out: str, order: str) -> np.ndarray:
    """Returns each element's block number in the operand as matrices `[batch, free, contract]`."""
    batch = [c for c in order if c in own and c in other and c in out]
    free = [c for c in order if c in own and c in out and c not in other]
    contract = [c for c in order if c in own and c not in out]
    labels = "".join([*batch, *free, *contract])
    sizes = [int(np.prod(shape("".join(part)))) for part in (batch, free, contract)]
    literal = granularity
    if isinstance(granularity, jaxq.PerChannel):  # Shared by all free axes but the last.
        sizes[1:2] = [sizes[1] // SIZES[free[-1]], SIZES[free[-1]]]
        literal = jaxq.PerChannel((0, 2))
    if isinstance(granularity, jaxq.PerBlock) and granularity.axes == (1, 0):
        literal = jaxq.PerBlock((2, 4))
    numbers = members(literal, tuple(sizes)).reshape(shape(labels))
    return numbers.transpose([labels.index(c) for c in own])


@pytest.mark.parametrize("subscripts", EINSUMS)
@pytest.mark.parametrize("name", GRANULARITIES)
def test_blocks_of_all_three_products_follow_contraction(subscripts: str, name: str):
    inputs, out = subscripts.split("->")
    lhs, rhs = inputs.split(",")
    order = "".join(dict.fromkeys(lhs + rhs))
    contraction = of_einsum(subscripts, len(lhs), len(rhs))
    products = [
        (contraction, (lhs, rhs, out)),
        (contraction.dlhs, (out, rhs, lhs)),
        (contraction.drhs, (out, lhs, rhs)),
    ]
    for product, (a, b, to) in products:
        for axes, own, other in zip(product.axes, (a, b), (b, a), strict=True):
            got = members(placed(GRANULARITIES[name], shape(own), axes), shape(own))
            want = in_normal_form(GRANULARITIES[name], own, other, to, order)
            pairs = np.unique(np.stack([got.ravel(), want.ravel()]), axis=1)
            assert pairs.shape[1] == len(np.unique(got)) == len(np.unique(want))


@pytest.mark.parametrize("subscripts", [slow("km,nk->nm"), "abk,ckd->bcad"])
def test_quantized_einsum_and_gradients_match_numpy(subscripts: str):
    """Uses MXFP4 in blocks of 4, for which all products and sums are exact in any order."""
    inputs, out = subscripts.split("->")
    lhs, rhs = inputs.split(",")
    x, w, g = data(lhs, 0), data(rhs, 1), data(out, 2)
    last = jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(4), jaxq.MX())
    both = jaxq.SingleProduct(last, last)
    recipe = jaxq.ProductRecipe(last, last, dlhs=both, drhs=both, residuals="original")

    def contracted(a, own, b, other, to):
        return np.einsum(f"{own},{other}->{to}", along(a, own, to), along(b, other, to))

    def along(a, own, to):
        order = sorted(own, key=lambda c: (c not in to, (lhs + rhs).index(c)))
        y = a.transpose([own.index(c) for c in order])
        rows = y.reshape(-1, int(np.prod([SIZES[c] for c in own if c not in to])))
        y = np.asarray(jaxq.fake_quant(rows, last)).reshape(y.shape).astype(np.float64)
        return y.transpose([order.index(c) for c in own])

    y, pull = jax.vjp(lambda x, w: jaxq.einsum(subscripts, x, w, recipe=recipe), x, w)
    dx, dw = pull(jnp.asarray(g))
    np.testing.assert_array_equal(y, contracted(x, lhs, w, rhs, out))
    np.testing.assert_array_equal(dx, contracted(g, out, w, rhs, lhs))
    np.testing.assert_array_equal(dw, contracted(g, out, x, lhs, rhs))


def test_only_padded_blocks_may_leave_a_remainder():
    axes = of_einsum("xym,xyn->mn", 3, 3).axes[0]
    with pytest.raises(ValueError, match="which have 4 x 6 elements in"):
        placed(jaxq.PerBlock(5), (4, 6, 8), axes)
    padded = placed(jaxq.PerBlock(5, pad=True), (4, 6, 8), axes)
    assert padded.block((4, 6, 8)) == (1, 5, 1)


def test_dimension_numbers_order_axes():
    """Checks that axes are ordered as batch, free and contracted, the latter in the given order."""
    contraction = of_dot((((3, 1), (0, 2)), ((0,), (1,))), 4, 4)
    assert contraction.axes[0] == ((0,), (2,), (3, 1))
    assert contraction.axes[1] == ((1,), (3,), (0, 2))
    assert contraction.dlhs.axes[0] == ((0,), (1,), (2,))
    assert contraction.drhs.axes[1] == ((0,), (3, 1), (2,))
    x, w = jnp.ones((2, 3, 4, 5)), jnp.ones((5, 2, 3, 6))
    y = lax.dot_general(x, w, (((3, 1), (0, 2)), ((0,), (1,))))
    assert [y.shape[contraction.out.index(i)] for i in contraction.out] == list(y.shape)


@pytest.mark.parametrize(
    ("subscripts", "lhs", "rhs", "out"),
    [
        ("ij,jk", (2, 3), (3, 4), "ik"),
        ("ba,ac", (2, 3), (3, 4), "bc"),
        ("i j , j k -> k i", (2, 3), (3, 4), "ki"),
        ("...ij,jk", (5, 2, 3), (3, 4), "...ik"),
        ("...ij,...jk->i...k", (5, 2, 3), (6, 5, 3, 4), "i...k"),
        ("...,i...->...i", (5, 2), (3, 5, 2), "...i"),
        ("ij,kl->il", (2, 3), (4, 5), "il"),
        ("i,i", (3,), (3,), ""),
        ("i,->i", (3,), (), "i"),
    ],
)
def test_einsum_parses_subscripts_like_jax(subscripts, lhs, rhs, out):
    del out
    contraction = of_einsum(subscripts, len(lhs), len(rhs))
    sizes = dict(zip(contraction.lhs, lhs, strict=True)) | dict(
        zip(contraction.rhs, rhs, strict=True)
    )
    want = jax.eval_shape(lambda a, b: jnp.einsum(subscripts, a, b), jnp.ones(lhs), jnp.ones(rhs))
    assert tuple(sizes[label] for label in contraction.out) == want.shape
    x, w = (np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in (lhs, rhs))
    plain = jaxq.einsum(subscripts, x, w, recipe=jaxq.ProductRecipe())
    assert_same(plain, jnp.einsum(subscripts, x, w))


def test_contracted_axes_of_convolution_and_gradients():
    numbers = lax.conv_dimension_numbers((2, 8, 8, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"))
    contraction = of_conv(numbers)
    assert contraction.axes[0] == ((), (0,), (1, 2, 3))
    assert contraction.axes[1] == ((), (3,), (0, 1, 2))
    assert contraction.shared == ((3,), (2,))
    assert contraction.dlhs.axes[0] == ((), (0,), (1, 2, 3))
    assert contraction.dlhs.axes[1] == ((), (2,), (0, 1, 3))
    assert contraction.drhs.axes[0] == ((), (3,), (1, 2, 0))
    assert contraction.drhs.axes[1] == ((), (3,), (1, 2, 0))


@pytest.mark.parametrize(
    ("granularity", "subscripts", "text"),
    [
        (jaxq.PerBlock(3), "mk,kn->mn", "blocks of 3 must divide .* which have 16 elements in"),
        (jaxq.PerBlock(32), "bmk,bnk->bmn", "which have 16 elements in a tensor of shape"),
        (jaxq.PerBlock((3, 4)), "mk,kn->mn", "which have 8 elements"),
        (jaxq.PerBlock(4), "m,n->mn", "no axis of a tensor of shape"),
        (jaxq.PerBlock(4, axes=2), "mk,kn->mn", "an operand counts as a matrix"),
        (jaxq.PerBlock((2, 4)), "k,kn->n", "which have no elements in a tensor"),
        (jaxq.PerChannel(-1), "k,kn->n", "index the free axes; .* has 0 here"),
        (jaxq.PerChannel(1), "mk,kn->mn", "index the free axes; .* has 1 here"),
    ],
)
def test_mismatched_blocks_raise(granularity, subscripts, text):
    lhs, rhs = subscripts.split("->")[0].split(",")
    recipe = jaxq.ProductRecipe(jaxq.Recipe("int4", granularity))
    with pytest.raises(ValueError, match=f"einsum {subscripts!r}: lhs: ") as caught:
        jaxq.einsum(subscripts, data(lhs, 0), data(rhs, 1), recipe=recipe)
    caught.match(text)
