"""The record: what was recorded is what happened, it changes nothing, and damage is named, never returned."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minitrain
from minitrain import trainer
from minitrain.config import Config, load_config
from minitrain.errors import RunError
from minitrain.loop import Listener, StepStats
from minitrain.record import recorder
from minitrain.record.audit import Damage, audit
from minitrain.record.journal import JournalWriter, read_journal
from minitrain.record.layout import layout_of
from minitrain.state import State
from minitrain.tensors import digest

STEPS = 150
SMALL = [
    *("model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.d_ff=32"),
    *("training.batch_size=4", "training.val_every=60", "training.checkpoint_every=40"),
    *(f"scheduler.total_steps={STEPS}", "scheduler.warmup_steps=10", "record.keyframe_every=32"),
]
"""More than two shards, a last keyframe out of turn, checkpoints out of step with both."""


def config(*more: str) -> Config:
    return load_config(None, [*SMALL, *more])


class Watch(Listener):
    """Copies of every state, and the stop at a step."""

    def __init__(self, stop_at: int = 10**9) -> None:
        self.stop_at = stop_at
        self.states: dict[int, tuple[np.ndarray, ...]] = {}
        self.stats: dict[int, StepStats] = {}
        self.batches: dict[int, Any] = {}

    def starting(self, step: int, batch: Any, state: State) -> None:
        self.batches[step] = batch
        self.states.setdefault(step, tuple(g.flat.copy() for g in (state.params, state.m, state.v)))

    def stepped(self, stats: StepStats, state: State) -> None:
        self.stats[stats.step] = stats
        self.states[state.step] = tuple(g.flat.copy() for g in (state.params, state.m, state.v))

    def __call__(self) -> bool:
        return len(self.stats) >= self.stop_at


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the corpus; no pictures are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("record")
        patch.chdir(folder)
        patch.setattr(trainer.report, "write_curve", lambda *_: None)
        patch.setattr(trainer.report, "write_page", lambda *_: None)
        yield folder


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, Watch]:
    """A run of SMALL, never touched, and what was seen while it ran."""
    watch = Watch()
    trainer.run(config(), place / "whole", listeners=[watch])
    return place / "whole", watch


@pytest.fixture
def copy(whole: tuple[Path, Watch], tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the record."""
    files = [run / "journal.msgpack", *(p for p in (run / "record.zarr").rglob("*") if p.is_file())]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}


def damages(run: Path) -> list[Damage]:
    return [found for found in audit(minitrain.open_run(run)) if isinstance(found, Damage)]


# What is recorded


def test_the_record_is_what_happened(whole):
    """Every state, batch, scalar and stream that the reader gives is the one that the loop had, bit for bit."""
    path, watch = whole
    with minitrain.open_run(path) as run:
        assert (run.steps, run.ended, run.events, run.keyframes) == (STEPS, "complete", [], [0, 32, 64, 96, 128, 150])
        for t, (params, m, v) in watch.states.items():
            state = run.state(t)
            for got, expected in ((state.params, params), (state.m, m), (state.v, v)):
                assert got.flat.tobytes() == expected.tobytes()
        for t, stats in watch.stats.items():
            frame, batch = run.frame(t), run.batch(t)
            assert (frame.loss, frame.lr, frame.grad_norm) == (stats.loss, stats.lr, stats.grad_norm)
            assert (frame.grad_norm_clipped, frame.tokens) == (stats.grad_norm_clipped, stats.tokens)
            assert batch.ids == watch.batches[t].ids
            assert np.array_equal(batch.batch.inputs, watch.batches[t].inputs)
            assert all(text for text in batch.texts)
            assert run.rng(t)[0].tolist() == [42, 2, t, 0]
            assert run.rng(t)[1].tolist()[:2] == [7, 3]
            assert np.array_equal(frame.digest_in, run.digests(t))
        assert run.moments(100)["lm_head.bias"].v.shape == (64,)
        assert run.scalars["loss"].tolist() == [s.loss for s in watch.stats.values()]
        assert set(run.scalars) == {"step", "loss", "lr", "grad_norm", "grad_norm_clipped", "loss_scale", "tokens"}
    assert damages(path) == []


@pytest.mark.parametrize("kind", ["record.enabled=false", "record.moments=keyframes", "record.sites=digest"])
def test_recording_changes_no_bit(whole, place, kind):
    """The trained bits are the same without a recorder, and with one of either tier or with all sites."""
    outcome = trainer.run(config(kind), place / kind)
    assert outcome.digest == digest(*whole[1].states[STEPS])
    if "enabled" not in kind:
        assert damages(place / kind) == []


