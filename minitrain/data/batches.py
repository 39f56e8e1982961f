"""From samples to batches of one shape. Which rows a step reads is a pure function of seed and step.

Training visits every sample once an epoch, each epoch in an order of its own. There is no position to save:
step t reads the samples t*B to t*B + B - 1 of that endless line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from minitrain.data.corpus import Row
from minitrain.data.tokenizer import PAD, Tokenizer
from minitrain.errors import DataError, did_you_mean
from minitrain.rng import Purpose, Stream

BATCHINGS = ("shuffle", "stratified")
FILL = -1
"""The row number of a place in a batch that no sample fills."""

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """The samples of one split as token rows (n, T+1) int32, filled up with ``<pad>``."""

    tokens: Tokens
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[Row, ...] | None = field(default=None, repr=False)
    """The corpus rows behind the samples; None for own text."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def inputs(self) -> Tokens:
        """(n, T): the tokens that are read."""
        return np.ascontiguousarray(self.tokens[:, :-1])

    @cached_property
    def targets(self) -> Tokens:
        """(n, T): the tokens that are to be predicted."""
        return np.ascontiguousarray(self.tokens[:, 1:])

    @cached_property
    def attn_pad_mask(self) -> Mask:
        """(n, T): True where a real token is read."""
        return np.not_equal(self.inputs, PAD)

    @cached_property
    def loss_mask(self) -> Mask:
        """(n, T): True where the target is a real token. ``<eos>`` is one."""
        return np.not_equal(self.targets, PAD)

    @property
    def strata(self) -> list[str] | None:
        """``verb/tense`` of each sample, or None for own text."""
        return None if self.labels is None else [f"{row.verb}/{row.tense}" for row in self.labels]

    def verb_mask(self, tokenizer: Tokenizer) -> Mask | None:
        """(n, T): True where the target shares a character with the conjugated form; None for own text."""
        if self.labels is None:
            return None
        width = np.array([len(piece) for piece in tokenizer.pieces])[self.targets]  # specials are 0 wide
        end = np.cumsum(width, axis=1)
        start = end - width
        first, last = np.array([row.verb_span for row in self.labels], np.int64).reshape(-1, 2).T[..., np.newaxis]
        mask: Mask = (start < last) & (end > first) & (width > 0)
        return mask


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step reads. B samples, T positions."""

    inputs: Tokens
    """(B, T) int32."""
    targets: Tokens
    """(B, T) int32."""
    attn_pad_mask: Mask
    """(B, T) bool, True = a real token is read."""
    loss_mask: Mask
    """(B, T) bool, True = counts in the loss."""
    rows: Rows
    """(B,) int64, the samples' numbers in the dataset, FILL where there is none."""
    dataset_ids: Sequence[str] | Mapping[int, str] = field(repr=False)
    """The ids of the whole dataset by row number, shared by all its batches."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the B samples, "" where there is none."""
        return tuple("" if row == FILL else self.dataset_ids[row] for row in self.rows.tolist())


class TrainBatches:
    """The training batches of a run, any of them at once: ``batch_at(step)``.

    ``shuffle`` orders each epoch at random. ``stratified`` spreads each verb and tense evenly over the epoch,
    so that batches have nearly the mix of the whole.
    """

    def __init__(self, dataset: Dataset, batch_size: int, data_seed: int, batching: str = "shuffle") -> None:
        """Raises DataError for an unknown ``batching``, and for ``stratified`` without labels."""
        if batching not in BATCHINGS:
            raise DataError(
                f"data.batching: expected one of {', '.join(BATCHINGS)}, got {batching!r}"
                f"{did_you_mean(batching, BATCHINGS)}"
            )
        self._strata = _stratum_numbers(dataset) if batching == "stratified" else None
        self.dataset = dataset
        self.batch_size = batch_size
        self._stream = Stream(data_seed, Purpose.SHUFFLE)
        self._order = lru_cache(maxsize=4)(self._epoch_order)

    def position(self, step: int) -> dict[str, int]:
        """Where ``step`` starts to read: ``epoch``, and ``offset`` in samples within it."""
        epoch, offset = divmod(step * self.batch_size, len(self.dataset))
        return {"epoch": epoch, "offset": offset}

    def rows_at(self, step: int) -> Rows:
        """(B,) int64: the row numbers that ``step`` reads. A batch may straddle epochs."""
        epoch, offset = divmod(step * self.batch_size, len(self.dataset))
        rows = self._order(epoch)[offset : offset + self.batch_size]
        while len(rows) < self.batch_size:
            epoch += 1
            rows = np.concatenate([rows, self._order(epoch)[: self.batch_size - len(rows)]])
        return rows

    def batch_at(self, step: int) -> Batch:
        """The batch of ``step``."""
        return self.take(self.rows_at(step))

    def take(self, rows: Rows) -> Batch:
        """The batch of these row numbers."""
        return _take(self.dataset, rows)

    def _epoch_order(self, epoch: int) -> Rows:
        order = self._stream.permutation(len(self.dataset), step=epoch)
        if self._strata is not None:
            order = _spread(order, self._strata)
        order.setflags(write=False)  # batches hold views of it
        return order


class EvalBatches:
    """The whole dataset in order, as often as asked, in batches of one shape. It draws from no stream."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size

    def __len__(self) -> int:
        return (len(self.dataset) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        """The last batch is filled up with copies of the last sample that no loss counts.

        Copies, not padding: a row of nothing but padding would leave attention without a single key.
        """
        for start in range(0, len(self.dataset), self.batch_size):
            rows = np.arange(start, start + self.batch_size)
            batch = _take(self.dataset, np.minimum(rows, len(self.dataset) - 1))
            filled = rows >= len(self.dataset)
            batch.loss_mask[filled] = False
            batch.rows[filled] = FILL
            yield batch


def _take(dataset: Dataset, rows: Rows) -> Batch:
    return Batch(
        inputs=dataset.inputs.take(rows, axis=0),
        targets=dataset.targets.take(rows, axis=0),
        attn_pad_mask=dataset.attn_pad_mask.take(rows, axis=0),
        loss_mask=dataset.loss_mask.take(rows, axis=0),
        rows=rows,
        dataset_ids=dataset.ids,
    )


def _stratum_numbers(dataset: Dataset) -> Rows:
    if dataset.strata is None:
        raise DataError(
            "data.batching: stratified needs labelled rows, got own text without verb and tense; "
            "set data.batching: shuffle"
        )
    return np.unique(dataset.strata, return_inverse=True)[1].astype(np.int64)


def _spread(order: Rows, strata: Rows) -> Rows:
    """``order`` rearranged so that the k-th of n members of a stratum stands near the share (k + 1/2) / n."""
    stratum = strata[order]
    size = np.bincount(strata)
    grouped = np.argsort(stratum, kind="stable")
    k = np.empty_like(order)
    k[grouped] = np.arange(len(order)) - np.repeat(np.cumsum(size) - size, size)
    return order[np.argsort((k + 0.5) / size[stratum], kind="stable")]
