"""Experiments that cause a fault: the two runs are one up to step K, what differs is measured, the page says that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_experiments import Stop, contents, page, stored

from minitrain.config import Config, differing_keys
from minitrain.errors import ConfigError
from minitrain.experiments import effect, expected, preset, runner
from minitrain.experiments.runner import Made
from minitrain.record.recorded import open_run
from minitrain.replay import Replay
from minitrain.report.log import Log
from minitrain.run_folder import RunFolder
from minitrain.stability import spikes, usual

K, T = 120, 160
FEW = [f"scheduler.total_steps={T}", "training.val_every=1000", "training.checkpoint_every=1000"]


@pytest.fixture
def make(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """``make(letter, *settings, variants=…, stop=…)``: a tiny 19-injection-<letter>, at step 120 of 160."""

    def made(letter: str, *settings: str, variants: Any = (), stop: Stop | None = None, **options: Any) -> Made:
        stop, whole = stop or Stop(), preset.load(f"19-injection-{letter}")
        few = preset.Preset(whole.name, whole.about, whole.kind, whole.settings, dict(variants))
        monkeypatch.setattr(runner, "load", lambda name: few)
        overrides = [*tiny, *FEW, f"injection.step={K}", *settings]
        return runner.run(whole.name, overrides=overrides, stop=stop, show=lambda *_: stop, **options)

    return made


def twin(made: Made, name: str = "baseline") -> RunFolder:
    return RunFolder(made.folder.path / "runs" / name)


def parts(made: Made) -> dict[str, dict[str, Any]]:
    return {part["part"]: part for part in stored(made)["effect"]["parts"]}


@pytest.mark.parametrize("name", [name for name in preset.names() if name.startswith("19-injection")])
def test_the_presets_are_the_default_run_with_one_fault(name: str):
    """At step 500 and seed 42, every parameter of the fault spelt out."""
    config = runner.Job(preset.load(name), [], RunFolder(Path("x")), [], lambda *_: Stop(), lambda: False).config
    (changed,) = differing_keys(Config(), config)
    assert changed.startswith("injections: none -> ")
    (one,) = config.injections
    assert (one.step, config.training.rng_seed) == (500, 42)


def test_v_corrupt(make: Callable[..., Made], words: Callable[[str], int]):
    """Before K and in K all is the same, v of one tensor excepted; the page has the figures of the records."""
    made = make("C")
    results, e = stored(made), stored(made)["effect"]
    a, b = open_run(made.folder.path), open_run(twin(made).path)
    assert differing_keys(b.config, a.config) == [
        "injections: none -> v_corrupt at step 120",
        'record.moments: "keyframes" -> "every_step"',
    ]
    assert [event["step"] for event in a.events if event["event"] == "injection"] == [K]
    assert not b.events
    assert e["before"] == {"first_difference": K, "same_bits": True}
    for part in e["parts"]:
        assert part["different"] == (part["part"] == "v")
    assert parts(made)["v"]["names"] == ["v.lm_head.bias"]
    assert parts(made)["v"]["exact"]
    assert results["expectations"][1]["as_expected"]
    # the trace against states that are had otherwise
    for n in (1, 7):
        x, y = (Replay(run).at(K + n).state.params.flat.copy() for run in (a, b))
        assert e["trace"]["distance"][n - 1] == np.linalg.norm(x.astype(np.float64) - y)
    v = [run.at(K + 3).state.v["lm_head.bias"].mean(dtype=np.float64) for run in (Replay(a), Replay(b))]
    assert e["trace"]["v"][2] == pytest.approx(v[0] / v[1], rel=1e-12)
    assert e["trace"]["v"][0] == pytest.approx(100, rel=1e-6)
    assert len(e["trace"]["update"]) == T - K
    assert [d["state"] for d in e["distance"]] == [128, T]
    log, without = Log.read(made.folder), Log.read(twin(made))
    sigma = usual(without.loss, K)
    assert e["loss"]["peak_sigmas"] == max(sigma.sigmas(x) for x in log.loss[K : K + 51])
    assert e["plateau_sigmas"] == pytest.approx((log.loss - without.loss)[K + 1 : K + 31].mean() / sigma.deviation)
    text = page(made)
    assert f"minitrain replay {made.folder.path} --step {K}" in text
    assert "`v.lm_head.bias` × 100, to the bit | as expected" in text
    assert f"highest loss {e['loss']['peak_sigmas']:.2f} σ" in text
    assert 200 <= words(made.folder.readme.read_text()) <= 400
    assert (made.folder.path / "injection.png").read_bytes().startswith(b"\x89PNG")
    assert made.finding
    assert not made.finding.problem


def test_scale_and_its_other_settings(make: Callable[..., Made]):
    """The norm is 50 times the twin's; without a clip every gradient is, to the bit; each setting has its own twin."""
    made = make("A", "optimizer.clip=0.01", variants={"no-clip": ("optimizer.clip=null",)})
    results, e = stored(made), stored(made)["effect"]
    assert e["norm_ratio"] == pytest.approx(50, rel=1e-5)
    assert e["clipped_at_step"] == pytest.approx(0.01)
    found = parts(made)
    assert [found[name]["different"] for name in ("batch", "forward", "backward")] == [0, 0, 0]
    assert not found["clipped gradient"]["exact"]
    low, high = found["clipped gradient"]["ratio"]
    assert 1 - 1e-5 < low <= high < 1 + 1e-5
    (variant,) = results["variants"]
    assert (variant["name"], variant["set"]) == ("no-clip", ["optimizer.clip=null"])
    free = {part["part"]: part for part in variant["effect"]["parts"]}
    assert free["clipped gradient"]["exact"]
    assert free["clipped gradient"]["different"] == free["clipped gradient"]["arrays"]
    pair = [twin(made, name).stored_config() for name in ("no-clip-baseline", "no-clip")]
    assert differing_keys(*pair) == ["injections: none -> scale at step 120"]
    assert pair[0].optimizer.clip is None
    text = page(made)
    assert "| `optimizer.clip=null` | 50.00 |" in text
    assert "the clip of 0.01, which divides any factor out again" in text
    assert ("A spike shows with `optimizer.clip=null`." in text) == bool(variant["effect"]["spikes"])


