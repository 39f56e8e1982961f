"""The formulas of the metrics: each against a slow twin that spells it out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain import stability
from minitrain.metrics import formulas

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.sampled_from([1e-6, 1.0, 1e6]))
def test_spectral_norm(seed, rows, columns, scale):
    """Every iteration stays below the largest singular value and never falls.

    Where that is half as large again as the second, going on from where it stood has it after 30 measurements.
    """
    rng = np.random.default_rng(seed)
    u, s, v = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
    s[1:] *= min(1.0, s[0] / (1.5 * s[1])) if len(s) > 1 else 1.0
    w = (scale * (u * s) @ v).astype(np.float32)
    largest = float(np.linalg.svd(w.astype(np.float64), compute_uv=False)[0])
    vector, before = formulas.first_vector(columns), 0.0
    for _ in range(5):
        norm, vector = formulas.spectral_norm(w, vector, 1)
        assert before * (1 - 1e-9) <= norm <= largest * (1 + 1e-9)
        before = norm
    for _ in range(30):  # over and over from where it stood
        norm, vector = formulas.spectral_norm(w, vector)
    assert norm == pytest.approx(largest, rel=1e-3)


def test_spectral_norm_of_odd_matrices():
    """Zeros have norm 0; a number that is not finite has none; the vector stays as it was."""
    v = formulas.first_vector(3)
    assert formulas.spectral_norm(np.zeros((2, 3), np.float32), v)[0] == 0
    broken = np.array([[1, np.nan, 0]], np.float32)
    norm, same = formulas.spectral_norm(broken, v)
    assert math.isnan(norm)
    assert np.array_equal(same, v)
    assert np.linalg.norm(v) == pytest.approx(1)


@given(SEEDS)
def test_update_ratios(seed):
    """|after - before| / |before| of each tensor; NaN where there is nothing to hold it against."""
    rng = np.random.default_rng(seed)
    offsets = np.array([0, 5, 6, 30])
    before = rng.standard_normal(30).astype(np.float32)
    after = before + (1e-3 * rng.standard_normal(30)).astype(np.float32)
    before[5] = 0
    after[7] = rng.choice([np.nan, 1.0])
    got = formulas.update_ratios(before, after, offsets)
    with np.errstate(all="ignore"):
        slow = [np.linalg.norm(after[a:b] - before[a:b]) / np.linalg.norm(before[a:b]) for a, b in ((0, 5), (6, 30))]
    assert np.isnan(got[1])
    assert got[[0, 2]] == pytest.approx(slow, rel=1e-5, nan_ok=True)


@given(SEEDS)
def test_attention(seed):
    """Entropy and largest weight of each head, over the real queries but the first, spelt out."""
    rng = np.random.default_rng(seed)
    B, H, T = rng.integers(1, 4), rng.integers(1, 4), rng.integers(2, 7)
    scores = np.exp(3 * rng.standard_normal((B, H, T, T))) * np.tril(np.ones((T, T)))
    probs = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
    queries = np.arange(T) < rng.integers(1, T + 1, (B, 1))
    entropy, peak = formulas.attention(probs, queries)
    for h in range(H):
        asked = [probs[b, h, t].astype(np.float64) for b in range(B) for t in range(1, T) if queries[b, t]]
        slow = [-sum(p * math.log(p) for p in weights if p > 0) for weights in asked]
        assert entropy[h] == pytest.approx(np.mean(slow) if asked else math.nan, abs=1e-5, nan_ok=True)
        assert peak[h] == pytest.approx(np.mean([w.max() for w in asked]) if asked else math.nan, nan_ok=True)


def test_a_head_that_looks_at_one_key():
    """All weight on one key is entropy 0 and peak 1; evenly spread it is the log of the number of keys."""
    one, even = np.zeros((1, 1, 4, 4), np.float32), np.tril(np.ones((4, 4), np.float32))[np.newaxis, np.newaxis]
    one[..., 0] = 1
    queries = np.ones((1, 4), np.bool_)
    entropy, peak = formulas.attention(one, queries)
    assert (entropy[0], peak[0]) == (0, 1)
    assert peak[0] > formulas.ONE_KEY
    entropy, peak = formulas.attention(even / even.sum(-1, keepdims=True), queries)
    assert entropy[0] == pytest.approx(np.mean(np.log([2, 3, 4])))


@given(SEEDS)
def test_never_active(seed):
    """A unit is dead if it was before and no real token, padding left out, puts it above 0; NaN is not dead."""
    rng = np.random.default_rng(seed)
    pre = (rng.standard_normal((2, 3, 8)) - 1).astype(np.float32)
    pre[rng.random(pre.shape) < 0.05] = np.nan
    tokens, dead = rng.random((2, 3)) < 0.7, rng.random(8) < 0.8
    slow = [dead[u] and all(pre[b, t, u] <= 0 for b in range(2) for t in range(3) if tokens[b, t]) for u in range(8)]
    assert formulas.never_active(pre, tokens, dead).tolist() == slow


@given(SEEDS)
def test_rare_tokens(seed):
    """Together they make up at most the share of the text, and with the next one they would be over it."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(5, 40))
    targets = np.minimum(rng.geometric(0.2, (20, 6)) - 1, vocab - 1)
    mask = rng.random((20, 6)) < 0.9
    rare = formulas.rare_tokens(targets, mask, vocab)
    counts = np.array([(targets[mask] == token).sum() for token in range(vocab)])
    limit = formulas.RARE_SHARE * counts.sum()
    assert counts[rare].sum() <= limit
    assert not (~rare).any() or counts[rare].sum() + counts[~rare].min() > limit
    assert rare[counts == 0].all()


