"""`minitrain diff`: the first step at which two runs part, by their records; the first site, by running it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from minitrain import trainer
from minitrain.cli import main
from minitrain.errors import RunError
from minitrain.fork import fork
from minitrain.record.recorded import open_run
from minitrain.replay.diff import diff


def minitrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def make(tmp_path_factory, record_run):
    """``make(*settings)``: an opened run; the same settings give the same run."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*settings: str):
        if settings not in made:
            made[settings] = record_run(tmp_path_factory.mktemp("diff") / "run", *settings)
        return open_run(made[settings])

    return run


def injected(name: str, step: int, *more: str) -> tuple[str, ...]:
    return (f"injection.name={name}", f"injection.step={step}", *(f"injection.{key}" for key in more))


def test_equal_runs(make, tmp_path):
    """A copy is equal, over all steps; so is a run with other settings of what no bit depends on."""
    a = make()
    found = diff(a, open_run(shutil.copytree(a.path, tmp_path / "copy")))
    assert (found.equal, found.steps, found.recorded_steps) == (True, range(30), (range(30), range(30)))
    assert (found.recorded, found.first_site) == ([], None)
    found = diff(a, make("training.threads=2", "record.moments=keyframes", "record.sites=digest"))
    assert found.equal
    assert found.config == [
        "training.threads: 1 -> 2",
        'record.moments: "every_step" -> "keyframes"',
        'record.sites: "none" -> "digest"',
    ]


@pytest.mark.parametrize(
    ("settings", "step", "recorded", "site", "phase"),
    [
        (injected("scale", 13), 13, "grad_norm", "clip", "clip"),
        (injected("v_corrupt", 13), 13, "v.lm_head.bias", "v.lm_head.bias", "left"),
        (injected("bit_flip", 13, "target=m.ln_f.bias[5]"), 13, "m.ln_f.bias", "m.ln_f.bias", "left"),
        (injected("duplicate_batch", 13), 13, "batch.rows", "embed", "forward"),
        (injected("nan_activation", 13, "target=block.0.ffn.pre[1,2,3]"), 13, "loss", "block.0.ffn.pre", "forward"),
        (injected("nan_activation", 13, "target=grad:ln_f[0,1,2]"), 13, "grad_norm", "grad:ln_f", "backward"),
        (injected("lr_jump", 13), 13, "lr", "param.embed.weight", "update"),
        (("optimizer.clip=0.5",), 0, "grad_norm_clipped", "clip", "clip"),
        (("training.rng_seed=43",), 0, "rng.training_control", "param.embed.weight", "state"),
        (("training.data_seed=8",), 0, "batch.rows", "embed", "forward"),
        (("optimizer.weight_decay=0.2",), 0, "param.embed.weight", "param.embed.weight", "update"),
    ],
)
def test_where_runs_part(make, settings, step, recorded, site, phase):
    """Step, first recorded difference and first site, each way round; both are as they were recorded."""
    for a, b in ((make(), make(*settings)), (make(*settings), make())):
        found = diff(a, b)
        assert found.first_step == step
        assert found.recorded[0].site == recorded
        assert (found.first_site.site, found.first_site.phase) == (site, phase)
        assert found.reproduced == (True, True)
        assert found.sites_differing >= 1
        assert (
            len(found.config) == len([s for s in settings if not s.startswith("injection.")]) or "injec" in settings[0]
        )


def test_the_element(make):
    """Index, both values, ulps and the count are of the elements that differ."""
    found = diff(make(), make(*injected("bit_flip", 13, "target=m.ln_f.bias[5]", "bit=2"))).first_site
    assert (found.index, found.ulps, found.differing, found.elements) == ((5,), 4, 1, 8)
    m = make().moments(14).m["ln_f.bias"]
    assert found.a == m[5]
    found = diff(make(), make(*injected("nan_activation", 13, "target=block.0.ffn.pre[1,2,3]"))).first_site
    assert (found.index, found.ulps, found.differing) == ((1, 2, 3), None, 1)
    assert np.isnan(found.b)


