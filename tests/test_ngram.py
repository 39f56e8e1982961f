"""The n-gram baseline against hand and against a second, slow implementation."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitrain.data.ngram import ALPHA, ORDERS, baseline
from minitrain.data.tokenizer import BOS, EOS

sequences = st.lists(
    st.lists(st.integers(4, 7), max_size=9).map(lambda text: [BOS, *text, EOS]), min_size=1, max_size=6
)


def test_by_hand():
    """Trained on "a b" and "a a", evaluated on "a b", with five ids."""
    a, b = 3, 4
    result = baseline([[BOS, a, b, EOS], [BOS, a, a, EOS]], [[BOS, a, b, EOS]], 5)
    # Unigrams: a, b and <eos> stand 3, 1 and 2 times among 6.
    p = [(count + 0.01) / (6 + 0.05) for count in (3, 1, 2)]
    assert result["perplexity"]["1"] == pytest.approx(math.prod(p) ** (-1 / 3), rel=1e-12)
    # Bigrams: <bos> a 2 of 2; a b 1 of 3; b <eos> 1 of 1.
    p = [(2 + 0.01) / (2 + 0.05), (1 + 0.01) / (3 + 0.05), (1 + 0.01) / (1 + 0.05)]
    assert result["perplexity"]["2"] == pytest.approx(math.prod(p) ** (-1 / 3), rel=1e-12)
    # Trigrams: <bos><bos> a 2 of 2; <bos> a b 1 of 2; a b <eos> 1 of 1. Longer contexts see no more.
    p = [(2 + 0.01) / (2 + 0.05), (1 + 0.01) / (2 + 0.05), (1 + 0.01) / (1 + 0.05)]
    assert result["perplexity"]["3"] == pytest.approx(math.prod(p) ** (-1 / 3), rel=1e-12)
    assert result["perplexity"]["7"] == result["perplexity"]["3"]
    assert result["best_n"] == 3
    assert result["best_perplexity"] == result["perplexity"]["3"]


def test_how_many_contexts_are_known():
    """Trained on "a b"; "a a" knows the contexts <bos> and a, but not a a."""
    a, b = 3, 4
    result = baseline([[BOS, a, b, EOS]], [[BOS, a, a, EOS]], 5)
    assert [result["context_seen"][str(n)] for n in ORDERS] == pytest.approx([1, 1, *[2 / 3] * 5])


def by_counting(train: list[list[int]], val: list[list[int]], vocab_size: int, n: int) -> float:
    """The definition, written down with dictionaries."""

    def grams(sequence: list[int]) -> list[tuple[int, ...]]:
        padded = [BOS] * n + sequence
        return [tuple(padded[end - n : end]) for end in range(n + 2, len(padded) + 1)]

    counts = Counter(gram for sequence in train for gram in grams(sequence))
    contexts = Counter(gram[:-1] for sequence in train for gram in grams(sequence))
    logs = [
        math.log((counts[gram] + ALPHA) / (contexts[gram[:-1]] + ALPHA * vocab_size))
        for sequence in val
        for gram in grams(sequence)
    ]
    return math.exp(-math.fsum(logs) / len(logs))


@given(train=sequences, val=sequences)
def test_equals_the_definition(train: list[list[int]], val: list[list[int]]):
    """The array version and the dictionary version agree at every order."""
    result = baseline(train, val, 8)
    expected = {str(n): by_counting(train, val, 8, n) for n in ORDERS}
    assert result["perplexity"] == pytest.approx(expected, rel=1e-12)
    assert result["best_perplexity"] == min(result["perplexity"].values())


def test_large_vocabulary_does_not_overflow():
    """Seven tokens of a vocabulary of 2**20 are more than 64 bits hold."""
    train = [[BOS, *(2**20 - 1 - place for place in range(20)), EOS]]
    assert baseline(train, train, 2**20)["perplexity"]["7"] == pytest.approx(
        by_counting(train, train, 2**20, 7), rel=1e-12
    )
