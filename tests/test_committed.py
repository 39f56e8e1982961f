"""The experiments that the repository holds: as they were produced, and saying what they found."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minitrain.config import config_hash, load_config
from minitrain.experiments import expected, healthy, overhead, preset
from minitrain.experiments.panels import panels
from minitrain.experiments.place import finished
from minitrain.metrics import read_metrics
from minitrain.report.log import Log
from minitrain.run_folder import RunFolder

ROOT = Path(__file__).parent.parent

COMMITTED = ROOT / "experiments"
committed = pytest.mark.skipif(not COMMITTED.is_dir(), reason="the repository's experiments/ is not beside the tests")


@committed
@pytest.mark.parametrize("name", preset.names())
def test_committed_as_produced(words: Callable[[str], int], name: str):
    """Finished, with the preset's settings, from a clean tree, a page of 200 to 400 words, and no path of a machine."""
    folder = RunFolder(COMMITTED / name)
    results, manifest = finished(folder), folder.read_manifest()
    assert results is not None
    assert config_hash(folder.stored_config()) == config_hash(load_config(None, preset.load(name).settings))
    assert load_config(folder.config) == folder.stored_config()
    assert manifest["command_line"] == ["minitrain", "experiment", name]
    assert manifest["git_dirty"] is False
    assert 200 <= words(folder.readme.read_text()) <= len(folder.readme.read_text().split()) <= 400
    for path in folder.path.iterdir():
        if path.suffix in (".json", ".jsonl", ".yaml", ".md"):
            assert not re.search(r"[\"'\s`(]/(?!/)\w", path.read_text()), path


@committed
def test_the_committed_mini_answers_its_question():
    """At least two variants are worse by more than chance, and the page has their figures."""
    folder = RunFolder(COMMITTED / "18-train-mini")
    results, text = finished(folder), " ".join(folder.readme.read_text().split())
    assert results
    assert results["beats_baseline"]
    worse = [v for v in results["variants"] if v["verdict"] in ("memorised", "learnt less")]
    assert len(worse) >= 2
    for variant in worse:
        assert f"`{variant['set'][0]}`: **{variant['val_ppl']:.2f}**, {variant['change_pct']:.1f} % worse" in text
    assert math.isclose(
        results["ngram_baseline_val_ppl"],
        json.loads((COMMITTED / "14-ngram-baseline/results.json").read_text())["best_perplexity"],
    )


@committed
@pytest.mark.parametrize("name", [name for name in preset.names() if name.startswith("19-injection")])
def test_the_committed_injections_say_what_was_measured(name: str):
    """Every verdict follows from the figures that stand beside it, as do headline and table of the page."""
    folder = RunFolder(COMMITTED / name)
    results, text = finished(folder), folder.readme.read_text()
    assert results
    assert results["effect"]["before"] == {"first_difference": 500, "same_bits": True}
    told = expected.lines(results["effect"], folder.stored_config())
    assert [line._asdict() for line in told] == results["expectations"]
    for line in told:
        verdict = "as expected" if line.as_expected else "**otherwise**"
        assert f"| {line.expected} | {line.seen} | {verdict} |" in text
    lines = {line["step"]: line for line in folder.log_lines() if "loss" in line}
    series = results["effect"]["series"]
    assert series["step"] == list(range(499, 551))
    assert series["loss"] == [lines[t]["loss"] for t in series["step"]]
    assert series["grad_norm"] == [lines[t]["grad_norm"] for t in series["step"]]


@committed
def test_the_committed_scale_is_seen_in_the_loss_under_one_setting_at_least():
    """At the defaults the clip hides it; where it spikes is told, and is another setting."""
    folder = RunFolder(COMMITTED / "19-injection-A")
    results = finished(folder)
    assert results
    assert results["effect"]["norm_ratio"] == pytest.approx(50, rel=1e-5)
    assert not results["effect"]["spikes"]
    spiked = [variant for variant in results["variants"] if variant["effect"]["spikes"]]
    assert spiked
    assert f"A spike shows with `{' '.join(spiked[0]['set'])}`" in " ".join(folder.readme.read_text().split())


@committed
def test_the_committed_healthy_run_is_what_its_metrics_say():
    """Every figure again from the log and metrics.zarr that stand beside it, and every sign from the figures."""
    folder = RunFolder(COMMITTED / "19-healthy")
    results, log, config = finished(folder), Log.read(folder), folder.stored_config()
    assert results
    rates = np.array([line["lr"] for line in folder.log_lines() if "lr" in line])
    assert panels(log, rates, read_metrics(folder), config) == results["panels"]
    assert [line._asdict() for line in healthy.lines(results["panels"], results, config)] == results["expectations"]
    assert folder.complete.read_text() == (COMMITTED / "18-baseline/COMPLETE").read_text()


@committed
def test_the_committed_overhead_says_what_was_measured():
    """Verdicts follow from the figures, and what is not met stands on the page."""
    folder = RunFolder(COMMITTED / "19-overhead")
    results, text = finished(folder), folder.readme.read_text()
    assert results
    assert overhead.bars(results) == results["bars"]
    assert all(timed["same_bits"] for timed in results["steps"].values())
    for bar in results["bars"]:
        assert (f"- {bar['what']}" in text) == (bar["met"] is not True)


def test_the_justfile_mirrors_the_makefile():
    """Every target that `make` has for a person is a recipe of its name."""
    if not (ROOT / "justfile").exists():
        pytest.skip("the repository's justfile is not beside the tests")
    targets = re.search(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())
    recipes = re.findall(r"(?m)^([\w-]+):\n    make \1$", (ROOT / "justfile").read_text())
    assert targets
    assert sorted(targets[1].split()) == sorted(recipes)