def test_recorded_sites_are_told(make):
    """With digests of sites in both, the record alone names the first site."""
    sites = "record.sites=digest"
    found = diff(make(sites), make(sites, *injected("nan_activation", 13, "target=block.0.ffn.pre[1,2,3]")))
    assert (found.recorded[0].site, found.recorded[0].phase) == ("block.0.ffn.pre", "forward")
    assert found.first_site.site == "block.0.ffn.pre"


def test_without_moments(make):
    """Then the step is reached by running from a keyframe."""
    sparse = "record.moments=keyframes"
    found = diff(make(sparse), make(sparse, *injected("v_corrupt", 13)))
    assert (found.first_step, found.first_site.site) == (13, "v.lm_head.bias")


def test_different_lengths(make, tmp_path, record_run):
    """The steps that both have are compared."""

    class Stop:
        asked = 0

        def __call__(self) -> bool:
            self.asked += 1
            return self.asked > 14

    short = record_run(tmp_path / "short", stop=Stop())
    result = minitrain("diff", make().path, short)
    assert result.exit_code == 0
    assert f"{make().path} has steps 0 to 29, {short} steps 0 to 13: steps 0 to 13 are compared" in result.stdout
    assert "equal: 14 steps of " in result.stdout


def test_a_fault_that_does_not_repeat(make, tmp_path, record_run, fault):
    """The records differ, the replays do not: the run whose step does not reproduce is named."""

    def strike(parts) -> None:
        parts.model.grads["ln_f.bias"][3] *= 1.5

    broken = record_run(tmp_path / "broken", watchers=[fault(13, strike, "clip")])
    found = diff(make(), open_run(broken))
    assert (found.first_step, found.recorded[0].site) == (13, "m.ln_f.bias")
    assert (found.reproduced, found.first_site) == ((True, False), None)
    text = minitrain("diff", make().path, broken).stdout
    assert f"run again, step 13 of {broken} is not what it has recorded: a fault that does not repeat" in text
    assert "run again, every site is the same in both" in text


def test_memory_that_changed(make, tmp_path, record_run, fault):
    """The first difference is what the step read, with the element."""

    def strike(parts) -> None:
        parts.optimizer.v["ln_f.bias"][3] *= 2

    broken = record_run(tmp_path / "broken", watchers=[fault(13, strike)])
    found = diff(make(), open_run(broken))
    assert (found.first_step, found.recorded[0].site, found.recorded[0].phase) == (13, "v.ln_f.bias", "state")
    assert (found.first_site.site, found.first_site.phase, found.first_site.index) == ("v.ln_f.bias", "state", (3,))
    assert found.first_site.b == 2 * found.first_site.a


def test_it_cannot_be_run_again(make, monkeypatch):
    """The record still tells the step; why there is no site is said."""
    monkeypatch.setattr("minitrain.replay.fingerprint.NUMERICS_VERSION", 2)
    found = diff(make(), make(*injected("scale", 13)))
    assert (found.first_step, found.first_site, found.reproduced) == (13, None, None)
    assert "numerics_version: 1 -> 2" in found.reason
    text = minitrain("diff", make().path, make(*injected("scale", 13)).path).stdout
    assert "not run again: " in text
    assert "recorded grad_norm (clip): " in text


