"""State t: everything that step t reads and that a checkpoint must hold."""

from __future__ import annotations

from dataclasses import dataclass

from minitrain.tensors import Tensors, digest


@dataclass(frozen=True)
class State:
    """Views of the live buffers, not copies: parameters and moments after ``step`` updates.

    The random streams need no more than this: what they draw at a step is a pure function of their seed and the step.
    """

    step: int
    params: Tensors
    m: Tensors
    v: Tensors

    def digest(self) -> str:
        """xxh3-128 over parameters, m and v, as hex."""
        return digest(self.params.flat, self.m.flat, self.v.flat)
