"""The command `jaxq inspect`: the tensors and the metadata of a file."""

import argparse
from typing import Any

import numpy as np

from jaxq.cli._output import print_json, print_table, safe
from jaxq.interop import open_tensors

__all__ = ["run"]

_ITEMS, _CHARACTERS = 8, 64  # The numbers of array items and of characters that are shown.


def run(args: argparse.Namespace) -> None:
    """Prints one line per tensor, the metadata and the totals."""
    with open_tensors(args.file, raw=args.raw) as file:
        rows = [
            {
                "tensor": entry.name,
                "shape": "x".join(map(str, entry.shape)) or "scalar",
                "dtype": entry.dtype,
                "bytes": entry.nbytes,
                "bits": 8 * entry.nbytes / entry.size if entry.size else None,
            }
            for entry in file.entries
        ]
        notes = {
            entry.name: entry.layout.note for entry in file.entries if entry.layout is not None
        }
        metadata = {key: _plain(value) for key, value in file.metadata.items()}
        elements = sum(entry.size for entry in file.entries)
    nbytes = sum(row["bytes"] for row in rows)
    total = {"tensors": len(rows), "elements": elements, "bytes": nbytes}
    if args.json:
        for row in rows:
            if notes.get(row["tensor"]):
                row["note"] = notes[row["tensor"]]
        return print_json({"tensors": rows, "metadata": metadata, "total": total})
    for key, value in metadata.items():
        print(f"{safe(key)} = {_short(value, args.metadata)}")
    if metadata:
        print()
    print_table(rows, left=["dtype"])
    bits = f", {8 * nbytes / elements:.4g} bits each" if elements else ""
    print(f"\n{len(rows)} tensors, {elements:,} elements, {nbytes:,} bytes{bits}")
    for note in dict.fromkeys(filter(None, notes.values())):
        names = [safe(name) for name, entry_note in notes.items() if entry_note == note]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"no recipe: {names[0]}{more}: {note}")
    return None


def _plain(value: Any) -> Any:
    """Converts a metadata value to types that JSON supports."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _short(value: Any, in_full: bool) -> str:
    if isinstance(value, list):
        items = value if in_full else value[:_ITEMS]
        more = "" if in_full or len(value) <= _ITEMS else f", … ({len(value)} items)"
        return f"[{', '.join(_short(item, in_full) for item in items)}{more}]"
    text = safe(str(value))
    return text if in_full or len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…"
