"""Loss by verb class: regular against irregular verbs, over the verb form and over the whole sentence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minitrain.data.batches import Dataset
from minitrain.data.tokenizer import Tokenizer
from minitrain.metrics.formulas import mean_where
from minitrain.metrics.table import CLASSES


def probe_of(dataset: Dataset, size: int) -> Dataset:
    """``size`` samples, evenly spaced over the dataset; all of them where it has no more."""
    count = min(size, len(dataset))
    rows = (np.arange(count) * len(dataset) // max(count, 1)).tolist()
    return Dataset(
        tokens=dataset.tokens[rows],
        ids=tuple(dataset.ids[row] for row in rows),
        texts=tuple(dataset.texts[row] for row in rows),
        labels=None if dataset.labels is None else tuple(dataset.labels[row] for row in rows),
    )


class ClassLosses:
    """Collects the loss of every token of a dataset, batch by batch, and takes the means of the classes."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer) -> None:
        self._losses = np.full(dataset.loss_mask.shape, np.nan, np.float32)
        verbs = dataset.verb_mask(tokenizer)
        self._masks: list[list[NDArray[np.bool_]]] = []
        if verbs is not None and dataset.labels is not None:
            regularity = np.array([row.regularity for row in dataset.labels])
            of_class = [(regularity == name)[:, np.newaxis] for name in CLASSES]
            self._masks = [[verbs & mine & dataset.loss_mask, dataset.loss_mask & mine] for mine in of_class]

    def take(self, rows: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        """The losses (B, T) of these samples (B,); a negative number stands for none."""
        there = rows >= 0
        self._losses[rows[there]] = losses[there]

    def means(self) -> NDArray[np.float64]:
        """(class, scope): nats per token; NaN where there is no such token, or no labels."""
        if not self._masks:
            return np.full((2, 2), np.nan)
        return np.array([[mean_where(self._losses, mask) for mask in scopes] for scopes in self._masks])
