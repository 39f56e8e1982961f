"""What to do about each kind of fault, with the command that does it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from minitrain.record.recorded import Run
from minitrain.replay.within_step import Finding

MEANING = {
    "arithmetic": "arithmetic in the step",
    "stored_state": "a stored number was changed",
    "data": "the data differ from the stream",
    "schedule": "the step's settings differ from the configured ones",
    "transient": "not reproducible: other bits out of the same inputs",
}
"""Each verdict in words."""
BACK = 100
"""Steps before a number that overflows from which to go on: it has grown for a while."""


class Remedy(NamedTuple):
    """What to do, in a sentence, and the commands that do it, in order."""

    advice: str
    commands: tuple[str, ...]


def remedy(run: Run, finding: Finding, injected: bool) -> Remedy:
    """What to do about this finding. A fork takes injections along: that of an ``injected`` run ends them."""
    found = _remedy(run, finding)
    if not injected:
        return found
    without = (c.replace(" --out-dir", " --injection none --out-dir") for c in found.commands)
    return found._replace(commands=tuple(without))


def _remedy(run: Run, finding: Finding) -> Remedy:
    path = run.path
    step = finding.place.step
    bundle = f"minitrain replay {path} --step {step} --bundle step{step}.tar.gz"
    match finding.verdict:
        case "stored_state":
            advice = (
                f"go on from state {step}, the last that is right, and test this machine's memory (memtester, "
                "memtest86+): a bit that changes by itself comes back"
            )
            return Remedy(advice, (fork(path, step),))
        case "data":
            advice = (
                f"find what puts other samples into the batch, and go on from state {step} with those of the stream"
            )
            return Remedy(advice, (fork(path, step), f"minitrain replay {path} --step {step} --print-batch"))
        case "schedule":
            advice = f"find what sets it besides the configuration, and go on from state {step} as configured"
            return Remedy(advice, (fork(path, step),))
        case "transient":
            advice = (
                f"go on from state {step}: the same step comes out right. If steps go wrong again, test memory and "
                "processor of the machine"
            )
            return Remedy(advice, (fork(path, step), bundle))
    return _arithmetic(run, finding, bundle)


def _arithmetic(run: Run, finding: Finding, bundle: str) -> Remedy:
    config, back = run.config, max(run.start, finding.place.step - BACK)
    if finding.place.phase in ("backward", "clip") and config.optimizer.clip_value is None:
        advice = "a gradient overflows: clip by value as well as by norm, which cuts Inf off"
        return Remedy(advice, (fork(run.path, back, "optimizer.clip_value=100"), bundle))
    high = config.optimizer.lr_max / 10
    rates = [f"optimizer.lr_max={high:g}"]
    rates += [f"optimizer.lr_min={high / 10:g}"] if config.optimizer.lr_min > high else []
    advice = (
        f"the numbers have grown until they overflowed: go on from state {back} with a lower learning rate and a "
        "lower clip"
    )
    return Remedy(advice, (fork(run.path, back, *rates, "optimizer.clip=0.5"), bundle))


def fork(run: Path, step: int, *settings: str) -> str:
    """The command that goes on from a state of this run with these settings."""
    changed = "".join(f" --set {setting}" for setting in settings)
    return f"minitrain train --from {run} --step {step}{changed} --out-dir {run}-from-{step}"
