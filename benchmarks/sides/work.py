"""What every side trains on, and what it has to offer. Nothing here imports minitrain: peers live without it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Racer(Protocol):
    """One side with the first weights loaded."""

    versions: dict[str, str]

    def step(self, n: int) -> tuple[float, float]:
        """Train on batch n, with rate n: the loss, and the gradient norm before clipping."""

    def digest(self) -> str:
        """Of the bits of all parameters."""

    def extras(self) -> dict[str, float]:
        """What only this side can measure, once the race is over."""


class Work:
    """A folder written by `measure.workloads`: sizes, rates, batches and the weights to start from."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "about.json").read_text())
        self.config: dict[str, Any] = about["config"]
        self.model: dict[str, Any] = self.config["model"]
        self.optimizer: dict[str, Any] = self.config["optimizer"]
        self.rates: list[float] = about["rates"]
        self.weights_file: Path = folder / about["weights"]
        with np.load(folder / "batches.npz") as arrays:
            self.batches: list[dict[str, Array]] = [
                dict(zip(arrays.files, values, strict=True)) for values in zip(*arrays.values(), strict=True)
            ]

    @cached_property
    def weights(self) -> Mapping[str, Array]:
        """Tensors by minitrain's names."""
        from safetensors.numpy import load_file

        return load_file(self.weights_file)

    def batch(self, n: int) -> dict[str, Array]:
        """``inputs``, ``targets`` (B, T) int32; ``attn_pad_mask``, ``loss_mask`` (B, T) bool; ``rows`` (B,)."""
        return self.batches[n % len(self.batches)]


def digest_of(arrays: Iterable[Array]) -> str:
    h = hashlib.sha256()
    for array in arrays:
        h.update(np.ascontiguousarray(array).data)
    return h.hexdigest()[:32]
