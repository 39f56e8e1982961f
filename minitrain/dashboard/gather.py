"""What the page tells of, gathered from the files of a run. What is missing becomes a note, not an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitrain.config import Config
from minitrain.dashboard.lanes import running_mean
from minitrain.data.manifest import data_hash
from minitrain.data.reading import is_plain_text, load_any
from minitrain.errors import DataError, MinitrainError
from minitrain.metrics import Series, read_metrics
from minitrain.record.journal import Journal, read_journal
from minitrain.report.log import Log
from minitrain.report.words import not_finite
from minitrain.run_folder import RunFolder
from minitrain.stability import Spike, overfit_onset, spikes

Floats = NDArray[np.float64]
ENDED = {
    "complete": "complete",
    "nonfinite": "stopped: not finite",
    "unfinished": "unfinished (at work, stopped or killed)",
}


class Mark(NamedTuple):
    """Something that happened at a step."""

    step: int
    kind: str
    """``injection``, ``alert``, ``broken``, ``forked``, ``best`` or ``onset``"""
    text: str


@dataclass(frozen=True)
class RunData:
    """One run, as far as its files tell of it."""

    name: str
    path: str
    """As commands are to name it."""
    config: Config
    log: Log
    manifest: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Series] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    rows: NDArray[np.int64] | None = None
    """(S, B) of the recorded steps: numbers of samples in the training split, -1 where none; None without a record."""
    recorded: range = range(0)
    samples: Sequence[tuple[str, str]] = ()
    """Id and text of every sample of the training split."""
    ended: str = "complete"
    notes: Sequence[str] = ()
    """What could not be had, in sentences."""

    @classmethod
    def read(cls, folder: RunFolder) -> RunData:
        """Raises MinitrainError where no run stands, or its manifest or log is damaged."""
        folder.require_run()
        manifest, config = folder.read_manifest(), folder.stored_config()
        notes: list[str] = []
        results = _results(folder, notes)
        journal = _journal(folder, config, notes)
        rows = _rows(journal)
        return cls(
            name=folder.path.resolve().name,
            path=str(folder.path),
            config=config,
            log=Log.read(folder),
            manifest=manifest,
            results=results,
            metrics=_metrics(folder, notes),
            events=journal.events if journal else (),
            rows=rows,
            recorded=range(journal.start, journal.end) if journal else range(0),
            samples=_samples(config, manifest, notes) if rows is not None else (),
            ended=_ended(folder, manifest),
            notes=notes,
        )

    @property
    def steps(self) -> int:
        return len(self.log.step)

    @property
    def start(self) -> int:
        return self.log.start

    @property
    def end(self) -> int:
        """The state that the last logged step left, and at least one step behind the start."""
        return int(max([self.start + 1, *(self.log.step[-1:] + 1), *self.log.val_step[-1:]]))

    @property
    def baseline_ppl(self) -> float:
        """Of the best n-gram model; NaN where the run has not got so far as to write it."""
        found = self.results.get("ngram_baseline_val_ppl")
        return float(found) if isinstance(found, int | float) and found > 0 else math.nan

    @property
    def baseline_name(self) -> str:
        order = self.results.get("ngram_best_n")
        return f"{order}-gram baseline" if order else "n-gram baseline"

    @cached_property
    def mean_loss(self) -> Floats:
        """The train loss averaged over the window of the log, at every step."""
        return running_mean(self.log.loss, self.log.window)

    @cached_property
    def spikes(self) -> list[Spike]:
        """Of the train loss; their steps are those of the run."""
        return [s._replace(step=int(self.log.step[s.step])) for s in spikes(self.log.loss)]

    @property
    def largest_spikes(self) -> list[Spike]:
        """The largest first; one out of a flat loss, which has no deviation, before all others."""
        return sorted(self.spikes, key=lambda spike: -spike.sigmas if math.isfinite(spike.sigmas) else -math.inf)

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest validation; None where none was finite."""
        finite = np.flatnonzero(np.isfinite(self.log.val_loss))
        if not len(finite):
            return None
        i = int(finite[self.log.val_loss[finite].argmin()])
        return int(self.log.val_step[i]), float(self.log.val_loss[i])

    @cached_property
    def onset(self) -> int | None:
        """The step from which validation rises while training falls; None where it does not."""
        if not self.steps or not len(self.log.val_step):
            return None
        at = np.clip(np.searchsorted(self.log.step, self.log.val_step) - 1, 0, None)
        return overfit_onset(self.log.val_step, self.log.val_loss, self.mean_loss[at])

    @cached_property
    def marks(self) -> list[Mark]:
        """What happened, in order of the steps."""
        found = [_event_mark(event) for event in self.events]
        found += [Mark(line["step"], "broken", f"not finite: {not_finite(line)}") for line in self.log.broken[:1]]
        if parent := self.manifest.get("parent"):
            found.append(Mark(int(parent["step"]), "forked", f"forked from {parent['run']}"))
        lowest = f"lowest validation loss {self.best[1]:.3f}" if self.best else ""
        if self.onset is not None and self.best and self.best[0] == self.onset:
            found.append(Mark(self.onset, "onset", f"{lowest}, overfitting begins"))
        elif self.best:
            found.append(Mark(self.best[0], "best", lowest))
        return sorted(found)


