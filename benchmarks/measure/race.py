"""The race: one side after the other, A B C A B C, so that a slow minute slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure.processes import SideFailed, Track
from measure.workloads import Size

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entrant:
    """A side as it runs in the race: free, or held to fewer instructions than the processor has."""

    name: str
    side: str
    held: Mapping[str, str]


def entrants(sides: list[str], isas: list[str]) -> list[Entrant]:
    """The sides, and minitrain held to what it has besides the best: a peer's library may keep to that by itself."""
    free = [Entrant(side, side, {}) for side in sides]
    held = [Entrant(f"minitrain, {isa}", "minitrain", {"MINITRAIN_ISA": isa}) for isa in isas[1:]]
    return [*free[:1], *held, *free[1:]]


def one_round(
    track: Track, size: Size, workload: Path, runners: list[Entrant], isas: list[str], threads: int, say: Say
) -> dict[str, Any]:
    """What each entrant told, or its ``error``, and of the machine at the time:

    ``peak`` by instruction set in GFLOP/s over so many cores, and of two cores ``round_trip_ns``.
    """
    say("peak")
    found: dict[str, Any] = {"peak": {isa: track.peak(isa, threads) for isa in isas}}
    if threads == 2:
        found["round_trip_ns"] = track.round_trip()
    for runner in runners:
        say(runner.name)
        try:
            found[runner.name] = track.run(
                runner.side,
                workload,
                threads=threads,
                warmup=size.warmup,
                steps=size.steps,
                extras=size.name == "default",
                held=runner.held,
            )
        except SideFailed as failure:
            say(str(failure))
            found[runner.name] = {"error": str(failure)}
    return found
