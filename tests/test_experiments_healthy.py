"""The experiment on a healthy run: its figures are those of the log and the metrics, and every sign can fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_experiments import Stop, page, stored

from minitrain.config import Config, differing_keys, load_config
from minitrain.errors import ConfigError
from minitrain.experiments import healthy, preset, runner
from minitrain.experiments.runner import Made
from minitrain.metrics import read_metrics
from minitrain.report import lines as picture
from minitrain.report.log import Log
from minitrain.schedule import lr_at
from minitrain.stability import spikes

T = 230
SMALL = [
    *("model.n_layer=2", "model.n_head=2", "model.d_model=16", "model.d_ff=16", f"scheduler.total_steps={T}"),
    *("scheduler.warmup_steps=15", "training.batch_size=4", "training.val_every=60", "training.checkpoint_every=100"),
    *("record.moments=keyframes", "metrics.every=7", "metrics.slow_every=20", "metrics.probe=6"),
]


@pytest.fixture(scope="module")
def made(place: Path) -> Made:
    """A small one, on the built-in corpus."""
    return runner.run("19-healthy", place / "healthy", overrides=SMALL)


def figures(made: Made) -> dict[str, Any]:
    return dict(stored(made)["panels"])


def test_the_preset_is_the_default_run():
    """Every key spelt out, metrics too."""
    settings = preset.load("19-healthy").settings
    assert differing_keys(Config(), load_config(None, settings)) == []
    assert {f"metrics.{key}" for key in Config().metrics.model_dump()} < {text.partition("=")[0] for text in settings}


def test_figures_of_the_log(made: Made):
    """Losses, rates, norms, the clip and the spikes, by hand from train_log.jsonl."""
    f, log = figures(made), Log.read(made.folder)
    config = made.folder.stored_config()
    assert f["loss"]["first"] == log.loss[0]
    assert f["loss"]["best_val_step"] == log.val_step[log.val_loss.argmin()]
    assert [s["step"] for s in f["loss"]["spikes"]] == [s.step for s in spikes(log.loss)]
    assert f["learning_rate"]["largest_difference"] == 0
    assert f["learning_rate"]["largest"] == lr_at(14, config.optimizer, config.scheduler) == config.optimizer.lr_max
    assert f["grad_norm"]["largest"] == log.norm.max() == log.norm[f["grad_norm"]["largest_step"]]
    assert f["grad_norm"]["early"] == np.median(log.norm[190:210])
    assert f["grad_norm"]["late"] is None
    assert f["grad_norm"]["clipped_pct"] == 100 * np.mean(log.norm > 1)


def test_figures_of_the_metrics(made: Made):
    """Activations, spectral norms, updates and verb classes are those of metrics.zarr at the steps that are told."""
    f, series = figures(made), read_metrics(made.folder)
    one = series["activation_mean_abs"]
    assert f["activations"]["steps"] == [0, 224]  # of 0, 500 and 2000 what there is, measured every 7 steps
    for site, values in f["activations"]["mean_abs"].items():
        assert values == one.values[[0, -1], one.labels[0].index(site)].tolist()
    fastest = f["activations"]["fastest"]
    assert fastest["growth"] == pytest.approx(np.nanmax(one.values[-1] / one.values[0]))
    spectral = series["spectral_norm"]
    for i, name in enumerate(spectral.labels[0]):
        assert f["spectral_norm"]["norm"][name] == spectral.values[[0, -1], i].tolist()
    change = f["spectral_norm"]["fastest"]
    assert change["from_step"] == 20  # the one look behind the warm-up that has another 200 steps later
    at = [spectral.steps.tolist().index(step) for step in (20, 220)]
    ratio = spectral.values[at[1]] / spectral.values[at[0]]
    assert change["ratio"] == pytest.approx(np.maximum(ratio, 1 / ratio).max())
    units = f["units_and_updates"]
    assert units["dead_pct_largest"] == 100 * series["dead_units"].values.max()
    update = series["update_ratio"]
    matrices = [update.labels[0].index(name) for name in spectral.labels[0]]
    assert units["update_ratio"] == pytest.approx(np.median(update.values[[0, -1]][:, matrices], axis=1).tolist())
    losses = series["class_loss"].values[-1]
    assert f["classes"]["last"]["step"] == T
    assert f["classes"]["last"]["tax"]["validation"]["verb form"] == pytest.approx(losses[1, 1, 0] - losses[1, 0, 0])
    assert f["classes"]["best"]["step"] == f["loss"]["best_val_step"]


def test_the_page_has_the_figures(made: Made, words: Callable[[str], int]):
    """Seven panels in words, what was otherwise than expected, and how to see them."""
    f, text, results = figures(made), page(made), stored(made)
    for panel in range(1, 8):
        assert f"- **{panel}, " in text
    assert f"largest {f['grad_norm']['largest']:.2f} (step {f['grad_norm']['largest_step']})" in text
    first, last = f["activations"]["mean_abs"]["logits"]
    assert f"`logits` {first:.2g} → {last:.2g}" in text
    assert f"{f['classes']['last']['tax']['train']['verb form']:+.2f} (verb form)" in text
    for line in results["expectations"]:
        told = f"Expected: {line['expected']}. Seen: {line['seen']}."
        assert (told in text) != line["as_expected"]
    met = sum(line["as_expected"] for line in results["expectations"])
    assert f"{met} of {len(results['expectations'])} signs as expected" in text
    assert f"minitrain dashboard {made.folder.path}" in text
    assert 200 <= words(made.folder.readme.read_text()) <= 400
    assert (made.folder.path / "healthy.png").read_bytes().startswith(b"\x89PNG")


SICK: dict[str, tuple[str, str, Any]] = {
    "first loss": ("loss", "first", 6.0),
    "overfit onset": ("loss", "overfit_onset", 10**6),
    "spikes": ("loss", "spikes", [{"step": 120, "sigmas": 9.0, "recovery": None}] * 3),
    "learning rate": ("learning_rate", "largest_difference", 1e-6),
    "no norm 30": ("grad_norm", "largest_over_median", 40.0),
    "activation grows": ("activations", "fastest", {"site": "embed", "growth": 80.0}),
    "one key": ("activations", "largest_peak", 0.99),
    "spectral norm": ("spectral_norm", "fastest", {"matrix": "embed.weight", "ratio": 2.5, "from_step": 100}),
    "dead unit": ("units_and_updates", "dead_pct_largest", 12.0),
    "updates": ("units_and_updates", "update_ratio_median", 1e-6),
    "more (validation)": ("classes", "last", {"step": 1, "tax": {"validation": {"verb form": 0.2, "sentence": -0.1}}}),
}
HEALTHY = {
    "loss": {"first": 4.2, "overfit_onset": 60, "best_val_step": 120, "spikes": [{"recovery": 3}] * 2},
    "activations": {"fastest": {"site": "embed", "growth": 8.0}},
    "spectral_norm": {"fastest": {"matrix": "embed.weight", "ratio": 1.5, "from_step": 100}},
    "units_and_updates": {"dead_pct_largest": 0.0, "update_ratio_median": 1e-3},
    "classes": {"last": {"step": 1, "tax": {"validation": {"verb form": 0.2, "sentence": 0.1}}}},
}


@pytest.mark.parametrize("sign", SICK)
def test_every_sign_can_fail(made: Made, sign: str):
    """As expected with a healthy figure, otherwise with a sick one."""
    results, config = stored(made), made.folder.stored_config()
    well = copy.deepcopy(results["panels"])
    for panel, more in HEALTHY.items():
        well[panel] |= more

    def verdict(figures: dict[str, Any]) -> bool:
        (line,) = (line for line in healthy.lines(figures, results, config) if sign in line.expected)
        return line.as_expected

    assert verdict(well)
    panel, name, value = SICK[sign]
    assert not verdict(well | {panel: well[panel] | {name: value}})


@pytest.fixture
def make(tiny: list[str]) -> Callable[..., Made]:
    """``make(*settings, …)``: one on a text of one's own."""

    def made(*settings: str, stop: Stop | None = None, **options: Any) -> Made:
        stop = stop or Stop()
        return runner.run("19-healthy", overrides=[*tiny, *settings], stop=stop, show=lambda *_: stop, **options)

    return made


