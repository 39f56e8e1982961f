"""Which elements of a tensor differ, and their bits: from whatever the record holds of it.

A tensor that was changed is often not recorded itself. What follows from it is: the parameters of the next keyframe
follow from it and the recorded moments element by element, a NaN stays at its place, and a digest proves a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from minitrain.errors import RunError
from minitrain.model import make_backend
from minitrain.optim import Recurrence
from minitrain.record.digests import groups, tensor_digest
from minitrain.replay.rerun import Rerun
from minitrain.replay.which_step import first_nonfinite
from minitrain.state import State
from minitrain.tensors import KINDS, Tensors, canonical_bits

Floats = NDArray[np.float32]
BITS_TRIED, NANS_TRIED = 4096, 32768
"""Elements of the largest tensor of which every bit, and every element as NaN, is tried against a digest (< 0.5 s)."""
FACTORS = (0.0, -1.0, 0.01, 0.1, 0.5, 2.0, 10.0, 50.0, 100.0, 1000.0)
"""By which a whole tensor may have been multiplied; each is tried."""


class Elements(NamedTuple):
    """How a tensor differs. ``recorded`` is None where the place is known and the bits are not."""

    index: tuple[int, ...]  # type: ignore[assignment]  # hides tuple's method
    """The first element that differs, in C order."""
    recorded: int | None
    replayed: int
    """The bits of that element."""
    differing: int
    elements: int
    factor: float | None = None
    """By which every element was multiplied, if so."""


def compare(recorded: Floats, replayed: Floats) -> Elements | None:
    """None where both have the same bits (every NaN is the same)."""
    then, now = canonical_bits(recorded), canonical_bits(replayed)
    places = np.argwhere(then != now)
    if not len(places):
        return None
    at = tuple(int(i) for i in places[0])
    return Elements(at, int(then[at]), int(now[at]), len(places), then.size, _factor(recorded, replayed))


def _factor(recorded: Floats, replayed: Floats) -> float | None:
    """The number by which ``replayed`` has been multiplied to the bit."""
    if replayed.size < 2:
        return None
    largest = np.unravel_index(np.argmax(np.where(np.isfinite(replayed), np.abs(replayed), 0)), replayed.shape)
    if not (replayed[largest] and np.isfinite(recorded[largest])):
        return None
    guess = float(f"{float(recorded[largest]) / float(replayed[largest]):.6g}")
    with np.errstate(all="ignore"):
        scaled = replayed * np.float32(guess)
    return guess if np.array_equal(canonical_bits(scaled), canonical_bits(recorded)) else None


def of_state(run: Rerun, kind: str, name: str) -> Elements | None:
    """How ``kind`` of ``name`` differs in the state that the step left; None where the record does not tell."""
    clean = groups(run.after)[KINDS.index(kind)][name]
    digest = int(run.frame.digest_out[KINDS.index(kind)][list(run.after.params).index(name)])
    for then in _recorded(run, kind, name):
        if tensor_digest(then) == digest:
            return compare(then, clean)
    for mask in _followed(run, kind, name):
        if mask.any():
            return _guess(clean, mask, digest)
    return search(clean, digest)


def _recorded(run: Rerun, kind: str, name: str) -> Iterator[Floats]:
    """The tensor itself, where it may stand."""
    source, t = run.source, run.step + 1
    if kind != "param" or t in source.run.keyframes:
        then = source.left(run.step, kind, name)
        if then is not None:
            yield then
    if t in source.steps and not source.memory_changed(t):
        with suppress(RunError):
            yield groups(source.incident(t))[KINDS.index(kind)][name]


def _followed(run: Rerun, kind: str, name: str) -> Iterator[NDArray[np.bool_]]:
    """Masks of the elements that must have differed, because of what later became of them."""
    for later, state in _later(run):
        then, clean = groups(state)[KINDS.index(kind)][name], groups(run.after)[KINDS.index(kind)][name]
        yield ~np.isfinite(then) & np.isfinite(clean)
        if kind == "param" and run.source.config.record.moments == "every_step":
            with suppress(RunError):
                yield canonical_bits(then) != canonical_bits(_params_at(run, later)[name])


def _later(run: Rerun) -> Iterator[tuple[int, State]]:
    """The next whole state that is recorded: of the step that was not finite, or a keyframe."""
    source, first = run.source, run.step + 1
    keyframes = [k for k in source.run.keyframes if k > first]
    wrong = first_nonfinite(source, source.steps[-1])
    if wrong is not None and wrong > first and not any(k <= wrong for k in keyframes):
        with suppress(RunError):
            yield wrong, source.incident(wrong)
    for t in keyframes[:1]:
        with suppress(RunError):
            yield t, source.run.keyframe(t)


def _params_at(run: Rerun, t: int) -> Tensors:
    """The parameters of state t as they follow from the clean state and the recorded moments."""
    source, config = run.source, run.source.config
    params = run.after.params.like()
    params.flat[:] = run.after.params.flat
    following = Recurrence(config.optimizer, params, make_backend(config.training.backend))
    for s in range(run.step + 1, t):
        moments = source.run.moments(s + 1)
        following(moments.m.flat, moments.v.flat, source.frame(s).lr, s + 1)
    return params


def _guess(clean: Floats, mask: NDArray[np.bool_], digest: int) -> Elements:
    """The elements of the mask, and the bits of the one if a digest tells them."""
    index = tuple(int(i) for i in np.argwhere(mask)[0])
    before = int(clean.view(np.uint32)[index])
    told = Elements(index, None, before, int(mask.sum()), clean.size)
    nan = clean.copy()
    nan[mask] = np.nan
    if tensor_digest(nan) == digest:
        return told._replace(recorded=0x7FC00000)
    if told.differing == 1:
        tried = clean.copy()
        for bits in (before ^ (1 << bit) for bit in range(32)):
            tried.view(np.uint32)[index] = bits
            if tensor_digest(tried) == digest:
                return told._replace(recorded=bits)
    return told


def search(clean: Floats, digest: int) -> Elements | None:
    """The one change that turns ``clean`` into the tensor of this digest: a bit, a NaN, a factor; None if none does."""
    for factor in FACTORS:
        with np.errstate(all="ignore"):
            scaled = clean * np.float32(factor)
        if tensor_digest(scaled) == digest:
            return compare(scaled, clean)
    tried = np.ascontiguousarray(clean).copy()
    bits, data, look = tried.reshape(-1).view(np.uint32), tried.data, xxhash.xxh3_64_intdigest
    single = [1 << bit for bit in range(32)] if clean.size <= BITS_TRIED else []
    for i, before in enumerate(bits.tolist() if clean.size <= NANS_TRIED else []):
        for changed in (0x7FC00000, *(before ^ one for one in single)):
            bits[i] = changed
            if look(data) == digest:
                return compare(tried, clean)
        bits[i] = before
    return None
