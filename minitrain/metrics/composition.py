"""What batches are made of: regular verbs, rare tokens, duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.data.batches import Batch
from minitrain.data.prepare import Prepared
from minitrain.metrics.formulas import duplicates, rare_tokens


class Composition:
    """Holds the batches since the last look, and counts them all at once: a step is not to wait for it."""

    def __init__(self, data: Prepared, vocab: int, before: NDArray[np.int64]) -> None:
        """``before`` (B,) are the rows of the batch before the first."""
        train = data.train
        self._rare = rare_tokens(train.targets, train.loss_mask, vocab)
        self._regular = None
        if train.labels is not None:
            self._regular = np.array([row.regularity == "regular" for row in train.labels], np.float32)
        self._before = before
        self._batches: list[Batch] = []

    def add(self, batch: Batch) -> None:
        """The batch of the next step, as the step read it."""
        self._batches.append(batch)

    def __len__(self) -> int:
        """How many batches it holds."""
        return len(self._batches)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row of the table for each batch since the last call."""
        if not self._batches:
            return
        rows = np.stack([batch.rows for batch in self._batches])
        targets = np.stack([batch.targets for batch in self._batches])
        mask = np.stack([batch.loss_mask for batch in self._batches])
        count = mask.sum(axis=(1, 2))
        rare = (self._rare[targets] & mask).sum(axis=(1, 2)) / np.maximum(count, 1)
        regular = np.full(len(rows), np.nan)
        if self._regular is not None:
            known = np.where(rows >= 0, self._regular[rows], np.nan)
            there = (rows >= 0).sum(axis=1)
            regular = np.where(there > 0, np.nansum(known, axis=1) / np.maximum(there, 1), np.nan)
        repeated = duplicates(rows, self._before)
        self._before = rows[-1]
        self._batches.clear()
        for a, b, c in zip(regular, rare, repeated, strict=True):
            yield {"batch_regular": a, "batch_rare": b, "batch_duplicates": c}
