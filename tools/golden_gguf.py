"""Makes tests/golden/gguf.npz: bytes that libgguf, which holds ggml's C code, quantizes.

Run it with a Python that has `libgguf` 0.2.2 and NumPy: `python tools/golden_gguf.py`.
"""

import pathlib

import numpy as np

NUMBERS = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11}
NUMBERS |= {"q4_k": 12, "q5_k": 13, "q6_k": 14, "iq4_nl": 20, "iq4_xs": 23, "tq1_0": 34}
NUMBERS |= {"tq2_0": 35, "mxfp4": 39, "nvfp4": 40}


def tensors() -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of several scales and of difficult values, and an importance of each column."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 256)) * 0.02
    x[4:8] *= np.exp2(rng.integers(-6, 7, (4, 256)))
    x[0, :64], x[1] = 0, np.abs(x[1])
    x[2] = rng.integers(-8, 9, 256)  # Ties.
    x[3, :128], x[3, 128:] = 2.5, np.tile([3, -3], 64)
    x[8], x[9, 32:] = -np.abs(x[8]), -0.0
    x[10] = np.exp2(rng.integers(-9, 9, 256)) * np.float32(1 - 2.0**-24)  # Just below powers of 2.
    x[11] *= 30000
    return x.astype(np.float32), (rng.standard_normal(256) ** 2 + 0.01).astype(np.float32)


if __name__ == "__main__":
    import libgguf  # pyright: ignore[reportMissingImports]

    x, importance = tensors()
    arrays = {name: libgguf.quantize_rows(x, number) for name, number in NUMBERS.items()}
    for name in (
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "iq4_nl",
        "iq4_xs",
        *(f"q{n}_k" for n in range(2, 7)),
    ):
        weighted = libgguf.quantize_rows(x, NUMBERS[name], imatrix=importance)
        arrays[f"{name} importance"] = weighted
    path = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "gguf.npz"
    np.savez_compressed(path, **arrays)
