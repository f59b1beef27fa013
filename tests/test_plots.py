"""Tests of the pictures of `jaxq.analysis.plots`."""

import inspect
import io
import math
import re
import sys

import numpy as np
import pytest
from matplotlib import rcParams, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

import jaxq
from jaxq.analysis import expected_error, pareto, plots, significant_bits
from jaxq.analysis.plots import _rates as rates
from jaxq.analysis.plots._labels import annotate, heads, place
from jaxq.analysis.plots._layouts import fields
from tests import data

# Arguments of small pictures, for names whose defaults are missing or slow.
X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
FEW = {
    "sqnr_by_bits": {"bits": [4], "shape": (64,)},
    "compression": {"recipes": ["int8_tensor", "int4_tensor", "mxfp4", "nf4_g64", "float8_e4m3fn"]},
    "quantized_values": {"recipe": "uint4_channel"},
    "outliers": {"count": 2},
    "range_and_precision": {"formats": ["float16", "bfloat16", "int8", "nf4", "posit8"]},
    "fits": {"models": ["llama-3.2-1b", "llama-3.1-405b"]},
}


def drawn(name: str, **more) -> Figure:
    function = plots.PLOTS[name]
    data = (X,) if "x" in inspect.signature(function).parameters else ()
    return function(*data, **FEW.get(name, {}), **more)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


# The other pictures are slow-only here, because doctests draw them too.
CHEAP = ("bit_layouts", "chain_errors", "memory_by_size", "range_and_precision", "fits")


@pytest.mark.parametrize("name", data.each(plots.PLOTS, CHEAP))
def test_pictures_are_drawn_without_side_effects(name: str):
    before = dict(rcParams)
    figure = drawn(name, title="A title")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert "A title" in texts(figure)
    assert dict(rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )
    width, height = figure.get_size_inches() * figure.dpi
    box = figure.get_tightbbox()
    assert box.x0 * figure.dpi >= -1
    assert box.y0 * figure.dpi >= -1
    assert box.x1 * figure.dpi <= width + 1, "clipped on the right"
    assert box.y1 * figure.dpi <= height + 1, "clipped at the top"
    assert plots.about(name).endswith(".")


def overlaps(axes: Axes) -> list[str]:
    """Returns the labels that overlap each other or leave the axes."""
    axes.figure.draw_without_rendering()
    found, boxes = [], [Text.get_window_extent(note) for note in axes.texts]
    for i, a in enumerate(boxes):
        if not (axes.bbox.x0 - 1 <= a.x0 and a.x1 <= axes.bbox.x1 + 1):
            found.append(axes.texts[i].get_text())
        for b in boxes[:i]:
            wide = min(a.x1, b.x1) - max(a.x0, b.x0)
            high = min(a.y1, b.y1) - max(a.y0, b.y0)
            if wide > 0 and high > 0:
                found.append(axes.texts[i].get_text())
    return found


def test_labels_of_all_formats_do_not_overlap():
    axes = plots.range_and_precision().axes[0]
    assert len(axes.texts) > 40
    assert overlaps(axes) == []
    names = {name for note in axes.texts for name in re.split(r", |\n", note.get_text())}
    assert names == set(jaxq.formats.FORMATS)


def test_labels_of_crowded_points_do_not_overlap():
    axes = Figure(figsize=(8, 6)).add_subplot()
    points = np.random.default_rng(0).standard_normal((40, 2))
    axes.scatter(*points.T)
    annotate(axes, points, [f"recipe_{i}" for i in range(40)])
    assert len(axes.texts) == 40
    assert overlaps(axes) == []


def test_names_above_axes_do_not_overlap():
    axes = Figure(figsize=(8, 6)).add_subplot()
    found = heads(axes, [0.5, 0.501, 0.502, 0.9], list("abcd"), color="black", gap=20)
    width = axes.get_window_extent().width
    places = [text.get_position()[0] * width for text in found]
    assert (np.diff(places) >= 20 - 1e-6).all()
    assert places[3] == pytest.approx(0.9 * width)


def test_recipes_that_do_not_fit_are_named(monkeypatch):
    some = {name: jaxq.recipes.RECIPES[name] for name in ("int8_tensor", "mxfp4", "int4_g128")}
    monkeypatch.setattr(rates, "RECIPES", some)
    figure = plots.compression(X)
    assert [note.get_text() for note in figure.axes[0].texts] == ["int8_tensor", "mxfp4"]
    assert "Blocks do not fit: int4_g128" in texts(figure)


