"""Speech for a recognizer: passages of books, spoken by `espeak-ng`, and their spectrograms."""

import io
import shutil
import subprocess
import sys
import wave
from typing import Any

import numpy as np

__all__ = ["CALIBRATION", "TEST", "mel", "read_wave", "speak"]

RATE = 16_000  # Samples per second.
SAMPLES = 30 * RATE  # Whisper always hears 30 seconds; shorter audio is followed by silence.

# All passages are in the public domain.
CALIBRATION = (
    # Herman Melville, Moby-Dick.
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world.",
    # Henry David Thoreau, Walden.
    "I went to the woods because I wished to live deliberately, to front only the essential facts "
    "of life, and see if I could not learn what it had to teach, and not, when I came to die, "
    "discover that I had not lived.",
    # James Matthew Barrie, Peter and Wendy.
    "All children, except one, grow up. They soon know that they will grow up, and the way Wendy "
    "knew was this. One day when she was two years old she was playing in a garden, and she "
    "plucked another flower and ran with it to her mother.",
    # Mark Twain, Adventures of Huckleberry Finn.
    "It was a close place. I took it up, and held it in my hand. I was trembling, because I had "
    "to decide, forever, between two things, and I knew it. I studied a minute, holding my "
    "breath, and then I said it to myself.",
)

TEST = (
    # Jane Austen, Pride and Prejudice.
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighborhood, this truth is well fixed.",
    # Charles Dickens, A Tale of Two Cities.
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the season of light, it was the season of darkness, it was the "
    "spring of hope, it was the winter of despair.",
    # Lewis Carroll, Alice's Adventures in Wonderland.
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do. Once or twice she had looked into the book her sister was reading, but it "
    "had no pictures or conversations in it.",
    # Abraham Lincoln, the Gettysburg Address.
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so "
    "conceived and so dedicated, can long endure. We are met on a great battlefield of that war.",
    # Arthur Conan Doyle, A Scandal in Bohemia.
    "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any "
    "other name. In his eyes she eclipses and predominates the whole of her sex. It was not that "
    "he felt any emotion akin to love.",
    # Charles Darwin, On the Origin of Species.
    "There is grandeur in this view of life, with its several powers, having been originally "
    "breathed into a few forms or into one. From so simple a beginning endless forms most "
    "beautiful and most wonderful have been, and are being, evolved.",
    # Herbert George Wells, The Time Machine.
    "The fire burned brightly, and the soft radiance of the lights in the lilies of silver "
    "caught the bubbles that flashed and passed in our glasses. Our chairs embraced and caressed "
    "us rather than submitted to be sat upon.",
    # Kenneth Grahame, The Wind in the Willows.
    "The Mole had been working very hard all the morning, cleaning his little home. First with "
    "brooms, then with dusters, then on ladders and steps and chairs, with a brush and a pail, "
    "till he had dust in his throat and eyes.",
)


def mel(audio: np.ndarray, samples: int = SAMPLES, bands: int = 80) -> np.ndarray:
    """Returns the log-mel spectrogram `[frames, bands]` of audio at 16 kHz.

    Windows of 25 ms start every 10 ms. The powers are summed in triangular bands on Slaney's mel
    scale; the logarithms are limited to 8 decades below the largest.

    Args:
      audio: the samples in [-1, 1].
      samples: the number of samples to pad or cut to. Default: 30 seconds.
      bands: the number of mel bands. Default 80.
    """
    size, hop = 400, RATE // 100
    audio = np.pad(audio[:samples], (0, max(0, samples - len(audio))))
    audio = np.pad(audio, size // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(audio, size)[::hop][: samples // hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    powers = np.abs(np.fft.rfft(frames * window)) ** 2
    logs = np.log10(np.maximum(powers @ _bands(size, bands), 1e-10))
    return ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)


def _bands(size: int, count: int) -> np.ndarray:
    """Returns the weights of powers in mel bands of equal area, `[size // 2 + 1, count]`."""
    # Slaney's scale is linear up to 1 kHz (15 mel) and logarithmic above.
    octave = np.log(6.4) / 27
    top = 15 + np.log(RATE / 2 / 1000) / octave
    mels = np.linspace(0, top, count + 2)
    edges = np.where(mels < 15, 200 / 3 * mels, 1000 * np.exp(octave * (mels - 15)))
    slopes = np.linspace(0, RATE / 2, size // 2 + 1)[:, None] - edges
    widths = np.diff(edges)
    triangles = np.minimum(slopes[:, :-2] / widths[:-1], -slopes[:, 2:] / widths[1:])
    return np.maximum(triangles, 0) * 2 / (edges[2:] - edges[:-2])


def speak(text: str, voice: str = "en-us", speed: int = 140) -> np.ndarray:
    """Returns speech at 16 kHz in [-1, 1], made by `espeak-ng`.

    Args:
      text: the text.
      voice: the voice. Default: American English.
      speed: the words per minute. Default 140.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        sys.exit("This example needs the program espeak-ng: apt-get install espeak-ng")
    command = [program, "-v", voice, "-s", str(speed), "--stdout", text]
    return read_wave(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout))


def read_wave(file: Any) -> np.ndarray:
    """Returns the first channel of a WAV file of 16-bit numbers at 16 kHz, in [-1, 1]."""
    with wave.open(file) as reader:
        rate, channels = reader.getframerate(), reader.getnchannels()
        assert reader.getsampwidth() == 2, "the WAV file must hold 16-bit numbers"
        # espeak-ng writes a header before it knows the length; the number of frames may be wrong.
        data = reader.readframes(SAMPLES * 4)
    audio = np.frombuffer(data[: len(data) // 2 * 2], "<i2")[::channels] / 2**15
    spectrum = np.fft.rfft(audio)  # The band above the lower of both limits is dropped.
    length = round(len(audio) * RATE / rate)
    return np.fft.irfft(spectrum[: length // 2 + 1], length) * length / len(audio)
