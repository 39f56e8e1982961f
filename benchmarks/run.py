"""Races minitrain against its peers on this machine; stores the figures and writes the page and the picture.

    python benchmarks/run.py                                     all of it, some 40 minutes on two cores
    python benchmarks/run.py --sizes default --peers jax --rounds 1 --parts race --out /tmp/try
    python benchmarks/run.py --parts                             measure nothing, render what is stored

Run it in minitrain's own environment. The peers go into another one, which is made at first use; a peer that cannot be
installed is left out, and the page says so. What is measured replaces what is stored of the same size, so a race with
fewer peers leaves a page with fewer peers: try things with --out. Nothing fails because of a timing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from time import monotonic
from typing import Any

from measure import forensics, hooks, metrics, recording, whole_command
from measure.about import about
from measure.identity import golden, identity
from measure.processes import Track, available
from measure.race import entrants, one_round
from measure.workloads import SIZES, Size, write_workload
from report import results
from report.page import page
from report.picture import picture
from sides import PEERS

from minitrain._ext import engine

HERE = Path(__file__).resolve().parent
PARTS = ("race", "identity", "command", "recording", "forensics", "hooks", "metrics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder of RESULTS.md and results/")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    stored = a.out / "results" / "results.json"
    tree = results.load(stored)
    if a.parts:
        with tempfile.TemporaryDirectory() as scratch:
            Measurement(a, Track(Path(scratch)), tree, stored).run()
    (a.out / "results" / "race.png").write_bytes(picture(tree))
    (a.out / "RESULTS.md").write_text(page(tree), encoding="utf-8")
    print(f"wrote {a.out / 'RESULTS.md'}")


class Measurement:
    """One call of the command: its parts in turn, stored as they are done."""

    def __init__(self, a: argparse.Namespace, track: Track, tree: results.Tree, stored: Path) -> None:
        self.a, self.track, self.tree, self.stored = a, track, tree, stored
        self.sizes = [size for name, size in SIZES.items() if name in a.sizes]
        peers, self.left_out = available(a.peers)
        self.sides = ["minitrain", *peers]
        self.isas = engine.instruction_sets()
        self.about = about(self.isas, track.cores)
        self.workloads = {s.name: write_workload(track.scratch / "workloads" / s.name, s) for s in self.sizes}
        self.start = monotonic()

    def say(self, what: str) -> None:
        print(f"{monotonic() - self.start:6.0f} s  {what}", file=sys.stderr)

    def run(self) -> None:
        for size in self.sizes:
            entry = self.tree["sizes"].setdefault(size.name, {})
            entry["about"] = {
                "title": size.title,
                "model": size.model,
                "batch_size": size.batch_size,
                "parameters": size.parameters,
                "flops": size.flops,
                "steps": size.warmup + size.steps,
            }
        self.tree["sizes"] = {name: self.tree["sizes"][name] for name in SIZES if name in self.tree["sizes"]}
        for part in (getattr(self, name) for name in PARTS):
            if part.__name__ in self.a.parts:
                part()
                results.save(self.stored, self.tree)

    def race(self) -> None:
        races = {size.name: {"about": self.about, "left_out": self.left_out, "rounds": []} for size in self.sizes}
        for number in range(self.a.rounds):
            for size in self.sizes:
                place = f"round {number + 1} of {self.a.rounds}, {size.name}"
                races[size.name]["rounds"].append(self.one_round(size, place))
            self.about["load_after"] = round(os.getloadavg()[0], 1)
            for name, race in races.items():
                self.tree["sizes"][name]["race"] = race
            results.save(self.stored, self.tree)

    def one_round(self, size: Size, place: str) -> dict[str, Any]:
        found = {}
        for threads in sorted(set(size.threads) & set(self.a.threads)):
            here = f"{place}, {threads} thread{'s' * (threads > 1)}"
            if threads > len(self.track.cores):
                self.say(f"{here}: left out, there are fewer cores")
                continue
            fast = [isa for isa in self.isas if isa != "portable"] or self.isas
            runners = entrants(self.sides, fast if threads == 1 else fast[:1])

            def say(what: str, here: str = here) -> None:
                self.say(f"{here}: {what}")

            found[str(threads)] = one_round(self.track, size, self.workloads[size.name], runners, fast, threads, say)
        return found

    def identity(self) -> None:
        for size in self.sizes:
            if not size.identity_steps:
                continue
            found = identity(self.track, size, self.workloads[size.name], self.sides, self.isas, self.say)
            entry = self.tree["sizes"][size.name].setdefault("identity", {})
            for side, runs in found.items():
                entry[side] = {"about": self.about, "runs": runs}
            entry["minitrain"]["golden"] = golden(size)

    def command(self) -> None:
        self.rounds("command", "minitrain train", whole_command.train)

    def recording(self) -> None:
        self.rounds("recording", "recording", lambda folder: recording.one_round(folder, self.track.cores, self.say))

    def forensics(self) -> None:
        self.rounds("forensics", "looking into a recorded run", forensics.one_round)

    def hooks(self) -> None:
        self.rounds("hooks", "hooks", lambda folder: hooks.costs())

    def metrics(self) -> None:
        self.rounds("metrics", "loops with metrics and without", lambda folder: metrics.one_round())

    def rounds(self, name: str, what: str, measure: Callable[[Path], Any]) -> None:
        """A part that is the same thing again and again, each time in a folder of its own."""
        found = []
        for number in range(self.a.rounds):
            self.say(f"round {number + 1} of {self.a.rounds}: {what}")
            folder = self.track.scratch / name / str(number)
            folder.mkdir(parents=True)
            with chdir(folder):
                found.append(measure(folder))
        self.tree[name] = {"about": self.about, "rounds": found}


if __name__ == "__main__":
    main()
