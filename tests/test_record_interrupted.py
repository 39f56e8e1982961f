"""Killed, resumed, out of disk, out of numbers: what a record is then."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns import Campaign
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recording import SMALL, STEPS, Watch, config, contents, damages

import minitrain
from minitrain import trainer
from minitrain.assembly import assemble, prepare_data
from minitrain.errors import HookError, RunError
from minitrain.loop import watched_step
from minitrain.record import recorder
from minitrain.record.journal import JournalWriter, read_journal
from minitrain.record.layout import BLOCK, layout_of
from minitrain.run_folder import RunFolder
from minitrain.state import State
from minitrain.tensors import digest


@pytest.mark.once
@settings(max_examples=8, deadline=None)
@example(stop=63, kind="every_step", sites=False)
@example(stop=128, kind="every_step", sites=False)
@given(stop=st.integers(1, STEPS - 1), kind=st.sampled_from(["every_step", "keyframes"]), sites=st.booleans())
def test_resumed_equals_uninterrupted(place, stop, kind, sites):
    """Stopped anywhere and resumed, the record is byte for byte that of a run in one go."""
    name = f"{kind}-{sites}"
    conf = config(f"record.moments={kind}", f"record.sites={'digest' if sites else 'none'}")
    if not (place / name).exists():
        trainer.run(conf, place / name)
    shutil.rmtree(place / "half", ignore_errors=True)
    halt = Watch(stop)
    trainer.run(conf, place / "half", listeners=[halt], stop=halt)
    half = minitrain.open_run(place / "half")
    assert (half.end, half.ended) == (stop, "unfinished")
    assert damages(place / "half") == []
    trainer.run(conf, place / "half", resume=True)
    assert contents(place / "half") == contents(place / name)


SCRIPT = """
import sys
from minitrain import report, trainer
from minitrain.cli import main
report.write_curve = trainer.write_dashboard = lambda *_: None  # pictures would take longer than the training
main(sys.argv[1:])
"""


def spawn(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, "train", "--json", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begun(run: Path) -> bool:
    """Whether the journal has its first frame; one without is refused for that reason."""
    try:
        read_journal(run / "journal.msgpack")
    except RunError as error:
        return not any(text in str(error) for text in ("killed before step 0", "no such file"))
    return True


def kill_and_resume(place: Path, count: int, seed: int) -> Counter[str]:
    """Kill ``count`` runs at work; how many were where. Each is readable, undamaged, and resumed to the same bytes."""
    rng, found, uncut = np.random.default_rng(seed), Counter[str](), f"uncut-{seed}"
    sets = [word for text in (*SMALL, "scheduler.total_steps=600") for word in ("--set", text)]
    process = spawn(*sets, "--out-dir", uncut)
    wait_for(process, place / uncut / "journal.msgpack")
    begun_at = time.monotonic()
    _, error = process.communicate()
    assert process.returncode == 0, error
    expected, seconds = contents(place / uncut), time.monotonic() - begun_at
    while found.total() < count:
        shutil.rmtree(place / "cut", ignore_errors=True)
        process = spawn(*sets, "--out-dir", "cut")
        wait_for(process, place / "cut" / "journal.msgpack")
        time.sleep(rng.random() * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (place / "cut" / "COMPLETE").exists():
            continue  # it had ended: no kill
        if not begun(place / "cut"):
            found["before the first frame"] += 1
        else:
            run = minitrain.open_run(place / "cut")
            assert damages(place / "cut") == []
            if run.steps:
                run.state(run.end)
            hundred = run.end // 100 * 100
            found["behind the last step" if run.end == 600 else f"in steps {hundred} to {hundred + 99}"] += 1
        process = spawn(*sets, "--out-dir", "cut", "--resume")
        _, error = process.communicate()
        assert process.returncode == 0, error
        assert contents(place / "cut") == expected, f"kill {found.total()}"
    return found


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    """Until the file is there, or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)


@pytest.mark.once
def test_killed_at_random_instants(place):
    """kill -9: the reader opens what is there, all of it verifies, and resuming completes it to the same bytes."""
    kill_and_resume(place, 6, seed=7)


@pytest.mark.long
@pytest.mark.parametrize("half", [1, 2])
def test_killed_at_many_random_instants(place, half):
    """The same, two hundred times."""
    campaign = Campaign(f"kill -9 at a random instant, then resume ({half} of 2)")
    found = kill_and_resume(place, 100, seed=half)
    rows = [(where, count, count) for where, count in sorted(found.items())]
    header = ("where it was killed", "kills", "record readable, undamaged, and resumed to the same bytes")
    campaign.tell(header, *rows, ("all", found.total(), found.total()))


