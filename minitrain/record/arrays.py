"""``record.zarr``: a plain Zarr v3 group, read by any Zarr client; here is how its bytes come about and are read back.

zarr-python writes the metadata. The numbers we write ourselves: zarr-python cannot append to a shard, and half a
millisecond for each array and step would be a third of the step. There are four ways for an array to stand on disk:

* ``rows``: shards of SHARD steps, an inner chunk with its crc32c for each, appended to a hidden file until full;
* ``blocks``: chunks of BLOCK steps, written when they are full;
* ``keyframes``: a chunk for each keyframe;
* ``once``: one chunk, written with the metadata.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from minitrain.errors import RunError
from minitrain.files import write_atomic
from minitrain.record.layout import BLOCK, FILL, SHARD, ArraySpec, Layout

_CRC = struct.Struct("<I")
_MISSING = (1 << 64) - 1

Array = NDArray[Any]


def create(folder: Path, layout: Layout) -> None:
    """Write the metadata and the arrays that are known from the start; what else stands there stays."""
    write_metadata(folder, layout.metadata())
    write_chunk(folder, layout.arrays["step"], 0, np.array(layout.steps))
    write_chunk(folder, layout.arrays["keyframe_step"], 0, np.array(layout.keyframes))


def write_metadata(folder: Path, metadata: Mapping[str, bytes]) -> None:
    """Every ``zarr.json`` of a group. Raises OSError."""
    folder.mkdir(exist_ok=True)
    for path, content in metadata.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_atomic(folder / path, content)


def crc32c(data: bytes | Array) -> bytes:
    """Of bytes, or of an array in C order."""
    return _CRC.pack(google_crc32c.value(data))


def chunk_name(spec: ArraySpec, number: int) -> str:
    return ".".join(["c", str(number), *("0" for _ in spec.shape)])


def write_chunk(folder: Path, spec: ArraySpec, number: int, values: Array) -> None:
    """A whole chunk beside its name, and renamed. Raises OSError."""
    data = np.ascontiguousarray(values, spec.dtype).tobytes()
    path = folder / spec.name / chunk_name(spec, number)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(data + crc32c(data))
    os.replace(beside, path)


def read_chunk(folder: Path, spec: ArraySpec, number: int, rows: int) -> Array:
    """(rows, ...) of a chunk of ``rows`` rows. Raises RunError if it is missing, truncated or damaged."""
    path = folder / spec.name / chunk_name(spec, number)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: expected chunk {number} of {spec.name}, got: {error.strerror}; {_LOST}") from error
    return _checked(data, rows * spec.row_bytes, str(path)).view(spec.dtype).reshape(rows, *spec.shape)


_LOST = "restore the file from a copy, or replay the steps from a keyframe before it"


def _checked(data: bytes, length: int, where: str) -> Array:
    """The bytes of a chunk without its crc32c, which must be right."""
    if len(data) != length + _CRC.size:
        raise RunError(f"{where}: expected {length + _CRC.size} bytes, got {len(data)} (truncated?); {_LOST}")
    body = data[:-4]
    if crc32c(body) != data[-4:]:
        raise RunError(f"{where}: expected crc32c {data[-4:].hex()}, got {crc32c(body).hex()} (damaged); {_LOST}")
    return np.frombuffer(body, np.uint8)


class RowWriter:
    """Appends rows of a ``rows`` array. A shard in progress is hidden; a reader finds its rows all the same."""

    def __init__(self, folder: Path, spec: ArraySpec, rows: int) -> None:
        """Go on behind the first ``rows`` rows; what stands there beyond them is dropped.

        Raises RunError if there are fewer, and OSError.
        """
        self._folder, self._spec = folder, spec
        self._stride = spec.row_bytes + _CRC.size
        self.rows = rows
        for shard, path in shards(folder, spec):
            if shard < rows // SHARD and path.name.startswith("."):  # killed before it got its name
                self._finish(self._open(shard, SHARD), shard, SHARD)
            elif shard > rows // SHARD:
                path.unlink()
        shard, inside = divmod(rows, SHARD)
        closed, opened = shard_paths(folder, spec, shard)
        if closed.exists():
            os.replace(closed, opened)
        self._file = self._open(shard, inside)

    def _open(self, shard: int, rows: int) -> int:
        """The shard in progress, cut behind its first ``rows`` rows."""
        path = shard_paths(self._folder, self._spec, shard)[1]
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        size = os.fstat(file).st_size
        if size < rows * self._stride:
            os.close(file)
            raise RunError(f"{path}: expected {rows} rows of {self._stride} bytes, got {size} bytes; {_LOST}")
        os.ftruncate(file, rows * self._stride)
        os.lseek(file, 0, os.SEEK_END)
        return file

    def append(self, row: Array) -> None:
        """``row`` has the dtype of the array and is in C order. Raises OSError."""
        parts = [row.data.cast("B"), memoryview(crc32c(row))]
        while parts:
            written = os.writev(self._file, parts)
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts:  # cut by a signal, or by a disk that is about to be full
                parts[0] = parts[0][written:]
        self.rows += 1
        if self.rows % SHARD == 0:
            shard = self.rows // SHARD
            self._finish(self._file, shard - 1, SHARD)
            self._file = self._open(shard, 0)

    def _finish(self, file: int, shard: int, rows: int) -> None:
        """Write the index behind the rows and give the shard its name."""
        index = _index(self._stride, rows)
        os.write(file, index + crc32c(index))
        if hasattr(os, "posix_fadvise"):  # have it go to the disk now: the next sync would wait for all of it at once
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
        closed, opened = shard_paths(self._folder, self._spec, shard)
        os.replace(opened, closed)

    def close(self) -> None:
        """Finish the last shard, so that other programs see its rows. Raises OSError."""
        shard, rows = divmod(self.rows, SHARD)
        if rows:
            self._finish(self._file, shard, rows)
        else:
            os.close(self._file)
            shard_paths(self._folder, self._spec, shard)[1].unlink(missing_ok=True)


def _index(stride: int, rows: int) -> bytes:
    """Offset and length of each inner chunk, as the sharding codec wants them."""
    index = np.full((SHARD, 2), _MISSING, "<u8")
    index[:rows, 0] = np.arange(rows) * stride
    index[:rows, 1] = stride
    return index.tobytes()


def shard_paths(folder: Path, spec: ArraySpec, shard: int) -> tuple[Path, Path]:
    """A finished shard, and one in progress."""
    name = chunk_name(spec, shard)
    return folder / spec.name / name, folder / spec.name / f".{name}.open"


def shards(folder: Path, spec: ArraySpec) -> list[tuple[int, Path]]:
    """The chunks or shards that stand there, with their numbers; not what a kill left half written."""
    there = [p for p in (folder / spec.name).iterdir() if p.suffix != ".partial"]
    found = [(p.name.removeprefix(".").split("."), p) for p in there]
    return sorted((int(name[1]), path) for name, path in found if name[0] == "c" and name[1].isdigit())


def read_row(folder: Path, spec: ArraySpec, row: int) -> Array:
    """One row of a ``rows`` array. Raises RunError if it is missing, truncated or damaged."""
    shard, inside = divmod(row, SHARD)
    stride = spec.row_bytes + _CRC.size
    closed, opened = shard_paths(folder, spec, shard)
    for path in (closed, opened, closed):  # it may get its name while we look
        try:
            with open(path, "rb") as file:
                file.seek(inside * stride)
                data = file.read(stride)
            break
        except FileNotFoundError:
            continue
    else:
        raise RunError(f"{closed}: expected row {row} of {spec.name}, got no such file; {_LOST}")
    return _checked(data, spec.row_bytes, f"{path}, row {row}").view(spec.dtype).reshape(spec.shape)


def rows_in(shard: Path, spec: ArraySpec) -> int:
    """How many rows a finished shard has by its length; 0 where there is none."""
    size = shard.stat().st_size if shard.exists() else 0
    return max(0, size - SHARD * 16 - _CRC.size) // (spec.row_bytes + _CRC.size)


def check_index(folder: Path, spec: ArraySpec, shard: int, rows: int) -> None:
    """Raises RunError unless the index of a finished shard says where its ``rows`` rows stand."""
    path = shard_paths(folder, spec, shard)[0]
    stride = spec.row_bytes + _CRC.size
    data = path.read_bytes() if path.exists() else b""
    expected = _index(stride, rows)
    if _checked(data[rows * stride :], len(expected), f"{path}, index").tobytes() != expected:
        raise RunError(f"{path}, index: expected the places of {rows} rows, got others (damaged); {_LOST}")


class BlockWriter:
    """Collects rows of the ``blocks`` arrays and writes a chunk of each when BLOCK are there."""

    def __init__(self, folder: Path, specs: Sequence[ArraySpec], block: int) -> None:
        """Go on at the front of this block; it and later ones are dropped."""
        self._folder, self._specs, self._block = folder, specs, block
        self._rows: list[Mapping[str, Any]] = []
        for spec in specs:
            for number, path in shards(folder, spec):
                if number >= block:
                    path.unlink()

    def append(self, row: Mapping[str, Any]) -> None:
        """``row`` has a value for each array. Raises OSError."""
        self._rows.append(row)
        if len(self._rows) == BLOCK:
            self.flush()
            self._rows.clear()
            self._block += 1

    def flush(self) -> None:
        """Write what there is; the rest of the chunk is filled up. Raises OSError."""
        for spec in self._specs if self._rows else ():
            values = np.full((BLOCK, *spec.shape), FILL[np.dtype(spec.dtype).kind], spec.dtype)
            values[: len(self._rows)] = [row[spec.name] for row in self._rows]
            write_chunk(self._folder, spec, self._block, values)


def blocks(steps: int, size: int) -> Iterator[tuple[int, int]]:
    """Number and length of each block of at most ``size`` among ``steps`` steps."""
    for block in range(-(-steps // size)):
        yield block, min(size, steps - block * size)