def test_equal_runs_have_equal_records(whole, place):
    """Byte for byte: no clock, no path, no order of threads in it."""
    trainer.run(config("training.threads=2"), place / "twin")
    assert contents(place / "twin") == contents(whole[0])


def test_keyframes_only(place, whole):
    """Without every step's moments a keyframe is read, and any other state is refused with the way to get it."""
    trainer.run(config("record.moments=keyframes"), place / "sparse")
    run = minitrain.open_run(place / "sparse")
    assert run.state(64).m.flat.tobytes() == whole[1].states[64][1].tobytes()
    with pytest.raises(RunError, match=r"state 65: expected a keyframe .* got keyframes; minitrain.replay.Replay"):
        run.state(65)
    with pytest.raises(RunError, match="state 65"):
        run.moments(65)


def test_out_of_range(whole):
    """Steps are 0..T-1, states 0..T; beyond is a message with the range."""
    run = minitrain.open_run(whole[0])
    for read, t, last in ((run.frame, STEPS, STEPS - 1), (run.batch, -1, STEPS - 1), (run.params, STEPS + 1, STEPS)):
        with pytest.raises(RunError, match=rf"expected 0 to {last}, which .* has recorded, got {t}"):
            read(t)


def test_other_readers(whole):
    """zarr-python, xarray and tensorstore read the same m and v; xarray shows names, a step axis and units."""
    import zarr

    path, watch = whole
    store = str(path / "record.zarr")
    group = zarr.open_group(store, mode="r")
    m = np.stack([watch.states[t + 1][1] for t in range(STEPS)])
    v = np.stack([watch.states[t + 1][2] for t in range(STEPS)])
    assert group["m"][:].tobytes() == m.tobytes()
    assert group["v"][:].tobytes() == v.tobytes()
    assert group["loss"][:].tolist() == [s.loss for s in watch.stats.values()]
    assert group["keyframe_param"][-1].tobytes() == watch.states[STEPS][0].tobytes()
    xarray = pytest.importorskip("xarray")
    data = xarray.open_zarr(store, consolidated=False)
    assert data.m.dims == ("step", "parameter")
    assert data.step.values.tolist() == list(range(STEPS))
    assert data.loss.attrs["units"] == "nat"
    assert data.v.sel(step=70).values.tobytes() == v[70].tobytes()
    tensorstore = pytest.importorskip("tensorstore")
    for name, expected in (("m", m), ("v", v)):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store}/{name}/"}}
        assert tensorstore.open(spec).result().read().result().tobytes() == expected.tobytes()


# The journal


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 10**6), flip=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_journal_cut_or_changed(whole, tmp_path_factory, cut, flip, bit):
    """Cut anywhere, the whole frames before are read and the rest is called torn; a changed bit is refused."""
    data = (whole[0] / "journal.msgpack").read_bytes()
    path = tmp_path_factory.mktemp("journal") / "journal.msgpack"
    entire = read_journal(whole[0] / "journal.msgpack")
    cut %= len(data)
    path.write_bytes(data[:cut])
    if cut < entire.start:
        with pytest.raises(RunError, match="got an empty one; it was killed before step 0"):
            read_journal(path)
    else:
        kept = read_journal(path)
        assert kept.steps == entire.steps[: sum(end <= cut for end in entire.ends)]
        assert kept.torn == cut - (kept.ends[-1] if kept.ends else kept.start)
    changed = bytearray(data)
    changed[flip % len(data)] ^= 1 << bit
    path.write_bytes(changed)
    with pytest.raises(RunError, match="expected (a journal that begins|frame .* at byte)"):
        read_journal(path)


def test_a_journal_of_another_version(tmp_path):
    """It names the version that it knows, and the one that came."""
    writer = JournalWriter(tmp_path / "j")
    writer.append({"format_version": 2})
    writer.close()
    with pytest.raises(RunError, match="expected format_version 1, got 2; use the minitrain version"):
        read_journal(tmp_path / "j")


# Damage


