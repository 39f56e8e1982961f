"""``record.zarr``: a plain Zarr v3 group, read by any Zarr client; here is how its bytes come about and are read back.

zarr-python writes the metadata. The numbers we write ourselves: zarr-python cannot append to a shard, and half a
millisecond for each array and step would be a third of the step. There are four ways for an array to stand on disk:

* ``rows``: shards of SHARD steps, an inner chunk with its crc32c for each, appended to a hidden file until full;
* ``blocks``: chunks of BLOCK steps, written when they are full;
* ``keyframes``: a chunk for each keyframe;
* ``once``: one chunk, written with the metadata.
"""

from __future__ import annotations

import math
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
from minitrain.record.appending import RowFile
from minitrain.record.layout import ALIGNED_FROM, BLOCK, FILL, SHARD, ArraySpec, Layout

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


class Row:
    """A row on its way to a ``rows`` array, in memory as it will stand on disk."""

    def __init__(self, spec: ArraySpec, memory: memoryview) -> None:
        """``memory`` is zeros, ``spec.stride`` bytes, from the front of a page on if it is to be written directly."""
        self.memory = memory
        self._end = spec.row_bytes
        self.values: Array = np.frombuffer(memory, spec.dtype, math.prod(spec.shape))
        """Its numbers, flat, to be written to."""

    def seal(self) -> None:
        """Put the crc32c of the numbers behind them: the row is ready to be appended."""
        self.memory[self._end : self._end + _CRC.size] = crc32c(self.values)


class RowWriter:
    """Appends rows of a ``rows`` array. A shard in progress is hidden; a reader finds its rows all the same."""

    def __init__(self, folder: Path, spec: ArraySpec, rows: int) -> None:
        """Go on behind the first ``rows`` rows; what stands there beyond them is dropped.

        Raises RunError if there are fewer, and OSError.
        """
        self._folder, self._spec = folder, spec
        self._go_on(rows)

    def _go_on(self, rows: int) -> None:
        folder, spec = self._folder, self._spec
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

    def _open(self, shard: int, rows: int) -> RowFile:
        """The shard in progress, cut behind its first ``rows`` rows."""
        path = shard_paths(self._folder, self._spec, shard)[1]
        size = path.stat().st_size if path.exists() else 0
        stride = self._spec.stride
        if size < rows * stride:
            raise RunError(f"{path}: expected {rows} rows of {stride} bytes, got {size} bytes; {_LOST}")
        return RowFile(path, rows * stride)

    def append(self, rows: Sequence[Row], cached: bool = False) -> None:
        """Sealed ones; ``cached`` leaves large ones to the page cache too, for slow disks. Raises OSError."""
        while rows:
            now, rows = rows[: SHARD - self.rows % SHARD], rows[SHARD - self.rows % SHARD :]
            direct = self._spec.stride >= ALIGNED_FROM and not cached
            self._file.append(*(row.memory for row in now), direct=direct)
            self.rows += len(now)
            if self.rows % SHARD == 0:
                shard = self.rows // SHARD
                self._finish(self._file, shard - 1, SHARD)
                self._file = self._open(shard, 0)

    def _finish(self, file: RowFile, shard: int, rows: int) -> None:
        """Write the index behind the rows and give the shard its name."""
        index = _index(self._spec, rows)
        file.append(memoryview(index + crc32c(index)), direct=False)
        file.close()
        closed, opened = shard_paths(self._folder, self._spec, shard)
        os.replace(opened, closed)

    def cut(self, rows: int) -> None:
        """Drop what stands behind the first ``rows`` rows. Raises OSError."""
        if rows != self.rows:
            self._file.close()
            self._go_on(rows)

    def close(self) -> None:
        """Finish the last shard, so that other programs see its rows. Raises OSError."""
        shard, rows = divmod(self.rows, SHARD)
        if rows:
            self._finish(self._file, shard, rows)
        else:
            self._file.close()
            shard_paths(self._folder, self._spec, shard)[1].unlink(missing_ok=True)


def _index(spec: ArraySpec, rows: int) -> bytes:
    """Offset and length of each inner chunk, as the sharding codec wants them."""
    index = np.full((SHARD, 2), _MISSING, "<u8")
    index[:rows, 0] = np.arange(rows) * spec.stride
    index[:rows, 1] = spec.row_bytes + _CRC.size
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
    closed, opened = shard_paths(folder, spec, shard)
    for path in (closed, opened, closed):  # it may get its name while we look
        try:
            with open(path, "rb") as file:
                file.seek(inside * spec.stride)
                data = file.read(spec.stride)
            break
        except FileNotFoundError:
            continue
    else:
        raise RunError(f"{closed}: expected row {row} of {spec.name}, got no such file; {_LOST}")
    size, where = spec.row_bytes + _CRC.size, f"{path}, row {row}"
    if data[size:].strip(b"\0"):
        raise RunError(f"{where}: expected zeros behind its crc32c, got others (damaged); {_LOST}")
    return _checked(data[:size], spec.row_bytes, where).view(spec.dtype).reshape(spec.shape)


def rows_in(shard: Path, spec: ArraySpec) -> int:
    """How many rows a finished shard has by its length; 0 where there is none."""
    size = shard.stat().st_size if shard.exists() else 0
    return max(0, size - SHARD * 16 - _CRC.size) // spec.stride


def check_index(folder: Path, spec: ArraySpec, shard: int, rows: int) -> None:
    """Raises RunError unless the index of a finished shard says where its ``rows`` rows stand."""
    path = shard_paths(folder, spec, shard)[0]
    data, expected = b"", _index(spec, rows)
    if path.exists():
        with open(path, "rb") as file:
            file.seek(rows * spec.stride)
            data = file.read()
    if _checked(data, len(expected), f"{path}, index").tobytes() != expected:
        raise RunError(f"{path}, index: expected the places of {rows} rows, got others (damaged); {_LOST}")


class BlockWriter:
    """Collects rows of ``blocks`` arrays of equal blocks, and writes a chunk of each when a block is full."""

    def __init__(self, folder: Path, specs: Sequence[ArraySpec], block: int) -> None:
        """Go on at the front of this block; it and later ones are dropped."""
        self._folder, self._specs, self._block = folder, specs, block
        self._size = specs[0].block if specs else BLOCK
        self._rows: list[Mapping[str, Any]] = []
        for spec in specs:
            for number, path in shards(folder, spec):
                if number >= block:
                    path.unlink()

    def append(self, row: Mapping[str, Any]) -> None:
        """``row`` has a value for each array. Raises OSError."""
        self._rows.append(row)
        if len(self._rows) == self._size:
            self.flush()
            self._rows.clear()
            self._block += 1

    def flush(self) -> None:
        """Write what there is; the rest of the chunk is filled up. Raises OSError."""
        for spec in self._specs if self._rows else ():
            values = np.full((self._size, *spec.shape), FILL[np.dtype(spec.dtype).kind], spec.dtype)
            values[: len(self._rows)] = [row[spec.name] for row in self._rows]
            write_chunk(self._folder, spec, self._block, values)


def blocks(steps: int, size: int) -> Iterator[tuple[int, int]]:
    """Number and length of each block of at most ``size`` among ``steps`` steps."""
    for block in range(-(-steps // size)):
        yield block, min(size, steps - block * size)