def test_label_positions_do_not_collide():
    points = np.array([[50.0, 50.0]] * 4 + [[52.0, 50.0], [5.0, 5.0]])
    sizes = np.full((6, 2), (30.0, 10.0))
    centers = place(points, sizes, (0, 0, 200, 200), obstacles=np.array([[60, 40, 100, 70]]))
    low, high = centers - sizes / 2, centers + sizes / 2
    for i in range(6):
        assert (low[i] >= 0).all()
        assert not ((high[i] > (60, 40)) & (low[i] < (100, 70))).all()
        for j in range(i):
            assert not ((high[i] > low[j]) & (low[i] < high[j])).all()


@pytest.mark.parametrize("fmt", jaxq.formats.FORMATS.values(), ids=lambda fmt: fmt.name)
def test_fields_cover_all_bits(fmt: jaxq.Format):
    found = fields(fmt)
    assert sum(field.bits for field in found) == fmt.bits
    assert min(field.bits for field in found) > 0


def test_bit_layouts_have_one_box_per_bit():
    figure = plots.bit_layouts(["float8_e5m2", "posit16", "ocp_int8", "nf4", "takum8", "uint3"])
    axes = figure.axes[0]
    assert len(axes.patches) == 8 + 16 + 8 + 4 + 8 + 3
    letters = [text.get_text() for text in axes.texts if text.get_text() in tuple("SEMIFLDR")]
    assert "".join(letters[:8]) == "SEEEEEMM"
    assert "".join(letters[24:32]) == "SIFFFFFF"


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("normalized", [False, True])
def test_number_line_has_tick_for_every_value(scale, normalized):
    names = ["float4_e2m1fn", "int4", "nf4", "float8_e8m0fnu", "uint2"]
    figure = plots.number_line(names, scale=scale, normalized=normalized)
    axes = figure.axes[0]
    for row, name in enumerate(names):
        mine = [c.get_positions() for c in axes.collections if c.get_lineoffset() == row]
        values = jaxq.get_format(name).values
        unit = np.abs(values).max() if normalized else 1
        np.testing.assert_array_equal(np.sort(np.concatenate(mine)), values / unit)
    low, high = axes.get_xlim()
    assert high > max(max(c.get_positions()) for c in axes.collections)
    assert low < min(min(c.get_positions()) for c in axes.collections)


def test_subnormals_have_separate_ticks():
    figure = plots.number_line(["float4_e2m1fn"])
    positions = [list(c.get_positions()) for c in figure.axes[0].collections]
    assert [-0.5, 0.5] in positions


def test_significant_bits_match_formats():
    bits = {name: significant_bits(jaxq.get_format(name)) for name in jaxq.formats.FORMATS}
    assert bits["float16"] == 11
    assert bits["float8_e4m3fn"] == 4
    assert bits["int8"] == pytest.approx(math.log2(128))
    for name in ("float6_e3m2fn", "float8_e5m2", "binary8p3se", "float4_e3m0"):  # By its values.
        values = jaxq.get_format(name).values
        values = values[values > 0]
        assert bits[name] == np.log2(1 + (values[:-1] / np.diff(values)).max())


def test_overflow_and_subnormals_are_marked():
    figure = plots.relative_error(["float16", "bfloat16", "int4"])
    lines = figure.axes[0].get_lines()
    crosses = [line.get_xdata()[0] for line in lines if line.get_marker() == "X"]
    circles = [line.get_xdata()[0] for line in lines if line.get_marker() == "o"]
    assert crosses == [65504, jaxq.get_format("bfloat16").max, 7]
    assert circles == [2.0**-14, 2.0**-126]
    half, brain = (next(a for a in lines if a.get_label() == n) for n in ("float16", "bfloat16"))
    for line, bits, normal in ((half, 11, 2.0**-14), (brain, 8, 2.0**-126)):
        x, y = (np.asarray(data, float) for data in line.get_data())
        inside = (x > 2 * normal) & (x < 30000)
        assert 0.75 * 2.0**-bits < y[inside].min()
        assert y[inside].max() <= 2.0**-bits
    x, y = (np.asarray(data, float) for data in half.get_data())
    assert (y[x < 2.0**-26] == 1).all(), "flushed to 0"
    assert np.isnan(y[x > 65504]).all()


