"""``journal.msgpack``: what stands behind a run, a frame a step, appended and never changed.

A frame is ``length`` and its complement (u32 each, little-endian), ``length`` bytes of msgpack, and the chain: xxh3-128
over the chain before and those bytes. So a changed byte is found, and told apart from a last frame that a crash tore:
that one is short, with a length that agrees with its complement.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from minitrain.errors import RunError

MAGIC = b"minitrain journal\n"
FORMAT_VERSION = 2
"""Of the whole record."""
_HEAD = struct.Struct("<II")
_CHAIN = 16
_ONES = 0xFFFFFFFF

Digests = NDArray[np.uint64]


class Frame(NamedTuple):
    """Step t, as it was recorded. N tensors, S sites, B samples; kinds are param, m, v; streams are control, data."""

    step: int
    rows: NDArray[np.int64]
    """(B,) numbers of the samples in the training split, -1 where none."""
    batch_digest: int
    """xxh3-64 over inputs, targets and both masks."""
    rng: NDArray[np.uint64]
    """(2, 4) seed, purpose and position of both streams before the batch was drawn."""
    loss: float
    lr: float
    grad_norm: float
    grad_norm_clipped: float
    loss_scale: float
    tokens: int
    digest_in: Digests
    """(3, N) state t as the step read it."""
    digest_out: Digests
    """(3, N) state t+1 as it left."""
    sites: Digests | None
    """(S,) every site before the update, with ``record.sites: digest``."""
    chain: bytes
    """16 bytes over everything up to here."""


FINGERPRINT = ("config_hash", "numerics_version", "data_manifest_hash", "tokenizer_hash")
"""Of the manifest, what must be the same for a replay to promise the same bits. The first frame repeats it."""

SCALARS = ("loss", "lr", "grad_norm", "grad_norm_clipped", "loss_scale")


def canonical(number: float) -> float:
    """Every NaN is the same one."""
    return math.nan if math.isnan(number) else number


def encode(body: Mapping[str, Any], chain: bytes) -> tuple[bytes, bytes]:
    """The bytes of a frame that follows ``chain``, and its own chain."""
    packed = msgpack.packb(body)
    follows = xxhash.xxh3_128_digest(chain + packed)
    return _HEAD.pack(len(packed), len(packed) ^ _ONES) + packed + follows, follows


START = xxhash.xxh3_128_digest(MAGIC)
"""The chain before the first frame."""


class JournalWriter:
    """Appends frames. Every `append` is one write to the file: a kill tears one frame at most, and that is the last."""

    def __init__(self, path: Path, *, keep: int = 0, chain: bytes = START) -> None:
        """A new journal, or with ``keep`` the first bytes of the one that stands, which end with ``chain``."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, keep)
        os.lseek(self._file, 0, os.SEEK_END)
        self.chain, self._end = chain, keep
        if not keep:
            self._write(MAGIC)

    def append(self, *bodies: Mapping[str, Any]) -> list[bytes]:
        """The chain behind each. All of them are written or none: raises OSError, and the file is as it was."""
        frames, chains, chain = [], [], self.chain
        for body in bodies:
            frame, chain = encode(body, chain)
            frames.append(frame)
            chains.append(chain)
        self._write(b"".join(frames))
        self.chain = chain
        return chains

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, 0, os.SEEK_END)
            raise
        self._end += len(data)

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


@dataclass
class Journal:
    """What a journal says, in order."""

    header: dict[str, Any]
    """The first frame: the run that it is of."""
    events: list[dict[str, Any]]
    """``{"event": name, "step": t, ...}``"""
    steps: list[dict[str, Any]]
    chains: list[bytes]
    """One for each step."""
    ends: list[int]
    """Where the frame of each step ends, in bytes."""
    begin: int
    """Where the frames of the first step begin, in bytes, and the chain there."""
    begin_chain: bytes
    torn: int
    """Bytes behind the last whole frame, which a crash left."""

    @property
    def start(self) -> int:
        """The first step: 0, but in a run that was forked from another."""
        return int(self.header.get("start", 0))

    @property
    def end(self) -> int:
        """The state that the last recorded step left."""
        return self.start + len(self.steps)

    def body(self, step: int) -> dict[str, Any]:
        """What the frame of step t says."""
        return self.steps[step - self.start]

    def frame(self, step: int) -> Frame:
        body = self.body(step)
        before = body["digest_in"] if body["digest_in"] is not None else self.body(step - 1)["digest_out"]
        sites = body.get("sites")
        return Frame(
            step=step,
            rows=np.frombuffer(body["rows"], "<i8"),
            batch_digest=body["batch_digest"],
            rng=np.frombuffer(body["rng"], "<u8").reshape(2, 4),
            digest_in=np.frombuffer(before, "<u8").reshape(3, -1),
            digest_out=np.frombuffer(body["digest_out"], "<u8").reshape(3, -1),
            sites=None if sites is None else np.frombuffer(sites, "<u8"),
            chain=self.chain(step),
            tokens=body["tokens"],
            **{name: body[name] for name in SCALARS},
        )

    def chain(self, step: int) -> bytes:
        """16 bytes over everything up to the frame of step t."""
        return self.chains[step - self.start]

    def end_of(self, state: int) -> tuple[int, bytes]:
        """Where the frames of the steps before ``state`` end, and the chain there."""
        rows = state - self.start
        return (self.ends[rows - 1], self.chains[rows - 1]) if rows else (self.begin, self.begin_chain)


