"""Damage to a record is found and named, and what is damaged is never returned."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns import Campaign
from recording import config, contents, damages

import minitrain
from minitrain import trainer
from minitrain.errors import RunError


def flips(copy: Path, count: int, seed: int) -> Counter[str]:
    """How many flips each part of the record got; every one was found and its file named."""
    hit: Counter[str] = Counter()
    rng = np.random.default_rng(seed)
    parts = [p for p in contents(copy) if Path(p).name.startswith("c.") or p == "journal.msgpack"]
    weights = np.array([(copy / p).stat().st_size for p in parts], float)
    for number in range(count):
        # half of the flips by size, half by file: else the small arrays would never be hit
        name = rng.choice(parts, p=weights / weights.sum() if number % 2 else None)
        path = copy / name
        hit[name.partition("/c.")[0]] += 1
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
    return hit


def test_flipped_bits(copy):
    """One flipped bit anywhere in a shard, a chunk or the journal is found and its file named."""
    flips(copy, 20, seed=1)


@pytest.mark.long
def test_a_thousand_flipped_bits(copy):
    """The same, a thousand times."""
    campaign = Campaign("One flipped bit in a record")
    hit = flips(copy, 1000, seed=2)
    rows = [(part, count, count) for part, count in sorted(hit.items())]
    campaign.tell(("where", "flips", "found, and the file named"), *rows, ("all", hit.total(), hit.total()))


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
    assert "expected the steps before 151, as " in told(outcome=manifest["outcome"] | {"steps": 151})
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
