"""From two paths to all that a run reads: both datasets, the tokenizer, the baseline and the data's hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minitrain.data.batches import Dataset
from minitrain.data.corpus import CORPUS_SEED, Row, generate, generator_info
from minitrain.data.manifest import data_hash
from minitrain.data.ngram import Baseline, baseline
from minitrain.data.reading import Text, check_splits, is_plain_text, load_any, split_own_text
from minitrain.data.tokenizer import PAD, Tokenizer
from minitrain.errors import DataError

Samples = Sequence[Row] | Sequence[Text]


class Window(NamedTuple):
    """A sample, or a piece of one, that fits the context."""

    id: str
    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    train: Dataset
    val: Dataset
    tokenizer: Tokenizer
    baseline: Baseline
    manifest_hash: str
    """The ``data_manifest_hash`` of a generated corpus; for any other data, a hash over its files."""
    labelled: bool
    """Whether both splits are verb corpora. Without labels there is no panel by verb class."""
    generated: bool
    """Whether the corpus was missing and has been written now."""


def prepare(
    train_path: Path,
    val_path: Path | None,
    *,
    heldout_policy: str,
    vocab_size: int,
    max_seq_len: int,
    generate_missing: bool,
) -> Prepared:
    """Read, check and tokenise the data of a run. Raises DataError.

    ``val_path`` None holds out the end of the user's own training text. ``generate_missing`` says that these
    are the default paths: the corpus is generated there if a file is missing, and must be this version's.
    """
    generated = False
    expected = {"heldout_policy": heldout_policy}
    if generate_missing and val_path is not None:
        expected = generator_info(CORPUS_SEED, heldout_policy)
        if not (train_path.exists() and val_path.exists()):
            generate(train_path, val_path, CORPUS_SEED, heldout_policy)
            generated = True

    train, val = _read(train_path, val_path)
    manifest_hash = data_hash(train_path, val_path, expected)
    tokenizer = Tokenizer.train((sample.text for sample in train), vocab_size)
    train_windows = list(_windows(train_path, train, tokenizer, max_seq_len + 1))
    val_windows = list(_windows(val_path or train_path, val, tokenizer, max_seq_len + 1))
    train_set = _dataset(train, train_windows, max_seq_len + 1)
    val_set = _dataset(val, val_windows, max_seq_len + 1)
    return Prepared(
        train=train_set,
        val=val_set,
        tokenizer=tokenizer,
        baseline=baseline(
            [window.tokens for window in train_windows],
            [window.tokens for window in val_windows],
            tokenizer.size,
        ),
        manifest_hash=manifest_hash,
        labelled=train_set.labels is not None and val_set.labels is not None,
        generated=generated,
    )


def _read(train_path: Path, val_path: Path | None) -> tuple[Samples, Samples]:
    train = load_any(train_path)
    if val_path is None:
        if (texts := _own(train)) is None:
            raise DataError(
                f"{train_path}: expected own text, of which a part can be held out, got a verb corpus; "
                "name its validation file with data.val_path"
            )
        return split_own_text(train_path, texts)
    if train_path.resolve() == val_path.resolve():
        raise DataError(
            f"{val_path}: expected validation text that is not trained on, got the training file; "
            "name another file with data.val_path"
        )
    val = load_any(val_path)
    if (train_rows := _labelled(train)) is not None and (val_rows := _labelled(val)) is not None:
        check_splits(train_path, train_rows, val_path, val_rows)
    return train, val


def _labelled(samples: Samples) -> list[Row] | None:
    rows = [sample for sample in samples if isinstance(sample, Row)]
    return rows or None


def _own(samples: Samples) -> list[Text] | None:
    texts = [sample for sample in samples if isinstance(sample, Text)]
    return texts or None


def _windows(path: Path, samples: Samples, tokenizer: Tokenizer, most: int) -> Iterator[Window]:
    """The samples as sequences of at most ``most`` tokens.

    Long pieces of plain text are cut; each window starts with the last token of the one before, so that
    every token is a target once. A JSONL row that is too long is refused: it was written as one sample.
    """
    for sample in samples:
        tokens = tokenizer.sequence(sample.text)
        if len(tokens) <= most:
            yield Window(sample.id, sample.text, tokens)
        elif is_plain_text(path):
            for number, start in enumerate(range(0, len(tokens) - 1, most - 1)):
                piece = tokens[start : start + most]
                yield Window(f"{sample.id}/{number}", tokenizer.decode(piece), piece)
        else:
            raise DataError(
                f"{path}, row {sample.id!r}, field text: expected at most {most} tokens with <bos> and "
                f"<eos>, got {len(tokens)}; raise model.max_seq_len to {len(tokens) - 1}, "
                "raise model.vocab_size, or shorten the row"
            )


def _dataset(samples: Samples, windows: Sequence[Window], width: int) -> Dataset:
    tokens = np.full((len(windows), width), PAD, np.int32)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window.tokens)] = window.tokens
    labels = _labelled(samples)
    return Dataset(
        tokens=tokens,
        ids=tuple(window.id for window in windows),
        texts=tuple(window.text for window in windows),
        labels=None if labels is None else tuple(labels),
    )
