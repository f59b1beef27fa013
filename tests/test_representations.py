"""The text and HTML that the Python prompt and notebooks show for jaxq's objects."""

import dataclasses
import re
from html.parser import HTMLParser

import jax
import wadler_lindig
from jax import numpy as jnp

import jaxq
from jaxq import analysis, ptq
from jaxq.recipes import PerBlock


def test_stored_array_names_recipe_shape_and_size():
    weights = jax.eval_shape(lambda: jnp.zeros((4096, 4096)))
    half = jaxq.Recipe("int5", PerBlock(128), rounding="nearest_away")
    shown = {
        "int4_g128": "int4_g128[4096×4096] 8.5 MiB",
        "nvfp4": "nvfp4[4096×4096] 9 MiB",
        half: "int5_g128(rounding='nearest_away')[4096×4096] 10.5 MiB",
    }
    for recipe, text in shown.items():
        assert repr(jax.eval_shape(lambda x, r=recipe: jaxq.quantize(x, r), weights)) == text
    # The recipe keeps its name on another axis.
    stored = jax.eval_shape(lambda x: jaxq.quantize(x, "int4_g128", axis=0), weights)
    assert repr({"w": stored}) == "{'w': int4_g128[4096×4096] 8.5 MiB}"
    # Equinox shows modules by this library.
    assert wadler_lindig.pformat([stored]) == "[int4_g128[4096×4096] 8.5 MiB]"


def test_stored_array_without_arrays_has_representation():
    stored = jaxq.quantize(jnp.ones(4), "int8_tensor")
    assert "Quantized" in repr(jax.tree.map(lambda _: "axis", stored))
    assert repr(stored) == "int8_tensor[4] 8 B"


class Cells(HTMLParser):
    """The text of all cells of an HTML table, and the elements that were not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, _attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_notebooks_show_tables_as_html():
    params = {"<w>": jnp.ones((8, 8))}
    tables = [
        jaxq.explain(lambda p, x: x @ p["<w>"], "w8a8")(params, params["<w>"]),
        jaxq.tree_report(params),
    ]
    for table in tables:
        cells = Cells(table._repr_html_())
        assert not cells.open
        assert len(cells.rows) == len(table.rows) + 1
        assert cells.rows[1][0] == "<w>"  # Escaped, and therefore intact.
        assert repr(table) == str(table)


def test_notebooks_show_reports_as_html_with_notes():
    """Checks that all reports of PTQ take their text and HTML from one class."""
    row = ptq.LearnedBlock(0, 20, 0.5, 0.25, 2, note="<note>")
    reports = {ptq.Report, ptq.BiasReport, ptq.RoundingReport, ptq.Scores, ptq.InputScales}
    for kind in reports | {ptq.InputRotations}:
        assert kind.__repr__ is ptq.RoundingReport.__repr__, kind
    cells = Cells(ptq.RoundingReport((row,))._repr_html_())
    assert cells.rows[1] == ["0", "20", "0.5", "0.25", "2", "<note>"]
    validated = dataclasses.replace(row, validation_rtn=0.5, validation_loss=0.375)
    cells = Cells(ptq.RoundingReport((validated,))._repr_html_())
    assert cells.rows[1] == ["0", "20", "0.5", "0.25", "2", "0.5", "0.375", "<note>"]
    batches = [jnp.ones((4, 8))]
    _, report = ptq.quantize_weights(lambda w, x: x @ w, "int4_tensor")(jnp.eye(8), batches)
    assert "<p>mean loss of 1 products" in report._repr_html_()
    assert "\nmean loss of 1 products" in repr(report)


def test_explain_shows_granularity():
    table = jaxq.explain(lambda p, x: x @ p, "w8a8")(jnp.ones((8, 8)), jnp.ones((2, 8)))
    assert table.rows[0].recipe == "int8_token int8_channel"


def test_explain_in_notebook_names_cell_and_leaves_out_empty_columns():
    code = compile("def model(p, x):\n    return x @ p", "/tmp/ipykernel_21/345.py", "exec")
    exec(code, cell := {})
    table = jaxq.explain(cell["model"], "w8a8")(jnp.ones((8, 8)), jnp.ones((2, 8)))
    assert table.rows[0].source == "notebook cell:2 (model)"
    heads = Cells(table._repr_html_()).rows[0]
    assert "shapes" in heads
    assert "scope" not in heads


def test_large_figures_are_rounded():
    table = analysis.memory_table(params=7e9, recipes=["int4_g128"])
    assert table.rows[0].model == "7 × 10⁹"
    html = jaxq.formats_table(["bfloat16"])._repr_html_()
    assert re.findall(r">(\d[^<]*× 10[^<]*)<", html) == [
        "3.39 × 10³⁸",
        "1.175 × 10⁻³⁸",
        "9.184 × 10⁻⁴¹",
    ]


def test_states_are_shown_by_their_products_and_bytes():
    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
    x = jnp.ones((4, 8))
    delayed = jax.eval_shape(jaxq.delayed_scaling(fn, [("", "fp8_training")]), params, x)
    assert repr(delayed) == "Delayed(2 products, 24 KiB)"
    rules = [("up", jaxq.ProductRecipe("int8_tensor", "int8_channel"))]
    _, seen = jax.eval_shape(jaxq.observe(fn, rules), params, x)
    assert repr(seen) == "Observed(1 product, 8 B)"
    assert repr(jax.eval_shape(lambda s: jaxq.freeze(rules, s), seen)) == "Frozen(1 product, 4 B)"


def test_records_of_arrays_are_shown_by_dtypes_and_shapes():
    scale = jnp.ones((8, 1))
    calibrated = jaxq.calibration.Calibrated(scale, None)
    assert repr(calibrated) == "Calibrated(scale=float32[8, 1], zero_point=None)"
    assert repr(calibrated._replace(scale=scale[:1])).startswith("Calibrated(scale=Array([[1.]]")
