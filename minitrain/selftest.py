"""Does this installation compute the bits that it promises? 500 default steps against digests known to be right."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from minitrain.assembly import assemble
from minitrain.config import Config
from minitrain.data.prepare import prepare
from minitrain.loop import train_step

GOLDEN = {
    0: "0b3ad252bf127c43a59507ede321c765",
    100: "0ffe2d07b62131f2ae2a93faab9928cf",
    500: "252656ad96f64b55a408fabafe10d851",
}
"""Digest of state t (parameters, m, v) of the default run, for numerics version 1, on every processor."""


def digests(threads: int = 1) -> Iterator[tuple[int, str, str]]:
    """(t, digest found, digest expected) for each golden state."""
    config = Config()
    training = config.training.model_copy(update={"threads": threads})
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(
            Path(folder) / "train.jsonl",
            Path(folder) / "val.jsonl",
            heldout_policy=config.data.heldout_policy,
            vocab_size=config.model.vocab_size,
            max_seq_len=config.model.max_seq_len,
            generate_missing=True,
        )
    parts = assemble(config.model_copy(update={"training": training}), data)
    for step in range(max(GOLDEN) + 1):
        if step in GOLDEN:
            yield step, parts.state().digest(), GOLDEN[step]
        train_step(parts.model, parts.optimizer, parts.scheduler, parts.batches.batch_at(step))
