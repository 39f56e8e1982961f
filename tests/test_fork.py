"""Runs that begin with a state of another: the parent again where nothing is changed, and runs like any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import Watch, contents, damages

from minitrain import open_run, trainer
from minitrain.cli import main
from minitrain.config import load_config, to_yaml
from minitrain.errors import ConfigError, RunError
from minitrain.fork import fork
from minitrain.record.journal import JournalWriter, read_journal
from minitrain.replay import Replay, verify
from minitrain.replay.origin import parent_of, recorded_state
from minitrain.run_folder import RunFolder

TIERS = ("every_step", "keyframes")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, record_run: Any) -> Path:
    """Where a parent of each tier stands, of 30 steps with keyframes every 8, with dropout."""
    folder = tmp_path_factory.mktemp("fork")
    for tier in TIERS:
        record_run(folder / tier, f"record.moments={tier}", "record.sites=digest", "model.dropout=0.2")
    return folder


@pytest.fixture(autouse=True)
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is drawn, which would take longer than all the rest."""
    monkeypatch.setattr(trainer.report, "write_curve", lambda *_: None)


def forked(parent: Path, step: int, folder: Path, *changes: str, **how: Any) -> Path:
    """A fork of ``parent`` in ``folder``."""
    config, origin = fork(parent, step, None, changes)
    trainer.run(config, folder, origin=origin, **how)
    return folder


def minitrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def log(run: Path) -> list[dict[str, Any]]:
    """The log without what a clock has to do with."""
    return [{k: x for k, x in line.items() if k != "tokens_per_s"} for line in RunFolder(run).log_lines()]


def same(a: Any, b: Any) -> bool:
    return bool(np.asarray(a).tobytes() == np.asarray(b).tobytes())


# The parent again


@pytest.mark.once
@settings(max_examples=12, deadline=None)
@given(
    step=st.integers(0, 29), parent_tier=st.sampled_from(TIERS), tier=st.sampled_from(TIERS), threads=st.integers(1, 3)
)
def test_nothing_changed_is_the_parent_again(home, tmp_path_factory, step, parent_tier, tier, threads):
    """From N on states, digests, frames, rows, log and outcome are the parent's, whatever no bit depends on."""
    folder = forked(
        home / parent_tier,
        step,
        tmp_path_factory.mktemp("f") / "f",
        f"record.moments={tier}",
        f"training.threads={threads}",
    )
    a, b = open_run(home / parent_tier), open_run(folder)
    assert (b.start, b.end, b.steps) == (step, 30, range(step, 30))
    assert b.keyframes == [step, *(k for k in (8, 16, 24) if k > step), 30]
    for t in b.steps:
        there, here = a.frame(t), b.frame(t)
        assert all(same(getattr(there, k), getattr(here, k)) for k in there._fields if k != "chain"), t
        assert same(a.rng(t), b.rng(t))
        assert a.batch(t).ids == b.batch(t).ids
    for t in range(step, 31) if parent_tier == tier == "every_step" else b.keyframes[1:]:
        assert a.state(t).digest() == b.state(t).digest()
    there, here = ([{**line, "metrics": None} for line in log(run)] for run in (home / parent_tier, folder))
    assert [line for line in there if line["step"] >= max(step, 1)] == [line for line in here if line["step"] > 0]
    assert a.manifest["outcome"]["digest"] == b.manifest["outcome"]["digest"]
    assert b.parent is not None
    assert {k: b.parent[k] for k in ("run", "step", "config_hash")} == {
        "run": str(home / parent_tier),
        "step": step,
        "config_hash": a.manifest["config_hash"],
    }
    found = verify(b, workers=1)
    assert found.verified
    assert found.steps_checked == 30 - step
    assert found.first is not None
    assert found.first.held
    assert damages(folder) == []


@pytest.mark.parametrize("step", [8, 13])
def test_the_arrays_say_which_step_a_row_is(home, tmp_path, step):
    """Row r is step N + r in every array, by its coordinate; rows of m and v are those of the parent, N rows on."""
    folder = forked(home / "every_step", step, tmp_path / "f")
    there, here = (zarr.open_group(run / "record.zarr", mode="r") for run in (home / "every_step", folder))
    assert here["step"][:].tolist() == list(range(step, 30))
    assert here["keyframe_step"][:].tolist() == open_run(folder).keyframes
    for name in ("m", "v", "loss", "digest_in", "digest_out", "batch_ids", "rng", "site_digest"):
        assert same(there[name][step:], here[name][:]), name
    assert open_run(folder).scalars["step"].tolist() == list(range(step, 30))
    assert read_journal(folder / "journal.msgpack").header["start"] == step


