"""Counter-based random numbers: what step 900 draws needs no steps 0 to 899.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): key ``(seed, purpose)``,
counter ``(index low, index high, site, step)``. Integer arithmetic only, so the words are the same on every
machine; what is made of them (permutations here, normals and dropout masks in the engine) is our own as well,
because the distributions of a library may change between its versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

SEED_LIMIT = 2**32
"""Seeds are 0 <= seed < SEED_LIMIT: one word of the Philox key."""


class Purpose(IntEnum):
    """Second word of the key: no two uses of one seed ever share a number."""

    INIT = 1
    DROPOUT = 2
    SHUFFLE = 3
    CORPUS = 4
    SPLIT = 5
    SAMPLE = 6


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32 over each row of ``counter`` (n, 4) uint32 -> (n, 4) uint32."""
    c = counter.astype(np.uint64).T
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = np.stack(
            [(p1 >> _SHIFT) ^ c[1] ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c[3] ^ np.uint64(k1), p0 & _LOW]
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.ascontiguousarray(c.T.astype(np.uint32))


@dataclass(frozen=True)
class Stream:
    """One of the random streams. It holds no position: every draw names its step and its site."""

    seed: int
    purpose: Purpose

    def words(self, n: int, step: int, site: int = 0) -> NDArray[np.uint32]:
        """``n`` uint32 words of (step, site), in index order."""
        index = np.arange((n + 3) // 4, dtype=np.uint64)
        counter = np.empty((len(index), 4), np.uint32)
        counter[:, 0] = index & _LOW
        counter[:, 1] = index >> _SHIFT
        counter[:, 2] = site
        counter[:, 3] = step
        return philox(counter, (self.seed, int(self.purpose))).ravel()[:n]

    def permutation(self, n: int, step: int, site: int = 0) -> NDArray[np.int64]:
        """A permutation of 0..n-1: the order of n 64-bit keys, ties by index."""
        words = self.words(2 * n, step, site).astype(np.uint64)
        return np.argsort(words[0::2] | (words[1::2] << _SHIFT), kind="stable")

    def integers(self, n: int, below: int, step: int, site: int = 0) -> NDArray[np.int64]:
        """``n`` integers in 0..below-1 (high word of a 32x32-bit product; bias below 2**-20 for below < 4096)."""
        return ((self.words(n, step, site).astype(np.uint64) * np.uint64(below)) >> _SHIFT).astype(np.int64)
