"""Draws the gallery: every picture of docs/pictures.md, by the code that stands above it.

    python tools/pictures.py [NAME ...]

Blocks in ```py are run here only, those in ```python by the tests as well.
"""

import io
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from PIL import Image

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "pictures.md"
_BLOCK = re.compile(r"^```(?:python|py)\n(.*?)^```\n(?:\n!\[[^\]]*\]\((.*?)\))?", re.M | re.S)


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a PNG of at most 255 colours, a third of the bytes of one with all."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    image = Image.open(file).convert("RGB")
    path.parent.mkdir(exist_ok=True)
    small = image.quantize(255, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main(names: Sequence[str]) -> None:
    """Runs the page's blocks in order and saves the figure of each that a picture follows."""
    namespace: dict[str, Any] = {}
    for code, picture in _BLOCK.findall(PAGE.read_text()):
        path = PAGE.parent / picture
        if names and picture and path.stem not in names:
            continue
        exec(compile(code, str(PAGE), "exec"), namespace)
        if picture:
            save(namespace["figure"], path)
            print(f"{path.relative_to(PAGE.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