def test_a_fork_of_a_fork_is_the_parent_too(home, tmp_path):
    """Forked twice with nothing changed; its parent is the fork, which does not have what was before."""
    middle = forked(home / "every_step", 9, tmp_path / "middle")
    last = forked(middle, 21, tmp_path / "last")
    assert open_run(last).state(30).digest() == open_run(home / "every_step").state(30).digest()
    assert verify(open_run(last)).first == (True, False, f"state 21 is that of {middle}")
    with pytest.raises(RunError, match=r"--step 5: expected one of the states 9 to 30, .* forked at state 9 from "):
        fork(middle, 5)


# Something changed


def test_a_changed_setting_changes_what_follows(home, tmp_path):
    """Step N reads the parent's state; what it makes of it is another. Manifest, page, info and replay tell of it."""
    folder = forked(home / "every_step", 10, tmp_path / "f", "optimizer.clip=0.01")
    a, b = open_run(home / "every_step"), open_run(folder)
    assert same(a.frame(10).digest_in, b.frame(10).digest_in)
    assert a.frame(10).loss == b.frame(10).loss
    assert a.frame(10).grad_norm_clipped > b.frame(10).grad_norm_clipped == pytest.approx(0.01)
    assert not same(a.frame(10).digest_out, b.frame(10).digest_out)
    assert b.parent is not None
    assert b.parent["settings"] == ["optimizer.clip: 1.0 -> 0.01"]
    page = (folder / "README.md").read_text()
    assert "## Forked" in page
    assert f"`{home / 'every_step'}`" in page
    assert "optimizer.clip: 1.0 -> 0.01" in page
    assert "20 steps of its own" in " ".join(page.split())
    assert f"--from {home / 'every_step'} --step 10" in page
    text = minitrain("info", folder).stdout
    assert f"from {home / 'every_step'} at state 10 with optimizer.clip: 1.0 -> 0.01" in text
    assert json.loads(minitrain("info", folder, "--json").stdout)["parent"] == b.parent
    assert verify(b).verified
    live = Replay(b).at(13)
    assert live.step().verified
    assert live.state.digest() == b.state(14).digest()
    bundle = tmp_path / "step.tar.gz"
    assert minitrain("replay", folder, "--step", 12, "--bundle", bundle).exit_code == 0
    assert minitrain("replay", bundle).exit_code == 0


def test_seed_and_batches_may_change(home, tmp_path):
    """Even at state 0, which then is the parent's and not that of the new seed: resumed, replayed and verified so."""
    changes = ("training.rng_seed=5", "training.data_seed=6", "training.batch_size=5", "optimizer.beta2=0.9")
    halt = Watch(3)
    folder = forked(home / "keyframes", 0, tmp_path / "f", *changes, listeners=[halt], stop=halt)
    config = load_config(folder / "config.yaml")
    trainer.run(config, folder, resume=True)
    run = open_run(folder)
    assert run.state(0).digest() == open_run(home / "keyframes").state(0).digest()
    assert verify(run).verified
    assert Replay(run).at(7).step().verified


def test_a_run_that_is_done_can_go_on(home, tmp_path):
    """From the last state, with more steps; of an unfinished run from what it has."""
    folder = forked(home / "every_step", 30, tmp_path / "f", "scheduler.total_steps=40")
    assert open_run(folder).steps == range(30, 40)
    assert verify(open_run(folder)).verified
    halt = Watch(5)
    half = forked(home / "every_step", 12, tmp_path / "half", "record.moments=keyframes", listeners=[halt], stop=halt)
    shutil.rmtree(half / "incidents", ignore_errors=True)
    again = forked(half, 17, tmp_path / "again")
    assert open_run(again).state(30).digest() == open_run(home / "every_step").state(30).digest()


def test_a_fork_that_ends_early_has_arrays_of_its_length(home, tmp_path):
    """Not finite at its third step or so: the rows it has, the last keyframe, and a verdict."""
    folder = forked(home / "every_step", 20, tmp_path / "f", "optimizer.lr_max=1e38", "optimizer.clip=null")
    run = open_run(folder)
    assert run.ended == "nonfinite"
    assert 20 < run.end < 30
    assert run.keyframes == [20, *([24] if run.end > 24 else []), run.end]
    assert zarr.open_group(folder / "record.zarr", mode="r")["step"][:].tolist() == list(run.steps)
    assert verify(run).verified
    assert damages(folder) == []
    assert f"--step {run.end - 1}" in (folder / "README.md").read_text()


