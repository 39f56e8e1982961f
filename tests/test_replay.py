"""Any step back, bit for bit: what a replay puts back, runs again, compares and refuses."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain.errors import HookError, RunError
from minitrain.record.digests import state_digests
from minitrain.record.recorded import open_run
from minitrain.replay import Replay, fingerprint
from minitrain.replay.evidence import distance, number
from minitrain.tensors import canonical_bits, sites


def bump(tensor) -> None:
    """One bit of one element, of which a rounding leaves something."""
    tensor.reshape(-1).view(np.uint32)[3] ^= 1 << 20


def hit(tensor) -> None:
    """One element, by so much that no rounding hides it."""
    tensor.reshape(-1)[3] *= 1.5


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, record_run) -> Path:
    """Every step's moments, and digests of every site."""
    return record_run(tmp_path_factory.mktemp("healthy") / "run", "record.sites=digest", "model.dropout=0.2")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, record_run) -> Path:
    """Keyframes only."""
    return record_run(tmp_path_factory.mktemp("sparse") / "run", "record.moments=keyframes", "model.dropout=0.2")


@pytest.mark.once
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dropout=st.sampled_from([0.0, 0.3]),
    moments=st.sampled_from(["every_step", "keyframes"]),
    heard=st.sampled_from(["none", "digest"]),
    sizes=st.sampled_from([(1, 8, 12), (2, 12, 20), (1, 16, 16)]),
    tied=st.booleans(),
    threads=st.sampled_from([1, 2]),
    steps=st.lists(st.integers(0, 23), min_size=3, max_size=3),
)
def test_a_replay_equals_the_record_in_every_bit(
    tmp_path_factory, record_run, seed, dropout, moments, heard, sizes, tied, threads, steps
):
    """For any configuration, step and number of threads; and state t+1 is the one that the record has."""
    layers, width, inner = sizes
    run = record_run(
        tmp_path_factory.mktemp("any") / "run",
        *(f"training.rng_seed={seed}", f"model.dropout={dropout}", f"record.moments={moments}"),
        *(f"model.n_layer={layers}", f"model.d_model={width}", f"model.d_ff={inner}", f"record.sites={heard}"),
        *(f"model.tie_weights={str(tied).lower()}", "scheduler.total_steps=24"),
    )
    replay = Replay(run, threads=threads)
    for t in steps:
        live = replay.at(t)
        assert np.array_equal(state_digests(live.state), open_run(run).frame(t).digest_in)
        report = live.step()
        assert (report.step, report.differences, report.divergence) == (t, [], None)
        assert report.verified
        assert np.array_equal(state_digests(live.state), open_run(run).digests(t + 1))
        assert [row.site for row in report.sites] == sites(replay.source.config.model)
        update = len(report.sites) - 3 * len(live.state.params)
        told = {row.site: row.digest_match for row in report.sites}
        assert told.pop("loss") is True
        assert set(list(told.values())[: update - 1]) == {True if heard == "digest" else None}
        assert set(list(told.values())[update - 1 :]) == {True}


def test_what_stands_before_a_step(healthy, book):
    """The live state, batch, texts and random streams are those that the record has of the step."""
    run, live = open_run(healthy), Replay(healthy).at(17)
    state, batch = run.state(17), run.batch(17)
    for live_group, group in ("params", state.params), ("m", state.m), ("v", state.v):
        assert canonical_bits(getattr(live.state, live_group).flat).tobytes() == canonical_bits(group.flat).tobytes()
    assert live.state.step == 17
    assert live.batch.ids == batch.ids
    assert tuple(live.texts) == batch.texts
    assert all(text in book.read_text() for text in live.texts)
    assert np.array_equal(live.rng, run.rng(17))
    assert np.array_equal(live.batch.inputs, batch.batch.inputs)


def test_steps_follow_each_other(healthy):
    """From one state on, each `step` runs the next: to the end all are as recorded, and behind it there is none."""
    live = Replay(healthy).at(20)
    assert [(r.step, r.verified) for r in (live.step() for _ in range(10))] == [(t, True) for t in range(20, 30)]
    with pytest.raises(RunError, match=r"^step 30: expected 0 to 29, which .* has recorded, got 30"):
        live.step()


@pytest.mark.parametrize("step", [-1, 30, 2**40])
def test_a_step_that_was_not_recorded(healthy, step):
    """The message names the range."""
    with pytest.raises(RunError, match=rf"^step {step}: expected one of the recorded steps 0\.\.29 of .*, got {step}$"):
        Replay(healthy).at(step)


def test_a_replay_changes_nothing(healthy):
    """Neither a file of the run nor a global generator."""
    before = {path: path.read_bytes() for path in healthy.rglob("*") if path.is_file()}
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert Replay(healthy).at(9).step().verified
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert {path: path.read_bytes() for path in healthy.rglob("*") if path.is_file()} == before


