"""Text from a model, token by token: the likeliest one, or one drawn at random.

The same model, prompt, settings and seed give the same text on every machine: logits are the engine's, weights are
our own exp, the draw is counted (`minitrain.rng`), and everything is added in the order of the token ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from minitrain._ext.engine import Environment
from minitrain.checkpoint import load_model
from minitrain.data.tokenizer import BOS, EOS, PAD, Tokenizer
from minitrain.elementary import exp
from minitrain.errors import ConfigError, DataError, RunError
from minitrain.model import MiniGPT
from minitrain.rng import SEED_LIMIT, Purpose, Stream
from minitrain.run_folder import RunFolder

NEVER = (PAD, BOS)
"""Tokens that no target of training is, and so no continuation."""


@dataclass(frozen=True)
class Sampling:
    """How to choose each next token. Raises ConfigError for a value that makes no sense.

    Temperature 0 takes the likeliest token (the lowest id of equals); else a token is drawn with weight
    exp(logit / temperature), from all or from the ``top_k`` likeliest.
    """

    temperature: float = 0.0
    top_k: int | None = None
    max_tokens: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        def expect(name: str, value: object, right: bool, expected: str) -> None:
            if not right:
                raise ConfigError(f"{name}: expected {expected}, got {value}")

        finite = math.isfinite(self.temperature) and self.temperature >= 0
        expect("temperature", self.temperature, finite, "a finite number, 0 (greedy) or more")
        expect("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "an integer of at least 1")
        expect("max_tokens", self.max_tokens, self.max_tokens >= 1, "an integer of at least 1")
        expect("seed", self.seed, 0 <= self.seed < SEED_LIMIT, f"an integer from 0 to {SEED_LIMIT - 1}")


@dataclass(frozen=True)
class Continuation:
    """The tokens behind a prompt, without ``<eos>``, and whether that ended them (else ``max_tokens`` did)."""

    tokens: list[int]
    finished: bool


def open_model(path: Path) -> tuple[MiniGPT, Tokenizer, Path]:
    """The model of a run folder, or of a model file; its tokenizer; the file. Raises RunError."""
    file = path if path.is_file() else RunFolder(path).require_model()
    stored = load_model(file)
    if stored.tokenizer is None:
        raise RunError(f"{file}: expected a model with its tokenizer, got one without; name one that a run has written")
    try:
        tokenizer = Tokenizer.from_json(stored.tokenizer)
    except DataError as error:
        raise RunError(f"{file}: {error}") from error
    if tokenizer.size > stored.config.vocab_size:
        raise RunError(
            f"{file}: expected a tokenizer of at most {stored.config.vocab_size} tokens, got {tokenizer.size}; "
            "name another file, or make it again"
        )
    model = MiniGPT(stored.config)
    model.params.flat[:] = stored.params.flat
    return model, tokenizer, file


def encode(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[str]]:
    """``<bos>`` and the ids of ``prompt``; and its characters that the model does not know, which become ``<unk>``.

    Raises ConfigError for text that cannot be written as UTF-8.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt: expected UTF-8 text, got {prompt!r}; check the terminal's encoding") from error
    return [BOS, *tokenizer.encode(prompt)], [c for c in dict.fromkeys(prompt) if c not in tokenizer.characters]


def generate(
    model: MiniGPT, tokenizer: Tokenizer, prompt: Sequence[int], how: Sampling, number: int = 0
) -> Continuation:
    """Continue ``prompt`` (ids, ``<bos>`` first) until ``<eos>`` or ``max_tokens``.

    ``number`` counts continuations of one seed: each draws its own numbers. The model reads the last ``max_seq_len``
    tokens, so a long text forgets its beginning. Raises RunError where a logit is not finite.
    """
    T, stream = model.config.max_seq_len, Stream(how.seed, Purpose.SAMPLE)
    candidates = [token for token in range(tokenizer.size) if token not in NEVER]
    inputs, nothing = np.full((1, T), PAD, np.int32), np.zeros((1, T), np.int32)
    ids = list(prompt)
    for step in range(how.max_tokens):
        window = ids[-T:]
        inputs[0] = window + [PAD] * (T - len(window))
        mask = np.arange(T)[np.newaxis] < len(window)
        logits, _ = model.forward(inputs, nothing, mask, np.zeros_like(mask), training=False)
        row = logits[0, len(window) - 1, candidates]
        if not np.isfinite(row).all():
            raise RunError("model: expected finite logits, got NaN or infinity; its run diverged, name another model")
        high, low = (int(word) for word in stream.words(2, step, site=number))
        uniform = ((high >> 5) * 2**26 + (low >> 6)) / 2**53
        token = candidates[choose(row.tolist(), how, uniform)]
        if token == EOS:
            return Continuation(ids[len(prompt) :], True)
        ids.append(token)
    return Continuation(ids[len(prompt) :], False)


def choose(logits: Sequence[float], how: Sampling, uniform: float) -> int:
    """The position of the logit that is chosen, by a number 0 <= ``uniform`` < 1."""
    likeliest = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if how.temperature == 0:
        return likeliest[0]
    kept, top = sorted(likeliest[: how.top_k]), logits[likeliest[0]]
    with Environment():  # no library may have switched denormals off
        sums = list(accumulate(exp((logits[i] - top) / how.temperature) for i in kept))  # sum() adds otherwise in 3.12
        threshold = uniform * sums[-1]
        return next((i for i, upto in zip(kept, sums, strict=True) if upto > threshold), likeliest[0])