@pytest.mark.slow
def test_levels_cover_numbers_of_every_block():
    x = X * np.exp2(np.arange(8, dtype=np.float32))[:, None]
    for recipe in ("uint4_channel", "mxfp4", "q4_1"):
        figure = plots.quantized_values(x, recipe)
        left, _, right = figure.axes
        fmt = jaxq.get_recipe(recipe).element
        levels = right.collections[0].get_segments()
        assert [s[0, 0] for s in levels] == fmt.values.tolist()
        heights = sum(patch.get_height() for patch in right.patches)
        assert heights == x.size, "numbers lie off the levels"
        points = left.get_lines()[1]
        expected = np.asarray(jaxq.fake_quant(x, recipe))
        np.testing.assert_array_equal(np.sort(points.get_ydata()), np.sort(expected.ravel()))


@pytest.mark.slow
def test_channels_are_sorted_by_power():
    x = X * np.exp2(np.arange(64) % 7 - 3, dtype=np.float32)
    lines = [a for a in plots.channel_errors(x).axes[0].get_lines() if len(a.get_xdata()) == 64]
    error = x - np.asarray(jaxq.fake_quant(x, "int8_tensor"))
    db = 10 * np.log10((x**2).sum(0) / (error**2).sum(0))
    power = (x**2).sum(0)
    np.testing.assert_allclose(lines[0].get_ydata(), db[np.argsort(power)], rtol=1e-4)
    assert (np.asarray(lines[1].get_ydata()) > 35).all()


@pytest.mark.slow
def test_sqnr_includes_theory():
    figure = drawn("sqnr_by_bits")
    lines = {a.get_label(): np.asarray(a.get_ydata()) for a in figure.axes[0].get_lines()}
    np.testing.assert_allclose(lines["6.02 dB per bit"], [24.08], atol=0.01)
    np.testing.assert_allclose(lines["Shannon's bound"], lines["6.02 dB per bit"])
    theory = expected_error(jaxq.Recipe("int4"), (64,)).sqnr_db
    assert lines["absmax integers, theory"][0] == pytest.approx(theory)
    assert (lines["best levels (Lloyd and Max)"] < lines["Shannon's bound"]).all()


def test_pareto_front_is_not_dominated():
    random = np.random.default_rng(0)
    bits, db = random.integers(1, 9, 40), random.integers(0, 30, 40)
    front = pareto(bits, db)
    for i in range(40):
        beaten = ((bits <= bits[i]) & (db >= db[i]) & ((bits < bits[i]) | (db > db[i]))).any()
        same = [j for j in front if bits[j] == bits[i] and db[j] == db[i]]
        assert bool(same) != beaten
    assert (np.diff(bits[front]) > 0).all()


def test_compression_marks_the_front():
    figure = drawn("compression")
    lines = {a.get_label(): a.get_xdata() for a in figure.axes[0].get_lines()}
    assert len(lines["Pareto front: none is better"]) + len(lines["others"]) == 5
    with pytest.raises(ValueError, match="does not divide"):
        plots.compression(X[:, :20], ["nf4_g64"])


@pytest.mark.slow
def test_remedies_reduce_the_error_of_outliers():
    figure = plots.outliers(X, count=2)
    left, right = figure.axes
    rows = [label.get_text() for label in right.get_yticklabels()]
    assert rows[:2] == ["without outliers", "with outliers"]
    error = dict(zip(rows, (patch.get_width() for patch in right.patches), strict=True))
    assert error["with outliers"] > 2 * error["without outliers"]
    for name in rows[2:]:
        assert error[name] < error["with outliers"], name
    assert error["stored in float16"] == pytest.approx(error["without outliers"], rel=0.05)
    spread = [patch.get_height() for patch in left.patches]
    assert sum(spread) == X.size


def test_nonfinite_data_raises():
    big = X * np.float32(1e6)
    figure = plots.compression(big, ["float16", "float32", "int8_tensor"])
    assert [note.get_text() for note in figure.axes[0].texts] == ["int8_tensor"]
    assert "Exact: float32. Beyond the range: float16" in texts(figure)
    notes = plots.chain_errors(big, ["float16", "float32"]).axes[0].texts
    assert notes[0].get_text() == "not finite"
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.compression(X, ["float32"])


def test_all_zero_data_is_drawn():
    figure = plots.quantized_values(X * 0, "uint4_channel")
    figure.savefig(io.BytesIO())
    assert "SQNR inf dB, largest 0" in texts(figure)