def flips(copy: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [p for p in contents(copy) if Path(p).name.startswith("c.") or p == "journal.msgpack"]
    weights = np.array([(copy / p).stat().st_size for p in parts], float)
    for number in range(count):
        # half of the flips by size, half by file: else the small arrays would never be hit
        name = rng.choice(parts, p=weights / weights.sum() if number % 2 else None)
        path = copy / name
        before = path.read_bytes()
        at, bit = int(rng.integers(len(before))), 1 << int(rng.integers(8))
        path.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
        if name == "journal.msgpack":
            with pytest.raises(RunError, match="journal"):
                minitrain.open_run(copy)
        else:
            array = Path(name).parent.name
            found = damages(copy)
            assert {f"keyframe_{d.array}" if d.array == "x" else d.array for d in found} <= {array, "keyframe"}, name
            assert any(str(path.parent) in d.message for d in found), (name, at)
        path.write_bytes(before)
    assert damages(copy) == []


def test_flipped_bits(copy):
    """One flipped bit anywhere in a shard, a chunk or the journal is found and its file named."""
    flips(copy, 20, seed=1)


@pytest.mark.long
def test_a_thousand_flipped_bits(copy):
    """The same, a thousand times."""
    flips(copy, 1000, seed=2)


def test_damaged_rows_are_never_returned(copy):
    """A row with a flipped bit, and every state that would follow from it, is refused by its file; others are read."""
    path = copy / "record.zarr" / "m" / "c.1.0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 % 1000 + 5 * (16 * 4)] ^= 4
    path.write_bytes(data)
    run = minitrain.open_run(copy)
    bad = damages(copy)
    assert [d.array for d in bad] == ["m"]
    with pytest.raises(RunError, match=rf"m/c.1.0, row {bad[0].step}: expected crc32c .* \(damaged\)"):
        run.moments(bad[0].step + 1)
    with pytest.raises(RunError, match="damaged"):
        run.params(95)
    run.state(64)
    run.state(128)


@pytest.mark.parametrize("kind", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["m/c.1.0", "loss/c.0", "keyframe_v/c.2.0", "step/c.0"])
def test_missing_and_truncated_chunks(copy, kind, name):
    """Both are told with the name of the file."""
    path = copy / "record.zarr" / name
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    found = damages(copy)
    assert found
    assert all(name.partition("/")[0] in d.message or d.array == "keyframe" for d in found)


def test_folders_that_are_no_record(copy, tmp_path):
    """Each refusal says what was expected."""
    with pytest.raises(RunError, match=r"expected a run folder, got no such folder"):
        minitrain.open_run(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError, match=r"expected a run folder, got no manifest.json in it"):
        minitrain.open_run(tmp_path / "other")
    manifest = json.loads((copy / "manifest.json").read_text())

    def told(**changes: Any) -> str:
        (copy / "manifest.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(RunError) as caught:
            minitrain.open_run(copy)
        return str(caught.value)

    assert "expected the journal of the run that" in told(data_manifest_hash="0" * 64)
    assert "expected 151 steps" in told(outcome=manifest["outcome"] | {"steps": 151})
    off = manifest["config"] | {"record": manifest["config"]["record"] | {"enabled": False}}
    assert "got one with record.enabled: false" in told(config=off)
    assert "expected schema_version" in told(schema_version=99)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "journal.msgpack").unlink()
    assert "the run was not recorded, or its journal is lost" in told()


def test_other_data(copy, tmp_path, monkeypatch):
    """A batch is refused where the data are not those of the run."""
    monkeypatch.chdir(tmp_path)
    rows = Path("data/processed/train.jsonl")
    trainer.prepare_data(config())
    text = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(text[1:]))
    (rows.parent / "MANIFEST.json").unlink()
    with pytest.raises(RunError, match="expected the data that .* was trained on"):
        minitrain.open_run(copy).batch(3)


# Interruption


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
    assert (half.steps, half.ended) == (stop, "unfinished")
    assert damages(place / "half") == []
    trainer.run(conf, place / "half", resume=True)
    assert contents(place / "half") == contents(place / name)


