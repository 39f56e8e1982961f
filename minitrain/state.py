"""State t: everything that step t reads and that a checkpoint must hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def copy_state(source: State, target: State, part: slice = slice(None)) -> None:
    """The bits of one into the buffers of the other, or of a part of the flat buffers."""
    for name in ("params", "m", "v"):
        np.copyto(getattr(target, name).flat[part], getattr(source, name).flat[part])


def copied(state: State) -> State:
    """The same bits in buffers of their own."""
    return State(state.step, state.params.copy(), state.m.copy(), state.v.copy())
