"""Checks real GGUF files: values against the gguf package, and writing against the file's bytes.

    python tools/gguf_files.py model.gguf ...

Every tensor is dequantized by jaxq and by gguf and must be equal, value for value. Then the file
is written again from what was read, and must have the same bytes.
"""

import argparse
import filecmp
import functools
import pathlib
import tempfile

import gguf as reference
import numpy as np

from jaxq import interop


def check(path: pathlib.Path) -> str:
    """Checks one file, and returns a line about it."""
    theirs = {tensor.name: tensor for tensor in reference.GGUFReader(path).tensors}
    with interop.open_tensors(path) as file, tempfile.TemporaryDirectory() as folder:
        tensors, kinds = [], {}
        for entry in file.entries:
            kinds[entry.dtype] = kinds.get(entry.dtype, 0) + 1
            other = theirs.pop(entry.name)
            want = reference.quants.dequantize(other.data, other.tensor_type)
            np.testing.assert_array_equal(file.read(entry), want.reshape(entry.shape), entry.name)
            read = functools.partial(file.raw, entry)
            kind = entry.dtype.lower()
            tensors.append(interop.gguf.Tensor(entry.name, kind, entry.shape, read))
        assert not theirs
        again = pathlib.Path(folder) / "again.gguf"
        interop.gguf.write(again, tensors, file.metadata)
        assert filecmp.cmp(path, again, shallow=False), f"{path}: written again, it differs"
    return (
        f"{path.name}: {sum(kinds.values())} tensors {kinds} equal, and written again identically"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    for path in parser.parse_args().files:
        print(check(path))
