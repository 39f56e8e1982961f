"""The verifier: a listener of the loop that holds every step against its record, bit by bit. The recorder's twin."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from minitrain.config import Config
from minitrain.data.batches import Batch
from minitrain.hooks import Hooks
from minitrain.loop import Listener, StepStats
from minitrain.record.digests import Positions, batch_digest, groups, rng_words, state_digests, tensor_digest
from minitrain.record.journal import Frame, canonical
from minitrain.state import State
from minitrain.tensors import KINDS, parameter_table, phase_of, sites

PHASES = ("data", "state", "forward", "backward", "clip", "update")
"""In the order of time. ``data`` and ``state`` are what the step reads."""


class Difference(NamedTuple):
    """Something that the replay has otherwise than the record. ``recorded`` and ``replayed`` are bits."""

    step: int
    phase: str
    kind: str
    """batch, rng, state, site, loss, grad_norm, grad_norm_clipped, lr, tokens, m, v or param."""
    site: str
    """The site, or what stands for one; before the forward pass, the tensor as it was read."""
    recorded: int
    replayed: int


def double_bits(number: float) -> int:
    """A double as an integer; every NaN is the same."""
    return int(struct.unpack("<Q", struct.pack("<d", canonical(number)))[0])


class Verifier(Listener):
    """Told of a step, it finds ``differences``, in the order of time: none where the step is what was recorded."""

    frame: Frame
    """What was recorded of the last step."""

    def __init__(self, frame_of: Callable[[int], Frame], config: Config, batches: Positions, hooks: Hooks) -> None:
        """``frame_of(t)`` is what was recorded of step t. At ``hooks`` sites are heard, where recorded."""
        self.differences: list[Difference] = []
        self._frame_of, self._config, self._batches = frame_of, config, batches
        names = [p.name for p in parameter_table(config.model)]
        self._tensors = [[f"{kind}.{name}" for name in names] for kind in KINDS]
        every = sites(config.model)
        self._before_update = every[: -3 * len(names)]
        self._place = {site: number for number, site in enumerate(every)}
        self._heard: list[int] = []
        if config.record.sites == "digest":
            hooks.listen(self._hear)

    def _hear(self, site: str, tensor: NDArray[Any]) -> None:
        if len(self._heard) < len(self._before_update):
            self._heard.append(tensor_digest(tensor))

    def starting(self, step: int, batch: Batch, state: State) -> None:
        """Compare what the step is about to read. Raises RunError where no such step was recorded."""
        frame = self.frame = self._frame_of(step)
        self.differences = []
        self._heard.clear()
        for recorded, replayed in zip(frame.rows.tolist(), batch.rows.tolist(), strict=True):
            self._compare("data", "batch", "batch.rows", recorded, replayed, once=True)
        self._compare("data", "batch", "batch", frame.batch_digest, batch_digest(batch))
        for i, stream in enumerate(("rng.training_control", "rng.data")):
            words = rng_words(self._config, self._batches, step)[i].tolist()
            for recorded, replayed in zip(frame.rng[i].tolist(), words, strict=True):
                self._compare("data", "rng", stream, recorded, replayed, once=True)
        self._compare_state("state", frame.digest_in, state)

    def stepped(self, stats: StepStats, state: State) -> None:
        """Compare what the step has made."""
        frame = self.frame
        if frame.sites is not None:
            for site, recorded, replayed in zip(self._before_update, frame.sites.tolist(), self._heard, strict=True):
                if site != "loss":  # a scalar, whose bits are recorded
                    self._compare(phase_of(site), "site", site, recorded, replayed)
        self._compare("data", "tokens", "tokens", frame.tokens, stats.tokens)
        for name, phase in ("loss", "forward"), ("grad_norm", "clip"), ("grad_norm_clipped", "clip"), ("lr", "update"):
            recorded, replayed = double_bits(getattr(frame, name)), double_bits(getattr(stats, name))
            self._compare(phase, name, name, recorded, replayed)
        self._compare_state("update", frame.digest_out, state)
        self.differences.sort(key=lambda d: (PHASES.index(d.phase), self._place.get(d.site, -1)))

    def _compare(self, phase: str, kind: str, site: str, recorded: int, replayed: int, once: bool = False) -> None:
        known = once and self.differences and self.differences[-1].site == site
        if recorded != replayed and not known:
            self.differences.append(Difference(self.frame.step, phase, kind, site, recorded, replayed))

    def _compare_state(self, phase: str, recorded: NDArray[np.uint64], state: State) -> None:
        raw = [xxhash.xxh3_64_intdigest(tensor.data) for group in groups(state) for tensor in group.values()]
        if raw == recorded.ravel().tolist():  # the canonical digests too: they differ from these at NaNs only
            return
        for i, (names, before, now) in enumerate(zip(self._tensors, recorded, state_digests(state), strict=True)):
            for name, then, there in zip(names, before.tolist(), now.tolist(), strict=True):
                self._compare(phase, "state" if phase == "state" else KINDS[i], name, then, there)

    def match(self, site: str) -> bool | None:
        """Whether the site was as recorded in the last step; None where nothing was recorded of it."""
        recorded = self.frame.sites is not None or site == "loss" or phase_of(site) == "update"
        return all(d.site != site or d.phase == "state" for d in self.differences) if recorded else None
