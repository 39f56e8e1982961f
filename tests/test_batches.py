"""Batches: a pure function of seed and step, every sample once an epoch, one shape throughout."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitrain.data.batches import FILL, Batch, Dataset, EvalBatches, TrainBatches
from minitrain.data.corpus import CORPUS_SEED, Row, sentences
from minitrain.data.tokenizer import BOS, EOS, PAD
from minitrain.errors import DataError

T = 6
ROWS = sentences(CORPUS_SEED)

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def dataset(n: int, labels: tuple[Row, ...] | None = None) -> Dataset:
    """``n`` samples of different lengths, none of them equal."""
    tokens = np.full((n, T + 1), PAD, np.int32)
    for number, row in enumerate(tokens):
        length = number % (T - 1)
        row[0], row[1 : length + 1], row[length + 1] = BOS, 4 + number, EOS
    names = tuple(f"sample.{number}" for number in range(n))
    return Dataset(tokens, names, names, labels)


def labelled(n: int, every: int = 37) -> Dataset:
    """``n`` samples with labels from all over the corpus."""
    return dataset(n, tuple(ROWS[number * every % len(ROWS)] for number in range(n)))


@given(n=sizes, batch_size=st.integers(1, 50), seed=seeds, batching=st.sampled_from(["shuffle", "stratified"]))
def test_each_epoch_visits_each_sample_once(n: int, batch_size: int, seed: int, batching: str):
    """The batches laid end to end and cut at n, 2n, 3n are permutations, wherever batches end."""
    batches = TrainBatches(labelled(n), batch_size, seed, batching)
    line = np.concatenate([batches.rows_at(step) for step in range(3 * n // batch_size + 1)])
    for epoch in range(len(line) // n):
        assert sorted(line[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(n=sizes, batch_size=st.integers(1, 12), seed=seeds, steps=st.lists(st.integers(0, 10**6), max_size=8))
def test_batches_are_a_function_of_seed_and_step(n: int, batch_size: int, seed: int, steps: list[int]):
    """Asking in any order, of any instance, gives the same rows."""
    one = TrainBatches(dataset(n), batch_size, seed)
    forward = [one.rows_at(step).tolist() for step in steps]
    assert forward == [TrainBatches(dataset(n), batch_size, seed).rows_at(step).tolist() for step in steps]
    assert forward[::-1] == [one.rows_at(step).tolist() for step in reversed(steps)]


@given(n=sizes, batch_size=st.integers(1, 50), step=st.integers(0, 10**6))
def test_position(n: int, batch_size: int, step: int):
    """Epoch and offset count the samples before the step."""
    position = TrainBatches(dataset(n), batch_size, 7).position(step)
    assert position["epoch"] * n + position["offset"] == step * batch_size
    assert 0 <= position["offset"] < n


def test_seeds_and_epochs_differ():
    """Another seed and another epoch give another order."""
    orders = [TrainBatches(dataset(40), 40, seed).rows_at(step).tolist() for seed in (1, 2) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_default_order_is_pinned():
    """The first rows of seed 7 on every machine."""
    assert TrainBatches(dataset(100), 8, 7).rows_at(0).tolist() == [22, 94, 14, 6, 85, 64, 87, 2]
    assert TrainBatches(labelled(100), 8, 7, "stratified").rows_at(0).tolist() == [
        96,
        34,
        31,
        22,
        94,
        14,
        6,
        85,
    ]


def check_batch(batch: Batch, data: Dataset, batch_size: int) -> None:
    """Shapes, dtypes, and each array against the tokens of its rows."""
    for array, dtype in (
        (batch.inputs, np.int32),
        (batch.targets, np.int32),
        (batch.attn_pad_mask, np.bool_),
        (batch.loss_mask, np.bool_),
    ):
        assert array.shape == (batch_size, T)
        assert array.dtype == dtype
        assert array.flags.c_contiguous
    assert batch.rows.shape == (batch_size,)
    assert batch.rows.dtype == np.int64
    real = batch.rows != FILL
    tokens = data.tokens[batch.rows[real]]
    np.testing.assert_array_equal(batch.inputs[real], tokens[:, :-1])
    np.testing.assert_array_equal(batch.targets[real], tokens[:, 1:])
    np.testing.assert_array_equal(batch.loss_mask[real], tokens[:, 1:] != PAD)
    np.testing.assert_array_equal(batch.attn_pad_mask, batch.inputs != PAD)
    assert batch.attn_pad_mask[:, 0].all(), "attention needs a key in every row"
    assert batch.ids == tuple(data.ids[row] if row != FILL else "" for row in batch.rows)


@given(n=sizes, batch_size=st.integers(1, 12), step=st.integers(0, 100))
def test_train_batch(n: int, batch_size: int, step: int):
    """Inputs, targets and masks are those of the rows, shifted by one."""
    data = dataset(n)
    check_batch(TrainBatches(data, batch_size, 7).batch_at(step), data, batch_size)


@given(n=sizes, batch_size=st.integers(1, 50))
def test_eval_batches(n: int, batch_size: int):
    """Every sample once, in order, as often as asked; what fills the last batch counts nowhere."""
    data = dataset(n)
    batches = EvalBatches(data, batch_size)
    assert len(list(batches)) == len(batches)
    rows: list[int] = []
    for batch in batches:
        check_batch(batch, data, batch_size)
        assert not batch.loss_mask[batch.rows == FILL].any()
        rows += batch.rows[batch.rows != FILL].tolist()
    assert rows == list(range(n))


def test_batches_are_copies():
    """Writing into a batch changes neither the data nor the next batch."""
    data = dataset(5)
    batches = TrainBatches(data, 5, 7)
    first = batches.batch_at(0)
    first.inputs[:] = 0
    first.loss_mask[:] = False
    check_batch(batches.batch_at(0), data, 5)
    for batch in islice(EvalBatches(data, 3), 2):
        batch.targets[:] = 0
        batch.loss_mask[:] = False
    check_batch(next(iter(EvalBatches(data, 3))), data, 3)
    with pytest.raises(ValueError, match="read-only"):
        first.rows[0] = 3


@given(seed=seeds)
def test_stratified_batches_have_the_mix_of_the_whole(seed: int):
    """Any stretch of an epoch holds a stratum's share of it, to within one sample."""
    data = dataset(
        120,
        tuple(row for row in ROWS if row.verb == "go" and row.tense != "infinitive")[:100]
        + tuple(row for row in ROWS if row.verb == "eat" and row.tense == "past_simple"),
    )
    strata = data.strata
    assert strata is not None
    order = TrainBatches(data, 120, seed, "stratified").rows_at(0)
    for stretch in range(1, 120):
        counts = Counter(strata[row] for row in order[:stretch])
        assert all(abs(counts[name] - stretch * total / 120) <= 1 for name, total in Counter(strata).items())


def test_refusals():
    """Stratified batches need labels; an unknown name gets a suggestion."""
    with pytest.raises(DataError, match=r"data\.batching: stratified needs labelled rows"):
        TrainBatches(dataset(3), 2, 7, "stratified")
    with pytest.raises(DataError, match=r"got 'shufle'; did you mean 'shuffle'\?"):
        TrainBatches(dataset(3), 2, 7, "shufle")
