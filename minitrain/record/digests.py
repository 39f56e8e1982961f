"""Digests of what a step reads and leaves: xxh3-64 over canonical bits (-0.0 counts, every NaN is the same)."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from minitrain.config import Config
from minitrain.data.batches import Batch
from minitrain.rng import Purpose
from minitrain.state import State
from minitrain.tensors import Tensors, canonical_bits

STREAMS = ("training_control", "data")


def tensor_digest(tensor: NDArray[Any]) -> int:
    """Of a float32 or float64 array, in C order."""
    if tensor.dtype == np.float32:
        bits: NDArray[Any] = canonical_bits(tensor)
    else:
        bits = np.where(np.isnan(tensor), np.nan, tensor)
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(bits).data)


def has_digest(tensor: NDArray[np.float32], recorded: int) -> bool:
    """Whether this is the tensor of that digest. In C order."""
    raw = xxhash.xxh3_64_intdigest(tensor.data)  # the canonical digest too, unless there are NaNs
    return raw == recorded or tensor_digest(tensor) == recorded


def state_digests(state: State, finite: bool = False) -> NDArray[np.uint64]:
    """(3, N): parameters, m and v, tensor by tensor in the order of the table. ``finite``: it is known to be."""
    nan = not finite and any(math.isnan(group.flat.max()) for group in groups(state))  # max keeps NaN
    if nan:
        return np.array([[tensor_digest(t) for t in group.values()] for group in groups(state)], np.uint64)
    raw = [[xxhash.xxh3_64_intdigest(t.data) for t in group.values()] for group in groups(state)]
    return np.array(raw, np.uint64)


def groups(state: State) -> tuple[Tensors, Tensors, Tensors]:
    """In the order of KINDS."""
    return state.params, state.m, state.v


def batch_digest(batch: Batch) -> int:
    """Over what the engine reads: inputs, targets, attention mask and loss mask, in this order."""
    h = xxhash.xxh3_64()
    for array in (batch.inputs, batch.targets, batch.attn_pad_mask, batch.loss_mask):
        h.update(np.ascontiguousarray(array).data)
    return h.intdigest()


class Positions(Protocol):
    """Where in the data a step starts to read; see TrainBatches."""

    def position(self, step: int) -> dict[str, int]: ...


def rng_words(config: Config, batches: Positions, step: int) -> NDArray[np.uint64]:
    """(2, 4): seed, purpose and place of both streams before step ``step`` draws from them.

    The training-control stream stands at (step, 0), the data stream at (epoch, offset).
    """
    training, place = config.training, batches.position(step)
    return np.array(
        [
            [training.rng_seed, Purpose.DROPOUT, step, 0],
            [training.data_seed, Purpose.SHUFFLE, place["epoch"], place["offset"]],
        ],
        np.uint64,
    )
