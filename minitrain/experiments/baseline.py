"""Experiments of the kind ``baseline``: a healthy run, and the figures that others are held against."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitrain.experiments.job import Finding, Job
from minitrain.files import write_atomic
from minitrain.report.log import Log
from minitrain.report.page import listed
from minitrain.report.story import Story
from minitrain.report.words import count, number
from minitrain.stability import CALM, PATIENCE, SPIKE, WINDOW, spikes, usual
from minitrain.trainer import finite_or_none

STEPS = (500, 1000, 1500)
"""Steps of which it is told what was usual before them."""


def make(job: Job) -> Finding:
    """Train as the preset says, and tell what is usual in such a run."""
    config = job.config
    results = job.results(config)
    results["healthy"] = healthy(Log.read(job.folder))
    story = HealthyStory.read(job.folder, config, results, results["ngram_baseline_val_ppl"], job=job)
    write_atomic(job.folder.readme, story.page())
    problem = results["first_nonfinite_step"] is not None or bool(results["alerts"])
    return Finding(story.headline(), results, problem)


def healthy(log: Log) -> dict[str, Any]:
    """The usual loss and gradient norm before some steps, how often the clip engages, and what is called a spike."""
    flagged = spikes(log.loss)
    finite = np.isfinite(log.norm)
    at = [t for t in STEPS if WINDOW <= t < len(log.step)] or [t for t in (len(log.step) - 1,) if t >= WINDOW]
    return {
        "usual": [
            {"step": t, **{name: _usual(series, t) for name, series in (("loss", log.loss), ("grad_norm", log.norm))}}
            for t in at
        ],
        "clipped_pct": 100 * float((log.norm_clipped[finite] < log.norm[finite]).sum()) / max(int(finite.sum()), 1),
        "spikes": [spike._asdict() for spike in flagged],
    }


def _usual(series: Any, step: int) -> dict[str, Any]:
    return finite_or_none(usual(series, step)._asdict())


@dataclass(frozen=True)
class HealthyStory(Story):
    """The page of a healthy run."""

    job: Job

    @property
    def title(self) -> str:
        return self.job.title

    def sections(self) -> dict[str, str]:
        told = super().sections()
        told.pop("Gap")  # to leave room
        result = told.pop("Result")
        return {"Result": result, "Healthy figures": self.figures(), **told}

    def figures(self) -> str:
        """What an injection is held against."""
        found = self.measured["healthy"]
        rows = [f"| {u['step']:,} | {_pair(u['loss'])} | {_pair(u['grad_norm'])} |" for u in found["usual"]]
        head = f"| step | loss, mean and σ of {WINDOW} steps before | gradient norm |"
        table = "\n".join([head, "|---|---|---|", *rows]) if rows else ""
        return "\n\n".join(filter(None, (table, self.flags(found["spikes"]))))

    def flags(self, flagged: Sequence[Mapping[str, Any]]) -> str:
        """Which steps the stability check would call a spike."""
        rule = f"more than {SPIKE:g} σ above the {WINDOW} steps before"
        if not flagged:
            return f"No step had a loss {rule}."
        each = [f"{s['step']:,} ({number(s['sigmas'])} σ, {_back(s['recovery'])})" for s in flagged[:6]]
        if len(flagged) > 6:
            each.append(f"{len(flagged) - 6} more")
        return (
            f"Without any fault {count(len(flagged), 'step')} had a loss {rule}: {listed(each)}. Back means at most "
            f"{CALM:g} σ above, in {PATIENCE} steps. What is no more than this proves nothing."
        )

    def why(self) -> str:
        return f"this is what the experiment is about ({self.job.preset.about})"

    def again(self) -> str:
        digest = self.manifest.get("outcome", {}).get("digest")
        return (
            f"{self.job.again()}Same version, settings and data give the same bits: the last state must have the "
            f"digest `{digest}`. Any step of it is replayed by\n\n```\nminitrain replay "
            f"{shlex.quote(str(self.folder.path))} --step 500\n```"
        )


def _pair(u: Mapping[str, Any]) -> str:
    return " ± ".join("not finite" if x is None else number(x, 3) for x in (u["mean"], u["deviation"]))


def _back(recovery: int | None) -> str:
    return "not back" if recovery is None else f"back after {recovery}"
