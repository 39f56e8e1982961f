"""`verify`: healthy runs are accused of nothing, and every fault is named, with what could not be checked behind it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from minitrain import trainer
from minitrain.errors import RunError
from minitrain.record.recorded import open_run
from minitrain.replay import verify
from minitrain.replay.segments import work_of


def bump(tensor) -> None:
    """One bit of one element: the next number."""
    tensor.reshape(-1).view(np.uint32)[3] += 1


def hit(tensor) -> None:
    """One element, by so much that no rounding hides it."""
    tensor.reshape(-1)[3] *= 1.5


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, record_run) -> Path:
    return record_run(tmp_path_factory.mktemp("healthy") / "run", "record.sites=digest")


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_accused_of_nothing(tmp_path, record_run, seed):
    """20 of 20, over both tiers, dropout, digests of sites, threads and workers; every step is checked once."""
    run = record_run(
        tmp_path / "run",
        *(f"training.rng_seed={seed}", f"training.data_seed={seed + 1}", f"training.threads={1 + seed % 2}"),
        *(f"model.dropout={0.1 * (seed % 3)}", f"record.moments={('every_step', 'keyframes')[seed // 2 % 2]}"),
        *(f"record.sites={('none', 'digest')[seed // 4 % 2]}", f"record.keyframe_every={(8, 7, 100)[seed % 3]}"),
    )
    recorded, shown = open_run(run), []
    found = verify(recorded, workers=1 + seed % 3, show=shown.append)
    assert (found.faults, found.unverified, found.steps_checked) == ([], [], 30)
    assert found.verified
    assert sum(shown) == work_of(recorded)


@pytest.mark.parametrize("moments", ["every_step", "keyframes"])
def test_a_faulty_step_is_named_and_those_behind_it_are_not(tmp_path, record_run, fault, moments):
    """One entry for the step, with the first tensor that differs; up to the next keyframe nothing is said."""
    broken = fault(10, lambda parts: hit(parts.model.grads["ln_f.bias"]), "clip")
    run = record_run(tmp_path / "run", f"record.moments={moments}", watchers=[broken])
    found = verify(open_run(run), workers=2)
    assert [(f.step, f.kind, f.tensor) for f in found.faults] == [(10, "m", "ln_f.bias")]
    assert "step 10: expected m.ln_f.bias (update) as recorded, 0x" in found.faults[0].message
    assert found.unverified == [11, 12, 13, 14, 15]
    assert found.steps_checked == 25


@pytest.mark.parametrize("step", [8, 13])
def test_memory_that_changed_is_one_fault_and_hides_nothing(tmp_path, record_run, fault, step):
    """What the step read was kept, so the steps behind it are checked too, at a keyframe and between two."""
    broken = fault(step, lambda parts: bump(parts.optimizer.v["ln_f.bias"]))
    run = record_run(tmp_path / "run", watchers=[broken])
    found = verify(open_run(run))
    assert [(f.step, f.kind, f.tensor) for f in found.faults] == [(step, "memory", "ln_f.bias")]
    assert f"step {step}: memory changed before it: v.ln_f.bias" in found.faults[0].message
    assert (found.steps_checked, found.unverified) == (30, [])
    open_run(run).folder.incident(step).unlink()
    again = verify(open_run(run))
    assert again.unverified == [*range(step, 16)]
    assert not again.verified


def test_a_run_that_did_not_begin_at_its_seed(tmp_path, record_run, monkeypatch):
    """State 0 is rebuilt from the seed: a run that began elsewhere is found, though it is consistent in itself."""
    assemble = trainer.assemble

    def altered(config, data):
        parts = assemble(config, data)
        bump(parts.model.params["embed.weight"])
        return parts

    monkeypatch.setattr(trainer, "assemble", altered)
    run = record_run(tmp_path / "run")
    found = verify(open_run(run))
    assert [(f.step, f.kind, f.tensor) for f in found.faults] == [
        (0, "keyframe", "embed.weight"),
        (0, "state", "embed.weight"),
    ]
    assert "keyframe 0: expected param.embed.weight as it is replayed" in found.faults[0].message
    assert found.unverified == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("array", "kinds"),
    [("m", {"m"}), ("v", {"v"}), ("loss", {"loss"}), ("digest_out", {"digest_out"}), ("keyframe_param", {"keyframe"})],
)
def test_a_flipped_byte_in_the_arrays_is_named(tmp_path, healthy, array, kinds):
    """The files are read too: what is damaged there is named, and the steps themselves still verify."""
    run = shutil.copytree(healthy, tmp_path / "run")
    chunk = sorted((run / "record.zarr" / array).glob("c.*"))[0]
    data = bytearray(chunk.read_bytes())
    data[5] ^= 16
    chunk.write_bytes(data)
    found = verify(open_run(run))
    assert {f.kind for f in found.faults} == kinds
    assert str(run) in found.faults[0].message
    assert (found.steps_checked, found.unverified) == (30, [])


def test_a_lost_keyframe_is_named_and_its_segment_checked_from_the_one_before(tmp_path, healthy):
    """Without the state at 16, steps 16 to 23 are reached from 8."""
    run = shutil.copytree(healthy, tmp_path / "run")
    for name in ("keyframe_param", "keyframe_m", "keyframe_v"):
        (run / "record.zarr" / name / "c.2.0").unlink()
    found = verify(open_run(run))
    assert [(f.step, f.kind) for f in found.faults] == [(16, "keyframe")]
    assert (found.steps_checked, found.unverified) == (30, [])


def test_a_fault_before_a_lost_keyframe_leaves_its_segment_unverified(tmp_path, record_run, fault):
    """Then no way leads to the segment, and it is not accused."""
    broken = fault(10, lambda parts: hit(parts.model.grads["ln_f.bias"]), "clip")
    run = record_run(tmp_path / "run", "record.moments=keyframes", watchers=[broken])
    (run / "record.zarr/keyframe_param/c.2.0").unlink()
    found = verify(open_run(run))
    assert {f.step for f in found.faults} == {10, 16}
    assert found.unverified == [*range(11, 16), *range(16, 24)]


def test_a_run_that_was_stopped(tmp_path, record_run):
    """An unfinished run is verified up to where it came; one without a step has nothing to verify."""

    class Stop:
        asked = 0

        def __call__(self) -> bool:
            self.asked += 1
            return self.asked > 14

    run = record_run(tmp_path / "run", stop=Stop())
    found = verify(open_run(run))
    assert (found.verified, found.steps_checked) == (True, 14)
    empty = record_run(tmp_path / "empty", stop=lambda: True)
    with pytest.raises(RunError, match="expected at least one recorded step, got none; there is nothing to verify"):
        verify(open_run(empty))


def test_an_interrupted_verification_ends_at_once(healthy):
    """Ctrl-C, or whatever `show` raises, ends all workers."""
    shown = []

    def show(steps: int) -> None:
        shown.append(steps)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(open_run(healthy), workers=2, show=show)
    assert len(shown) < work_of(open_run(healthy))
