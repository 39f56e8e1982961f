"""How rows of m and v come to stand in their shards, whatever disk and file system do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain.errors import RunError
from minitrain.record import appending
from minitrain.record.arrays import Row, RowWriter, check_index, read_row, shard_paths, shards
from minitrain.record.layout import ALIGNED_FROM, ALIGNMENT, SHARD, ArraySpec
from minitrain.tensors import pages

SMALL, LARGE = 7, ALIGNED_FROM // 4 + 5
"""Numbers in a row: one that is small, and one that is to be written directly."""


def spec(numbers: int) -> ArraySpec:
    return ArraySpec("m", "<f4", "rows", ("step", "parameter"), (numbers,), {})


def make_rows(s: ArraySpec, values: np.ndarray) -> list[Row]:
    rows = [Row(s, pages(s.stride)) for _ in values]
    for row, numbers in zip(rows, values, strict=True):
        row.values[:] = numbers
        row.seal()
    return rows


def write(folder: Path, s: ArraySpec, values: np.ndarray, groups: list[int], cached: bool = False) -> None:
    """All of them, so many at a time, each group by a writer that goes on behind the one before."""
    (folder / s.name).mkdir(parents=True)
    done = 0
    while done < len(values):
        for size in groups:
            writer = RowWriter(folder, s, done)
            writer.append(make_rows(s, values[done : done + size]), cached)
            done = min(done + size, len(values))
            writer.close()


def require(folder: Path, s: ArraySpec, values: np.ndarray) -> None:
    """The rows are there, and nothing else."""
    for i, expected in enumerate(values):
        assert read_row(folder, s, i).tobytes() == expected.tobytes()
    for number, path in shards(folder, s):
        rows = min(SHARD, len(values) - number * SHARD)
        assert path == shard_paths(folder, s, number)[0]
        assert path.stat().st_size == rows * s.stride + 16 * SHARD + 4
        check_index(folder, s, number, rows)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 150), groups=st.lists(st.integers(1, 70), min_size=1, max_size=5), cached=st.booleans())
@pytest.mark.parametrize("numbers", [SMALL, LARGE])
def test_any_number_of_rows_in_any_groups(numbers, count, groups, cached, tmp_path_factory):
    """Rows of any size, appended in any groups, by one writer or many, are read back; the index says where they are."""
    s, folder = spec(numbers), tmp_path_factory.mktemp("rows")
    values = np.random.default_rng(count).standard_normal((count, numbers)).astype(np.float32)
    write(folder, s, values, groups, cached)
    require(folder, s, values)


@pytest.mark.parametrize("numbers", [SMALL, LARGE])
def test_any_flipped_bit_of_a_row(numbers, tmp_path):
    """In its numbers, checksum or zeros behind: the row is refused and the file named, its neighbours are read."""
    s, rng = spec(numbers), np.random.default_rng(1)
    write(tmp_path, s, rng.standard_normal((3, numbers)).astype(np.float32), [3])
    path = shard_paths(tmp_path, s, 0)[0]
    whole = path.read_bytes()
    places = {0, 4 * numbers, 4 * numbers + 3, s.stride - 1, *(int(p) for p in rng.integers(s.stride, size=20))}
    for place in places:
        data = bytearray(whole)
        data[s.stride + place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"c\.0\.0, row 1: expected (crc32c|zeros behind its crc32c)"):
            read_row(tmp_path, s, 1)
        assert read_row(tmp_path, s, 0).size == read_row(tmp_path, s, 2).size == numbers


def test_large_rows_begin_at_whole_blocks():
    """Only they: the zeros that fill them up are a twentieth at most."""
    assert spec(SMALL).stride == 4 * SMALL + 4
    for numbers in (ALIGNED_FROM // 4, LARGE, 103_744):
        s = spec(numbers)
        assert s.stride % ALIGNMENT == 0
        assert 4 * numbers + 4 <= s.stride < (4 * numbers + 4) * 1.0625


@pytest.mark.parametrize("what", ["no such blocks", "cut short", "no O_DIRECT"])
def test_disks_of_all_kinds(what, monkeypatch, tmp_path):
    """A file system that refuses direct writes, at once or at the first one, and writes cut short: the same bytes."""
    s, calls, pwritev = spec(LARGE), [], os.pwritev
    values = np.random.default_rng(0).standard_normal((10, LARGE)).astype(np.float32)

    def write_some(file, parts, at):
        calls.append(len(parts))
        if what == "no such blocks" and calls == [len(parts)]:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if what == "cut short" and len(calls) % 3 == 1:
            return os.pwrite(file, parts[0][: ALIGNMENT * len(calls)], at)
        return pwritev(file, parts, at)

    monkeypatch.setattr(appending.os, "pwritev", write_some)
    if what == "no O_DIRECT":
        monkeypatch.delattr(appending.os, "O_DIRECT", raising=False)
    write(tmp_path, s, values, [4])
    assert len(calls) > 3
    require(tmp_path, s, values)


def test_an_error_of_the_disk_is_told(monkeypatch, tmp_path):
    """What is not about direct writes reaches the caller."""
    (tmp_path / "m").mkdir()
    writer = RowWriter(tmp_path, spec(LARGE), 0)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(appending.os, "pwritev", fail)
    with pytest.raises(OSError, match="Input/output error"):
        writer.append(make_rows(spec(LARGE), np.ones((1, LARGE), np.float32)))


def test_a_shard_that_is_too_short(tmp_path):
    """Going on behind rows that are not there is refused, naming the file."""
    (tmp_path / "m").mkdir()
    with pytest.raises(RunError, match=r"\.c\.0\.0\.open: expected 3 rows of 32 bytes, got 0 bytes"):
        RowWriter(tmp_path, spec(SMALL), 3)
