"""Random numbers: Philox's published answers, and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain._ext import engine
from minitrain.rng import Purpose, Stream, philox

words32 = st.integers(0, 2**32 - 1)

# Random123 (Salmon et al.), kat_vectors: counter, key, words of philox4x32 with 10 rounds
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def normal(n: int, seed: int = 0, purpose: int = 0, step: int = 0, site: int = 0, std: float = 1.0) -> np.ndarray:
    out = np.empty(n, np.float32)
    engine.normal(out, std, seed, purpose, step, site)
    return out


def box_muller(w: np.ndarray) -> np.ndarray:
    """Two normals from each row of four Philox words, in double precision with NumPy's functions."""
    w = w.astype(np.uint64)
    u = ((w[:, 0] << np.uint64(20) | w[:, 1] >> np.uint64(12)) + np.uint64(1)) * 2.0**-52
    angle = 2 * np.pi * ((w[:, 2] << np.uint64(20) | w[:, 3] >> np.uint64(12)) * 2.0**-52)
    return (np.sqrt(-2 * np.log(u))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)).ravel()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    """The words of `philox` are those that the authors publish."""
    k0, k1 = words(key)
    assert philox(np.array([words(counter)], np.uint32), (k0, k1))[0].tolist() == words(expected)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN[:1])
def test_known_answer_of_the_engine(counter, key, expected):
    """The engine's first two normals are those of the first published answer (its counter starts at index 0)."""
    exact = box_muller(np.array([words(expected)], np.uint32))
    np.testing.assert_allclose(normal(2), exact, rtol=1e-6)


@settings(deadline=None)
@given(seed=words32, purpose=words32, step=words32, site=words32)
def test_normals_are_box_muller_of_philox(seed, purpose, step, site):
    """The engine's Philox has the same words as `minitrain.rng`, and its own log and sine the values of NumPy's."""
    counter = np.zeros((50, 4), np.uint32)
    counter[:, 0], counter[:, 2], counter[:, 3] = np.arange(50), site, step
    exact = box_muller(philox(counter, (seed, purpose)))
    np.testing.assert_allclose(normal(100, seed, purpose, step, site), exact, rtol=1e-6, atol=1e-9)


def test_normals_look_normal():
    """Moments and tails of 100,000 of them, and no correlation of the two of a pair."""
    n = 100_000
    x = normal(n, seed=42, purpose=Purpose.INIT).astype(np.float64)
    assert abs(x.mean()) < 4 / np.sqrt(n)
    assert abs(x.std() - 1) < 4 / np.sqrt(2 * n)
    assert abs((x**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * np.sqrt(96 / n)
    assert abs((x[::2] * x[1::2]).mean()) < 4 / np.sqrt(n / 2)
    assert abs((np.abs(x) > 2).mean() - 0.0455) < 0.003
    assert np.isfinite(x).all()


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 70), seed=words32)
def test_normals_are_a_prefix(n, seed):
    """Fewer numbers, odd or even, are the beginning of more; the same call gives the same bits, another seed others."""
    x = normal(71, seed)
    assert np.array_equal(normal(n, seed), x[:n])
    assert not np.array_equal(normal(71, seed ^ 1), x)


def test_std_scales():
    """``std`` multiplies before the rounding to float32."""
    np.testing.assert_allclose(normal(1000, std=0.02), 0.02 * normal(1000).astype(np.float64), rtol=2e-7)


# Streams


@settings(deadline=None, max_examples=30)
@given(seed=words32, n=st.integers(0, 40), step=words32, site=words32)
def test_words_are_philox(seed, n, step, site):
    """Word i of (step, site) is word i % 4 of counter (i // 4, 0, site, step), whatever n is."""
    stream = Stream(seed, Purpose.SHUFFLE)
    counter = np.array([[i, 0, site, step] for i in range(10)], np.uint32)
    assert np.array_equal(stream.words(n, step, site), philox(counter, (seed, Purpose.SHUFFLE)).ravel()[:n])


@settings(deadline=None, max_examples=30)
@given(seed=words32, n=st.integers(0, 300), step=st.integers(0, 1000))
def test_permutations(seed, n, step):
    """Every number once, the same on each call, no need of earlier steps."""
    stream = Stream(seed, Purpose.SHUFFLE)
    order = stream.permutation(n, step)
    assert sorted(order) == list(range(n))
    assert np.array_equal(order, Stream(seed, Purpose.SHUFFLE).permutation(n, step))


def test_permutations_are_even():
    """Each of the 24 orders of 4 things comes about equally often (chi-square of 23 degrees below its 99.9 % point)."""
    orders = [tuple(Stream(9, Purpose.SHUFFLE).permutation(4, step)) for step in range(2400)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 49.7


@settings(deadline=None, max_examples=30)
@given(seed=words32, below=st.integers(1, 4096))
def test_integers(seed, below):
    """In range, and reaching both halves of it."""
    x = Stream(seed, Purpose.SAMPLE).integers(200, below, step=3)
    assert x.min() >= 0
    assert x.max() < below
    assert below == 1 or (x.min() < below / 2 <= x.max())


def test_no_two_uses_share_a_number():
    """Purpose, step, site and seed each change every word."""
    base = Stream(1, Purpose.INIT).words(64, 2, 3)
    others = [
        Stream(1, Purpose.DROPOUT).words(64, 2, 3),
        Stream(2, Purpose.INIT).words(64, 2, 3),
        Stream(1, Purpose.INIT).words(64, 3, 3),
        Stream(1, Purpose.INIT).words(64, 2, 4),
        Stream(1, Purpose.INIT).words(64, 3, 2),
    ]
    assert all((base != other).mean() > 0.95 for other in others)
    assert len(set(Purpose)) == len(Purpose)
