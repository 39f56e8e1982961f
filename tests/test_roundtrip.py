"""The round trip of a checkpoint: it passes where the state comes back, and fails in the machine that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitrain import trainer
from minitrain.assembly import Parts
from minitrain.config import Config, load_config
from minitrain.errors import ConfigError
from minitrain.experiments import roundtrip, runner
from minitrain.experiments.runner import Made
from minitrain.rng import Purpose, Stream
from minitrain.run_folder import RunFolder
from minitrain.sections import OptimizerConfig

ALL = set(roundtrip.ASSERTIONS)
Checked = tuple[Config, Path, roundtrip.Witness]


@pytest.fixture
def make(tiny: list[str]) -> Callable[..., Made]:
    """``make(*settings)``: the experiment, tiny."""
    return lambda *settings: runner.run("18-checkpoint-roundtrip", overrides=[*tiny, *settings])


@pytest.fixture
def checked(tiny: list[str], tmp_path: Path) -> Checked:
    """A run that went through, and the checkpoint of one that was stopped before step 10."""
    config = load_config(None, [*tiny, "model.dropout=0.2"])
    through, before = roundtrip.Witness(copy_at=10), roundtrip.Witness()
    trainer.run(config, tmp_path / "whole", watchers=[through.watch])
    half = trainer.run(config, tmp_path / "half", watchers=[before.watch], stop=lambda: len(before.notes) == 10)
    assert all(roundtrip.reload(config, half.folder.checkpoint, through, 10).values())
    return config, half.folder.checkpoint, through


@pytest.mark.parametrize("steps", [2, 40])
def test_roundtrip_passes(make: Callable[..., Made], words: Callable[[str], int], steps: int):
    """Five machines, each reloaded and resumed; sizes and digests are those of the files."""
    made = make(f"scheduler.total_steps={steps}", "scheduler.warmup_steps=1")
    results = json.loads(made.folder.results.read_text())
    assert made.finding
    assert not made.finding.problem
    assert results["passed"]
    assert list(results["state_machines"]) == list(roundtrip.ASSERTIONS)
    assert all(half["passed"] for m in results["state_machines"].values() for half in m.values())
    assert (
        results["digest"]["uninterrupted"] == results["digest"]["resumed"] == made.folder.complete.read_text().strip()
    )
    assert results["bytes"]["checkpoint.safetensors"] == made.folder.checkpoint.stat().st_size
    assert results["steps_compared"] == results["different_masks"] == steps - results["stopped_at"]
    assert 0.05 < results["dropped_share"] < 0.15
    inner = RunFolder(made.folder.path / "runs" / "second")
    assert inner.require_model().read_bytes() == made.folder.require_model().read_bytes()
    assert made.folder.readme.read_text().count("pass:") == 10
    assert 200 <= words(made.folder.readme.read_text()) <= 400


def test_roundtrip_of_a_bad_resume(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch):
    """One bit of m lost on the way: the resumed run is another one, results and page say so, and it is a problem."""
    load = trainer.load_checkpoint

    def loses_a_bit(path: Path, params: Any, m: Any, v: Any, *more: Any) -> dict[str, Any]:
        about = load(path, params, m, v, *more)
        m.flat.view(np.uint32)[3] ^= 1 << 20
        return about

    monkeypatch.setattr(trainer, "load_checkpoint", loses_a_bit)
    made = make()
    assert made.finding
    machines = made.finding.results["state_machines"]
    assert made.finding.problem
    assert {name for name, m in machines.items() if not m["resume"]["passed"]} == {"parameters", "optimizer"}
    assert all(m["reload"]["passed"] for m in machines.values())
    assert "3 of 5 state machines come back to the bit; not parameters and optimizer" in made.folder.readme.read_text()
    assert made.folder.readme.read_text().count("**FAIL**") == 2


def flipped(which: int, bit: int = 0) -> Callable[..., None]:
    def sabotage(about: dict[str, Any], *buffers: Any) -> None:
        buffers[which].flat.view(np.uint32)[-1] ^= 1 << bit

    return sabotage


def streams(name: str, key: str) -> Callable[..., None]:
    def sabotage(about: dict[str, Any], *buffers: Any) -> None:
        about["streams"][name][key] += 1

    return sabotage


def step_before(about: dict[str, Any], *buffers: Any) -> None:
    about["step"] -= 1


@pytest.mark.parametrize(
    ("sabotage", "fails"),
    [
        (flipped(0), {"parameters"}),
        (flipped(1), {"optimizer"}),
        (flipped(2), {"optimizer"}),
        (streams("data", "offset"), {"data_position"}),
        (streams("data", "seed"), {"data_position"}),
        (streams("training_control", "seed"), {"training_control"}),
        (streams("training_control", "step"), {"training_control"}),
        (step_before, ALL - {"parameters"}),
    ],
)
def test_a_reload_that_is_wrong_in_one_machine_fails_in_that_one(
    checked: Checked,
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Callable[..., None],
    fails: set[str],
):
    """The lowest bit of a parameter, of m, of v; a place or a seed of a stream; the step."""
    config, checkpoint, through = checked
    load = roundtrip.load_checkpoint

    def wrong(path: Path, *buffers: Any) -> dict[str, Any]:
        about = load(path, *buffers)
        sabotage(about, *buffers)
        return about

    monkeypatch.setattr(roundtrip, "load_checkpoint", wrong)
    reloaded = roundtrip.reload(config, checkpoint, through, 10)
    assert {name for name, passed in reloaded.items() if not passed} == fails


@pytest.mark.parametrize(
    ("part", "fails"),
    [
        (lambda parts: parts.model.reseed(1), {"training_control"}),
        (lambda parts: setattr(parts.batches, "_stream", Stream(1, Purpose.SHUFFLE)), {"data_position"}),
        (lambda parts: setattr(parts.scheduler, "_optimizer", OptimizerConfig(lr_max=1e-2)), {"scheduler"}),
    ],
)
def test_a_part_that_draws_otherwise_fails(
    checked: Checked,
    monkeypatch: pytest.MonkeyPatch,
    part: Callable[[Parts], None],
    fails: set[str],
):
    """Another dropout seed, another order of the data, another schedule: what the next step draws tells it."""
    config, checkpoint, through = checked
    assemble = roundtrip.assemble

    def otherwise(*arguments: Any) -> Parts:
        parts = assemble(*arguments)
        part(parts)
        return parts

    monkeypatch.setattr(roundtrip, "assemble", otherwise)
    reloaded = roundtrip.reload(config, checkpoint, through, 10)
    assert {name for name, passed in reloaded.items() if not passed} == fails


def test_a_round_trip_that_could_check_nothing(make: Callable[..., Made]):
    """Without dropout, or of a single step, it is refused, and nothing written; a run that breaks is a problem."""
    with pytest.raises(ConfigError, match="model.dropout: expected more than 0"):
        make("model.dropout=0")
    with pytest.raises(ConfigError, match="scheduler.total_steps: expected at least 2"):
        make("scheduler.total_steps=1", "scheduler.warmup_steps=0")
    assert not Path("experiments").exists()
    made = make("optimizer.lr_max=1e30", "optimizer.clip=null")
    assert made.finding
    assert made.finding.problem
    assert "not finite: nothing was checked" in made.finding.headline
