"""The numbers themselves: pure functions of arrays, each with its formula and where that comes from.

They only look: rounding follows NumPy and its BLAS, so the last digits may differ between processors, and nothing here
enters training, record or replay.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]

RARE_SHARE = 0.05
"""Rare are the tokens that together make up at most this share of the training text, the rarest first (our choice)."""
ONE_KEY = 0.95
"""A head whose queries give their largest weight more than this, on average, looks at one key only (our choice)."""


SETTLED = 2e-4
"""Power iteration ends when it raises the norm by less than this share (our choice)."""


def spectral_norm(weight: Floats, vector: Floats, iterations: int = 50) -> tuple[float, NDArray[np.float64]]:
    """Largest singular value of ``weight`` (out, in), and the vector (in,) to go on from.

    Power iteration on W^T W: v <- W^T W v / |W^T W v|, sigma = |W v| (von Mises & Pollaczek-Geiringer 1929; with the
    vector kept between steps as in Miyato et al. 2018, "Spectral normalization"), until it has `SETTLED` or taken
    that many ``iterations``. From below: the norm is at least this. NaN where an element is not finite, 0 for zeros.
    """
    w = weight.astype(np.float64)
    v = np.asarray(vector, np.float64)
    if not np.isfinite(w).all():
        return float("nan"), v
    image = w @ v
    norm = math.sqrt(image @ image)
    for _ in range(iterations):
        if norm == 0:
            break
        back = image @ w
        v = back / math.sqrt(back @ back)
        image = w @ v
        before, norm = norm, math.sqrt(image @ image)
        if norm - before < SETTLED * norm:
            break
    return norm, v


def first_vector(n: int) -> NDArray[np.float64]:
    """(n,) of length 1 from which power iteration begins: no two elements alike, so that no symmetry hides anything."""
    v = 1 + np.modf(np.arange(1, n + 1) * 0.6180339887498949)[0]
    v[1::2] *= -1
    return np.asarray(v / np.linalg.norm(v))


def update_ratios(before: Floats, after: Floats, offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,): L2 norm of the change of each tensor over its norm before, |after - before| / |before|.

    Healthy is about 1e-3 (Karpathy, CS231n notes on training). ``offsets`` (N + 1,) cut the flat buffers (P,) into
    tensors. NaN where a tensor was all zeros or is not finite.
    """
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    change = after - before
    with np.errstate(all="ignore"):
        changed = np.sqrt([float(np.dot(x, x)) for x in (change[a:b] for a, b in bounds)])
        norm = np.sqrt([float(np.dot(x, x)) for x in (before[a:b] for a, b in bounds)])
        ratios = np.where(norm > 0, changed / norm, np.nan)
    return np.where(np.isfinite(ratios), ratios, np.nan)


def attention(probs: Floats, queries: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Entropy in nats and largest weight, each (H,): means over the queries that have more than one key to look at.

    ``probs`` (B, H, T, T) are the weights that each query (third axis) gives to the keys, ``queries`` (B, T) True where
    a real token asks. The entropy -sum p ln p is 0 where a query looks at one key only, at most ln of the number of its
    keys (Zhai et al. 2023, "Stabilizing transformer training by preventing attention entropy collapse"). The first
    query sees itself alone and does not count. NaN where no query is left.
    """
    asked = queries.copy()
    asked[:, 0] = False
    count = int(asked.sum())
    heads = probs.shape[1]
    if not count:
        return np.full(heads, np.nan), np.full(heads, np.nan)
    rows = np.ascontiguousarray(probs.transpose(0, 2, 1, 3)[asked])  # (count, H, T)
    tiny = np.finfo(np.float32).tiny
    entropy = -np.einsum("nhk,nhk->h", rows, np.log(np.maximum(rows, tiny)))
    return np.asarray(entropy / count, np.float64), np.asarray(rows.max(axis=-1).mean(axis=0), np.float64)


def never_active(pre: Floats, tokens: Mask, dead: Mask) -> Mask:
    """Which of the ``dead`` units (F,) stay dead: pre-activation ``pre`` (B, T, F) <= 0 on every one of these tokens.

    With GELU such a unit gives almost nothing and learns almost nothing; the word is ReLU's (Lu et al. 2019, "Dying
    ReLU and initialization"). ``tokens`` (B, T) is True where a real token stands. NaN does not count as dead.
    """
    still = dead.copy()
    left = np.flatnonzero(dead)
    if len(left):
        rows = pre[tokens]
        still[left] = ~(~(rows[:, left] <= 0)).any(axis=0)
    return still


def rare_tokens(targets: NDArray[np.integer], mask: Mask, vocab: int) -> Mask:
    """(V,): True for the rarest tokens, as many as make up at most `RARE_SHARE` of the text together.

    A token that the text does not have is rare.
    """
    counts = np.bincount(targets[mask].ravel(), minlength=vocab)
    order = np.argsort(counts, kind="stable")
    upto = np.cumsum(counts[order]) <= RARE_SHARE * counts.sum()
    rare = np.zeros(vocab, np.bool_)
    rare[order[upto]] = True
    return rare


def duplicates(rows: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,): how many samples each of n batches (n, B) has twice, or shares with the batch before it.

    ``before`` (B,) is the batch before the first; a negative row number stands for no sample.
    """
    previous = np.concatenate([before[np.newaxis], rows[:-1]])
    earlier = np.tril(np.ones((rows.shape[1], rows.shape[1]), np.bool_), -1)
    within = ((rows[:, :, np.newaxis] == rows[:, np.newaxis]) & earlier).any(axis=2)
    shared = (rows[:, :, np.newaxis] == previous[:, np.newaxis]).any(axis=2)
    return np.asarray(((within | shared) & (rows >= 0)).sum(axis=1))


def mean_where(values: Floats, mask: Mask) -> float:
    """The mean of what the mask shows; NaN where that is nothing."""
    return float(values[mask].mean(dtype=np.float64)) if mask.any() else float("nan")