def test_bad_batch(make: Callable[..., Made]):
    """The batch is another, and with it everything behind; spikes are those of the definition, not the twin's own."""
    made = make("B")
    e, found = stored(made)["effect"], parts(made)
    assert found["batch"]["different"] == 2
    assert all(part["different"] for part in found.values())
    ours, theirs = ({s.step: s for s in spikes(Log.read(f).loss)} for f in (made.folder, twin(made)))
    assert [s["step"] for s in e["spikes"]] == [t for t in ours if K <= t <= K + 50 and t not in theirs]
    assert e["series"]["step"] == list(range(K - 1, min(K + 51, T)))
    assert e["series"]["loss"][0] == e["series"]["loss_baseline"][0]
    assert e["series"]["loss"][1] == e["loss"]["at_step"] != e["loss"]["baseline_at_step"]


def test_another_fault_has_no_expectations(make: Callable[..., Made]):
    """But for the steps before it; it is measured all the same."""
    made = make("B", "injection.name=lr_jump")
    results = stored(made)
    assert [line["as_expected"] for line in results["expectations"]] == [True]
    changed = [part["part"] for part in results["effect"]["parts"] if part["different"]]
    assert changed == ["param"]
    assert "`lr_jump` at step 120: 1 of 1 as expected" in page(made)


def test_a_run_that_ends_is_not_compared(make: Callable[..., Made]):
    """A parameter that is NaN ends the run, the experiment's own or that of a setting: a problem, told as such."""
    made = make("B", "injection.name=param_nan")
    assert made.finding
    assert made.finding.problem
    assert made.finding.headline == "Nothing was compared: a run ended with numbers that are not finite"
    assert "effect" not in stored(made)
    made = make("B", variants={"broken": ("injection.name=param_nan",)}, out_dir=Path("variant"))
    assert made.finding
    assert made.finding.problem
    assert "compared: under injection.name=param_nan a run ended" in made.finding.headline


