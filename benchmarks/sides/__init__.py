"""The sides of the race: minitrain and its peers, each training the same model on the same batches in its own process.

`python -m sides NAME FOLDER …` is one such process. This file names the sides and imports none of them.
"""

from __future__ import annotations

from typing import NamedTuple


class Side(NamedTuple):
    """``module`` of this folder has a class ``Racer(work, threads, style)``; ``packages`` is what it imports."""

    title: str
    module: str
    style: str
    packages: tuple[str, ...]
    """Beyond NumPy and safetensors; empty: minitrain's own environment has all."""


SIDES = {
    "minitrain": Side("minitrain", "with_minitrain", "", ()),
    "torch": Side("PyTorch eager, as first written", "with_torch", "plain", ("torch",)),
    "torch-best": Side("PyTorch eager, at its best", "with_torch", "best", ("torch",)),
    "torch-compile": Side("torch.compile", "with_torch", "compile", ("torch",)),
    "jax": Side("JAX jit", "with_jax", "", ("jax",)),
    "numpy": Side("NumPy by hand", "with_numpy", "", ()),
}
PEERS = [name for name in SIDES if name != "minitrain"]