def test_without_a_record(home, tmp_path):
    """With the recorder off it is the same run, resumable, with its log from N on; and no parent of another."""
    folder, halt = tmp_path / "f", Watch(4)
    forked(home / "every_step", 13, folder, "record.enabled=false", listeners=[halt], stop=halt)
    assert min(line["step"] for line in log(folder)) == 13
    trainer.run(load_config(folder / "config.yaml"), folder, resume=True)
    told = RunFolder(folder).read_manifest()
    assert told["outcome"]["digest"] == open_run(home / "every_step").manifest["outcome"]["digest"]
    assert json.loads(minitrain("info", folder, "--json").stdout)["parent"]["step"] == 13
    refused(minitrain("train", "--from", folder, "--step", 20), "expected a recorded run, got one with record.enabled")


@pytest.mark.parametrize(("name", "factor"), [("v_corrupt", 100), ("decay_huge", 50)])
def test_injections_come_along(record_run, tmp_path, name, factor):
    """One at N or later strikes again, a setting that began before N goes on; what is past is past."""
    parent = record_run(tmp_path / "parent", f"injection={name}", "injection_step=14", f"injection.factor={factor}")
    a = open_run(parent)
    for step in (10, 14, 15):
        run = open_run(forked(parent, step, tmp_path / f"f{step}"))
        assert run.state(30).digest() == a.state(30).digest()
        assert [event["step"] for event in run.events] == [14] * (step <= 14)
        assert verify(run).verified


def test_injections_may_be_others_or_none(home, record_run, tmp_path):
    """Those that are given take the place of the parent's; none gives what should have happened."""
    parent = record_run(tmp_path / "parent", "injection=scale", "injection_step=14", "model.dropout=0.2")
    healed = open_run(forked(parent, 10, tmp_path / "healed", "injection=none"))
    assert healed.state(30).digest() == open_run(home / "every_step").state(30).digest()
    assert healed.parent is not None
    assert healed.parent["settings"] == ["injections: scale at step 14 -> none"]
    other = open_run(forked(parent, 10, tmp_path / "other", "injection=m_corrupt", "injection_step=12"))
    assert [(event["name"], event["step"]) for event in other.events] == [("m_corrupt", 12)]
    assert "injections: none -> m_corrupt at step 12" in (tmp_path / "other" / "README.md").read_text()
    with pytest.raises(ConfigError, match="expected steps from 10 on, where the run begins, got m_corrupt at 9"):
        fork(parent, 10, None, ["injection=m_corrupt", "injection_step=9"])


# Killed and resumed


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_resumed_equals_uninterrupted(home, tmp_path, stop):
    """Stopped after any of its steps, the record is byte for byte that of a fork in one go."""
    whole = forked(home / "keyframes", 11, tmp_path / "whole", "optimizer.clip=0.5")
    halt = Watch(stop)
    half = forked(home / "keyframes", 11, tmp_path / "half", "optimizer.clip=0.5", listeners=[halt], stop=halt)
    trainer.run(load_config(half / "config.yaml"), half, resume=True)
    assert contents(half) == contents(whole)
    assert log(half) == log(whole)


def test_killed_before_its_first_step(home, tmp_path):
    """Its checkpoint stands before its manifest: it can go on from there, or not having got so far be made anew."""
    whole = forked(home / "every_step", 11, tmp_path / "whole")
    killed = tmp_path / "killed"
    halt = Watch(0)
    forked(home / "every_step", 11, killed, listeners=[halt], stop=halt)
    for name in ("record.zarr", "metrics.zarr", "models"):
        shutil.rmtree(killed / name, ignore_errors=True)
    for name in ("journal.msgpack", "train_log.jsonl"):
        (killed / name).unlink()
    config = load_config(killed / "config.yaml")
    early = shutil.copytree(killed, tmp_path / "early")
    trainer.run(config, killed, resume=True)
    assert contents(killed) == contents(whole)
    (early / "manifest.json").unlink()
    trainer.run(config, early)  # no fork: what the other has left does not count
    assert open_run(early).start == 0
    assert not RunFolder(early).read_manifest().get("parent")