def test_chain_shows_the_error_of_each_step():
    steps = ["float16", "float8_e5m2", "float16"]
    axes = plots.chain_errors(X, steps).axes[0]
    rows = jaxq.analysis.chain_table(X, steps).rows
    shown = np.asarray(axes.get_lines()[0].get_ydata())
    expected = [math.sqrt(r.mse / np.mean(X.astype(float) ** 2)) for r in rows]
    np.testing.assert_allclose(shown, expected, rtol=1e-5)
    notes = [text.get_text() for text in axes.texts]
    assert notes == [*(f"{r.sqnr_db:.1f} dB" for r in rows), "adds nothing"]
    assert plots.chain_errors(X, ["float32"]).axes[0].texts[0].get_text() == "exact"


def test_memory_bars_add_up():
    figure = plots.memory(["llama-3.1-8b", 7e9, "llama-2-7b"], ["bfloat16"], ["rtx-4090", "l4"])
    assert len(figure.axes) == 3
    bars = figure.axes[0].patches
    total = jaxq.analysis.memory("llama-3.1-8b", "bfloat16").total / 2**30
    assert sum(bar.get_width() for bar in bars) == pytest.approx(total)
    assert "rtx-4090, l4" not in texts(figure), "the axes end before 24 GiB"
    wide = plots.memory(["llama-3.1-8b"], ["float32"], ["rtx-4090", "l4"])
    assert "rtx-4090, l4" in texts(wide)


def test_fits_has_a_cell_for_every_case():
    axes = drawn("fits").axes[0]
    assert len(axes.texts) == 2 * 3 * len(jaxq.analysis.machines.DEVICES)
    assert axes.texts[0].get_text() == "18 %"
    assert axes.texts[-1].get_text() == "2 \N{MULTIPLICATION SIGN}"


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: plots.bit_layouts([]), ValueError, "at least 1, got 0"),
        (lambda: plots.bit_layouts("float16"), TypeError, r"Write \['float16'\]"),
        (lambda: plots.bit_layouts(["flaot16"]), ValueError, "Did you mean float16"),
        (lambda: plots.number_line(["float32"]), ValueError, "at most 16 bits"),
        (lambda: plots.number_line(["int4"], scale="lin"), ValueError, "'linear' or 'log'"),
        (lambda: plots.relative_error(["int4"], limits=(2, 1)), ValueError, "the lower first"),
        (lambda: plots.quantized_values(np.float32([1, np.nan])), ValueError, "must be finite"),
        (
            lambda: plots.quantized_values(np.zeros(0, np.float32)),
            ValueError,
            "one element or more",
        ),
        (lambda: plots.quantized_values(np.ones(2, np.int32)), TypeError, "int32"),
        (lambda: plots.channel_errors(np.float32(1)), ValueError, "1 or more axes"),
        (lambda: plots.sqnr_by_bits([9]), ValueError, "2 to 8"),
        (lambda: plots.outliers(X, count=500), ValueError, "at most a quarter"),
        (lambda: plots.outliers(X[:, :20]), ValueError, "multiple of 32"),
        (lambda: plots.outliers(X * 0), ValueError, "must not be constant, got only 0"),
        (lambda: plots.memory(["gpt"]), ValueError, "No model is named 'gpt'"),
        (lambda: plots.memory(devices=["abacus"]), ValueError, "abacus"),
    ],
)
def test_invalid_arguments_raise(call, error, match: str):
    with pytest.raises(error, match=match):
        call()


def test_missing_matplotlib_error_names_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="bit_layouts needs matplotlib: pip install matplotlib"):
        plots.bit_layouts()


def test_style_does_not_depend_on_matplotlib_settings():
    from matplotlib import rc_context

    with rc_context({"text.color": "red", "axes.facecolor": "black", "font.size": 30}):
        figure = plots.bit_layouts(["int4"])
    assert "red" not in {text.get_color() for text in figure.axes[0].texts}
    assert rcParams["text.color"] == rcParamsDefault["text.color"]


def test_figures_are_images_in_notebooks():
    figure = plots.number_line(["int2"])
    assert figure._repr_png_().startswith(b"\x89PNG")
    drawn = [plots.number_line(["int2"])._repr_svg_() for _ in range(2)]
    assert "<svg" in drawn[0]
    assert drawn[0] == drawn[1]
    many = np.random.default_rng(0).standard_normal((4, 4096)).astype(np.float32)
    points = plots.quantized_values(many, "int4_tensor")._repr_svg_()
    assert points.count("<image") == 1, "dense points are rasterized inside the SVG"
    assert plots.channel_errors(many)._repr_svg_() is None, "too many marks are shown as PNG"
