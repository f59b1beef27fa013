"""Writes the log-mel spectrogram of a chirp, as computed by transformers, for the tests.

    pip install transformers
    python tools/golden_whisper.py

The result is `tests/golden/whisper_mel.npz`: one second of audio as int16 at 16 kHz, and every
tenth frame of Whisper's spectrogram.
"""

# pyright: reportMissingImports=false

import pathlib

import numpy as np
from transformers import WhisperFeatureExtractor

PATH = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "whisper_mel.npz"


def main() -> None:
    """Writes the file."""
    time = np.arange(12_000) / 16_000  # The rest of the second is silence.
    chirp = np.sin(2 * np.pi * (100 * time + 2500 * time**2)) * np.exp(-time)
    audio = np.round(chirp * 2**14).astype(np.int16)
    extractor = WhisperFeatureExtractor(chunk_length=1)
    features = extractor(audio / np.float32(2**15), sampling_rate=16_000, return_tensors="np")
    mel = np.asarray(features["input_features"], np.float32)[0].T
    np.savez_compressed(PATH, audio=audio, mel=mel[::10])


if __name__ == "__main__":
    main()