SCRIPT = """
import sys
from minitrain import report
from minitrain.cli import main
report.write_curve = lambda *_: None  # the picture would take longer than the training
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


def kill_and_resume(place: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sets = [word for text in (*SMALL, "scheduler.total_steps=600") for word in ("--set", text)]
    process = spawn(*sets, "--out-dir", "uncut")
    _, error = process.communicate()
    assert process.returncode == 0, error
    expected, seconds = contents(place / "uncut"), 0.0
    for number in range(count):
        shutil.rmtree(place / "cut", ignore_errors=True)
        process, killed = spawn(*sets, "--out-dir", "cut"), False
        started = time.monotonic()
        while not (place / "cut" / "journal.msgpack").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * (seconds or 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed = True
        process.communicate()
        if killed and (place / "cut" / "manifest.json").exists() and not (place / "cut" / "COMPLETE").exists():
            if begun(place / "cut"):
                run = minitrain.open_run(place / "cut")
                assert damages(place / "cut") == []
                if run.steps:
                    run.state(run.steps)
            process = spawn(*sets, "--out-dir", "cut", "--resume")
            _, error = process.communicate()
            assert process.returncode == 0, error
        seconds = max(seconds, (time.monotonic() - started) / 2)
        if (place / "cut" / "manifest.json").exists():  # else it was killed before there was a run
            assert contents(place / "cut") == expected, f"kill {number}"


def test_killed_at_random_instants(place, repository):
    """kill -9: the reader opens what is there, all of it verifies, and resuming completes it to the same bytes.

    Once in the sources is enough: an installed wheel is the same code.
    """
    kill_and_resume(place, 10, seed=int.from_bytes(os.urandom(4)))


@pytest.mark.long
def test_killed_at_many_random_instants(place):
    """The same, two hundred times."""
    kill_and_resume(place, 200, seed=3)


def test_resume_needs_the_record(place, whole):
    """A journal that is too short for the checkpoint, or other settings of the record, are refused with what to do."""
    halt = Watch(100)
    trainer.run(config(), place / "short", listeners=[halt], stop=halt)
    with pytest.raises(RunError, match=r"expected the settings of record that the run began with"):
        trainer.run(config("record.moments=keyframes"), place / "short", resume=True)
    journal = read_journal(place / "short" / "journal.msgpack")
    os.truncate(place / "short" / "journal.msgpack", journal.end_of(20)[0])
    with pytest.raises(RunError, match=r"expected every step before 100, where the checkpoint stands, got only 20"):
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
        write, writev = os.write, os.writev
        patch.setattr("minitrain.record.arrays.os.writev", lambda *a: self(writev, *a))
        patch.setattr("minitrain.record.journal.os.write", lambda *a: self(write, *a))

    def __call__(self, function: Any, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 100, 241, 300])
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
        FullDisk(patch, 200)
        outcome = trainer.run(config("record.on_error=continue"), place / "without")
    assert outcome.digest == digest(*whole[1].states[STEPS])
    assert outcome.results["alerts"][0].startswith("not recorded from step ")
    run = minitrain.open_run(place / "without")
    assert 50 < run.steps < STEPS
    assert run.state(run.steps).params.flat.tobytes() == whole[1].states[run.steps][0].tobytes()


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


class Flips(Listener):
    """Changes memory after step 70 was recorded."""

    def stepped(self, stats: StepStats, state: State) -> None:
        if stats.step == 70:
            state.m["lm_head.bias"][3] += 1


def test_memory_that_changes_between_steps(place, whole):
    """The step after says so before it begins: an event, the state as it then was, and an alert."""
    outcome = trainer.run(config(), place / "flipped", listeners=[Flips()])
    run = minitrain.open_run(place / "flipped")
    assert run.events == [{"event": "memory_changed", "step": 71, "tensors": ["m.lm_head.bias"]}]
    assert not np.array_equal(run.frame(71).digest_in, run.frame(70).digest_out)
    assert run.moments(71).m.flat.tobytes() == whole[1].states[71][1].tobytes()  # as step 70 left it
    assert outcome.results["alerts"] == ["memory changed before step 71: m.lm_head.bias"]
    from safetensors import safe_open

    with safe_open(run.folder.incident(71), framework="numpy") as file:
        changed = file.get_tensor("m.lm_head.bias") - run.moments(71)["lm_head.bias"].m
        assert np.nonzero(changed)[0].tolist() == [3]
    assert damages(place / "flipped") == []


@pytest.mark.parametrize("mode", ["stop", "continue"])
def test_not_finite(place, mode):
    """Before the update that would spread it, the state as it was read is kept with gradients and activations."""
    conf = config("optimizer.lr_max=1e30", f"training.on_nonfinite={mode}")
    outcome = trainer.run(conf, place / f"nonfinite-{mode}")
    first = outcome.metrics.first_nonfinite_step
    run = minitrain.open_run(place / f"nonfinite-{mode}")
    assert run.steps == (STEPS if mode == "continue" else first + 1)
    assert run.keyframes[-1] == run.steps
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
    last = run.state(run.steps)
    assert np.isnan(last.params.flat).any() or np.isnan(last.m.flat).any() or np.isinf(last.v.flat).any()
    assert damages(run.path) == []
