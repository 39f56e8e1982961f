"""What is measured of a run besides its losses and norms: a place holder for the real one, which reads metrics.zarr."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minitrain.run_folder import RunFolder


@dataclass(frozen=True)
class Series:
    """One quantity over some steps."""

    name: str
    unit: str
    steps: NDArray[np.int64]
    """(S,)"""
    values: NDArray[np.float32]
    """(S, ...); NaN where nothing was measured, or nothing finite."""
    labels: tuple[tuple[str, ...], ...]
    """One tuple for each axis after the first."""
    formula: str


def read_metrics(folder: RunFolder) -> dict[str, Series]:
    """Every series by name; none where the run measured nothing."""
    return {}
