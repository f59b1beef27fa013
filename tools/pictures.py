"""Draws the pictures of docs/pictures.md with the code above each of them.

    python tools/pictures.py [NAME ...]

Blocks marked ```py run only here; blocks marked ```python also run in the tests.
"""

import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "pictures.md"
_BLOCK = re.compile(r"^```(?:python|py)\n(.*?)^```\n(?:\n!\[[^\]]*\]\((.*?)\))?", re.M | re.S)


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes an SVG."""
    path.parent.mkdir(exist_ok=True)
    drawn = figure._repr_svg_()
    if drawn is None:
        raise ValueError(f"{path.name} would have too many marks; rasterize some of them.")
    path.write_text(drawn)


def main(names: Sequence[str]) -> None:
    """Runs the page's code blocks in order and saves the figure of each block before a picture."""
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
