"""The models of `real_models.py` with their data for calibration and tests."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import encoder
import file_kinds
import gemma
import jax
import numpy as np
import smollm
import speech
import texts
import whisper
from jax import lax
from jax import numpy as jnp

__all__ = ["NAMES", "Amounts", "Documents", "Model", "divergence", "real", "tiny", "word_errors"]

NAMES = {
    "minilm": "MiniLM",
    "magika": "Magika",
    "whisper": "Whisper",
    "smollm2": "SmolLM2",
    "gemma": "Gemma 3",
}


class Amounts(NamedTuple):
    """The amounts of data, and the text of the language models.

    Attributes:
      documents: the number of passages of text to test with.
      length: the number of tokens of a passage.
      calibration: the number of sentences or passages to calibrate with.
      text: the name of the text in `texts.TEXTS`. Default: Python's manual.
    """

    documents: int
    length: int
    calibration: int
    text: str = "manual"


class Documents(NamedTuple):
    """The results of a function, by document.

    Attributes:
      quality: the quality: a cosine, a log-likelihood, or a share of wrong words.
      weight: the number of sentences, tokens or words.
      error: the divergence from the float model: KL, or 1 minus the cosine.
    """

    quality: np.ndarray
    weight: np.ndarray
    error: np.ndarray


class Model(NamedTuple):
    """A model with its data.

    Attributes:
      name: the name.
      quality: the name of the quality.
      params: the parameters.
      apply: the function that is calibrated.
      loss: the loss whose gradients score recipes, of the same arguments.
      batches: its arguments after the parameters, for calibration.
      mask: a function from these arguments to a mask without padding; None if there is none.
      run: the function that is tested.
      inputs: its arguments after the parameters, for each group of documents.
      measure: a function from float outputs, outputs and the number of the group to the results.
      is_stacked: True if layers are stacked along a first axis. Default False.
    """

    name: str
    quality: str
    params: Any
    apply: Callable[..., Any]
    loss: Callable[..., jax.Array]
    batches: Sequence[Any]
    mask: Callable[..., Any] | None
    run: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    measure: Callable[[Any, Any, int], Documents]
    is_stacked: bool = False


@jax.jit
def divergence(base: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns the KL divergence of each distribution from that of `base`."""
    base, logits = jax.nn.log_softmax(base), jax.nn.log_softmax(logits)
    return (jnp.exp(base) * (base - logits)).sum(-1)


def drawn_loss(logits: jax.Array) -> jax.Array:
    """Returns the negative log-likelihood of labels that are drawn from the distributions.

    On average over the labels, the squares of its gradients are the diagonal of the Hessian of the
    divergence. Labels of the data would give larger gradients where the model is wrong.
    """
    log_probs = jax.nn.log_softmax(logits)
    labels = jax.random.categorical(jax.random.key(0), lax.stop_gradient(log_probs))
    return -jnp.take_along_axis(log_probs, labels[..., None], -1).sum()


def word_errors(reference: str, transcript: str) -> tuple[int, int]:
    """Returns the least number of changed, missing and added words, and the number of words."""
    a, b = (re.findall(r"[a-z0-9']+", text.lower()) for text in (reference, transcript))
    costs = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(b, 1):
            change = before + (word != other)
            before, costs[j] = costs[j], min(change, costs[j] + 1, costs[j - 1] + 1)
    return costs[-1], len(a)