def test_a_lost_checkpoint_is_told(home, tmp_path):
    """A fork cannot begin again from the seed: the message has the command that makes it anew."""
    halt = Watch(2)
    folder = forked(home / "every_step", 11, tmp_path / "f", listeners=[halt], stop=halt)
    again = f"fork it again: minitrain train --from {home / 'every_step'} --step 11 --config {folder}/config.yaml"
    (folder / "checkpoint.safetensors").write_bytes(b"no")
    refused(minitrain("train", "--resume", "--out-dir", folder), "expected a readable checkpoint", again)
    refused(minitrain("info", folder), "expected a readable checkpoint", again)
    (folder / "checkpoint.safetensors").unlink()
    refused(minitrain("train", "--resume", "--out-dir", folder), "from which the forked run goes on", again)


# Where the state comes from


def test_damage_at_the_state_is_gone_round(home, tmp_path):
    """A row that is damaged is not needed where an earlier state and the steps behind it lead there too."""
    parent = shutil.copytree(home / "every_step", tmp_path / "parent")
    shard = next((parent / "record.zarr" / "m").glob("c.0*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 64 * 12 + 100 : len(data) // 64 * 12 + 2000] = bytes(1900)
    shard.write_bytes(data)
    assert damages(parent)
    for t in range(10, 20):
        assert recorded_state(open_run(parent), t).digest() == open_run(home / "every_step").state(t).digest()


def test_memory_that_changed_is_the_state_that_was_read(record_run, fault, tmp_path):
    """State N is what step N read. Where that is lost, what had been left is not taken for it."""

    def strike(parts: Any) -> None:
        parts.model.params["ln_f.bias"][2] += 1

    for tier in TIERS:
        parent = record_run(tmp_path / tier, f"record.moments={tier}", watchers=[fault(13, strike)])
        folder = forked(parent, 13, tmp_path / f"f-{tier}")
        assert open_run(folder).state(30).digest() == open_run(parent).state(30).digest()
        assert verify(open_run(folder)).verified
        shutil.rmtree(parent / "incidents")
        with pytest.raises(RunError, match="expected state 13 as step 13 read it, got only what the step before had"):
            fork(parent, 13)


def test_a_step_that_does_not_verify_leads_nowhere(record_run, fault, tmp_path):
    """Between keyframes without moments a state has to be run again, which a faulty step does not allow."""
    strike = fault(13, lambda parts: parts.model.grads.flat.__imul__(-1), "clip")
    parent = record_run(tmp_path / "parent", "record.moments=keyframes", watchers=[strike])
    with pytest.raises(RunError, match="expected step 13, run again from state 8, to be as it was recorded, got anoth"):
        fork(parent, 15)
    assert open_run(forked(parent, 16, tmp_path / "f")).state(30).digest() == open_run(parent).state(30).digest()


# What a fork does not have


def test_what_was_before_is_refused_and_the_parent_named(home, tmp_path):
    """States and steps before N, by every way to ask for them."""
    folder = forked(home / "every_step", 13, tmp_path / "f")
    run = open_run(folder)
    elsewhere = rf"got 12; it was forked at state 13 from {home / 'every_step'}, which has what was before$"
    for ask in (run.frame, run.rng, run.batch):
        with pytest.raises(RunError, match=rf"^step 12: expected 13 to 29, .*{elsewhere}"):
            ask(12)
    for ask in (run.params, run.moments, run.state, run.digests):
        with pytest.raises(RunError, match=rf"^state 12: expected 13 to 30, .*{elsewhere}"):
            ask(12)
    with pytest.raises(RunError, match=rf"^step 12: expected one of the recorded steps 13\.\.29 .*{elsewhere}"):
        Replay(run).at(12)
    with pytest.raises(RunError, match=r"^state 31: expected 13 to 30, which .* has recorded, got 31$"):
        run.state(31)
    refused(minitrain("replay", folder), "expected --step N, one of the recorded steps 13..29")
    refused(minitrain("replay", folder, "--step", 14, "--to", 30), "recorded steps 13..29, got 30")


def test_verify_says_what_is_known_of_the_first_state(home, tmp_path):
    """It is the parent's; or taken from the manifest where that is gone or another run; or neither, a fault."""
    parent = shutil.copytree(home / "every_step", tmp_path / "parent")
    folder = forked(parent, 13, tmp_path / "f")
    result = minitrain("verify", folder)
    assert result.exit_code == 0
    assert f"\nforked: state 13 is that of {parent}\n" in result.stdout
    told = json.loads(minitrain("verify", folder, "--json").stdout)
    assert told["first_state"] == {"held": True, "fault": False, "message": f"state 13 is that of {parent}"}
    shutil.rmtree(parent)
    trusted = f"forked: state 13 is taken as {folder}/manifest.json has it: "
    result = minitrain("verify", folder)
    assert result.exit_code == 0
    assert f"{trusted}its parent is not at hand ({parent}: expected a run" in result.stdout
    shutil.copytree(home / "keyframes", parent)
    result = minitrain("verify", folder)
    assert result.exit_code == 0
    assert f"{trusted}{parent} is another run by now" in result.stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parent"]["digest"] = "0" * 32
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = minitrain("verify", folder)
    assert result.exit_code == 1
    assert "keyframe 13: expected state 13 of" in result.stdout
    assert f"with digest {'0' * 32}, as {folder}/manifest.json says, got" in result.stdout


def test_verify_finds_another_state_than_the_parents(home, tmp_path):
    """A state that was changed on the way, whose manifest says so too, is not that of the parent."""
    config, origin = fork(home / "every_step", 13)
    origin.state.params.flat[3] += 1
    about = origin.parent | parent_of(open_run(home / "every_step"), origin.state)
    trainer.run(config, tmp_path / "f", origin=replace(origin, parent=about))
    found = verify(open_run(tmp_path / "f"))
    assert [(f.step, f.kind) for f in found.faults] == [(13, "parent")]
    assert "got other bits than are recorded there" in found.faults[0].message


@pytest.mark.parametrize("tier", TIERS)
def test_verify_without_the_first_keyframe(home, tmp_path, tier):
    """Nothing leads to its steps up to the next keyframe: they are unverified, the damage is named."""
    folder = forked(home / "every_step", 13, tmp_path / "f", f"record.moments={tier}")
    (folder / "record.zarr" / "keyframe_param" / "c.0.0").unlink()
    found = verify(open_run(folder))
    assert found.unverified == [13, 14, 15]
    assert found.steps_checked == 14
    assert any(f.kind == "keyframe" for f in found.faults)
    assert found.first is not None
    assert not found.first.held
    assert "cannot be read" in found.first.message


def test_a_record_without_a_start_begins_at_0(home, tmp_path):
    """As every record had it before there were forks."""
    old = shutil.copytree(home / "every_step", tmp_path / "old")
    journal = read_journal(old / "journal.msgpack")
    (old / "journal.msgpack").unlink()
    writer = JournalWriter(old / "journal.msgpack")
    for body in ({k: x for k, x in journal.header.items() if k != "start"}, *journal.steps):
        writer.append(body)
    writer.close()
    run = open_run(old)
    assert (run.start, run.end) == (0, 30)
    assert run.state(17).digest() == open_run(home / "every_step").state(17).digest()


def test_manifest_and_journal_must_agree_on_the_start(home, tmp_path):
    """A fork whose manifest has lost its parent, or has half of one, is refused."""
    folder = forked(home / "every_step", 13, tmp_path / "f")
    manifest = json.loads((folder / "manifest.json").read_text())
    parent = manifest.pop("parent")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="got one with another start; put the files of one run together again"):
        open_run(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"parent": {"step": parent["step"]}}))
    with pytest.raises(RunError, match="expected the manifest of a run, got KeyError: 'run'"):
        open_run(folder)