def _ended(folder: RunFolder, manifest: Mapping[str, Any]) -> str:
    """As the manifest says; the page of a run that ends is written before its last file, COMPLETE."""
    if folder.complete.exists():
        return "complete"
    return str((manifest.get("outcome") or {}).get("ended", "unfinished"))


def spike_size(spike: Spike) -> str:
    """``+3.8σ``"""
    return f"+{spike.sigmas:.1f}σ" if math.isfinite(spike.sigmas) else "out of a flat loss"


def _event_mark(event: Mapping[str, Any]) -> Mark:
    name = str(event["event"])
    more = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "step", "name"))
    if name == "injection":
        return Mark(int(event["step"]), "injection", f"injection {event['name']}" + (f" ({more})" if more else ""))
    return Mark(int(event.get("step", 0)), "alert", name.replace("_", " ") + (f": {more}" if more else ""))


def _results(folder: RunFolder, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(folder.results.read_text(encoding="utf-8"))
        return dict(found)
    except FileNotFoundError:
        notes.append(
            "No results.json: the run has not ended, so the baseline and the final perplexities are not known."
        )
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"results.json cannot be read ({type(error).__name__}), so the baseline is not known.")
    return {}


def _journal(folder: RunFolder, config: Config, notes: list[str]) -> Journal | None:
    if not config.record.enabled:
        notes.append("No record (record.enabled: false): no step can be replayed, and events are not known.")
        return None
    try:
        return read_journal(folder.journal)
    except MinitrainError as error:
        notes.append(f"The record cannot be read, so events and batches are not known: {error}")
        return None


def _rows(journal: Journal | None) -> NDArray[np.int64] | None:
    if journal is None or not journal.steps:
        return None
    rows = [np.frombuffer(body["rows"], "<i8") for body in journal.steps]
    return np.stack(rows) if len({len(row) for row in rows}) == 1 else None


def _metrics(folder: RunFolder, notes: list[str]) -> dict[str, Series]:
    try:
        found = read_metrics(folder)
    except MinitrainError as error:
        notes.append(f"The metrics cannot be read: {error}")
        return {}
    if not found:
        notes.append("No metrics were recorded, so panels 4 to 7 and the batch lane are empty.")
    return found


def _samples(config: Config, manifest: Mapping[str, Any], notes: list[str]) -> list[tuple[str, str]]:
    """Ids and texts, if the files are still those of the run. Plain text is cut by its tokens, so it is left alone."""
    train, val = Path(config.data.train_path), Path(config.data.val_path)
    if is_plain_text(train):
        notes.append("The text is plain: minitrain replay RUN --step N --print-batch shows what a step read.")
        return []
    named = config.data.named_paths()
    own_text_only = config.data.train_path in named and config.data.val_path not in named
    try:
        held_out = None if own_text_only else val
        if data_hash(train, held_out, {}) != manifest.get("data_manifest_hash"):
            raise DataError("they have changed since")
        return [(sample.id, sample.text) for sample in load_any(train)]
    except (MinitrainError, OSError) as error:
        notes.append(f"The texts of batches are not shown: {train} and {val} are not the files of the run ({error}).")
        return []