def of_minilm(documents: int, calibration: int) -> Model:
    """Returns MiniLM with sentences to calibrate and to test with."""
    texts = encoder.sentences()[: calibration + documents]
    tokens, mask = encoder.tokenize(texts)

    def measure(base: Any, outputs: Any, group: int) -> Documents:
        del group
        cosines = np.asarray((base * outputs).sum(-1), np.float64)
        return Documents(cosines, np.ones(len(cosines)), 1 - cosines)

    def loss(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        # A random projection has the role that drawn labels have for distributions.
        embeddings = encoder.encode(params, tokens, mask)
        return (embeddings * jax.random.normal(jax.random.key(0), embeddings.shape)).sum()

    return Model(
        name="MiniLM",
        quality="cosine",
        params=encoder.load(),
        apply=encoder.encode,
        loss=loss,
        batches=[(tokens[:calibration], mask[:calibration])],
        mask=lambda _, mask: mask,
        run=encoder.encode,
        inputs=[(tokens[calibration:], mask[calibration:])],
        measure=measure,
    )


def of_magika(most: int) -> Model:
    """Returns Magika with files, at most `most` of each kind; a third of them calibrates."""
    model, files = file_kinds.load(), file_kinds.files(most)
    tokens = np.stack([file_kinds.content(path.read_bytes()) for path, _ in files])
    kinds = np.array([model.kinds.index(kind) for _, kind in files])
    is_test = np.arange(len(files)) % 3 > 0

    def measure(base: Any, outputs: Any, group: int) -> Documents:
        del group
        wrong = np.asarray(outputs.argmax(-1) != kinds[is_test], np.float64)
        return Documents(wrong, np.ones(len(wrong)), np.asarray(divergence(base, outputs)))

    return Model(
        name="Magika",
        quality="wrong files",
        params=model.params,
        apply=file_kinds.logits,
        loss=lambda params, tokens: drawn_loss(file_kinds.logits(params, tokens)),
        batches=[tokens[~is_test]],
        mask=None,
        run=file_kinds.logits,
        inputs=[(tokens[is_test],)],
        measure=measure,
    )


def of_text(name: str, model: Any, logits: Any, amounts: Amounts) -> Model:
    """Returns a language model with passages of text."""
    length = amounts.length

    def passages_of(part: int, count: int) -> list[np.ndarray]:
        # A token has fewer than 12 letters on average.
        width = length - len(model.first)
        text = texts.TEXTS[amounts.text](part)
        tokens = model.tokenize(text[: 12 * count * width])[: count * width]
        starts = np.tile(np.array(model.first, np.int32), (count, 1))
        rows = np.concatenate([starts, np.array(tokens, np.int32).reshape(count, width)], 1)
        return np.split(rows, max(1, count // 4))

    held_out = passages_of(1, amounts.documents)
    apply = functools.partial(logits, config=model.config)

    def measure(base: Any, outputs: Any, group: int) -> Documents:
        tokens = held_out[group]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), tokens[:, 1:, None], -1)
        losses = -np.asarray(chosen[..., 0], np.float64).mean(-1)
        weight = np.full(len(tokens), length - 1.0)
        return Documents(losses, weight, np.asarray(divergence(base, outputs)).mean(-1))

    def run(params: Any, tokens: jax.Array) -> jax.Array:
        return apply(params, tokens)[:, :-1]  # The token after the last one is not known.

    return Model(
        name=name,
        quality="perplexity",
        params=model.params,
        apply=apply,
        loss=lambda params, tokens: drawn_loss(run(params, tokens)),
        batches=passages_of(0, amounts.calibration),
        mask=None,
        run=run,
        inputs=[(tokens,) for tokens in held_out],
        measure=measure,
        is_stacked=True,
    )


def of_whisper(model: whisper.Model, sounds: Any, tests: Any, passages: Sequence[str]) -> Model:
    """Returns Whisper with recordings.

    Args:
      model: the model.
      sounds: the spectrograms to calibrate with, `[count, frames, bands]`.
      tests: the spectrograms to test with.
      passages: the texts of the spectrograms to test with.
    """
    apply = functools.partial(whisper.logits, heads=model.heads)
    first = len(whisper.PROMPT) - 1

    def listen(params: Any, sounds: jax.Array) -> tuple[jax.Array, jax.Array]:
        # One recording at a time, because attention to 30 seconds takes much memory.
        encoded = lax.map(lambda x: whisper.encode(params, x[None], model.heads)[0], sounds)
        prompt = jnp.tile(jnp.array(whisper.PROMPT), (len(sounds), 1))
        return encoded, whisper.transcribe(params, encoded, prompt, model.suppressed, model.heads)

    def run(params: Any, sounds: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoded, transcripts = listen(params, sounds)
        return whisper.decode(params, encoded, tokens, model.heads)[:, first:], transcripts

    write = jax.jit(lambda params, sounds: listen(params, sounds)[1])
    sounds, tests = np.stack(sounds), np.stack(tests)
    written = write(model.params, sounds)[:, None, :48]
    batches = list(zip(sounds[:, None], written, strict=True))
    tokens = write(model.params, tests)

    def measure(base: Any, outputs: Any, group: int) -> Documents:
        del group
        inside = np.asarray(tokens[:, first:] != whisper.END)
        kl = np.asarray(divergence(base[0], outputs[0]))
        heard = [model.text(np.asarray(transcript)) for transcript in outputs[1]]
        counts = [word_errors(*pair) for pair in zip(passages, heard, strict=True)]
        errors, words = np.array(counts, np.float64).T
        return Documents(errors / words, words, (kl * inside).sum(1) / inside.sum(1))

    return Model(
        name="Whisper",
        quality="word error",
        params=model.params,
        apply=apply,
        loss=lambda *args: drawn_loss(apply(*args)),
        batches=batches,
        mask=None,
        run=run,
        inputs=[(tests, tokens)],
        measure=measure,
        is_stacked=True,
    )


def real(name: str, amounts: Amounts) -> Model:
    """Returns a real model by its name in `NAMES`."""
    if name == "minilm":
        return of_minilm(4 * amounts.documents, amounts.calibration)
    if name == "magika":
        return of_magika(2 * amounts.documents)
    if name == "whisper":
        sounds, tests = (
            [speech.mel(speech.speak(text)) for text in passages]
            for passages in (speech.CALIBRATION[:2], speech.TEST[:6])
        )
        return of_whisper(whisper.load(), sounds, tests, speech.TEST[:6])
    module = {"smollm2": smollm, "gemma": gemma}[name]
    return of_text(NAMES[name], module.load(), module.logits, amounts)


def tiny(name: str) -> Model:
    """Returns a tiny random model of the form of a real one, of Whisper or SmolLM2."""
    if name == "smollm2":
        return of_text(NAMES[name], smollm.tiny(), smollm.logits, Amounts(4, 32, 4))
    sounds = np.random.default_rng(0).normal(size=(2, 64, 80)).astype(np.float32)
    return of_whisper(whisper.tiny(), sounds[:1], sounds[1:], ["one two"])
