"""The record: what was recorded is what happened, and it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import STEPS, config, contents, damages

import minitrain
from minitrain import trainer
from minitrain.errors import RunError
from minitrain.record.journal import JournalWriter, read_journal
from minitrain.tensors import digest


def test_the_record_is_what_happened(whole):
    """Every state, batch, scalar and stream that the reader gives is the one that the loop had, bit for bit."""
    path, watch = whole
    with minitrain.open_run(path) as run:
        assert (run.end, run.ended, run.events, run.keyframes) == (STEPS, "complete", [], [0, 32, 64, 96, 128, 150])
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
    if cut < entire.begin:
        with pytest.raises(RunError, match="got an empty one; it was killed before step 0"):
            read_journal(path)
    else:
        kept = read_journal(path)
        assert kept.steps == entire.steps[: sum(end <= cut for end in entire.ends)]
        assert kept.torn == cut - (kept.ends[-1] if kept.ends else kept.begin)
    changed = bytearray(data)
    changed[flip % len(data)] ^= 1 << bit
    path.write_bytes(changed)
    with pytest.raises(RunError, match="expected (a journal that begins|frame .* at byte)"):
        read_journal(path)


def test_a_journal_of_another_version(tmp_path):
    """It names the version that it knows, and the one that came."""
    writer = JournalWriter(tmp_path / "j")
    writer.append({"format_version": 3})
    writer.close()
    with pytest.raises(RunError, match="expected format_version 2, got 3; use the minitrain version"):
        read_journal(tmp_path / "j")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rng": b"\0" * 63}, "rng of 63 bytes, not 64"),
        ({"digest_out": b""}, "digest_out of 0 bytes"),
        ({"digest_in": b"1"}, "digest_in of 1 bytes"),
        ({"rows": b"1234567"}, "rows of 7 bytes"),
        ({"loss": "low"}, "numbers of another type"),
        ({"rng": 5}, "has no len"),
        ({"step": 4}, "step 4"),
    ],
)
def test_a_forged_journal(whole, tmp_path, change, message):
    """Frames with the right checksums and the wrong content are refused where they stand."""
    true = read_journal(whole[0] / "journal.msgpack")
    writer = JournalWriter(tmp_path / "j")
    for body in (true.header, *true.steps[:3], true.steps[3] | change):
        writer.append(body)
    writer.close()
    with pytest.raises(RunError, match=rf"j: expected step 3 before byte \d+, got .*{message}"):
        read_journal(tmp_path / "j")