def test_the_picture_begins_where_the_fork_does(home, tmp_path, monkeypatch):
    """Steps from N on, the subtitle says from where."""
    monkeypatch.undo()
    seen = {}
    monkeypatch.setattr(
        "minitrain.report.picture.png",
        lambda layers, title, subtitle, rows: seen.update(subtitle=subtitle, rows=rows) or b"",
    )
    folder = forked(home / "every_step", 13, tmp_path / "f")
    assert f"forked from {home / 'every_step'} at state 13" in seen["subtitle"]
    assert {row["step"] for row in seen["rows"] if row["series"].startswith("train")} == set(range(13, 30))
    assert {row["step"] for row in seen["rows"] if "baseline" in row["series"]} == {13, 30}
    assert (folder / "loss_curve.png").exists()


# Bad input


def refused(result: Result, *words: str) -> None:
    """Exit code 2, one message with these words, no traceback."""
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.output


def test_bad_input_at_the_command_line(home, tmp_path, monkeypatch):
    """One message each, exit code 2, and no folder is made."""
    monkeypatch.chdir(tmp_path)
    a = home / "every_step"

    def train(*arguments: object) -> Result:
        return minitrain("train", "--out-dir", "new", *arguments)

    refused(train("--from", a), "expected --from RUN and --step N together")
    refused(train("--step", 3), "expected --from RUN and --step N together")
    refused(train("--from", a, "--step", 3, "--resume"), "expected --from or --resume, got both")
    refused(train("--from", "nowhere", "--step", 3), "nowhere: expected a run folder, got no such folder")
    for step in (-1, 31):
        refused(train("--from", a, "--step", step), f"--step {step}: expected one of the states 0 to 30, which {a}")
    refused(
        train("--from", a, "--step", 30),
        f"scheduler.total_steps: expected more than 30, since the run begins with state 30 of {a}, got 30",
        "--set scheduler.total_steps=60",
    )
    refused(train("--from", a, "--step", 9, "--set", "scheduler.total_steps=8"), "expected more than 9")
    refused(
        train("--from", a, "--step", 9, "--set", "model.d_model=16", "--set", "model.tie_weights=false"),
        f"--from {a}: expected the model of state 9, got another: model.d_model: 8 -> 16; model.tie_weights: true",
        "leave these settings out, or train a new run",
    )
    refused(train("--from", a, "--step", 9, "--set", "optimizer.clp=1"), "unknown key; did you mean 'clip'")
    refused(train("--from", a, "--step", 9, "--set", "optimizer.lr_min=1"), f"lr_max: {a}/manifest.json")
    assert not Path("new").exists()
    Path("taken").mkdir()
    Path("taken/file").touch()
    refused(minitrain("train", "--from", a, "--step", 3, "--out-dir", "taken"), "got one with other files; choose")
    refused(minitrain("train", "--from", a, "--step", 3, "--out-dir", a), "got another run (complete); choose another")


