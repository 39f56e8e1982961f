"""The checks of a run that come before any diagnosis: is it configured and wired as it should be.

Each is a function of the run to a `Check`; the thresholds stand in one table. What was not measured is said to be that,
and a check that does not apply to the run has passed only where the number says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from minitrain.dashboard.gather import Floats, RunData
from minitrain.dashboard.readings import before, scheduled, short
from minitrain.report.words import count

Verdict = Literal["pass", "fail", "not measured"]

THRESHOLDS: dict[str, float] = {
    "first_loss": 0.5,  # nats around ln V
    "first_norm_low": 0.1,
    "first_norm_high": 10.0,
    "first_norm_tiny": 0.001,
    "first_norm_huge": 100.0,
    "lr_relative": 1e-9,
    "moves": 1e-9,  # update per parameter norm
    "falls": 0.2,  # of the loss at the start: a loss that falls
    "flat": 0.02,  # of the loss at the start: a loss that does not
    "explosion": 1.5,  # times the mean loss of the 100 steps before
    "memory_mb": 4000.0,
}


class Check(NamedTuple):
    """One answer."""

    name: str
    question: str
    measured: str
    threshold: str
    verdict: Verdict
    advice: str
    """What to do where it fails."""


def checks(run: RunData) -> list[Check]:
    """All of them, in the order of the troubleshooting table."""
    return [check(run) for check in CHECKS]


def _check(name: str, question: str, threshold: str, advice: str, passed: bool | None, measured: str) -> Check:
    verdict: Verdict = "not measured" if passed is None else "pass" if passed else "fail"
    return Check(name, question, measured, threshold, verdict, advice)


def first_loss(run: RunData) -> Check:
    """Guessing all tokens alike costs ln V; other first weights cost more."""
    chance, width = math.log(run.config.model.vocab_size), THRESHOLDS["first_loss"]
    passed, measured = None, "the run does not begin at step 0"
    if run.steps and run.start == 0:
        found = float(run.log.loss[0])
        passed, measured = bool(abs(found - chance) <= width), short(found)
    return _check(
        "first loss",
        "Is the loss at step 0 that of a guess?",
        f"ln {run.config.model.vocab_size} ± {width:g} = {chance - width:.2f} to {chance + width:.2f}",
        "initial weights, or the loss mask",
        passed,
        measured,
    )


def first_norm(run: RunData) -> Check:
    """Far too large: weights or reduction; far too small: no data behind the loss."""
    low, high = THRESHOLDS["first_norm_low"], THRESHOLDS["first_norm_high"]
    passed, measured, advice = None, "the run does not begin at step 0", "initial weights, or the reduction of the loss"
    if run.steps and run.start == 0:
        found = float(run.log.norm[0])
        passed, measured = bool(low <= found <= high), short(found)
        if found > THRESHOLDS["first_norm_huge"]:
            advice = "over 100: initial weights, or a loss that is summed and not averaged"
        if found < THRESHOLDS["first_norm_tiny"]:
            advice = "under 0.001: degenerate data, or an empty loss mask"
    return _check(
        "first gradient norm",
        "Is the first gradient of a usual size?",
        f"{low:g} to {high:g}",
        advice,
        passed,
        measured,
    )


def schedule(run: RunData) -> Check:
    """Every step's rate, held against the configured one."""
    passed, measured = None, "no learning rate in the log"
    if len(run.log.lr):
        wanted = scheduled(run)
        other = np.flatnonzero(~np.isclose(run.log.lr, wanted, rtol=THRESHOLDS["lr_relative"], atol=0))
        passed, measured = not len(other), f"equal in {count(len(wanted), 'step')}"
        if len(other):
            measured = f"other in {count(len(other), 'step')}, the first {int(run.log.step[other[0]]):,}"
    return _check(
        "learning rate",
        "Is the learning rate the configured one?",
        "equal at every step",
        "the scheduler, or an injection that changes the rate",
        passed,
        measured,
    )


def moves(run: RunData) -> Check:
    """A flat loss has many causes; parameters that do not move have one."""
    series = run.metrics.get("update_ratio")
    passed, measured = None, "no update was measured"
    if series is not None and np.isfinite(series.values).any():
        largest = float(np.nanmax(np.where(np.isfinite(series.values), series.values, np.nan)))
        passed, measured = largest > THRESHOLDS["moves"], f"largest update {short(largest)} of its parameters"
    return _check(
        "optimizer",
        "Do the parameters move at all?",
        f"over {THRESHOLDS['moves']:g} of the norm",
        "optimizer.lr_max, and whether the optimizer steps",
        passed,
        measured,
    )


