"""The sentences and checks of the dashboard: what is read off healthy and broken data, and nothing not measured."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import dashboards
import numpy as np
import pytest
from dashboards import bare, broken, changed, healthy, measured
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain.dashboard import readings
from minitrain.dashboard.checks import CHECKS, checks, verdict
from minitrain.dashboard.gather import RunData
from minitrain.dashboard.header import header
from minitrain.dashboard.lanes import running_mean
from minitrain.dashboard.panels import panels
from minitrain.dashboard.selection import telling
from minitrain.dashboard.terminal import BLOCKS, sparkline, summary
from minitrain.sections import OptimizerConfig
from minitrain.stability import Spike, overfit_onset, recovery, spikes, usual

READINGS = [
    readings.loss,
    readings.learning_rate,
    readings.gradient,
    readings.activations,
    readings.spectral,
    readings.units,
    readings.classes,
]


@pytest.fixture(scope="module")
def run() -> RunData:
    return healthy()


def spiked(run: RunData, step: int, factor: float) -> RunData:
    norm = run.log.norm.copy()
    norm[step] *= factor
    return changed(run, norm=norm)


def verdict_of(run: RunData, name: str) -> str:
    return next(check.verdict for check in checks(run) if check.name == name)


# Sentences


def test_a_reading_is_one_sentence_with_numbers(run):
    """Every panel of a healthy run is read in one line that ends in a full stop and holds a number."""
    for reading in READINGS:
        text = reading(run)
        assert text[0].isupper()
        assert text.endswith(".")
        assert "\n" not in text
        assert ". " not in text.replace("e. ", "")
        assert re.search(r"\d", text), text
        assert "nan" not in text
        assert "inf" not in text


@pytest.mark.parametrize("kind", [lambda: bare(0), lambda: bare(1), lambda: bare(60), lambda: broken(healthy(300))])
def test_nothing_is_read_that_is_not_there(kind):
    """Without metrics, with one step, without a step, with NaN everywhere: a sentence, without `nan` and `healthy`."""
    told = kind()
    for reading in READINGS:
        text = reading(told)
        assert text.endswith(".")
        assert not re.search(r"\bnan\b|\binf\b|healthy", text), text
    assert len(panels([told])) == 7
    assert all(len(line) <= 80 for line in summary([told]).splitlines())


def test_loss_tells_peak_baseline_onset_and_what_is_not_finite(run):
    text = readings.loss(run)
    assert "overfitting begins at step" in text
    assert "4-gram baseline (13.30)" in text
    loss = run.log.loss.copy()
    loss[40] = 9.0
    assert "after a peak of 9.00 at step 40" in readings.loss(changed(run, loss=loss))
    loss[700] = 30.0
    assert re.search(r"spikes? over 3σ, the largest \+\d+\.\dσ at step 700", readings.loss(changed(run, loss=loss)))
    loss[1200:] = np.nan
    lines = [{"step": i, "nonfinite": {"loss": "nan"}} for i in range(1200, 2000)]
    assert "step 1,200 is the first of 800 not finite" in readings.loss(changed(run, loss=loss, broken=lines))
    assert "baseline is not known" in readings.loss(replace(run, results={}))


def test_loss_doubts_what_no_language_allows(run):
    """A model that sees its targets has nearly no loss."""
    low = np.maximum(run.log.loss - 0.8, 0.001)
    assert "or the model sees its targets" in readings.loss(changed(run, loss=low))


def test_a_flat_loss_has_no_spike_and_a_spike_out_of_it_has_a_name(run):
    """There is no deviation to measure it by."""
    flat = np.full(run.steps, 4.16)
    assert "no spike over 3σ" in readings.loss(changed(run, loss=flat))
    flat = np.ones(run.steps)
    flat[500] = 2
    spiked = changed(run, loss=flat)
    assert "1 spike over 3σ, the largest out of a flat loss at step 500" in readings.loss(spiked)
    assert "nan" not in summary([spiked]) + header([spiked])


def test_learning_rate_names_the_first_step_that_differs(run):
    assert "every step logged had the configured rate" in readings.learning_rate(run)
    lr = run.log.lr.copy()
    lr[500] *= 10
    text = readings.learning_rate(changed(run, lr=lr))
    assert "1 step had another rate than configured" in text
    assert "step 500" in text
    assert "10 ×" in text
    assert readings.learning_rate(healthy(200, "scheduler.warmup_steps=0")).startswith("No warm-up")


def test_gradient_tells_the_share_of_clipped_steps_and_norms_that_stand_alone(run):
    share = float((run.log.norm > 1).mean())
    assert share == 1
    assert "engaged on 100 % of steps (it is always on" in readings.gradient(run)
    text = readings.gradient(spiked(run, 803, 300))
    assert "largest norm" in text
    assert "at step 803" in text
    assert "1 step over 30 × the mean of the 100 steps before" in text
    assert readings.gradient(healthy(200, "optimizer.clip=null")).startswith("No clip is configured")


def test_gradient_names_the_batch_of_the_largest_norm(run):
    rare = run.metrics["batch_rare"].values.copy()
    rare[803] = 0.9
    assert "(batch: 90 % rare tokens" in readings.gradient(measured(spiked(run, 803, 300), "batch_rare", rare))


def test_activations_see_a_bad_initialisation_and_a_dead_site(run):
    values = run.metrics["activation_mean_abs"].values.copy()
    assert "initialisation" not in readings.activations(run)
    assert "Embed begins at 100 ×" in readings.activations(measured(run, "activation_mean_abs", values * 100))
    values[-1, -2] = 0
    assert "all zero at the end: ln_f" in readings.activations(measured(run, "activation_mean_abs", values))


def test_spectral_sees_growth_and_collapse(run):
    values = run.metrics["spectral_norm"].values.copy()
    assert "the weights have collapsed" in readings.spectral(measured(run, "spectral_norm", values * 0))
    flat = np.ones_like(values)
    assert "none changed by 2 × within 200 steps" in readings.spectral(measured(run, "spectral_norm", flat))
    flat[20:, 3] = 5
    assert "block.0.attn.v.weight grew 5 ×" in readings.spectral(measured(run, "spectral_norm", flat))


def test_units_see_a_dead_layer_and_a_frozen_tensor(run):
    assert readings.units(run).startswith("No FFN unit is dead")
    dead = run.metrics["dead_units"].values.copy()
    dead[:, 1] = 1
    assert "Layer 1: the layer is dead" in readings.units(measured(run, "dead_units", dead))
    update = run.metrics["update_ratio"].values.copy()
    update[:, 2] = 0
    update[:, 4] = 0.5
    text = readings.units(measured(run, "update_ratio", update))
    assert f"frozen (under 1e-06): {run.metrics['update_ratio'].labels[0][2]}" in text
    assert f"too fast (over 0.1): {run.metrics['update_ratio'].labels[0][4]}" in text


def test_classes_tell_the_irregular_tax(run):
    assert re.search(r"in validation \d\S* against \d\S*, \d\S* nats more than regular ones", readings.classes(run))


# Checks


def test_a_healthy_run_passes_every_check(run):
    assert {check.verdict for check in checks(run)} == {"pass"}, [c for c in checks(run) if c.verdict != "pass"]
    assert verdict(checks(run)) == f"{len(CHECKS)} of {len(CHECKS)} checks passed"


def test_what_is_not_there_is_not_measured():
    """No check of a run without steps or measurements passes or fails."""
    assert {check.verdict for check in checks(bare(0))} == {"not measured"}


def _with(run: RunData, **columns: float) -> RunData:
    arrays = {}
    for name, first in columns.items():
        arrays[name] = getattr(run.log, name).copy()
        arrays[name][0] = first
    return changed(run, **arrays)


def test_every_check_fails_where_it_should(run):
    """One broken run for each."""
    still, half = np.zeros_like(run.metrics["update_ratio"].values), run.log.loss.copy()
    half[100:] *= 40
    flat_val = np.full_like(run.log.val_loss, 4.0)
    fails = {
        "first loss": _with(run, loss=9.0),
        "first gradient norm": _with(run, norm=250.0),
        "learning rate": _with(run, lr=1.0),
        "optimizer": measured(run, "update_ratio", still),
        "validation follows": changed(run, val_loss=flat_val),
        "training falls": changed(run, loss=np.full(run.steps, 4.16)),
        "behind the warm-up": changed(run, loss=half),
        "memory": replace(run, results={**run.results, "peak_rss_mb": 5000.0}),
    }
    assert set(fails) == {check.name for check in checks(run)}
    for name, bad in fails.items():
        assert verdict_of(bad, name) == "fail"
        assert name in verdict(checks(bad))
    assert "over 100" in checks(fails["first gradient norm"])[1].advice
    assert "under 0.001" in checks(_with(run, norm=1e-4))[1].advice


def test_a_number_that_is_not_finite_passes_no_check(run):
    for check in checks(broken(run)):
        assert check.verdict != "pass" or check.name in ("learning rate", "memory"), check


# Pure functions


@settings(deadline=None)
@given(st.lists(st.floats(0, 10) | st.just(math.nan) | st.just(math.inf), max_size=260), st.integers(0, 3))
def test_spikes_are_those_of_the_definition(values, scale):
    """The steps that are ruled out at once are none that the definition would have found, and nothing is made up."""
    series = np.array(values) * 10.0**scale
    found = spikes(series)
    for step in range(101, len(series)):
        frozen = usual(series, step)
        over = series[step] - (frozen.mean + 3 * frozen.deviation)
        if math.isfinite(over) and abs(over) > 1e-9 * (1 + abs(series[step])):  # else rounding decides
            expected = [Spike(step, frozen.sigmas(series[step]), recovery(series, step, frozen))] if over > 0 else []
            assert repr([spike for spike in found if spike.step == step]) == repr(expected)


def test_onset_is_where_validation_turns():
    """Within a validation of its minimum; none while validation still falls, is level, or training rises too."""
    at = np.arange(50, 2001, 50.0)
    train = 3 * np.exp(-at / 300)
    turns = 2 + np.abs(at - 700) / 1000
    rng = np.random.default_rng(0)
    assert abs(overfit_onset(at, turns + rng.normal(0, 0.01, len(at)), train) - 700) <= 100
    assert overfit_onset(at, 4 - at / 1000, train) is None
    assert overfit_onset(at, np.full(len(at), 2.0), train) is None
    assert overfit_onset(at, turns, 1 + at / 1000) is None
    assert overfit_onset(at, np.full(len(at), np.nan), train) is None
    assert overfit_onset(at[:2], turns[:2], train[:2]) is None


def test_running_mean_is_that_of_the_log(run):
    loss = run.log.loss.copy()
    loss[300:310] = np.nan
    log = replace(run.log, loss=loss)
    expected = [log.mean_loss(i) for i in range(len(loss))]
    np.testing.assert_allclose(running_mean(loss, log.window), expected, rtol=1e-12)


def test_telling_lines_are_those_that_move():
    values = np.ones((50, 30))
    values[:, 7] = np.linspace(1, 9, 50)
    values[:, 21] = np.linspace(1, 1e-3, 50)
    values[:, 3] = np.nan
    assert telling(values, 2) == [7, 21]
    assert telling(values[:, :2], 5) == [0, 1]


# Terminal


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10) | st.just(math.nan), min_size=1, max_size=300), st.integers(1, 60))
def test_a_sparkline_draws_its_highest_and_lowest(values, width):
    """However many steps fall into a column; a column without a number is not drawn as one."""
    array = np.array(values)
    text = sparkline(array, width)
    assert len(text) == min(width, len(values))
    finite = array[np.isfinite(array)]
    if len(finite) and finite.max() - finite.min() > 1e-6:
        assert BLOCKS[-1] in text
    if len(finite) == 0:
        assert set(text) == {"×"}


def test_the_summary_lays_two_runs_over_each_other(run):
    """Under each line of the first run stands that of the second, and what was set otherwise is told."""
    other = healthy(seed=3, name="b")
    other = replace(other, config=other.config.model_copy(update={"optimizer": OptimizerConfig(clip=0.5)}))
    lines = summary([run, other]).splitlines()
    first = [line for line in lines if " · A " in line]
    assert len(first) > 10
    for line in first:
        name, _, _ = line.partition(" · A ")
        assert lines[lines.index(line) + 1].startswith(f"{name} · B "), line
    assert lines[lines.index("settings that differ, A to B:") + 1].strip() == "optimizer.clip: 1.0 -> 0.5"
    assert "no setting differs" in summary([run, healthy(seed=3, name="b")])


def test_the_summary_fits_80_columns(run):
    """One run and two; every reading is in it, and nothing else than text."""
    for runs in [run], [run, healthy(seed=3, name="b")]:
        text = summary(runs)
        assert max(map(len, text.splitlines())) <= 80
        assert "\033" not in text
        words = " ".join(text.split())
        assert all(words.count(f"{n} {panel.title}") == 1 for n, panel in enumerate(panels(runs), 1))
        assert readings.learning_rate(run) in words
    assert dashboards.HOSTILE not in text