def test_text_with_another_vocabulary_is_refused(record_run, book, tmp_path):
    """Of other data a fork may read, if they have the parent's tokens; of its own it must find what was there."""
    mine = Path(shutil.copy(book, tmp_path / "mine.txt"))
    parent = record_run(tmp_path / "parent", f"data.train_path={mine}")
    copied = shutil.copy(book, tmp_path / "copied.txt")
    folder = forked(parent, 9, tmp_path / "f", f"data.train_path={copied}")
    assert open_run(folder).parent["settings"] == [f'data.train_path: "{mine}" -> "{copied}"']
    other = tmp_path / "other.txt"
    other.write_text(book.read_text().replace("cat", "owl"))
    with pytest.raises(RunError, match=r"^data.train_path .*other.txt: expected text with the vocabulary of .*parent"):
        forked(parent, 9, tmp_path / "g", f"data.train_path={other}")
    mine.write_text(other.read_text())
    with pytest.raises(RunError, match=r"^--from .*parent: expected the data that it was trained on, got other files"):
        forked(parent, 9, tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_the_command_forks(home, tmp_path, monkeypatch):
    """Settings of a file go over the parent's, those of --set and --seed over both; a folder is found by itself."""
    monkeypatch.chdir(tmp_path)
    Path("low.yaml").write_text("optimizer: {clip: 0.5}\ntraining: {data_seed: 3}\n")
    arguments = ("--from", home / "every_step", "--step", 13, "--config", "low.yaml", "--set", "optimizer.clip=0.25")
    result = minitrain("train", *arguments, "--seed", 4)
    assert result.exit_code == 0, result.output
    assert "steps 13 to 29 in " in result.stdout
    assert "-> runs/every_step-from-13" in result.stdout
    config = open_run("runs/every_step-from-13").config
    expected = ["optimizer.clip=0.25", "training.data_seed=3", "training.rng_seed=4"]
    assert config == load_config(home / "every_step" / "config.yaml", expected)
    assert to_yaml(config) == Path("runs/every_step-from-13/config.yaml").read_text()
    again = minitrain("train", *arguments, "--seed", 4, "--out-dir", "again", "--json")
    assert json.loads(again.stdout)["digest"] == open_run("runs/every_step-from-13").manifest["outcome"]["digest"]