def test_runs_that_cannot_be_compared(make, tmp_path, record_run):
    """Other shapes, no steps, no run: one message and exit code 2."""
    a = make()
    for settings, words in (
        (("training.batch_size=4",), "training.batch_size: 3 and 4"),
        (("model.d_model=12", "model.d_ff=16"), "model.d_model: 8 and 12, model.d_ff: 12 and 16"),
    ):
        with pytest.raises(RunError, match=f"expected runs whose steps have the same arrays, got {words}; compare"):
            diff(a, make(*settings))
    empty = record_run(tmp_path / "empty", stop=lambda: True)
    result = minitrain("diff", a.path, empty)
    assert result.exit_code == 2
    assert f"{empty}: expected at least one recorded step, got none; there is nothing to compare" in result.stderr
    result = minitrain("diff", a.path, tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere: expected a run folder, got no such folder" in result.stderr


def test_what_differs_is_told(make):
    """Exit code 1: step, what was recorded, the site with its element and both values, the settings, what to type."""
    a, b = make(), make(*injected("scale", 13))
    result = minitrain("diff", a.path, b.path)
    assert result.exit_code == 1
    for words in (
        "different at step 13 (13 earlier steps are identical)",
        "recorded grad_norm (clip): ",
        "... and ",
        "run again, the first to differ is clip (clip), element [0",
        "config injections: none -> scale at step 13",
        f"next: minitrain replay {a.path} --step 13",
    ):
        assert words in result.stdout
    told = minitrain("diff", a.path, make(*injected("bit_flip", 13, "target=m.ln_f.bias[5]")).path).stdout
    assert "m.ln_f.bias (as the step leaves it, behind the update), element [5]: " in told
    assert ": 1 ulp; 1 of 8 elements differ, 1 tensors in all" in told
    told = minitrain("diff", a.path, make("training.data_seed=8").path).stdout
    assert "different at step 0 (from the first step on)" in told
    assert "recorded batch.rows (data): " in told


def test_json(make):
    """The stable keys; numbers that JSON does not have are words; environments are told."""
    a, b = make(), make(*injected("nan_activation", 13, "target=block.0.ffn.pre[1,2,3]"))
    result = minitrain("diff", a.path, b.path, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert {"equal", "first_step", "first_site"} < set(told)
    assert (told["equal"], told["first_step"], told["steps_compared"], told["steps"]) == (
        False,
        13,
        14,
        [[0, 30], [0, 14]],
    )
    assert told["first_site"]["site"] == "block.0.ffn.pre"
    assert (told["first_site"]["b"], told["first_site"]["index"]) == ("nan", [1, 2, 3])
    assert told["reproduced"] == [True, True]
    told = json.loads(minitrain("diff", a.path, a.path, "--json").stdout)
    assert (told["equal"], told["first_step"], told["first_site"]) == (True, None, None)


def test_the_environment_is_told(make, tmp_path):
    """Versions, processor and data of the two manifests."""
    copy = Path(shutil.copytree(make().path, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["hardware"]["cpu"], manifest["versions"]["numpy"] = "Abacus", "0.1"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    told = diff(make(), open_run(copy)).environment
    assert any(line.startswith("NumPy ") and line.endswith(" -> 0.1") for line in told)
    assert any(line.startswith("processor ") and line.endswith(" -> Abacus") for line in told)


def test_a_fork_and_its_parent(make, tmp_path):
    """Forked with nothing changed, the steps that both have are equal; with no step in common nothing is compared."""
    parent = make().path
    for name, first in ("fork", 9), ("late", 22):
        config, origin = fork(parent, first)
        trainer.run(config, tmp_path / name, origin=origin)
    found = diff(open_run(parent), open_run(tmp_path / "fork"))
    assert (found.equal, found.steps, found.recorded_steps[1]) == (True, range(9, 30), range(9, 30))
    changed, origin = fork(parent, 9, overrides=["optimizer.clip=0.01"])
    trainer.run(changed, tmp_path / "clipped", origin=origin)
    found = diff(open_run(parent), open_run(tmp_path / "clipped"))
    assert (found.first_step, found.reproduced) == (9, (True, True))
    assert found.first_site is not None
    assert found.first_site.site == "clip"
    early, origin = fork(parent, 0, overrides=["scheduler.total_steps=22"])
    trainer.run(early, tmp_path / "early", origin=origin)
    with pytest.raises(RunError, match=r"expected runs with steps in common, got 0\.\.21 and 22\.\.29"):
        diff(open_run(tmp_path / "early"), open_run(tmp_path / "late"))
