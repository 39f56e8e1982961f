"""The bars that the race is to clear, each with what was measured for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from measure.workloads import ROUND_NEIGHBOUR

from report.results import Figure, Race, Tree, same_bits

LEADS = {
    ("default", "torch-best"): 2.2,
    ("default", "torch-compile"): 2.0,
    ("default", "jax"): 1.7,
    ("default", "numpy"): 2.5,
    ("M", "torch-best"): 1.15,
    ("M", "torch-compile"): 1.15,
    ("M", "jax"): 1.5,
    ("L", "torch-compile"): 1.0,
}
"""Times faster than a peer at a size, on one thread."""
PEAK_SHARE = 75
TWO_THREADS = 1.8
NEIGHBOUR = 0.8
"""Speed per FLOP against the default size without padding."""
PASSES = 4
"""Of a step in which hooks are asked for: forward, backward, clip, update."""


@dataclass(frozen=True)
class Bar:
    """A quantity once a round, ``sign`` ≥ or ≤, and a limit. No values: not measured."""

    name: str
    values: list[float]
    form: str
    sign: str
    limit: float

    def met(self) -> str:
        good = sum(v >= self.limit if self.sign == "≥" else v <= self.limit for v in self.values)
        if not self.values:
            return "not measured"
        return {0: "**no**", len(self.values): "yes"}.get(good, f"**in {good} of {len(self.values)} rounds**")

    def row(self) -> str:
        measured = Figure(self.values).show(self.form) if self.values else ""
        return f"| {self.name} | {self.sign} {self.form.format(self.limit)} | {measured} | {self.met()} |"


@dataclass(frozen=True)
class BitBar:
    """Parameters, m and v of minitrain bit-equal over everything that was varied."""

    name: str
    runs: list[Tree]

    def met(self) -> str:
        verdict = same_bits(self.runs)
        return verdict if verdict in ("yes", "not measured") else f"**{verdict}**"

    def row(self) -> str:
        told = [run["digest"] for run in self.runs if run["steps"] == self.steps and "digest" in run]
        digests = len(set(told))
        return f"| {self.name} | equal | {digests} digest{'s' * (digests != 1)} in {len(told)} runs | {self.met()} |"

    @property
    def steps(self) -> int:
        return max((run["steps"] for run in self.runs), default=0)


def bars(tree: Tree) -> Iterator[Bar | BitBar]:
    """In the order of the sizes; those of a size that was not measured are left out."""
    for name, size in tree["sizes"].items():
        title = size["about"]["title"]
        if "race" in size:
            yield from _race_bars(name, title, Race(size, 1), Race(size, 2))
        if name in ("vocab512", "odd"):
            yield _neighbour_bar(title, tree, size)
        if "minitrain" in size.get("identity", {}):
            yield BitBar(f"{title}: parameters, m, v of minitrain", size["identity"]["minitrain"]["runs"])
    if "command" in tree:
        rounds = tree["command"]["rounds"]
        yield Bar("`minitrain train`, 2000 steps, import to picture", [r["wall_s"] for r in rounds], "{:.2f} s", "≤", 8)
        yield Bar("peak memory of that process", [r["memory_mb"] for r in rounds], "{:.0f} MB", "≤", 400)
    for place, way, limit in RECORDING:
        name = f"recording {way}, second core {'free' if place == 'free' else 'taken (one core for all)'}"
        yield Bar(f"{name}: a step takes longer by", more(tree, place, way), "{:.1f} %", "≤", limit)
    looks = tree.get("forensics", {}).get("rounds", [])
    for what, key, form, scale, limit in FORENSICS:
        yield Bar(what, [scale * r[key] for r in looks], form, "≤", limit)
    if looks:
        for what, slow, fast in RATIOS:
            yield Bar(what, [r[slow] / r[fast] for r in looks], "{:.2f}×", "≤", 1)
    heard = tree.get("hooks", {}).get("rounds", [])
    if heard:
        asking = [100 * PASSES * r["fires"]["a pass, nobody listening"] / r["steps"]["nobody"] for r in heard]
        yield Bar("nobody listening: share of a default step", asking, "{:.3f} %", "≤", 0.5)
        for what, key, limit in (
            ("a probe of no elements", "a probe, 0 elements", 15),
            ("a Python hook, beside its call", "a Python hook, its call taken off", 100),
        ):
            yield Bar(what, [1e9 * r["fires"][key] for r in heard], "{:.1f} ns", "≤", limit)
        for isa, (words, limit) in PROBES.items():
            yield Bar(
                f"probes at all sites, {words}: a step takes longer by", probed(tree, isa), "{:.1f} %", "≤", limit
            )
        larger = heard_more([r for r in heard if "steps of M" in r], "a probe at every site", "steps of M")
        yield Bar("the same of a step of size M: longer by", larger, "{:.1f} %", "≤", PROBES["avx512"][1])
        yield Bar("no-op Python hooks at all sites: a step takes longer by", heard_more(heard), "{:.1f} %", "≤", 30)
    measured = tree.get("metrics", {}).get("rounds", [])
    longer = [100 * (r["on_s"] / r["off_s"] - 1) for r in measured]
    yield Bar("all seven panels: the loop of 2000 steps takes longer by", longer, "{:.1f} %", "≤", 10)
    yield Bar("`minitrain dashboard RUN` of 2000 steps", [r["page_s"] for r in measured], "{:.2f} s", "≤", 3)


PROBES = {"avx512": ("AVX-512", 5), "avx2": ("AVX2", 8)}
"""Per cent of a step."""
RECORDING = (("free", "keyframes", 5), ("free", "every step", 10), ("pinned", "every step", 30))
"""Per cent of a step."""
FORENSICS = (
    ("`minitrain replay RUN --step 500` of 2000 steps", "replay_s", "{:.2f} s", 1, 1.0),
    ("`run.moments(t)`", "moments_s", "{:.2f} ms", 1e3, 5),
    ("`minitrain replay RUN --nan-bisect`, a number is not finite", "bisect_nan_s", "{:.2f} s", 1, 3.0),
    ("`minitrain diff A B`", "diff_s", "{:.2f} s", 1, 1.5),
)
RATIOS = (
    ("`minitrain verify RUN` over the training that it verifies", "verify_s", "training_s"),
    ("`minitrain replay RUN --nan-bisect` where all is finite, over `verify`", "bisect_nothing_s", "verify_s"),
)


def probed(tree: Tree, isa: str) -> list[float]:
    """By how many per cent a probe at every site makes a step longer with these instructions, each round by itself."""
    part = tree["hooks"]
    key = "steps" if part["about"]["isas"][0] == isa else f"steps, {isa}"
    return heard_more([r for r in part["rounds"] if key in r], "a probe at every site", key)


def heard_more(rounds: list[Tree], way: str = "a Python hook at every site", key: str = "steps") -> list[float]:
    """By how many per cent listening that way makes a step longer than with nobody there, each round by itself."""
    return [100 * (r[key][way] / r[key]["nobody"] - 1) for r in rounds]


def more(tree: Tree, place: str, way: str, what: str = "step_s") -> list[float]:
    """By how many per cent recording that way makes a step longer, each round by itself."""
    rounds = [r[place] for r in tree.get("recording", {}).get("rounds", [])]
    return [100 * (r[way][what] / r["not recorded"][what] - 1) for r in rounds]


def _race_bars(name: str, title: str, one: Race, two: Race) -> Iterator[Bar]:
    here = "minitrain" in one.entrants
    for (size, peer), limit in LEADS.items():
        if size == name:
            values = one.ratio(peer, "minitrain").values if here and peer in one.entrants else []
            yield Bar(f"{title}: faster than {peer}", values, "{:.2f}×", "≥", limit)
    if name in ("default", "full", "M", "L"):
        shares = [100 * v for v in one.peak_share("minitrain").values] if here else []
        yield Bar(f"{title}: share of the FMA peak", shares, "{:.1f} %", "≥", PEAK_SHARE)
    if name in ("default", "full"):
        both = here and "minitrain" in two.entrants and len(one.rounds) == len(two.rounds)
        slow, fast = (race.rounds if both else [] for race in (one, two))
        values = [
            a["minitrain"]["step_s"]["min"] / b["minitrain"]["step_s"]["min"] for a, b in zip(slow, fast, strict=True)
        ]
        yield Bar(f"{title}: 1 thread / 2 threads", values, "{:.2f}×", "≥", TWO_THREADS)
    if name == "default":
        for what, path, form, scale, limit in (
            ("fresh process, import to first step", "launch_to_first_step_s", "{:.2f} s", 1, 0.5),
            ("Python over the engine, share of a step", "python_share", "{:.1f} %", 100, 5),
        ):
            values = [scale * v for v in one.figure("minitrain", path).values] if here else []
            yield Bar(f"{title}: {what}", values, form, "≤", limit)


def _neighbour_bar(title: str, tree: Tree, size: Tree) -> Bar:
    """Rounds by number: the neighbour has run in the same round of the same command."""
    values: list[float] = []
    neighbour = tree["sizes"].get(ROUND_NEIGHBOUR, {})
    if "race" in size and "race" in neighbour and size["race"]["about"] == neighbour["race"]["about"]:
        here, there = Race(size, 1), Race(neighbour, 1)
        if "minitrain" in here.entrants and "minitrain" in there.entrants:
            pairs = zip(there.seconds_per_flop("minitrain"), here.seconds_per_flop("minitrain"), strict=True)
            values = [usual / this for usual, this in pairs]
    return Bar(f"{title}: speed per FLOP against the default size without padding", values, "{:.2f}×", "≥", NEIGHBOUR)