@pytest.mark.once
@pytest.mark.parametrize("stopped_after", [60, 200])
def test_stopped_and_gone_on_with(make: Callable[..., Made], stopped_after: int):
    """In the run or in its twin: the same command makes what is left, with the same figures."""
    whole = make("C", out_dir=Path("whole"))
    assert make("C", stop=Stop(stopped_after)).finding is None
    rest = Stop()
    again = make("C", stop=rest)
    assert 10**9 - rest.left == 2 * T - stopped_after
    assert stored(again)["effect"] == stored(whole)["effect"]


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        (["injection.step=100"], "got 100;"),
        (["injection.step=130"], "got 130;"),
        (["injection.name=none"], "got none;"),
        (["scheduler.total_steps=150"], "119 in a run of 150 steps, .* got 120;"),
    ],
)
def test_steps_around_it_are_needed(make: Callable[..., Made], settings: list[str], got: str):
    """A hundred before, thirty behind, and one injection: told before anything is written."""
    before = contents(Path())
    with pytest.raises(ConfigError, match=f"injections: expected one, at a step from 101 to .*{got} --set injection.s"):
        make("C", *settings)
    assert contents(Path()) == before


def test_verdicts_can_fail(make: Callable[..., Made]):
    """Of every expectation there is a measurement that contradicts it."""
    made = make("C")
    config, e = made.folder.stored_config(), stored(made)["effect"]
    verdicts = [line.as_expected for line in expected.lines(e, config)]
    others = {
        0: {"before": {"first_difference": 7, "same_bits": False}},
        1: {"parts": [*e["parts"], {**parts(made)["v"], "part": "m", "names": ["m.ln_f.bias"]}]},
        2: {"spikes": [{"step": K + 1, "sigmas": 4.0, "recovery": 3}]},
        3: {"plateau_sigmas": 0.6 if e["plateau_sigmas"] < 0.5 else 0.4},
    }
    for line, change in others.items():
        changed = [x.as_expected for x in expected.lines({**e, **change}, config)]
        assert [i for i, pair in enumerate(zip(verdicts, changed, strict=True)) if pair[0] != pair[1]] == [line]


def test_band():
    """Left at the first loss too far from the twin's; back where the next twenty are near, or not at all."""
    apart = np.zeros(100)
    assert effect.band(apart, 50) == (None, None)
    apart[[10, 60, 62, 64]] = [9.0, 0.6, -0.6, 0.6]
    assert effect.band(apart, 50) == (60, 65)
    apart[80] = 0.51
    assert effect.band(apart, 50) == (60, None)


# The healthy run


def test_the_baseline(tiny: list[str]):
    """What is usual, how often the clip engages, and every spike of a run without faults, as the log has them."""
    name = "18-baseline"
    made = runner.run(name, overrides=[*tiny, *FEW, "optimizer.clip=1.5"], show=lambda *_: Stop())
    log, found = Log.read(made.folder), stored(made)["healthy"]
    assert found["usual"] == [
        {"step": T - 1, "loss": usual(log.loss, T - 1)._asdict(), "grad_norm": usual(log.norm, T - 1)._asdict()}
    ]
    assert found["clipped_pct"] == pytest.approx(100 * (log.norm > log.norm_clipped).mean())
    assert [s["step"] for s in found["spikes"]] == [s.step for s in spikes(log.loss)]
    assert open_run(made.folder.path).config.record.moments == "every_step"
    assert f"minitrain replay {made.folder.path} --step 500" in page(made)
    assert f"| {T - 1} | {found['usual'][0]['loss']['mean']:.3f} ± " in page(made)


def test_pictures_are_drawn_where_nothing_is_finite(tmp_path: Path):
    """Steps that are not finite are gaps."""
    from minitrain.report import around

    step = np.arange(60.0)
    log = Log(step, np.full(60, np.nan), step + 1, step, step, step[:0], step[:0], [])
    panels = [around.loss(log, log, "optimizer.eps=1"), around.norm(log, log, None)]
    assert around.draw(panels, 30, "scale", "title", "subtitle").startswith(b"\x89PNG")