def test_a_text_of_ones_own_has_no_verb_classes(make: Callable[..., Made]):
    """Nothing is said of them, nor of the prototype, whose text was another; the rest is told."""
    made = make()
    assert stored(made)["panels"]["classes"] is None
    assert "**7, verb classes**: this text has none." in page(made)
    assert not any(
        "irregular" in line["expected"] or "proto" in line["expected"] for line in stored(made)["expectations"]
    )


def test_without_metrics_there_is_nothing_to_look_into(make: Callable[..., Made]):
    """Refused before anything is written."""
    with pytest.raises(ConfigError, match=r"metrics.enabled: expected true"):
        make("metrics.enabled=false")
    assert not Path("experiments").exists()


def test_a_run_that_is_not_finite_is_a_problem(make: Callable[..., Made]):
    """It is not called healthy."""
    made = make("optimizer.lr_max=1e30", "optimizer.clip=null")
    assert made.finding
    assert made.finding.problem
    assert "panels" not in stored(made)


def test_stopped_and_gone_on_with(make: Callable[..., Made]):
    """The figures are those of a run that was not stopped."""
    whole = figures(make(out_dir=Path("whole")))
    assert make(stop=Stop(25)).finding is None
    assert figures(make(tell=lambda text: None)) == whole


@pytest.mark.parametrize("last", [[1.0, 1.0, 1.0], [1.0, 1.01, 9.0], [8.9, 9.0, 1.0], [np.nan, 1.0, 9.0]])
def test_names_of_lines_do_not_cover_each_other(last: list[float]):
    """In the panel, each at least a line's height from the next, in the order of the last values."""
    lines = {str(i): np.array([1.0, x]) for i, x in enumerate(last)}
    panel = picture.Panel("x", np.array([0.0, 1.0]), lines)
    low, high = picture.domain(panel)
    placed = picture.places(panel, low, high)
    assert 0 <= min(placed) <= max(placed) <= picture.HEIGHT
    assert np.diff(sorted(placed)).min() >= picture.LINE