def test_resume_needs_the_record(place, whole):
    """A journal that is too short for the checkpoint, or other settings of the record, are refused with what to do."""
    halt = Watch(100)
    trainer.run(config(), place / "short", listeners=[halt], stop=halt)
    with pytest.raises(RunError, match=r"expected the settings of record that the run began with"):
        trainer.run(config("record.moments=keyframes"), place / "short", resume=True)
    journal = read_journal(place / "short" / "journal.msgpack")
    os.truncate(place / "short" / "journal.msgpack", journal.end_of(20)[0])
    with pytest.raises(RunError, match=r"every step before 100, where the checkpoint stands, got only those before 20"):
        trainer.run(config(), place / "short", resume=True)
    (place / "short" / "checkpoint.safetensors").unlink()
    (place / "short" / "train_log.jsonl").unlink()
    trainer.run(config(), place / "short", resume=True)
    assert contents(place / "short") == contents(whole[0])


def test_a_step_that_comes_out_otherwise(place, monkeypatch):
    """Steps that are done again after a kill are held against what was recorded of them before."""
    halt = Watch(100)
    trainer.run(config("training.checkpoint_every=80"), place / "again", listeners=[halt], stop=halt)
    checkpoint = place / "again" / "checkpoint.safetensors"
    journal = read_journal(place / "again" / "journal.msgpack")
    other = journal.steps[97] | {"loss": 1.0}
    # What a kill between checkpoint 80 and step 100 leaves, had the machine computed step 97 differently then.
    state = minitrain.open_run(place / "again").state(80)
    from minitrain.checkpoint import save_checkpoint
    from minitrain.config import config_hash

    save_checkpoint(checkpoint, state, config_hash=config_hash(config()), streams={})
    end, chain = journal.end_of(97)
    writer = JournalWriter(place / "again" / "journal.msgpack", keep=end, chain=chain)
    for body in (other, *journal.steps[98:]):
        writer.append(body)
    writer.close()
    outcome = trainer.run(config("training.checkpoint_every=80"), place / "again", resume=True)
    assert outcome.results["alerts"][-1].startswith("step 97 has other bits than it had before the run was resumed")


# What goes wrong while it runs


