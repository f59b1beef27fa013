"""Plots of the bit layouts of formats."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxq.analysis.plots._look import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    YELLOW,
    as_list,
    blank,
    new,
    picture,
    power,
)
from jaxq.formats import CodebookFormat, FloatFormat, Format, IntFormat, TaperedFormat, get_format

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Field", "bit_layouts", "fields"]

_FORMATS = (
    "float32",
    "tf32",
    "bfloat16",
    "float16",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e8m0fnu",
    "int8",
    "float4_e2m1fn",
    "int4",
)


class Field(NamedTuple):
    """A field of a code: its kind and its width in bits."""

    kind: str
    bits: int


_KINDS = {  # The color of each kind of field, and the letter in its bits.
    "sign": (ORANGE, "S"),
    "exponent": (BLUE, "E"),
    "mantissa": (GREEN, "M"),
    "integer": (SKY, "I"),
    "fraction": (GREEN, "F"),
    "index of a level": (PURPLE, "L"),
    "direction": (YELLOW, "D"),
    "regime": (PURPLE, "R"),
}


def fields(fmt: Format) -> tuple[Field, ...]:
    """Returns the fields of a format's codes, from the highest bit down.

    The fields of posits and takums have no fixed widths; their widths in the code of 1 are
    returned.

    Example:
      >>> [tuple(field) for field in fields(get_format("float8_e4m3fn"))]
      [('sign', 1), ('exponent', 4), ('mantissa', 3)]
    """
    if isinstance(fmt, CodebookFormat):
        all_fields = [Field("index of a level", fmt.bits)]
    elif isinstance(fmt, IntFormat):
        sign, fraction = int(fmt.signed), min(max(fmt.fraction_bits, 0), fmt.bits)
        whole = fmt.bits - sign - fraction
        all_fields = [Field("sign", sign), Field("integer", whole), Field("fraction", fraction)]
    elif isinstance(fmt, TaperedFormat) and fmt.exponent_bits is None:
        rest = fmt.bits - 5
        all_fields = [Field("sign", 1), Field("direction", 1), Field("regime", 3)]
        all_fields += [Field("fraction", rest)]
    elif isinstance(fmt, TaperedFormat):
        exponent = min(fmt.exponent_bits or 0, fmt.bits - 3)
        all_fields = [Field("sign", 1), Field("regime", 2), Field("exponent", exponent)]
        all_fields += [Field("fraction", fmt.bits - 3 - exponent)]
    else:
        all_fields = [Field("sign", int(fmt.signed)), Field("exponent", fmt.exponent_bits)]
        all_fields += [Field("mantissa", fmt.mantissa_bits)]
    return tuple(field for field in all_fields if field.bits > 0)


def _notes(fmt: Format) -> str:
    """Returns the text to the right of a row."""
    text = f"{fmt.bits} bits, max {power(fmt.max)}"
    if isinstance(fmt, FloatFormat):
        text += f", bias {fmt.bias}"
    if isinstance(fmt, TaperedFormat):
        text += ", fields as in the code of 1"
    return text


@picture
def bit_layouts(
    formats: Sequence[str | Format] = _FORMATS,
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draws the sign, exponent and mantissa bits of formats, a row of boxes for each.

    Each box is a bit and has the same width in all rows; the highest bit is on the left. The width
    of a field is above it, and the numbers of its first and last bits are below it.

    Args:
      formats: formats or their names, as in `jaxq.get_format`. The fields of posits and takums
        depend on the value; they are drawn as in the code of 1.
      title: a title above the plot.
      size: the width and height in inches.

    Returns:
      A figure.

    Raises:
      ValueError: if a format is unknown or the list is empty.

    Example:
      >>> figure = bit_layouts(["float16", "bfloat16"])
      >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
      ['float16', 'bfloat16']
    """
    from matplotlib.patches import Patch, Rectangle

    chosen = [get_format(spec) for spec in as_list("bit_layouts", "formats", formats)]
    # The width of a row and its notes, in boxes; a letter takes 0.3 of a box.
    reach = max(fmt.bits + 1.2 + 0.3 * len(_notes(fmt)) for fmt in chosen)
    width = max(6.0, 0.4 + 0.085 * max(len(fmt.name) for fmt in chosen) + 0.21 * reach)
    figure = new(width, 0.62 * len(chosen) + 1.0, size, title)
    axes = blank(figure.add_subplot())
    seen: dict[str, None] = {}
    for row, fmt in enumerate(chosen):
        left = 0
        for kind, bits in fields(fmt):
            seen[kind] = None
            color, letter = _KINDS[kind]
            for bit in range(left, left + bits):
                box = (bit + 0.03, row - 0.24), 0.94, 0.48
                axes.add_patch(Rectangle(*box, facecolor=color, alpha=0.28, linewidth=0))
                axes.text(bit + 0.5, row, letter, ha="center", va="center", fontsize=8.5)
            line = [left + 0.03, left + bits - 0.03]
            axes.plot(line, [row - 0.27] * 2, color=color, linewidth=2, solid_capstyle="butt")
            axes.text(left + bits / 2, row - 0.31, str(bits), ha="center", va="bottom", fontsize=8)
            for bit in {left, left + bits - 1}:
                number = str(fmt.bits - 1 - bit)
                axes.text(
                    bit + 0.5, row + 0.26, number, ha="center", va="top", fontsize=7.5, color=GRAY
                )
            left += bits
        axes.text(fmt.bits + 0.6, row, _notes(fmt), va="center", fontsize=8, color=GRAY)
    axes.set_xlim(-0.2, reach)
    axes.set_ylim(len(chosen) - 0.45, -0.6)
    axes.set_yticks(range(len(chosen)), [fmt.name for fmt in chosen])
    axes.set_xticks([])
    handles = [
        Patch(color=_KINDS[kind][0], alpha=0.5, linewidth=0, label=f"{_KINDS[kind][1]}: {kind}")
        for kind in seen
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=int(width / 1.2))
    return figure
