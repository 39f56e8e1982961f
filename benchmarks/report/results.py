"""The stored figures: one JSON file, which a measurement changes where it has measured.

    sizes.NAME.about           model, batch, flops, parameters
    sizes.NAME.race            about (when, where, with what), left_out, rounds[r][threads][entrant or OF_THE_MACHINE]
    sizes.NAME.identity.SIDE   about, runs[] (isa, threads, build, steps, digest)
    command, recording, forensics, hooks, metrics      about, rounds[]

Seconds, megabytes (10^6) and GFLOP/s, as measured; whatever is derived is derived when it is shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from minitrain.files import write_json

Tree = dict[str, Any]


def load(path: Path) -> Tree:
    """What is stored, or an empty tree."""
    return json.loads(path.read_text()) if path.exists() else {"sizes": {}}


def save(path: Path, tree: Tree) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, tree)


@dataclass(frozen=True)
class Figure:
    """A quantity, once a round."""

    values: list[float]

    @property
    def middle(self) -> float:
        return median(self.values)

    def show(self, form: str, scale: float = 1.0) -> str:
        """The median of the rounds, and in brackets from the least to the greatest."""
        least, middle, most = (form.format(scale * v) for v in (min(self.values), self.middle, max(self.values)))
        return f"{middle} ({least}–{most})" if least != most else middle


OF_THE_MACHINE = ("peak", "round_trip_ns")
"""What a round says of the machine; the rest are entrants."""


class Race:
    """The rounds of one size on one number of threads."""

    def __init__(self, size: Tree, threads: int) -> None:
        self.flops: float = size["about"]["flops"]
        self.rounds: list[Tree] = [r[str(threads)] for r in size["race"]["rounds"] if str(threads) in r]
        names = {name: None for r in self.rounds for name in r if name not in OF_THE_MACHINE}
        self.entrants = [name for name in names if all("step_s" in r.get(name, {}) for r in self.rounds)]
        self.failed = [name for name in names if name not in self.entrants]

    def figure(self, entrant: str, *path: str) -> Figure:
        return Figure([_at(r[entrant], path) for r in self.rounds])

    def smallest(self, entrant: str) -> float:
        return min(r[entrant]["step_s"]["min"] for r in self.rounds)

    def ratio(self, slow: str, fast: str, what: str = "min") -> Figure:
        """How many times longer a step of ``slow`` takes, each round by itself."""
        return Figure([r[slow]["step_s"][what] / r[fast]["step_s"][what] for r in self.rounds])

    def peak_share(self, entrant: str) -> Figure:
        """Of the peak of the instruction set that it is held to, else of the best one: its smallest step."""

        def peak(r: Tree) -> float:
            held = entrant.partition(", ")[2]
            return float(r["peak"][held] if held else max(r["peak"].values()))

        return Figure([self.flops / r[entrant]["step_s"]["min"] / 1e9 / peak(r) for r in self.rounds])

    @property
    def round_trip(self) -> Figure | None:
        """Nanoseconds of a cache line to the other core and back, if every round measured it."""
        found = [r.get("round_trip_ns") for r in self.rounds]
        return Figure([float(ns) for ns in found]) if all(found) else None

    def seconds_per_flop(self, entrant: str) -> list[float]:
        return [r[entrant]["step_s"]["min"] / self.flops for r in self.rounds]


def _at(tree: Any, path: tuple[str, ...]) -> float:
    for key in path:
        tree = tree[key]
    return float(tree)


def same_bits(runs: list[Tree]) -> str:
    """``yes``, or what moves the bits: threads, instructions, build."""
    whole = [run for run in runs if "digest" in run]
    moved = {
        what
        for a in whole
        for b in whole
        for what, key in (("threads", "threads"), ("instructions", "isa"), ("build", "build"))
        if a["steps"] == b["steps"]
        and a["digest"] != b["digest"]
        and all(a.get(k) == b.get(k) for k in ("threads", "isa", "build") if k != key)
    }
    if not whole:
        return "not measured"
    if moved:
        return "no: " + ", ".join(what for what in ("threads", "instructions", "build") if what in moved)
    return "no" if any(a["steps"] == b["steps"] and a["digest"] != b["digest"] for a in whole for b in whole) else "yes"