@given(SEEDS)
def test_duplicates(seed):
    """A sample counts if it stands earlier in its batch or anywhere in the one before; filled places do not."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 6, (5, 4))
    before = rng.integers(-1, 6, 4)
    slow, previous = [], before.tolist()
    for batch in rows.tolist():
        slow.append(sum(r >= 0 and (r in batch[:i] or r in previous) for i, r in enumerate(batch)))
        previous = batch
    assert formulas.duplicates(rows, before).tolist() == slow


@settings(max_examples=30)
@given(SEEDS, st.integers(0, 260))
def test_spike_steps(seed, length):
    """All at once they are what holding each loss against the 100 before it gives, numbers that are not finite too."""
    rng = np.random.default_rng(seed)
    losses = 2 + 0.1 * rng.standard_normal(length)
    losses[rng.random(length) < 0.03] += rng.choice([0.3, 0.5, 5.0])
    losses[rng.random(length) < 0.02] = rng.choice([np.nan, np.inf])
    slow = []
    for step in range(stability.WINDOW + 1, length):
        usual = stability.usual(losses, step)
        if losses[step] > usual.mean + stability.SPIKE * usual.deviation:
            slow.append(step)
    assert stability.spike_steps(losses).tolist() == slow


@given(SEEDS)
def test_overfit_onset_is_near_the_least_validation(seed):
    """With noise the onset is within 100 steps of where the true validation loss is least."""
    rng = np.random.default_rng(seed)
    steps = np.arange(50, 2001, 50)
    turn = int(rng.integers(300, 1500))
    validation = 2 + ((steps - turn) / 1000) ** 2 + 0.001 * rng.standard_normal(len(steps))
    onset = stability.overfit_onset(steps, validation, 4 * np.exp(-steps / 800))
    assert onset is not None
    assert abs(onset - turn) <= 100


def test_no_overfitting():
    """A validation loss that falls to the end has no onset; nor have too few or no finite numbers."""
    steps = np.arange(10)
    assert stability.overfit_onset(steps, 2 / (1 + steps), 1 / (1 + steps)) is None
    assert stability.overfit_onset(steps[:2], [1, 2], [2, 1]) is None
    assert stability.overfit_onset(steps, np.full(10, np.nan), -steps) is None
