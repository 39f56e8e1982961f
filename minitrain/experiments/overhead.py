"""Experiments of the kind ``overhead``: what instruments cost a training step, and all metrics a whole run.

Times are this machine's and this hour's. Nothing fails because of one: what is over its bar is told, on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from minitrain._ext import engine
from minitrain._ext.plan import instruction_set
from minitrain.assembly import Parts, assemble, prepare_data
from minitrain.config import Config, to_yaml
from minitrain.data.prepare import Prepared
from minitrain.environment import peak_rss_mb
from minitrain.errors import ConfigError
from minitrain.experiments import timing
from minitrain.experiments.job import Finding, Job, Stopped
from minitrain.files import write_atomic, write_json
from minitrain.report import overhead as picture
from minitrain.report.page import page
from minitrain.report.story import machine_name
from minitrain.report.words import number
from minitrain.tensors import sites
from minitrain.trainer import manifest

PICTURE = "overhead.png"
ROUNDS, LOOP_TURNS = 8, 6
SITES = (1, 8, 32)
"""So many sites, evenly spaced over the step; and all of them."""
BARE, EMPTY = "bare", "empty dispatcher"
PROBES, FUNCTIONS = "probes", "Python hooks"

BARS = {
    "avx512": ("probes at all sites, AVX-512", 5.0),
    "avx2": ("probes at all sites, AVX2", 8.0),
    "python": ("no-op Python hooks at all sites", 30.0),
    "metrics": ("all seven panels, of the loop", 10.0),
    "page": ("building the page", 3.0),
}
"""What is to be cleared: per cent, and seconds for the page."""

Figures = Mapping[str, Any]


def check(job: Job) -> None:
    """Raises ConfigError where metrics are off, which are half of the question."""
    if not job.config.metrics.enabled:
        raise ConfigError("metrics.enabled: expected true, since the experiment is about their cost, got false")


def make(job: Job) -> Finding:
    """Time steps, loops and the page; a folder with the figures, the picture and the page. Raises Stopped."""
    started = perf_counter()
    folder, config = job.folder, job.config
    data = prepare_data(config)
    about = manifest(config, data, assemble(config, data).model, job.command_line, job.preset.name)
    with folder.hold(new=not folder.manifest.exists()):
        write_atomic(folder.config, to_yaml(config))
        write_json(folder.manifest, about)
        found: dict[str, Any] = {
            "instruction_set": instruction_set(),
            "sites": len(sites(config.model)),
            "numbers": numbers(config, data),
        }
        for isa in _instruction_sets(config):
            with timing.instructions(isa):
                found.setdefault("steps", {})[isa] = steps(config, data, job.stop)
        if (loops := whole(job)) is None:
            headline = "Nothing was compared: the run ended with numbers that are not finite"
            write_atomic(folder.readme, page(job.title, headline, None, {"Again": job.again()}))
            return Finding(headline, found, True)
        found["loops"] = loops
        found["bars"] = bars(found)
        found |= {"wall_clock_s": round(perf_counter() - started, 3)}
        headline = _headline(found)
        subtitle = f"{job.preset.name}: {machine_name(about)}, one thread"
        write_atomic(folder.path / PICTURE, picture.draw(_curves(found), _limits(found), headline, subtitle))
        found["peak_rss_mb"] = peak_rss_mb()
        shown = ("How much longer a step takes, by number of sites", PICTURE)
        write_atomic(folder.readme, page(job.title, headline, shown, _told(job, config, found, machine_name(about))))
    return Finding(headline, found)


# Measuring


def _instruction_sets(config: Config) -> list[str]:
    """The best one, and AVX2, which has a bar of its own."""
    if config.training.backend != "compiled":
        return [instruction_set()]
    return list(dict.fromkeys([instruction_set(), *(i for i in engine.instruction_sets() if i == "avx2")]))


def numbers(config: Config, data: Prepared) -> int:
    """How many stand at all sites of a step together."""
    parts = assemble(config, data)
    probe = parts.hooks.probe()
    timing.step(parts, parts.batches.batch_at(0))
    return sum(stats.count for stats in probe.stats.values())


def ways(config: Config) -> dict[str, timing.Way]:
    """What stands beside a bare step, by name."""
    names = sites(config.model)
    found: dict[str, timing.Way] = {BARE: timing.bare, EMPTY: lambda parts: None}
    for n in sizes(config):
        chosen = [names[(2 * i + 1) * len(names) // (2 * n)] for i in range(n)]
        found[f"{PROBES}, {n}"] = _at(chosen, lambda parts, site: parts.hooks.probe(site))
        found[f"{FUNCTIONS}, {n}"] = _at(chosen, lambda parts, site: parts.hooks.listen(timing.listener, site))
    return found


def sizes(config: Config) -> list[int]:
    """How many sites are listened at, each once."""
    total = len(sites(config.model))
    return [*(n for n in SITES if n < total), total]


def _at(chosen: Sequence[str], add: Callable[[Parts, str], object]) -> timing.Way:
    return lambda parts: [add(parts, site) for site in chosen]


def steps(config: Config, data: Prepared, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Of every way the fastest step in µs, and by how many per cent it is longer than a bare one, round by round."""
    timed = timing.Steps(ways(config), config, data)
    rounds = []
    for _ in range(ROUNDS):
        if stop():
            raise Stopped
        rounds.append(timed.round())
    return {
        "rounds": ROUNDS,
        "steps_a_round": timing.TURNS * timing.BURST,
        "same_bits": timed.same_bits,
        "ways": {
            way: {
                "step_us": 1e6 * min(r[way] for r in rounds),
                "longer_pct": _spread([100 * (r[way] / r[BARE] - 1) for r in rounds]),
            }
            for way in rounds[0]
        },
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """The median of the rounds, their least and most, and all of them."""
    return {"median": float(np.median(values)), "least": min(values), "most": max(values), "rounds": list(values)}


def whole(job: Job) -> dict[str, Any] | None:
    """The loops with metrics and without, where the difference lies, and the page; None where a run ended early."""
    config = job.config
    with job.show(job.preset.name, config) as listener:
        found = timing.loops(config, LOOP_TURNS, [listener], job.stop)
    if found is None:
        if job.stop():
            raise Stopped
        return None
    least, most = found.spread
    return {
        "steps": config.scheduler.total_steps,
        "turns": LOOP_TURNS,
        "off_s": found.seconds(found.off),
        "on_s": found.seconds(found.on),
        "longer_pct": {"median": 100 * found.longer, "least": 100 * least, "most": 100 * most},
        "turns_s": {name: turns.sum(axis=1).tolist() for name, turns in (("off", found.off), ("on", found.on))},
        "where_ms": where(found, config),
        "page_s": found.page.wall_s,
        "page_processor_s": found.page.processor_s,
    }


def where(found: timing.Loops, config: Config) -> dict[str, float]:
    """Milliseconds that metrics add to the loop, by what was done; a part of it counts once, as the first that fits."""
    more = 1e3 * (found.on.min(axis=0) - found.off.min(axis=0))
    metrics, step = config.metrics, found.step
    kinds = {
        "validations": step == timing.VALIDATION,
        "checkpoints": (step + 1) % config.training.checkpoint_every == 0,
        "heads_and_matrices": step % metrics.slow_every == 0,
        "sites_and_tensors": step % metrics.every == 0,
        "other_steps": np.ones(len(step), np.bool_),
    }
    told, left = {}, np.ones(len(step), np.bool_)
    for kind, here in kinds.items():
        told[kind] = float(more[here & left].sum())
        left &= ~here
    return told


# Against the bars


def bars(found: Figures) -> list[dict[str, Any]]:
    """Each bar with what was measured for it; None where nothing was. The median of the rounds decides."""
    total = found["sites"]
    told = {isa: s["ways"][f"{PROBES}, {total}"]["longer_pct"] for isa, s in found["steps"].items()}
    told["python"] = found["steps"][found["instruction_set"]]["ways"][f"{FUNCTIONS}, {total}"]["longer_pct"]
    told["metrics"] = found["loops"]["longer_pct"]
    told["page"] = dict.fromkeys(("median", "least", "most"), found["loops"]["page_s"])
    return [
        {
            "what": what,
            "unit": "s" if key == "page" else "%",
            "bar": limit,
            **{name: told[key][name] if key in told else None for name in ("median", "least", "most")},
            "met": told[key]["median"] <= limit if key in told else None,
        }
        for key, (what, limit) in BARS.items()
    ]


def _headline(found: Figures) -> str:
    judged = [bar for bar in found["bars"] if bar["met"] is not None]
    loops = found["loops"]
    return (
        f"All metrics make the loop {number(loops['longer_pct']['median'], 1)} % longer; "
        f"{sum(bar['met'] for bar in judged)} of {len(judged)} bars met"
    )


def _curves(found: Figures) -> list[picture.Point]:
    """What is drawn: each kind of instrument by number of sites."""
    points: list[picture.Point] = []
    for isa, timed in found["steps"].items():
        for way, cost in timed["ways"].items():
            kind, comma, n = way.partition(", ")
            if comma and (kind == PROBES or isa == found["instruction_set"]):
                name = f"{kind}, {isa}"
                longer = cost["longer_pct"]
                points.append(picture.Point(name, int(n), longer["median"], longer["least"], longer["most"]))
    return sorted(points, key=lambda point: not point.name.startswith(PROBES))


def _limits(found: Figures) -> dict[str, float]:
    """The bars of steps, by their words."""
    return {what: limit for key, (what, limit) in BARS.items() if key in ("python", *found["steps"])}


# The page


def _told(job: Job, config: Config, found: Figures, machine: str) -> dict[str, str]:
    over = [bar for bar in found["bars"] if bar["met"] is False]
    missing = [bar["what"] for bar in found["bars"] if bar["met"] is None]
    not_met = [f"{bar['what']}: {number(bar['median'], 1)} {bar['unit']}, the bar is {_limit(bar)}." for bar in over]
    not_met += [f"{what}: not measured, this processor has no such instructions." for what in missing]
    return {
        "Bars": _bars(found["bars"]),
        "Not met": "\n".join(f"- {line}" for line in not_met) or "Nothing.",
        "A step": _steps(found),
        "A loop": _loop(found["loops"], config),
        "How": _how(found, machine),
        "Again": f"{job.again()}Times differ from machine to machine and from hour to hour; results.json has every "
        "round.",
    }


def _bars(told: Sequence[Figures]) -> str:
    verdict = {True: "met", False: "**not met**", None: "not measured"}
    rows = [f"| {bar['what']} | ≤ {_limit(bar)} | {_measured(bar)} | {verdict[bar['met']]} |" for bar in told]
    return "\n".join(["| what | bar | measured | |", "|---|---|---|---|", *rows])


def _limit(bar: Figures) -> str:
    return f"{bar['bar']:g} {bar['unit']}"


def _measured(bar: Figures) -> str:
    return "-" if bar["median"] is None else _range(bar, bar["unit"])


def _range(told: Figures, unit: str) -> str:
    """``9.8 (9.5…10.4) %``"""
    digits = 2 if unit == "s" else 1
    # 0.0 is added so that nothing is -0.0
    middle, least, most = (f"{round(told[key], digits) + 0.0:.{digits}f}" for key in ("median", "least", "most"))
    return f"{middle} {unit}" if least == most else f"{middle} ({least}…{most}) {unit}"


def _steps(found: Figures) -> str:
    timed = found["steps"][found["instruction_set"]]
    cost = {way: told["longer_pct"] for way, told in timed["ways"].items()}
    rows = [
        f"| {n} | {_range(cost[f'{PROBES}, {n}'], '%')} | {_range(cost[f'{FUNCTIONS}, {n}'], '%')} |"
        for n in dict.fromkeys(int(way.partition(", ")[2]) for way in cost if ", " in way)
    ]
    bare, probed = (timed["ways"][way]["step_us"] for way in (BARE, f"{PROBES}, {found['sites']}"))
    rate = 4e-3 * found["numbers"] / max(probed - bare, 1e-3)
    same = all(timed["same_bits"] for timed in found["steps"].values())
    text = (
        f"A bare step takes {bare:,.0f} µs ({found['instruction_set']}), with an {EMPTY} {_range(cost[EMPTY], '%')} "
        f"more. All {found['sites']} sites hold {number(1e-6 * found['numbers'])} million numbers, which probes read "
        f"at {number(rate, 0)} GB/s. "
    )
    text += "All ways lead to the same bits." if same else "**Not all ways lead to the same bits.**"
    return "\n".join([text, "", "| sites | probes: a step is longer by | Python hooks |", "|---|---|---|", *rows])


def _loop(loops: Figures, config: Config) -> str:
    parts, between = loops["where_ms"], 1e3 * (loops["on_s"] - loops["off_s"])
    text = (
        f"{loops['steps']:,} steps with log, validations and checkpoints take {number(loops['off_s'])} s without "
        f"metrics and {number(loops['on_s'])} s with them. The {number(between, 0)} ms between: "
        f"{number(parts['validations'], 0)} at validations, {number(parts['checkpoints'], 0)} at checkpoints, "
        f"{number(parts['heads_and_matrices'], 0)} at the steps whose heads and matrices are looked at, "
        f"{number(parts['sites_and_tensors'], 0)} where sites and tensors are, {number(parts['other_steps'], 0)} at "
        "all others."
    )
    return (
        f"{text} The page comes on top: {number(loops['page_s'])} s from the shell "
        f"({number(loops['page_processor_s'])} s of processor)."
    )


def _how(found: Figures, machine: str) -> str:
    timed = next(iter(found["steps"].values()))
    return (
        f"Everything takes turns; the fastest of {timed['steps_a_round']} steps counts in a round, the median of "
        f"{timed['rounds']} rounds is told, with the least and the most. Of a loop each step and batch "
        f"counts as the fastest of {found['loops']['turns']} turns, and the range is with any one turn left out "
        f"({machine})."
    )
