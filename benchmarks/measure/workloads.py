"""The sizes of the race, and the folders from which every side trains."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from minitrain.checkpoint import save_model
from minitrain.config import Config, config_from
from minitrain.data.batches import Batch, TrainBatches
from minitrain.data.prepare import prepare
from minitrain.model import MiniGPT
from minitrain.schedule import Scheduler
from minitrain.tensors import parameter_table


@dataclass(frozen=True)
class Size:
    """One model and batch shape, and how long to look at it. Steps count per process.

    ``identity_steps`` is for minitrain, ``peer_identity_steps`` for the peers: one that moves bits does so early.
    """

    name: str
    title: str
    model: dict[str, int]
    batch_size: int
    warmup: int
    steps: int
    threads: tuple[int, ...]
    identity_steps: int = 0
    peer_identity_steps: int = 0

    @cached_property
    def config(self) -> Config:
        return config_from({"model": self.model, "training": {"batch_size": self.batch_size}}, f"the size {self.name}")

    @property
    def flops(self) -> int:
        """Of a step's matrix products: attention in full, padding included, backward twice forward."""
        m = self.config.model
        tokens = self.batch_size * m.max_seq_len
        linear = m.n_layer * (4 * m.d_model**2 + 2 * m.d_model * m.d_ff) + m.d_model * m.vocab_size
        attention = m.n_layer * 2 * m.max_seq_len * m.d_model
        return 3 * 2 * tokens * (linear + attention)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(p.shape)) for p in parameter_table(self.config.model))


def _shape(layers: int, width: int, heads: int, inner: int, vocab: int, positions: int) -> dict[str, int]:
    return dict(n_layer=layers, d_model=width, n_head=heads, d_ff=inner, vocab_size=vocab, max_seq_len=positions)


SIZES = {
    size.name: size
    for size in (
        Size("default", "Default", _shape(2, 64, 4, 256, 64, 32), 8, 50, 350, (1, 2), 500, 20),
        Size("full", "Default without padding", _shape(2, 64, 4, 256, 64, 32), 8, 50, 350, (1, 2)),
        Size("vocab512", "Default with vocabulary 512", _shape(2, 64, 4, 256, 512, 32), 8, 50, 350, (1,)),
        Size("odd", "Odd: width 60, 31 positions, batch 7", _shape(2, 60, 3, 240, 64, 31), 7, 50, 350, (1,)),
        Size("M", "M", _shape(4, 256, 8, 1024, 512, 128), 16, 3, 8, (1, 2), 10, 3),
        Size("L", "L", _shape(6, 768, 12, 3072, 4096, 256), 4, 2, 3, (1, 2), 4, 2),
    )
}
ROUND_NEIGHBOUR = "full"
"""Its speed per FLOP is the measure of ``vocab512`` and ``odd``, which have no padding either."""


def write_workload(folder: Path, size: Size) -> Path:
    """Write ``about.json``, ``batches.npz`` and the first weights to ``folder``; see sides/work.py for the reader."""
    folder.mkdir(parents=True)
    config = size.config
    rows = list(_corpus_batches(folder, config) if size.name == "default" else random_batches(size))
    names = ("inputs", "targets", "attn_pad_mask", "loss_mask", "rows")
    np.savez(folder / "batches.npz", **{name: np.stack([getattr(b, name) for b in rows]) for name in names})
    model = MiniGPT(config.model, seed=config.training.rng_seed)
    weights = save_model(folder, model.params, config.model)
    about = {"config": config.model_dump(), "weights": weights.name, "rates": list(_rates(config))}
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def _rates(config: Config) -> Iterator[float]:
    scheduler = Scheduler.from_config(config)
    for _ in range(config.scheduler.total_steps):
        yield scheduler.lr
        scheduler.step()


def _corpus_batches(folder: Path, config: Config) -> Iterable[Batch]:
    """The batches of the default run, as many as its identity is looked at for."""
    data = prepare(
        folder / "train.jsonl",
        folder / "val.jsonl",
        heldout_policy=config.data.heldout_policy,
        vocab_size=config.model.vocab_size,
        max_seq_len=config.model.max_seq_len,
        generate_missing=True,
    )
    source = TrainBatches(data.train, config.training.batch_size, config.training.data_seed)
    return map(source.batch_at, range(SIZES["default"].identity_steps))


def random_batches(size: Size) -> Iterator[Batch]:
    """Random tokens without padding, a batch for each step: learning the same few by heart would magnify rounding."""
    config, draw = size.config, np.random.default_rng(0)
    shape = (config.training.batch_size, config.model.max_seq_len)
    everywhere = np.ones(shape, np.bool_)
    for _ in range(size.warmup + size.steps):
        tokens = draw.integers(4, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        yield Batch(inputs, targets, everywhere, everywhere, np.arange(shape[0]), ())
