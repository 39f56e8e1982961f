"""`minitrain replay RUN --nan-bisect`: the first bad number of a run. First which step (which_step.py), then which
phase, site, tensor and element (within_step.py), whose sample it was, what kind of fault, and what to do (causes.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minitrain.data.tokenizer import SPECIALS, Tokenizer
from minitrain.errors import RunError
from minitrain.inject import FAULTS
from minitrain.record.recorded import open_run
from minitrain.replay.causes import Remedy, remedy
from minitrain.replay.rerun import Rerun, rerun
from minitrain.replay.source import RecordedRun, require_match, span
from minitrain.replay.which_step import Search, Searcher
from minitrain.replay.within_step import Finding, Place, examine
from minitrain.tensors import phase_of


class Sample(NamedTuple):
    """To whom a place belongs. None where it belongs to none, or the record does not tell."""

    row: int | None = None
    """Of the batch."""
    position: int | None = None
    """In the sequence, from 0."""
    token: str | None = None
    """The text of the token that is read there, or whose row of the embedding it is."""
    sample_id: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Bisection:
    """What was found in the steps from ``first`` to ``last``."""

    path: Path
    first: int
    last: int
    search: Search
    finding: Finding | None = None
    sample: Sample | None = None
    remedy: Remedy | None = None
    magnitudes: tuple[dict[str, Any], ...] = ()
    """The largest |x| of each layer in the replay, over some steps up to the one found; see `rerun.Rerun`."""
    journal: tuple[dict[str, Any], ...] = ()
    """The injections that the journal tells of at the step found, unless the search is blind."""


def nan_bisect(
    path: Path,
    step: int | None = None,
    *,
    workers: int | None = None,
    blind: bool = False,
    show: Callable[[int], None] = lambda steps: None,
) -> Bisection:
    """Find the first bad number in the steps of this run up to ``step``, by default in all.

    The search itself never reads what the journal tells of injections; ``blind`` leaves it out of the answer too.
    ``show`` is told, in any thread, how many more steps are done with. Raises RunError where there is no such step,
    the run cannot be read, or the same bits are not promised here.
    """
    run = open_run(path, blind=True)
    if not run.steps:
        raise RunError(f"{path}: expected at least one recorded step, got none; there is nothing to bisect")
    last = run.steps[-1] if step is None else step
    if last not in run.steps:
        raise RunError(
            f"--step {last}: expected one of the recorded steps {span(run.steps)} of {path}, got {last}"
            f"{run.before(last)}"
        )
    source = RecordedRun(run)
    require_match(source)
    search = Searcher(source, workers, show).search(last)
    if search.first is None:
        return Bisection(path, run.start, last, search)
    again = rerun(source, search.first.step)
    finding = examine(again, search.first)
    at = finding.place.step
    events = [] if blind else [e for e in open_run(path).events if e["event"] == "injection"]
    return Bisection(
        path,
        run.start,
        last,
        search,
        finding,
        attribute(again, finding.place),
        remedy(run, finding, bool(events)),
        tuple(again.magnitudes),
        tuple(e for e in events if e["step"] == at or (e["step"] < at and FAULTS[e["name"]].lasts)),
    )


def attribute(run: Rerun, place: Place) -> Sample:
    """Batch row, position, token and sample of a place."""
    tokenizer = Tokenizer.from_json(run.source.tokenizer)
    if place.rows:
        row = place.rows[0]
        return _sample(run, row, None, None, int(run.frame.rows[row]))
    if place.index is None:
        return Sample()
    if place.tensor is not None:  # a row of the embedding, or an output of the head, is a token's
        own = place.differing == 1 and re.fullmatch(r"embed\.weight|lm_head\.(weight|bias)", place.tensor)
        return Sample(token=_token(tokenizer, place.index[0])) if own and place.index[0] < tokenizer.size else Sample()
    if phase_of(place.site) not in ("forward", "backward") or len(place.index) < 3:
        return Sample()
    row, position = place.index[0], place.index[2 if place.site.endswith("attn.probs") else 1]
    token = _token(tokenizer, int(run.batch.inputs[row, position]))
    return _sample(run, row, position, token, int(run.frame.rows[row]))


def _token(tokenizer: Tokenizer, id: int) -> str:
    return SPECIALS[id] if id < len(SPECIALS) else tokenizer.pieces[id]


def _sample(run: Rerun, row: int, position: int | None, token: str | None, number: int) -> Sample:
    """The sample that the record says stood in this row of the batch."""
    train = run.source.data.train
    if not 0 <= number < len(train):
        return Sample(row, position, token)
    return Sample(row, position, token, train.ids[number], train.texts[number])