def test_listeners_hear_the_replayed_step_only(sparse):
    """A hook hears each site once, read-only; the steps that lead from a keyframe to the state are not shown to it."""
    replay, heard = Replay(sparse), []

    def listen(site, tensor):
        heard.append((replay.hooks.step, site))
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0

    live = replay.at(13)
    with replay.hooks.listen(listen, "block.0.*"):
        assert live.step("ln_f").verified
    assert {step for step, _ in heard} == {13}
    assert [site for _, site in heard] == [s for s in sites(replay.source.config.model) if s.startswith("block.0.")]
    with pytest.raises(HookError, match="did you mean 'logits'"):
        live.step("logit")


def test_statistics_of_sites(healthy):
    """Minimum, maximum and mean |x| in the report are those of the tensors that pass."""
    replay, seen = Replay(healthy), {}
    live = replay.at(4)
    with replay.hooks.listen(lambda site, x: seen.update({site: x.astype(float)})):
        report = live.step()
    for row in report.sites:
        x = seen[row.site]
        assert (row.finite, row.min, row.max) == (True, x.min(), x.max())
        assert row.mean_abs == pytest.approx(np.abs(x).mean(), rel=4e-6)  # sums of float32, as statistics.h says


# What went wrong in the run that was recorded


@pytest.mark.parametrize("moments", ["every_step", "keyframes"])
def test_a_fault_in_the_backward_pass(tmp_path, record_run, fault, moments):
    """A gradient that was hit before the update: the replay differs at that step, and where elements are recorded, in
    that element of m.
    """
    broken = fault(13, lambda parts: hit(parts.model.grads["ln_f.bias"]), "clip")
    run = record_run(tmp_path / "run", f"record.moments={moments}", "record.sites=digest", watchers=[broken])
    replay = Replay(run)
    report = replay.at(13).step()
    assert not report.verified
    assert {d.site for d in report.differences} == {f"{kind}.ln_f.bias" for kind in ("m", "v", "param")}
    first = report.divergence
    assert (first.step, first.phase, first.site, first.tensor) == (13, "update", "m.ln_f.bias", "ln_f.bias")
    if moments == "every_step":
        assert first.index == (3,)
        assert (first.differing, first.elements) == (1, 8)
        assert first.ulps >= 1
        assert number(first.recorded) == open_run(run).moments(14)["ln_f.bias"].m[3]
    else:
        assert (first.index, first.ulps) == (None, None)
        assert int(first.recorded, 16) == report.differences[0].recorded
    matches = {row.site: row.digest_match for row in report.sites}
    assert matches["m.ln_f.bias"] is False
    assert matches["m.embed.weight"] is True
    assert matches["clip"] is True
    assert Replay(run).at(12).step().verified


def test_a_fault_in_the_forward_pass_is_found_at_its_site(tmp_path, record_run, fault):
    """With digests of the sites, the first that differs is the one behind the damage."""

    def strike(parts):
        hit(parts.model.passes(3, 12).arrays["block.0.ln1"])

    run = record_run(tmp_path / "run", "record.sites=digest", watchers=[fault(11, strike, "block.0.ln1")])
    report = Replay(run).at(11).step()
    assert report.divergence.site == "block.0.q"
    assert report.divergence.phase == "forward"
    assert report.divergence.index is None
    matches = {row.site: row.digest_match for row in report.sites}
    assert (matches["embed"], matches["block.0.ln1"], matches["block.0.q"]) == (True, True, False)


def test_a_fault_in_the_loss_has_its_bits(tmp_path, record_run, fault):
    """Without digests of sites, the loss tells first; its bits and their distance are known."""

    def strike(parts):
        hit(parts.model.passes(3, 12).arrays["logits"])

    run = record_run(tmp_path / "run", watchers=[fault(11, strike, "logits")])
    first = Replay(run).at(11).step().divergence
    assert (first.phase, first.site, first.index) == ("forward", "loss", None)
    assert number(first.recorded) == open_run(run).scalars["loss"][11]
    assert first.ulps > 0


@pytest.mark.parametrize("moments", ["every_step", "keyframes"])
@pytest.mark.parametrize("step", [8, 13])
def test_memory_that_changed_between_steps(tmp_path, record_run, fault, moments, step):
    """The step is replayed from what it read, not from what the step before had left, and is as recorded."""
    broken = fault(step, lambda parts: bump(parts.model.params["ln_f.weight"]))
    run = record_run(tmp_path / "run", f"record.moments={moments}", watchers=[broken])
    assert [(e["event"], e["step"]) for e in open_run(run).events] == [("memory_changed", step)]
    replay = Replay(run)
    for t in (step, step - 1, step + 1, 20):
        assert replay.at(t).step().verified, t
    live = replay.at(step - 1)
    assert live.step().verified
    first = live.step().divergence
    assert (first.step, first.phase, first.site) == (step, "state", "param.ln_f.weight")
    replay.source.run.folder.incident(step).unlink()
    with pytest.raises(RunError, match=rf"expected step {step}, run again from state \d+, .* param.ln_f.weight"):
        replay.at(15)


