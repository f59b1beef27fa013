"""Memory of models against published parameter counts and the bytes of `Quantized` tensors."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxq
from jaxq import analysis
from jaxq.analysis.machines import DEVICES, MODELS, Device, Model

# The exact numbers of parameters, as published with the models.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}
SMALL = Model("small", 2, 256, 512, 4, 2, 64, 1024, bias=True)


def test_parameters_match_published_counts():
    assert {name: model.parameters for name, model in MODELS.items()} == PARAMETERS


@pytest.mark.parametrize("recipe", ["nvfp4", "int4_g128", "int8_channel", "q4_1", "nf4_dq"])
def test_weights_match_bytes_of_quantized_tensors(recipe: str):
    stored = 0
    for shape, count in SMALL.matrices:
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        q = jax.eval_shape(lambda x: jaxq.quantize(x, recipe), x)
        bytes_of = [math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(q)]
        stored += count * sum(bytes_of)
    stored += 2 * (SMALL.embeddings + SMALL.others)
    assert analysis.memory(SMALL, recipe).weights == stored


def test_kv_cache_matches_arithmetic():
    """Compares with the product of 2 tensors, layers, heads, head size, tokens and 2 bytes."""
    m = analysis.memory("llama-3.1-8b", context=1000, batch=3)
    assert m.kv_cache == 2 * 32 * 8 * 128 * 3000 * 2
    quantized = analysis.memory("llama-3.1-8b", context=1000, batch=3, kv="int8_token")
    assert quantized.kv_cache == pytest.approx(m.kv_cache * (8 + 32 / 128) / 16)
    assert analysis.memory("llama-3.1-8b", context=0).kv_cache == 0
    assert m.overhead == pytest.approx(0.1 * (m.weights + m.kv_cache))
    assert m.total == m.weights + m.kv_cache + m.overhead


def test_memory_takes_a_number_of_parameters():
    assert analysis.memory(7e9, "float32", overhead=0) == (28e9, 0, 0)
    assert analysis.memory(7e9, "int4_g128", overhead=0).weights == 7e9 * 4.25 / 8
    assert analysis.memory(0.0, "bfloat16").total == 0


def test_tables_list_models_and_devices():
    table = analysis.memory_table("llama-3.1-70b", ["bfloat16", "nvfp4"])
    assert [row.device for row in table.rows] == ["b200", "l40s"]
    assert table.rows[0].weights_gib == pytest.approx(2 * 70_553_706_496 / 2**30)
    assert analysis.memory_table(params=1e12, recipes=["float32"]).rows[0].device == "none alone"
    rows = analysis.fits_table(["llama-3.1-70b", 7e9], ["bfloat16"], ["h100", Device("tiny", 1)])
    first = rows.rows[0]
    assert (first.fits, first.devices, first.tokens) == (False, 2, 0)
    assert [row.tokens for row in rows.rows[2:]] == [-1, -1]
    assert [row.fits for row in rows.rows] == [False, False, True, False]
    for row in analysis.fits_table().rows:
        assert row.fits == (row.devices == 1)
        assert row.share == pytest.approx(row.total_gib / DEVICES[row.device].gib)


def test_token_count_is_the_maximum():
    row = analysis.fits_table(["qwen2.5-7b"], ["int4_g128"], ["rtx-4090"]).rows[0]
    limit = DEVICES["rtx-4090"].memory
    for tokens, fits in ((row.tokens, True), (row.tokens + 2, False)):
        total = analysis.memory("qwen2.5-7b", "int4_g128", context=tokens).total
        assert (total <= limit) == fits


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match=r"Did you mean llama-3\.1-8b"):
        analysis.memory("llama-3.1-8")
    with pytest.raises(ValueError, match="No device is named"):
        analysis.fits_table(["llama-2-7b"], ["bfloat16"], ["abacus"])
    with pytest.raises(ValueError, match="`context` must be an integer of at least 0"):
        analysis.memory("llama-2-7b", context=-1)
    with pytest.raises(ValueError, match="a number of parameters of at least 0"):
        analysis.memory(np.nan)
    for arguments in ({}, {"model": "llama-2-7b", "params": 7e9}):
        with pytest.raises(ValueError, match="either `model` or `params`"):
            analysis.memory_table(**arguments)