def read_journal(path: Path) -> Journal:
    """Raises RunError where a byte is damaged, naming the place; a torn last frame is only left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError(
            f"{path}: expected the journal of a run, got no such file; the run was not recorded, or its journal is lost"
        ) from None
    except OSError as error:
        raise RunError(f"{path}: expected the journal of a run, got: {error.strerror}") from error
    if not data.startswith(MAGIC):
        if MAGIC.startswith(data):
            raise RunError(f"{path}: expected the journal of a run, got an empty one; it was killed before step 0")
        raise RunError(f"{path}: expected a journal that begins with {MAGIC!r}, got {data[: len(MAGIC)]!r}")
    journal = Journal({}, [], [], [], [], len(MAGIC), START, 0)
    end = len(MAGIC)
    for body, chain, end in _frames(path, data):
        try:
            if not journal.header:
                journal.header = _header(path, body)
                journal.begin, journal.begin_chain = end, chain
            elif "event" in body:
                journal.events.append(body)
            elif body["step"] == journal.end:
                _require_step(body, journal.header)
                journal.steps.append(body)
                journal.chains.append(chain)
                journal.ends.append(end)
            else:
                raise ValueError(f"step {body['step']}")
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: expected step {journal.end} before byte {end}, got {error}") from error
    if not journal.header:
        raise RunError(f"{path}: expected the journal of a run, got an empty one; it was killed before step 0")
    journal.torn = len(data) - end
    return journal


def _header(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    if body.get("format_version") != FORMAT_VERSION:
        raise RunError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {body.get('format_version')!r}; "
            "use the minitrain version that the run's manifest names"
        )
    start = body.get("start", 0)
    if type(start) is not int or start < 0:
        raise ValueError(f"a first step {start!r}")
    return body


def _require_step(body: dict[str, Any], header: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError unless this is a step of that run: a forger can make checksums."""
    digests, sites = 24 * len(header["tensors"]), 8 * len(header["sites"])
    wanted = {"rng": 64, "digest_out": digests, **({"sites": sites} if sites else {})}
    wanted |= {"digest_in": digests} if body["digest_in"] is not None else {}
    for name, length in wanted.items():
        if len(body[name]) != length or type(body[name]) is not bytes:
            raise ValueError(f"{name} of {len(body[name])} bytes, not {length}")
    if len(body["rows"]) % 8 or not body["rows"]:
        raise ValueError(f"rows of {len(body['rows'])} bytes")
    if not all(type(body[name]) is float for name in SCALARS) or type(body["tokens"]) is not int:
        raise ValueError("numbers of another type")


def _frames(path: Path, data: bytes) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    """Body, chain and end of every whole frame."""
    chain, at, number = START, len(MAGIC), 0

    def damaged(what: str) -> RunError:
        return RunError(
            f"{path}: expected frame {number} at byte {at} as it was written, got {what}: the file has been changed or "
            "damaged; restore it from a copy, nothing behind this place can be trusted"
        )

    while at + _HEAD.size <= len(data):
        length, complement = _HEAD.unpack_from(data, at)
        if length ^ complement != _ONES:
            raise damaged("a length that contradicts itself")
        end = at + _HEAD.size + length + _CHAIN
        if end > len(data):
            return
        packed = data[at + _HEAD.size : end - _CHAIN]
        chain = xxhash.xxh3_128_digest(chain + packed)
        if chain != data[end - _CHAIN : end]:
            raise damaged("another checksum")
        try:
            body = msgpack.unpackb(packed)
        except (ValueError, msgpack.UnpackException) as error:
            raise damaged(f"no msgpack ({error})") from error
        if not isinstance(body, dict):
            raise damaged("no map")
        yield body, chain, end
        at, number = end, number + 1
