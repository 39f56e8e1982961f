"""Makes an experiment: the function of its kind takes a `Job`, makes its runs, writes the page, returns a `Finding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from minitrain.experiments import baseline, healthy, injection, ngram, overhead, place, roundtrip, training
from minitrain.experiments.job import Finding, Job, Show, Stopped
from minitrain.experiments.preset import load
from minitrain.files import write_json
from minitrain.loop import Listener
from minitrain.run_folder import RunFolder


class Made(NamedTuple):
    """An experiment that was made, or that was stopped: then there is no finding, and perhaps no going on."""

    folder: RunFolder
    finding: Finding | None
    resumes: bool


class Kind(NamedTuple):
    """How experiments of one kind are checked and made, and whether one that was stopped can be gone on with."""

    check: Callable[[Job], object]
    make: Callable[[Job], Finding]
    resumes: bool


KINDS = {
    "training": Kind(lambda job: job.variants, training.make, resumes=True),
    "baseline": Kind(lambda job: job.config, baseline.make, resumes=True),
    "healthy": Kind(healthy.check, healthy.make, resumes=True),
    "injection": Kind(injection.check, injection.make, resumes=True),
    "ngram": Kind(lambda job: job.config, ngram.make, resumes=True),
    "overhead": Kind(overhead.check, overhead.make, resumes=False),
    "roundtrip": Kind(roundtrip.check, roundtrip.make, resumes=False),
}
"""Checking raises ConfigError; it comes before anything is written."""


def run(
    name: str,
    out_dir: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    command_line: Sequence[str] = (),
    show: Show = lambda name, config: nullcontext(_Blind()),
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda text: None,
) -> Made:
    """Make an experiment in ``out_dir`` (by default experiments/<name>).

    An unfinished one of the same settings is gone on with. Raises MinitrainError with nothing half written.
    """
    preset = load(name)
    kind = KINDS[preset.kind]
    folder = RunFolder(out_dir or Path("experiments") / name)
    job = Job(preset, overrides, folder, command_line, show, stop)
    kind.check(job)
    place.clear(folder, name, job.config, force=force, resumes=kind.resumes, tell=tell)
    try:
        finding = kind.make(job)
    except Stopped:
        return Made(folder, None, kind.resumes)
    write_json(folder.results, {"experiment": name, **finding.results})  # last: it says that the experiment is finished
    return Made(folder, finding, kind.resumes)


class _Blind(Listener):
    """A listener that shows nothing."""
