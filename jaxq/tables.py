"""Tables of records, set as plain text."""

import dataclasses
import math
from typing import Any

__all__ = ["Table"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows that are records of one dataclass; `str` sets them as aligned text."""

    rows: tuple[Any, ...]

    def __str__(self) -> str:
        heads = [field.name for field in dataclasses.fields(self.rows[0])] if self.rows else []
        cells = [[_cell(getattr(row, head)) for head in heads] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (heads, *cells)
        ]
        return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.6g}"
    return str(value)
