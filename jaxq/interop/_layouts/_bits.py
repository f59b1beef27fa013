"""Codes in dense words, unpacked and packed with NumPy."""

import numpy as np

__all__ = ["as_bytes", "pack_bits", "unpack_bits"]


def as_bytes(words: np.ndarray) -> np.ndarray:
    """Returns words `[..., n]` as their little-endian bytes, uint8 `[..., n · bytes per word]`."""
    words = np.ascontiguousarray(words, words.dtype.newbyteorder("<"))
    size = words.shape[-1] * words.dtype.itemsize
    return words.view(np.uint8).reshape(*words.shape[:-1], size)


def unpack_bits(data: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Returns the codes packed in bytes, beginning with the lowest bit of the first byte.

    Args:
      data: uint8 `[..., bytes]`.
      bits: the width of a code, 1 to 8.
      n: the number of codes.

    Returns:
      uint8 `[..., n]`.
    """
    if bits == 8:
        return data[..., :n]
    if bits in (1, 2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = data[..., None] >> shifts & np.uint8(2**bits - 1)
        return codes.reshape(*data.shape[:-1], codes.shape[-2] * codes.shape[-1])[..., :n]
    groups = -(-n // 8)  # Eight codes fill `bits` bytes.
    padded = np.zeros((*data.shape[:-1], groups * bits + 1), np.uint16)
    taken = min(data.shape[-1], groups * bits)
    padded[..., :taken] = data[..., :taken]
    starts = np.arange(8) * bits
    columns = []
    for byte, shift in zip(starts // 8, starts % 8, strict=True):
        low = padded[..., byte::bits][..., :groups]
        high = padded[..., byte + 1 :: bits][..., :groups]
        columns.append((low >> shift | high << (8 - shift)) & (2**bits - 1))
    codes = np.stack(columns, axis=-1).astype(np.uint8)
    return codes.reshape(*data.shape[:-1], 8 * groups)[..., :n]


def pack_bits(codes: np.ndarray, bits: int, word: int = 1) -> np.ndarray:
    """Returns the bytes of codes, padded with zeros to whole words; the inverse of `unpack_bits`.

    Args:
      codes: uint8 `[..., n]`, below 2^bits.
      bits: the width of a code, 1 to 8.
      word: the number of bytes in a word. Default: 1.

    Returns:
      uint8 `[..., bytes]`.
    """
    size = -(-codes.shape[-1] * bits // 8)
    size = -(-size // word) * word
    if bits == 8:
        data = codes
    elif bits in (1, 2, 4):
        per_byte = 8 // bits
        if codes.shape[-1] % per_byte:
            padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)]
            codes = np.pad(codes, padding)
        data = codes[..., ::per_byte].copy()
        for i in range(1, per_byte):
            data |= codes[..., i::per_byte] << np.uint8(i * bits)
    else:
        digits = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        digits = digits.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
        data = np.packbits(digits, axis=-1, bitorder="little")
    result = np.zeros((*codes.shape[:-1], size), np.uint8)
    result[..., : data.shape[-1]] = data
    return result
