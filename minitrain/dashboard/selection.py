"""Which of many series are shown, how they look, and what their names say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.dashboard.lanes import COLOURS, DASHES
from minitrain.metrics import Series

Numbers = NDArray[np.float64]
STREAM = re.compile(r"embed|block\.\d+\.(attn|ffn)\.out|ln_f|logits")
"""The sites that carry the residual stream from layer to layer, and what comes of it."""


def layers_of(series: Series) -> tuple[list[str], NDArray[np.float32]]:
    """The sites of the residual stream and their values; all sites where none is."""
    names = series.labels[0]
    kept = [i for i, name in enumerate(names) if STREAM.fullmatch(name)] or list(range(len(names)))
    return [names[i] for i in kept], series.values[:, kept]


def layer_name(label: str) -> str:
    """``layer 0`` for ``0`` or ``block.0``."""
    return f"layer {label.removeprefix('block.')}"


def group_of(tensor: str) -> str:
    """``block 0 attn``, ``block 1 ffn``, ``embed``, ``norms and biases`` (of one dimension): what moves together."""
    if tensor.endswith(".bias") or re.search(r"\bln(1|2|_f)\b", tensor):
        return "norms and biases"
    parts = tensor.split(".")
    return f"block {parts[1]} {parts[2]}" if parts[0] == "block" and len(parts) > 2 else parts[0]


def grouped(series: Series) -> dict[str, Numbers]:
    """The median of each group of tensors, step by step."""
    names = series.labels[0]
    groups = dict.fromkeys(group_of(name) for name in names)
    columns = {group: [i for i, name in enumerate(names) if group_of(name) == group] for group in groups}
    return {group: median(series.values[:, at].astype(np.float64)) for group, at in columns.items()}


def median(values: Numbers) -> Numbers:
    """Of each row, of what is finite; NaN where nothing is."""
    result = np.full(len(values), np.nan)
    rows = np.isfinite(values).any(axis=1)
    if rows.any():
        known = np.where(np.isfinite(values[rows]), values[rows], np.nan)
        result[rows] = np.nanmedian(known, axis=1)
    return result


def finite_rows(values: NDArray[np.floating]) -> NDArray[np.intp]:
    """Where a column is finite."""
    return np.flatnonzero(np.isfinite(values))


def first_last(values: NDArray[np.floating]) -> tuple[Numbers, Numbers]:
    """The first and the last finite value of each column; NaN where there is none."""
    first, last = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    for i in range(values.shape[1]):
        if len(rows := finite_rows(values[:, i])):
            first[i], last[i] = values[rows[0], i], values[rows[-1], i]
    return first, last


def telling(values: NDArray[np.floating], most: int) -> list[int]:
    """At most so many columns: those that changed most, as a factor, in their own order."""
    if values.shape[1] <= most:
        return list(range(values.shape[1]))
    with np.errstate(all="ignore"):
        size = np.log(np.where(values > 0, values, np.nan).astype(np.float64))
        known = np.isfinite(size)
        spread = np.where(known, size, -np.inf).max(0) - np.where(known, size, np.inf).min(0)
    spread[~np.isfinite(spread)] = -1
    return sorted(np.argsort(-spread, kind="stable")[:most].tolist())


def deviation_of_size(mean_size: NDArray[Any], deviation: NDArray[Any]) -> NDArray[Any]:
    """σ of |x| from mean |x| and σ of x, for x with a mean near 0: Var|x| = E x² - (E|x|)²."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.sqrt(np.maximum(deviation.astype(np.float64) ** 2 - mean_size.astype(np.float64) ** 2, 0.0))


def styled(names: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...], float]]:
    """Colour, dash and width of each name: what it is has a colour, the layer that it is of a dash."""
    kinds: dict[str, int] = {}
    dashes: dict[str, int] = {}
    styles: dict[str, tuple[str, tuple[int, ...], float]] = {}
    for name in names:
        layer = re.search(r"(?:block|layer)[. ](\d+)", name)
        kind = re.sub(r"(?:block|layer)[. ]\d+[. ]?", "", name)
        colour = kinds.setdefault(kind, len(kinds))
        dash = dashes.setdefault(layer[1], len(dashes)) if layer else colour // len(COLOURS)
        while (style := (COLOURS[colour % len(COLOURS)], DASHES[dash % len(DASHES)], 1.7)) in styles.values():
            dash += 1
            colour += dash % len(DASHES) == 0
        styles[name] = style
    return styles