class FullDisk:
    """After ``calls`` writes of rows or frames there is no space left."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        write, pwritev = os.write, os.pwritev
        patch.setattr("minitrain.record.appending.os.pwritev", lambda *a: self(pwritev, *a))
        patch.setattr("minitrain.record.journal.os.write", lambda *a: self(write, *a))

    def __call__(self, function: Any, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 50, 97, 111])
def test_full_disk_stops_and_resumes(place, whole, calls):
    """Training stops with one message; with room again it is resumed to the same bytes."""
    shutil.rmtree(place / "full", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, calls)
        with pytest.raises((RunError, OSError), match="No space left on device"):
            trainer.run(config(), place / "full")
    trainer.run(config(), place / "full", resume=True)
    assert contents(place / "full") == contents(whole[0])


def test_full_disk_goes_on_without(place, whole):
    """With record.on_error: continue the run ends with the same bits, and an alert that says from where on not."""
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, 70)
        outcome = trainer.run(config("record.on_error=continue"), place / "without")
    assert outcome.digest == digest(*whole[1].states[STEPS])
    assert outcome.results["alerts"][0].startswith("not recorded from step ")
    run = minitrain.open_run(place / "without")
    assert 50 < run.end < STEPS
    assert run.state(run.end).params.flat.tobytes() == whole[1].states[run.end][0].tobytes()


class CutShort:
    """The disk fills up in the middle of the write of this number, of rows or of frames. Then somebody makes room."""

    def __init__(self, patch: pytest.MonkeyPatch, what: str, number: int) -> None:
        self.left = number
        self.write = {"rows": os.pwritev, "frames": os.write}[what]
        module, name = {"rows": ("appending", "pwritev"), "frames": ("journal", "write")}[what]
        patch.setattr(f"minitrain.record.{module}.os.{name}", self)

    def __call__(self, file: int, data: Any, *at: int) -> int:
        self.left -= 1
        if self.left > 0 or self.left < -1:
            return self.write(file, data, *at)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole = b"".join(data) if isinstance(data, list) else bytes(data)
        half = whole[: int(0.6 * len(whole))]
        return self.write(file, [half], *at) if isinstance(data, list) else self.write(file, half)


@pytest.mark.parametrize(("what", "number"), [("rows", 5), ("rows", 6), ("rows", 33), ("rows", 34), ("frames", 17)])
def test_a_disk_that_fills_up_in_the_middle_of_a_write(place, whole, what, number):
    """Steps are committed whole or not at all: what stands is undamaged, and resumed it becomes the same bytes."""
    for name in ("full", "without"):
        shutil.rmtree(place / name, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        CutShort(patch, what, number)
        outcome = trainer.run(config("record.on_error=continue"), place / "without")
    assert outcome.digest == digest(*whole[1].states[STEPS])
    assert 0 < minitrain.open_run(place / "without").end < STEPS
    assert damages(place / "without") == []
    with pytest.MonkeyPatch.context() as patch:
        CutShort(patch, what, number)
        with pytest.raises((RunError, OSError), match="No space left on device"):
            trainer.run(config(), place / "full")
    assert damages(place / "full") == []
    trainer.run(config(), place / "full", resume=True)
    assert contents(place / "full") == contents(whole[0])


def test_full_blocks_come_before_the_next_frame(place, monkeypatch):
    """Wherever a kill strikes, only the last block can be missing: the frame behind a full one waits for it."""

    def fail(self: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("minitrain.record.arrays.BlockWriter.flush", fail)
    with pytest.raises((RunError, OSError), match="Input/output error"):
        trainer.run(
            config("scheduler.total_steps=530", "training.checkpoint_every=401", "metrics.enabled=false"),
            place / "blocks",
        )
    assert read_journal(place / "blocks" / "journal.msgpack").end == BLOCK
    assert damages(place / "blocks") == []


def test_a_disk_slower_than_training(place, whole, monkeypatch):
    """Where the backlog fills up, rows are left to the page cache, as long as that lasts; the bytes are the same."""
    asked: list[bool] = []
    steps = recorder.RecordWriter.steps

    def slow(self: Any, told: Any, hurry: bool) -> list[int]:
        asked.append(hurry)
        time.sleep(0 if hurry else 0.03)
        return steps(self, told, hurry)

    monkeypatch.setattr(recorder, "BACKLOG_STEPS", 12)
    monkeypatch.setattr(recorder.RecordWriter, "steps", slow)
    trainer.run(config(), place / "slow")
    assert set(asked) == {False, True}
    assert contents(place / "slow") == contents(whole[0])


def test_no_room_is_said_before_step_0(place, monkeypatch):
    """A record that does not fit is refused with both figures, and nothing is written."""
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(RunError, match=r"record: expected .* GB of free disk at .* for 150 steps, got 0.00 GB"):
        trainer.run(config(), place / "large")
    assert not (place / "large").exists()


def test_the_size_is_announced(place, whole):
    """About what the files then take."""
    told: list[str] = []
    trainer.run(config(), place / "told", tell=told.append)
    size = sum(len(data) for name, data in contents(place / "told").items() if not name.endswith("zarr.json"))
    assert 0.9 < layout_of(config()).disk_bytes / size < 1.3
    assert told[0].startswith("recording every step with its moments to ")


@pytest.mark.parametrize("mode", ["stop", "continue"])
def test_not_finite(place, mode):
    """Before the update that would spread it, the state as it was read is kept with gradients and activations."""
    conf = config("optimizer.lr_max=1e30", f"training.on_nonfinite={mode}")
    outcome = trainer.run(conf, place / f"nonfinite-{mode}")
    first = outcome.metrics.first_nonfinite_step
    run = minitrain.open_run(place / f"nonfinite-{mode}")
    assert run.end == (STEPS if mode == "continue" else first + 1)
    assert run.keyframes[-1] == run.end
    assert [int(path.stem) for path in run.folder.incident_files()] == [first]
    from safetensors.numpy import load_file

    kept = load_file(run.folder.incident(first))
    state = run.state(first)
    assert all(np.array_equal(kept[f"param.{name}"], t, equal_nan=True) for name, t in state.params.items())
    assert any(not np.isfinite(t).all() for name, t in kept.items() if name.startswith("grad"))
    assert "block.0.attn.probs" in kept
    if mode == "stop":  # resumed and stopped before it fails again, it is a run like any other
        halt = Watch(1)
        trainer.run(conf, run.path, resume=True, listeners=[halt], stop=halt)
        assert minitrain.open_run(run.path).ended == "unfinished"
        assert damages(run.path) == []
        trainer.run(conf, run.path, resume=True)
        run = minitrain.open_run(run.path)
    last = run.state(run.end)
    assert np.isnan(last.params.flat).any() or np.isnan(last.m.flat).any() or np.isinf(last.v.flat).any()
    assert damages(run.path) == []


def test_a_step_that_is_given_up_many_times(place):
    """A hook that raises between the update and the end of the step costs the recorder nothing that it would miss."""
    conf = config("scheduler.total_steps=3", "scheduler.warmup_steps=1")
    data = prepare_data(conf)
    parts = assemble(conf, data)
    (place / "given-up").mkdir()
    recorder_ = recorder.Recorder(RunFolder(place / "given-up"), conf, parts, {})
    start = parts.state()
    kept = State(0, start.params.copy(), start.m.copy(), start.v.copy())

    def fail(site: str, tensor: Any) -> None:
        raise ValueError("enough")

    with closing(recorder_):
        handle = parts.hooks.listen(fail, "param.lm_head.bias")
        for _ in range(2 * recorder_._backlog.size):
            with pytest.raises(HookError):
                watched_step(parts.model, parts.optimizer, parts.scheduler, parts.batches.batch_at(0), [recorder_])
            parts.put(kept)
        handle.remove()
        for step in range(3):
            watched_step(parts.model, parts.optimizer, parts.scheduler, parts.batches.batch_at(step), [recorder_])
    journal = read_journal(place / "given-up" / "journal.msgpack")
    assert [body["step"] for body in journal.steps] == [0, 1, 2]
    assert not journal.events