def test_a_run_that_went_nonfinite(tmp_path, record_run):
    """The step whose numbers are not finite is replayed to the same NaNs, and the table says so."""
    run = record_run(tmp_path / "run", "optimizer.lr_max=1e30", "optimizer.clip=null", "record.sites=digest")
    last = open_run(run).end - 1
    assert 0 < last < 29
    report = Replay(run).at(last).step()
    assert report.verified
    assert not all(row.finite for row in report.sites)
    assert any(np.isnan(row.mean_abs) for row in report.sites)


def test_damaged_moments_are_run_again(tmp_path, healthy):
    """Where a recorded row is damaged, the steps from the keyframe lead to the state all the same."""
    run = shutil.copytree(healthy, tmp_path / "run")
    shard = next((run / "record.zarr/m").glob("c.*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert all(Replay(run).at(t).step().verified for t in range(30))
    for name in ("keyframe_param", "keyframe_m"):  # and without a keyframe from state 0, made of the seed
        for chunk in (run / "record.zarr" / name).glob("c.*"):
            chunk.unlink()
    assert Replay(run).at(19).step().verified


def test_a_state_that_cannot_be_had(tmp_path, record_run, fault):
    """Without moments, the way to a state behind a fault leads over other bits: refused, or allowed by name."""
    broken = fault(10, lambda parts: hit(parts.model.grads["ln_f.bias"]), "clip")
    run = record_run(tmp_path / "run", "record.moments=keyframes", watchers=[broken])
    with pytest.raises(
        RunError, match=r"expected step 10, run again from state 8, to be as it was recorded, got anoth"
    ):
        Replay(run).at(12)
    assert Replay(run).at(17).step().verified


# What is not promised


def test_another_engine_is_refused(healthy, monkeypatch):
    """Another numerics version promises no bits; --allow-mismatch goes on and keeps saying so."""
    monkeypatch.setattr(fingerprint, "NUMERICS_VERSION", 2)
    with pytest.raises(RunError, match=r"numerics_version: 1 -> 2; use those of the manifest, or replay with --allow-"):
        Replay(healthy)
    replay = Replay(healthy, allow_mismatch=True)
    assert replay.mismatches == ["numerics_version: 1 -> 2"]
    assert replay.at(5).step().verified


def test_other_data_are_refused(tmp_path, record_run, book):
    """Another text is named by its hash; allowed, the first difference is the batch, whatever keyframe it came from."""
    mine = shutil.copy(book, tmp_path / "mine.txt")
    run = record_run(tmp_path / "run", f"data.train_path={mine}", "record.moments=keyframes")
    Path(mine).write_text(book.read_text().replace("cat", "cow"))
    with pytest.raises(RunError, match=r"data_manifest_hash: [0-9a-f]{12}… -> [0-9a-f]{12}…; tokenizer_hash: "):
        Replay(run)
    report = Replay(run, allow_mismatch=True).at(3).step()
    assert report.divergence.phase == "data"
    assert report.divergence.site in ("batch.rows", "batch")


def test_an_edited_configuration_is_refused(tmp_path, healthy):
    """A manifest whose config no longer has the hash that it was recorded with."""
    run = shutil.copytree(healthy, tmp_path / "run")
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"beta1": 0.9', '"beta1": 0.8'))
    with pytest.raises(RunError, match="config_hash: "):
        Replay(run)


def test_the_reference_backend_is_held_to_numpy_and_processor(tmp_path, record_run, monkeypatch):
    """Its sums are NumPy's: replayed where both are the same, refused elsewhere. The compiled kernels do not ask."""
    run = record_run(tmp_path / "run", "training.backend=reference", "scheduler.total_steps=6")
    assert Replay(run).at(5).step().verified
    monkeypatch.setattr(fingerprint, "versions", lambda: {"numpy": "9.0", "minitrain": "0", "python": "3"})
    with pytest.raises(RunError, match=r"versions\.numpy: .* -> 9\.0"):
        Replay(run)


def test_ulps():
    """Neighbours are one apart, also across zero; what is no number has no distance."""
    one = np.float32(1)
    pairs = [
        (one, np.nextafter(one, np.float32(2)), 1),
        (np.float32(-0.0), np.float32(0.0), 1),
        (one, -one, 2130706433),
    ]
    for a, b, expected in pairs:
        assert distance(a.view(np.uint32), b.view(np.uint32)) == expected
        assert distance(b.view(np.uint32), a.view(np.uint32)) == expected
    assert distance(np.float64(1.0).view(np.uint64), np.float64(1.0).view(np.uint64)) == 0
    assert distance(np.float32(np.nan).view(np.uint32), one.view(np.uint32)) is None