def _changes(run: RunData) -> tuple[float, float] | None:
    """By what part of its beginning train and validation loss fell to their lowest; None where that is not known."""
    val = run.log.val_loss[np.isfinite(run.log.val_loss)]
    train = run.mean_loss[np.isfinite(run.mean_loss)]
    if len(val) < 3 or len(train) < 3:
        return None
    at = int(np.clip(np.searchsorted(run.log.step, run.log.val_step[0]), 0, len(train) - 1))
    return _fall(train[at:]), _fall(val)


def _fall(losses: Floats) -> float:
    return float((losses[0] - losses.min()) / abs(losses[0])) if losses[0] else 0.0


def validation_follows(run: RunData) -> Check:
    """Validation that stays where it was while training falls looks at something else."""
    question, advice = "Does validation fall while training falls?", "loss mask on the input, or the splits"
    return _falls_along(run, "validation follows", question, "validation", advice)


def training_follows(run: RunData) -> Check:
    """The other way round, the splits are swapped."""
    question = "Does training fall while validation falls?"
    return _falls_along(run, "training falls", question, "train", "the splits are swapped")


def _falls_along(run: RunData, name: str, question: str, follower: str, advice: str) -> Check:
    """Whether one of the two losses falls at all while the other falls."""
    flat, falls = THRESHOLDS["flat"], THRESHOLDS["falls"]
    leader = "train" if follower == "validation" else "validation"
    passed, measured = None, "fewer than 3 finite validations"
    if changes := _changes(run):
        fell = dict(zip(("train", "validation"), changes, strict=True))
        passed = not (fell[follower] < flat and fell[leader] > falls)
        told = ", ".join(f"{loss} {'fell ' if loss == 'train' else ''}{100 * x:.0f} %" for loss, x in fell.items())
        measured = f"since the first validation {told}"
    threshold = f"not under {100 * flat:g} % while {leader} is over {100 * falls:g} %"
    return _check(name, question, threshold, advice, passed, measured)


def behind_warmup(run: RunData) -> Check:
    """The rate is highest right behind the warm-up: there too high a rate shows first."""
    warmup, limit = run.config.scheduler.warmup_steps, THRESHOLDS["explosion"]
    behind = (run.log.step >= warmup) & (run.log.step < warmup + 100)
    passed, measured = None, "no step behind the warm-up"
    if behind.any() and run.start <= warmup:
        usual = before(run.log.loss)
        usual[np.isnan(usual)] = run.log.loss[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            times = (run.log.loss / usual)[behind]
        if not np.isfinite(times).all():
            passed, measured = False, "a loss that is not finite"
        else:
            i = int(times.argmax())
            passed, measured = bool(times[i] <= limit), f"{short(times[i])} × at step {int(run.log.step[behind][i]):,}"
    return _check(
        "behind the warm-up",
        "Does the loss explode right behind the warm-up?",
        f"at most {limit:g} × the mean of the 100 steps before",
        "halve optimizer.lr_max",
        passed,
        measured,
    )


def memory(run: RunData) -> Check:
    """The exercise is for laptops."""
    found, limit = run.results.get("peak_rss_mb"), THRESHOLDS["memory_mb"]
    known = isinstance(found, int | float) and math.isfinite(found)
    return _check(
        "memory",
        "Does the run fit into 4 GB?",
        f"at most {limit:,.0f} MB",
        "a smaller training.batch_size",
        bool(found <= limit) if known and found is not None else None,
        f"{found:,.0f} MB" if known else "not known before the run has ended",
    )


CHECKS: Sequence[Callable[[RunData], Check]] = (
    first_loss,
    first_norm,
    schedule,
    moves,
    validation_follows,
    training_follows,
    behind_warmup,
    memory,
)


def verdict(found: Sequence[Check]) -> str:
    """All of them in a few words."""
    number = {name: sum(check.verdict == name for check in found) for name in ("pass", "fail", "not measured")}
    parts = [f"{number['pass']} of {len(found)} checks passed"]
    if number["fail"]:
        parts.append(f"failed: {', '.join(check.name for check in found if check.verdict == 'fail')}")
    if number["not measured"]:
        parts.append(f"not measured: {', '.join(check.name for check in found if check.verdict == 'not measured')}")
    return "; ".join(parts)
