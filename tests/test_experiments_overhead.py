"""The experiment on overhead: what it compares is comparable, and its verdicts follow from its figures.

Nothing here depends on how long anything takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_experiments import Stop, page, stored

from minitrain._ext import engine
from minitrain.assembly import assemble, prepare_data
from minitrain.config import Config, differing_keys, load_config
from minitrain.errors import ConfigError
from minitrain.experiments import overhead, preset, runner, timing
from minitrain.experiments.runner import Made
from minitrain.metrics import read_metrics
from minitrain.run_folder import RunFolder
from minitrain.tensors import sites

PAGE, STEP = timing.Page(1.0, 0.5), np.array([0, 1])


@pytest.fixture
def make(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """``make(*settings, page_s=…, stop=…)``: a tiny one, of few rounds, whose page takes as long as said."""
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    monkeypatch.setattr(overhead, "LOOP_TURNS", 2)
    monkeypatch.setattr(timing, "TURNS", 1)
    monkeypatch.setattr(timing, "BURST", 2)

    def made(*settings: str, page_s: float = 1.0, stop: Stop | None = None, **options: Any) -> Made:
        monkeypatch.setattr(timing, "build_page", lambda run: timing.Page(page_s, 0.5))
        stop = stop or Stop()
        return runner.run("19-overhead", overrides=[*tiny, *settings], stop=stop, show=lambda *_: stop, **options)

    return made


def test_the_preset_is_the_default_run_without_its_record():
    """The cost of metrics is not to be that of the record."""
    changed = differing_keys(Config(), load_config(None, preset.load("19-overhead").settings))
    assert changed == ["record.enabled: true -> false"]


@pytest.mark.parametrize("page_s", [1.25, 7.0])
def test_figures_and_page(make: Callable[..., Made], words: Callable[[str], int], tiny: list[str], page_s: float):
    """Every way for every number of sites; bars follow from them; the page has each, also what is not met."""
    made = make(page_s=page_s)
    results, text = stored(made), page(made)
    total = len(sites(load_config(None, tiny).model))
    counts = [n for n in overhead.SITES if n < total] + [total]
    for timed in results["steps"].values():
        assert list(timed["ways"])[:2] == ["bare", "empty dispatcher"]
        assert {f"{kind}, {n}" for kind in ("probes", "Python hooks") for n in counts} < set(timed["ways"])
        assert timed["same_bits"]
        assert timed["ways"]["bare"]["longer_pct"]["rounds"] == [0.0, 0.0]
        for cost in timed["ways"].values():
            longer = cost["longer_pct"]
            assert longer["least"] <= longer["median"] <= longer["most"]
            assert len(longer["rounds"]) == 2
    loops = results["loops"]
    assert loops["longer_pct"]["median"] == pytest.approx(100 * (loops["on_s"] / loops["off_s"] - 1))
    assert sum(loops["where_ms"].values()) == pytest.approx(1e3 * (loops["on_s"] - loops["off_s"]))
    assert loops["page_s"] == page_s
    assert results["bars"] == overhead.bars(results)
    for bar in results["bars"]:
        assert bar["met"] == (None if bar["median"] is None else bar["median"] <= bar["bar"])
        assert ("- " + bar["what"] in text) == (bar["met"] is not True)
        verdict = {True: "met", False: "**not met**", None: "not measured"}[bar["met"]]
        assert f"| {bar['what']} | ≤ {bar['bar']:g} {bar['unit']} | {overhead._measured(bar)} | {verdict} |" in text
    assert results["bars"][-1]["met"] == (page_s <= 3)
    assert f"{page_s:.2f} s from the shell (0.50 s of processor)" in text
    assert "All ways lead to the same bits." in text
    assert 200 <= words(made.folder.readme.read_text()) <= 400
    assert (made.folder.path / "overhead.png").read_bytes().startswith(b"\x89PNG")
    assert made.finding
    assert not made.finding.problem
    assert made.folder.read_manifest()["hardware"]["instruction_set"] == results["instruction_set"]
    assert not list(made.folder.path.glob("runs"))


def found(probes: float, python: float, metrics: float, page_s: float) -> dict[str, Any]:
    """Figures as `bars` reads them."""
    longer = {"probes, 9": probes, "Python hooks, 9": python}
    ways = {way: {"longer_pct": {"median": x, "least": x, "most": x}} for way, x in longer.items()}
    loops = {"longer_pct": {"median": metrics, "least": metrics, "most": metrics}, "page_s": page_s}
    return {"instruction_set": "avx2", "sites": 9, "steps": {"avx2": {"ways": ways}}, "loops": loops}


def test_bars():
    """At the limit is met; each instruction set has a limit of its own, and what is not there has no verdict."""
    assert [bar["met"] for bar in overhead.bars(found(8.0, 30.0, 10.0, 3.0))] == [None, True, True, True, True]
    assert [bar["met"] for bar in overhead.bars(found(8.1, 30.1, 10.1, 3.1))] == [None, False, False, False, False]


def test_numbers_of_the_page():
    """The range where there is one; nothing is minus nothing."""
    assert overhead._range({"median": -0.01, "least": -1.26, "most": 0.34}, "%") == "0.0 (-1.3…0.3) %"
    assert overhead._range({"median": 1.994, "least": 1.994, "most": 1.994}, "s") == "1.99 s"


def test_a_loop_is_as_fast_as_its_fastest_parts():
    """A disturbance of one turn does not count; the spread leaves out any one turn."""
    off, on = np.array([[1.0, 1.0], [9.0, 1.0], [1.0, 1.0]]), np.array([[1.0, 5.0], [1.5, 1.5], [1.2, 1.5]])
    timed = timing.Loops(off, on, STEP, PAGE)
    assert timed.longer == pytest.approx(0.25)
    assert timed.spread == pytest.approx((0.25, 0.35))
    one = timing.Loops(off[:1], on[:1], STEP, PAGE)
    assert one.spread == (one.longer, one.longer) == (2.0, 2.0)


def test_where_the_time_goes(tiny: list[str]):
    """A part counts once: of a validation, then a checkpoint, then heads and matrices, then sites, else any other."""
    every = ["metrics.every=4", "metrics.slow_every=8", "training.val_every=10", "training.checkpoint_every=5"]
    config = load_config(None, [*tiny, *every])
    step = np.array([*range(11), timing.VALIDATION, timing.VALIDATION, 11, 12, 24, timing.VALIDATION])
    more = {
        0: 1,
        1: 2,
        2: 2,
        3: 2,
        4: 4,
        5: 2,
        6: 2,
        7: 2,
        8: 1,
        9: 4,
        10: 2,
        11: 2,
        12: 8,
        24: 4,
        timing.VALIDATION: 16,
    }
    off = np.ones((1, len(step)))
    told = overhead.where(timing.Loops(off, off + [1e-3 * more.get(t, 2) for t in step], step, PAGE), config)
    assert {kind: round(ms, 6) for kind, ms in told.items()} == {
        "validations": 48,
        "checkpoints": 12,
        "heads_and_matrices": 2,
        "sites_and_tensors": 8,
        "other_steps": 16,
    }


@pytest.mark.parametrize("before", [None, "portable"])
def test_instructions_are_held_to_and_given_back(monkeypatch: pytest.MonkeyPatch, tiny: list[str], before: str | None):
    """What is made inside has those, and the variable is afterwards what it was, whatever happens."""
    monkeypatch.delenv("MINITRAIN_ISA", raising=False)
    if before:
        monkeypatch.setenv("MINITRAIN_ISA", before)
    config = load_config(None, tiny)
    for isa in engine.instruction_sets():
        with timing.instructions(isa):
            assert assemble(config, prepare_data(config)).model.backend.isa == isa
        assert os.environ.get("MINITRAIN_ISA") == before
        with contextlib.suppress(KeyError), timing.instructions(isa):
            raise KeyError
        assert os.environ.get("MINITRAIN_ISA") == before


def test_a_bare_step_hears_nobody(tiny: list[str]):
    """Not even who listens; its bits are those of any other step."""
    config = load_config(None, tiny)
    heard: list[str] = []

    def deaf(parts: Any) -> None:
        parts.hooks.listen(lambda site, tensor: heard.append(site))
        timing.bare(parts)

    timed = timing.Steps({"deaf": deaf, "usual": lambda parts: None}, config, prepare_data(config))
    timed.round()
    assert not heard
    assert timed.same_bits


def test_without_metrics_there_is_nothing_to_time(make: Callable[..., Made]):
    """Refused before anything is written."""
    with pytest.raises(ConfigError, match=r"metrics.enabled: expected true"):
        make("metrics.enabled=false")
    assert not Path("experiments").exists()


def test_a_run_that_is_not_finite_is_a_problem(make: Callable[..., Made]):
    """There is no whole loop to time; the page says so."""
    made = make("optimizer.lr_max=1e30", "optimizer.clip=null")
    assert made.finding
    assert made.finding.problem
    assert "Nothing was compared" in page(made)


def test_stopped(make: Callable[..., Made]):
    """While loops run; it cannot be gone on with, since times of two occasions are not comparable."""
    stopped = make(stop=Stop(25))
    assert (stopped.finding, stopped.resumes) == (None, False)
    assert make(force=True).finding


def test_the_page_is_built_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the command that a user types, over and over; what it writes is the page."""
    ran: list[list[str]] = []
    monkeypatch.setattr(timing.subprocess, "run", lambda command, **how: ran.append(command))
    assert timing.build_page(tmp_path).wall_s >= 0
    assert [command[-3:] for command in ran] == [["minitrain", "dashboard", str(tmp_path)]] * timing.PAGES


def test_loops_are_of_the_run_and_leave_nothing(tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    """A time for each step and each batch of a validation, both ways; the page is that of a run with metrics."""
    seen: list[bool] = []

    def page(run: Path) -> timing.Page:
        seen.append(bool(read_metrics(RunFolder(run))) and not RunFolder(run).record.exists())
        return PAGE

    monkeypatch.setattr(timing, "build_page", page)
    config = load_config(None, [*tiny, "metrics.every=3"])
    timed = timing.loops(config, 2)
    assert timed
    assert timed.off.shape == timed.on.shape == (2, len(timed.step))
    assert [t for t in timed.step if t != timing.VALIDATION] == list(range(40))
    batches = sum(1 for _ in assemble(config, prepare_data(config)).validation)
    assert (timed.step == timing.VALIDATION).sum() == 4 * (batches + 1)
    assert min(timed.off.min(), timed.on.min()) > 0
    assert seen == [True]
    assert timing.loops(load_config(None, tiny), 1, stop=lambda: True) is None
