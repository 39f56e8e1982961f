"""A bundle: one step that is replayed anywhere, made of the same bytes each time, and read with suspicion."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from minitrain.errors import MinitrainError, RunError
from minitrain.replay import Replay
from minitrain.replay import bundle as bundles
from minitrain.replay.bundle import MEMBERS, open_bundle, write_bundle

Content = dict[str, bytes]


@pytest.fixture(scope="module")
def run(tmp_path_factory, record_run) -> Path:
    return record_run(tmp_path_factory.mktemp("bundled") / "run", "record.sites=digest", "model.dropout=0.2")


def bundle_of(run: Path, step: int, path: Path) -> Path:
    replay = Replay(run)
    live = replay.at(step)
    write_bundle(path, replay.source, live.state)
    return path


@pytest.fixture(scope="module")
def content(run, tmp_path_factory) -> Content:
    """The members of the bundle of step 13."""
    path = bundle_of(run, 13, tmp_path_factory.mktemp("one") / "step.tar.gz")
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def pack(path: Path, content: Content, seal: bool = True, names: list[str] | None = None) -> Path:
    """A bundle of these members; with ``seal`` the hashes in bundle.json are made to fit."""
    if seal:
        about = json.loads(content["bundle.json"])
        about["sha256"] = {n: hashlib.sha256(d).hexdigest() for n, d in content.items() if n in MEMBERS[1:]}
        content = content | {"bundle.json": json.dumps(about).encode()}
    with tarfile.open(path, "w:gz") as tar:
        for name in names or content:
            member = tarfile.TarInfo(name)
            member.size = len(content[name])
            tar.addfile(member, io.BytesIO(content[name]))
    return path


@pytest.mark.parametrize("step", [0, 13, 29])
def test_a_bundle_is_replayed_without_the_run(run, tmp_path, monkeypatch, step):
    """In another folder, without the run and its data: the same report as from the run, site by site."""
    path = bundle_of(run, step, tmp_path / "step.tar.gz")
    here = Replay(run).at(step)
    texts, expected = here.texts, here.step()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("minitrain.replay.source.prepare_data", None)
    live = Replay(path, threads=2).at(step)
    assert live.texts == texts
    assert live.batch.ids == Replay(path).at(step).batch.ids
    report = live.step()
    assert report.verified
    assert report.sites == expected.sites
    assert report.stats == expected.stats
    assert not list(Path.cwd().iterdir())
    again = Replay(path)
    assert again.at(step).step().verified
    assert again.at(step).step().verified  # the bundle's own state was not touched


def test_equal_steps_make_equal_bytes(run, tmp_path):
    """No clock, no order of a set, no owner; and a bundle of a bundle is that bundle."""
    one, two = (bundle_of(run, 5, tmp_path / name) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert bundle_of(one, 5, tmp_path / "three").read_bytes() == one.read_bytes()
    assert one.read_bytes() != bundle_of(run, 6, tmp_path / "six").read_bytes()


def test_a_bundle_has_one_step(run, tmp_path):
    """Any other is refused by name."""
    path = bundle_of(run, 13, tmp_path / "step.tar.gz")
    with pytest.raises(RunError, match=r"^step 12: expected one of the recorded steps 13 of .*step.tar.gz, got 12$"):
        Replay(path).at(12)
    live = Replay(path).at(13)
    live.step()
    for ask in (live.step, lambda: live.batch, lambda: Replay(path).source.frame(14)):
        with pytest.raises(RunError, match=r"^step 14: expected 13, the one step of .*, got 14$"):
            ask()


def test_a_changed_element_is_found(content, tmp_path):
    """State or batch changed with all hashes made to fit: the replay differs from the record, and says where."""
    state = load(content["state.safetensors"])
    state["m.ln_f.bias"].view(np.uint32)[2] ^= 1
    path = pack(tmp_path / "a", content | {"state.safetensors": save(state)})
    first = Replay(path).at(13).step().divergence
    assert (first.phase, first.site) == ("state", "m.ln_f.bias")
    batch = load(content["batch.safetensors"])
    batch["loss_mask"][0, 0] ^= True
    path = pack(tmp_path / "b", content | {"batch.safetensors": save(batch)})
    assert Replay(path).at(13).step().divergence.site == "batch"
    path = pack(tmp_path / "c", content | {"tokenizer.json": b"{}\n"})
    with pytest.raises(RunError, match="tokenizer_hash: "):
        Replay(path)


def refused(path: Path, words: str) -> None:
    with pytest.raises(MinitrainError, match=words):
        open_bundle(path)


def test_what_is_no_bundle(content, tmp_path):
    """No gzip, a cut one, no tar in it: one message."""
    whole = pack(tmp_path / "whole", content).read_bytes()
    path = tmp_path / "x"
    for data in (b"", b"run", whole[: len(whole) // 2], whole[:-6] + b"\0" * 6):
        path.write_bytes(data)
        refused(path, "expected a bundle of minitrain replay, or a run folder, got no (gzip|tar) file|one without")
    for inside in (b"x" * 700, b"\0" * 99):
        path.write_bytes(gzip.compress(inside))
        refused(path, "got (no tar file inside|one without bundle.json)")


def test_members_that_no_bundle_has(content, tmp_path):
    """A foreign name, a path, a link, a device, one twice, one missing: refused before anything is read."""
    path = tmp_path / "x"
    for name in ("evil.py", "../bundle.json", "/etc/passwd", "bundle.json/x"):
        refused(pack(path, content | {name: b"x"}), "which no bundle has")
    refused(pack(path, content, names=[*MEMBERS, "bundle.json"]), "one with 'bundle.json', which no bundle has")
    refused(pack(path, content, names=list(MEMBERS[:-1])), "one without tokenizer.json")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo("manifest.json")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        refused(path, "one with 'manifest.json', which no bundle has")


def test_a_bomb_is_not_unpacked(content, tmp_path, monkeypatch):
    """What unpacks to far more than it is, or claims a size that is not there, ends the reading early."""
    path = tmp_path / "x"
    monkeypatch.setattr(bundles, "ROOM", 1 << 16)
    path.write_bytes(gzip.compress(b"\0" * (1 << 25)))
    refused(path, "one that unpacks to more than ")
    monkeypatch.undo()
    head = tarfile.TarInfo("manifest.json")
    head.size = 1 << 40
    path.write_bytes(gzip.compress(head.tobuf(tarfile.GNU_FORMAT)))
    refused(path, "which no bundle has|no tar file inside")
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        sparse = tarfile.TarInfo("manifest.json")
        sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
        sparse.size = 1
        tar.addfile(sparse, io.BytesIO(b"x"))
    refused(path, "which no bundle has")


def test_damage_is_found_by_the_hashes(content, tmp_path):
    """A member that is not what bundle.json says."""
    for name in MEMBERS[1:]:
        refused(pack(tmp_path / "x", content | {name: content[name] + b" "}, seal=False), "with the sha256")


def edited(name: str, change: Callable[[dict], object]) -> Callable[[Content], Content]:
    """The content with a JSON member changed."""

    def edit(content: Content) -> Content:
        value = json.loads(content[name])
        change(value)
        return content | {name: json.dumps(value).encode()}

    return edit


def reframed(**fields: object) -> Callable[[Content], Content]:
    """The content with fields of the frame changed; None as a name takes one away."""
    return lambda content: (
        content | {"frame.msgpack": msgpack.packb(msgpack.unpackb(content["frame.msgpack"]) | fields)}
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edited("bundle.json", lambda b: b.update(format_version=2)), "expected minitrain-bundle 1, got 'minitrain-bu"),
        (edited("bundle.json", lambda b: b.update(format="zip")), "got 'zip' 1; use the minitrain that wrote it"),
        (edited("bundle.json", lambda b: b.update(step=12)), "expected step 12, as bundle.json says, got the frame of"),
        (lambda c: c | {"manifest.json": b"[1"}, "expected manifest.json as JSON, got "),
        (lambda c: c | {"manifest.json": b"[" * 100_000}, "expected manifest.json as JSON, got "),
        (lambda c: c | {"manifest.json": b"[]"}, "expected manifest.json as a JSON dict, got list"),
        (lambda c: c | {"samples.json": b"[]"}, "expected samples.json as 3 samples with id and text"),
        (lambda c: c | {"samples.json": b'[1, {"id": "a"}, {"id": 1, "text": "b"}]'}, "as 3 samples"),
        (lambda c: c | {"samples.json": json.dumps([1] + 3 * [{"id": "a", "text": "b"}]).encode()}, "as 3 samples"),
        (edited("manifest.json", lambda m: m.update(schema_version=9)), "expected schema_version 1, got 9"),
        (edited("manifest.json", lambda m: m.update(samples={"train": 0})), "expected the manifest of a run"),
        (edited("manifest.json", lambda m: m.update(samples=[])), "expected the manifest of a run"),
        (edited("manifest.json", lambda m: m.update(hardware="x")), "expected the manifest of a run"),
        (edited("manifest.json", lambda m: m["config"].update(extra={})), "extra"),
        (edited("manifest.json", lambda m: m["config"]["model"].update(n_layer=2**31 - 1)), "parameters of 2147483647"),
        (edited("manifest.json", lambda m: m["config"]["model"].update(d_model=2**20)), "expected param.embed.weight"),
        (
            edited("manifest.json", lambda m: m["config"]["model"].update(max_seq_len=13)),
            r"expected inputs as int32 \(",
        ),
        (edited("manifest.json", lambda m: m["config"]["training"].update(batch_size=2)), "expected inputs as int32"),
        (lambda c: c | {"state.safetensors": b"\xff" * 40}, "state.safetensors: expected safetensors, got "),
        (lambda c: c | {"batch.safetensors": save({"inputs": np.zeros((3, 12))})}, "expected inputs as int32"),
        (lambda c: c | {"state.safetensors": save({"param.embed.weight": np.zeros(3, "f4")})}, "expected param.embed"),
        (lambda c: c | {"frame.msgpack": b"\xc1"}, "expected a frame of 16 tensors, got "),
        (lambda c: c | {"frame.msgpack": b"\x81\x01"}, "expected a frame of 16 tensors, got "),
        (lambda c: c | {"frame.msgpack": msgpack.packb([1])}, "got other fields"),
        (reframed(more=1), "got other fields"),
        (reframed(digest_in=b"12345678"), "got cannot reshape"),
        (reframed(digest_in=7), "got "),
        (reframed(loss="x"), "got fields of another type"),
        (reframed(step=-1), "got fields of another type"),
        (reframed(tokens=True), "got fields of another type"),
        (reframed(chain=b"short"), "got fields of another type"),
        (reframed(rows=b"\0" * 8), "got 1 rows of 3"),
    ],
)
def test_content_that_does_not_fit(content, tmp_path, edit, words):
    """A bundle whose hashes fit but whose content does not is refused with the member and the reason."""
    refused(pack(tmp_path / "x", edit(dict(content))), words)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_byte_can_be_changed_unnoticed(content, tmp_path_factory, data):
    """One changed byte anywhere in the file: refused, or every bit of the content is what it was."""
    folder = tmp_path_factory.mktemp("flipped")
    whole = bytearray(pack(folder / "x", content).read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    (folder / "x").write_bytes(whole)
    try:
        opened = open_bundle(folder / "x")
    except RunError:
        return
    assert np.array_equal(opened.frame(13).digest_out, open_bundle(pack(folder / "y", content)).frame(13).digest_out)
    assert Replay(folder / "x").at(13).step().verified


def test_a_bundle_too_big_for_this_machine(content, tmp_path, monkeypatch):
    """What the passes would need is estimated before they are made."""
    monkeypatch.setattr("minitrain.assembly.hardware", lambda: {"ram_bytes": 1000})
    refused(pack(tmp_path / "x", content), "expected a run that fits into")
