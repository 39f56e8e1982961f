"""A bundle: one step and all that running it again needs, in one file that can be sent to somebody else.

A gzipped tar of the MEMBERS below and nothing else: ``bundle.json`` says which step of which format it is, and the
sha256 of each other member. Equal steps of a run make equal bytes. It is read with suspicion: nothing is written to
disk or executed, nothing is bigger than it claims, and a name or a size that is not expected ends the reading.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from minitrain.assembly import require_memory
from minitrain.config import Config, config_from
from minitrain.data.batches import Batch
from minitrain.errors import RunError
from minitrain.files import write_atomic
from minitrain.record.journal import SCALARS, Frame
from minitrain.replay.source import Batches, Source
from minitrain.replay.states import empty_state, named_tensors, read_arrays, read_state, require_arrays
from minitrain.run_folder import SCHEMA_VERSION
from minitrain.state import State, copy_state
from minitrain.tensors import KINDS, sites

FORMAT = "minitrain-bundle"
FORMAT_VERSION = 1
MEMBERS = (
    "bundle.json",
    "manifest.json",
    "frame.msgpack",
    "state.safetensors",
    "batch.safetensors",
    "samples.json",
    "tokenizer.json",
)
ROOM, RATIO = 64 << 20, 20
"""What a bundle may grow to: ROOM bytes and RATIO times its size. With moments that are all zeros it is below 4."""
_ARRAYS = ("inputs", "targets", "attn_pad_mask", "loss_mask", "rows")


def write_bundle(path: Path, source: Source, state: State) -> None:
    """Step t of ``source``, which is about to read this state. Raises OSError; no half file is left.

    The batch is the one that the data give; what a recorded injection makes of it follows from the manifest.
    """
    batch = source.batches.batch_at(state.step)
    arrays = {name: getattr(batch, name) for name in _ARRAYS}
    if _needs_the_batch_before(source.config, state.step):
        before = source.batches.batch_at(state.step - 1)
        arrays |= {f"before.{name}": getattr(before, name) for name in _ARRAYS}
    samples = [{"id": id, "text": text} for id, text in zip(batch.ids, source.texts(batch), strict=True)]
    content = {
        "manifest.json": _json(source.manifest),
        "frame.msgpack": _pack(source.frame(state.step)),
        "state.safetensors": save({name: np.ascontiguousarray(t) for name, t in named_tensors(state).items()}),
        "batch.safetensors": save({name: np.ascontiguousarray(x) for name, x in arrays.items()}),
        "samples.json": _json(samples),
        "tokenizer.json": source.tokenizer,
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": state.step, "sha256": hashes}
    content["bundle.json"] = _json(about)
    tape = io.BytesIO()
    with tarfile.open(fileobj=tape, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in MEMBERS:  # owner, mode and time are those of a new TarInfo, and always the same
            member = tarfile.TarInfo(name)
            member.size = len(content[name])
            tar.addfile(member, io.BytesIO(content[name]))
    write_atomic(path, gzip.compress(tape.getvalue(), 6, mtime=0))


def _needs_the_batch_before(config: Config, step: int) -> bool:
    return any(one.name == "duplicate_batch" and one.step == step for one in config.injections)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


class Bundle:
    """The step of a bundle: a source of a replay that needs no other file."""

    def __init__(self, path: Path, manifest: dict[str, Any], config: Config, frame: Frame, held: _Held) -> None:
        self.path, self.manifest, self.config = path, manifest, config
        self.steps = range(frame.step, frame.step + 1)
        self.batches: Batches = _HeldBatches(held.batches, frame.step, config.training.batch_size, manifest)
        self.tokenizer = held.tokenizer
        self._frame, self._held = frame, held

    @property
    def hashes(self) -> dict[str, str]:
        return {"tokenizer_hash": hashlib.sha256(self.tokenizer).hexdigest()}

    def frame(self, t: int) -> Frame:
        if t not in self.steps:
            raise RunError(f"step {t}: expected {self.steps[0]}, the one step of {self.path}, got {t}")
        return self._frame

    def texts(self, batch: Batch) -> list[str]:
        return [self._held.texts.get(row, "") for row in batch.rows.tolist()]

    def nearest(self, t: int) -> State:
        state = empty_state(self.config, t)
        copy_state(self._held.state, state)
        return state

    def left(self, t: int, kind: str, name: str) -> NDArray[np.float32] | None:
        return None


class _Held(NamedTuple):
    state: State
    batches: dict[int, Batch]
    """By step: that of the bundle's, and where an injection asks for it the one before."""
    texts: dict[int, str]
    """By row."""
    tokenizer: bytes


class _HeldBatches:
    """The batches that a bundle holds, and where in the data they stand."""

    def __init__(self, batches: dict[int, Batch], step: int, batch_size: int, manifest: Mapping[str, Any]) -> None:
        self._batches, self._step, self._batch_size = batches, step, batch_size
        self._samples: int = manifest["samples"]["train"]

    def position(self, step: int) -> dict[str, int]:
        epoch, offset = divmod(step * self._batch_size, self._samples)
        return {"epoch": epoch, "offset": offset}

    def batch_at(self, step: int) -> Batch:
        if step not in self._batches:
            raise RunError(f"step {step}: expected {self._step}, the one step of the bundle, got {step}")
        return self._batches[step]


def open_bundle(path: Path, *, blind: bool = False) -> Bundle:
    """The bundle in this file; ``blind`` leaves the injections of its configuration out.

    Raises RunError where the file is no bundle, of another format, damaged, or not as big as it claims.
    """
    content = _members(path)

    def refuse(expected: str, got: object) -> RunError:
        return RunError(f"{path}: expected {expected}, got {got}; ask for the bundle again")

    def parse(name: str, kind: type) -> Any:
        try:
            value = json.loads(content[name])
        except (ValueError, RecursionError) as error:
            raise refuse(f"{name} as JSON", error) from error
        if not isinstance(value, kind):
            raise refuse(f"{name} as a JSON {kind.__name__}", type(value).__name__)
        return value

    about = parse("bundle.json", dict)
    if (about.get("format"), about.get("format_version")) != (FORMAT, FORMAT_VERSION):
        found = f"{about.get('format')!r} {about.get('format_version')!r}"
        raise RunError(f"{path}: expected {FORMAT} {FORMAT_VERSION}, got {found}; use the minitrain that wrote it")
    hashes = {name: hashlib.sha256(content[name]).hexdigest() for name in MEMBERS[1:]}
    if about.get("sha256") != hashes:
        raise refuse("members with the sha256 that bundle.json says", "others (changed or damaged)")
    manifest, samples = parse("manifest.json", dict), parse("samples.json", list)
    config = _config(path, manifest)
    if blind:
        config = config.model_copy(update={"injections": []})
    B, T = config.training.batch_size, config.model.max_seq_len
    arrays = read_arrays(content["batch.safetensors"], f"{path}, batch.safetensors")
    each = (B, T)
    wanted: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(_ARRAYS[:2], (each, np.int32))
    wanted |= dict.fromkeys(_ARRAYS[2:4], (each, np.bool_)) | {"rows": ((B,), np.int64)}
    if f"before.{_ARRAYS[0]}" in arrays:
        wanted |= {f"before.{name}": spec for name, spec in wanted.items()}
    require_arrays(arrays, wanted, f"{path}, batch.safetensors")
    whole = [s for s in samples if isinstance(s, dict) and all(isinstance(s.get(key), str) for key in ("id", "text"))]
    told: list[tuple[str, str]] = [(s["id"], s["text"]) for s in whole]
    if not len(told) == len(samples) == B:
        raise refuse(f"samples.json as {B} samples with id and text", "something else")
    state = read_state(
        read_arrays(content["state.safetensors"], f"{path}, state.safetensors"), config, 0, f"{path}, state.safetensors"
    )
    require_memory(config)  # the batch and the state are there; what the passes need may be much more
    frame = _unpack(path, content["frame.msgpack"], config, len(state.params))
    if about.get("step") != frame.step:
        raise refuse(f"step {about.get('step')}, as bundle.json says", f"the frame of step {frame.step}")
    rows = arrays["rows"].tolist()
    ids = dict(zip(rows, (i for i, _ in told), strict=True))
    batches = {frame.step: Batch(**{name: arrays[name] for name in _ARRAYS}, dataset_ids=ids)}
    if f"before.{_ARRAYS[0]}" in arrays:
        before = {name: arrays[f"before.{name}"] for name in _ARRAYS}
        unnamed = dict.fromkeys(before["rows"].tolist(), "")
        batches[frame.step - 1] = Batch(**before, dataset_ids=unnamed)
    texts = dict(zip(rows, (text for _, text in told), strict=True))
    held = _Held(state, batches, texts, content["tokenizer.json"])
    return Bundle(path, manifest, config, frame, held)


def _config(path: Path, manifest: dict[str, Any]) -> Config:
    """The configuration, and with it every field of the manifest that a replay reads."""
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = repr(manifest.get("schema_version"))
        raise RunError(
            f"{path}: expected schema_version {SCHEMA_VERSION}, got {found}; use the minitrain that wrote it"
        )
    maps = ("config", "versions", "hardware", "samples")
    count = manifest["samples"].get("train") if isinstance(manifest.get("samples"), dict) else None
    if not all(isinstance(manifest.get(name), dict) for name in maps) or type(count) is not int or count < 1:
        raise RunError(f"{path}: expected the manifest of a run, with {', '.join(maps)}, got another")
    return config_from(manifest["config"], f"{path}, manifest.json")


def _members(path: Path) -> dict[str, bytes]:
    """The bytes of each member. Raises RunError for anything but exactly MEMBERS, each a plain file."""

    def refuse(got: object) -> RunError:
        return RunError(f"{path}: expected a bundle of minitrain replay, or a run folder, got {got}")

    limit = ROOM + RATIO * path.stat().st_size
    try:
        with gzip.open(path) as packed:
            data = bytearray()
            while piece := packed.read(1 << 20):
                data += piece
                if len(data) > limit:
                    raise refuse(f"one that unpacks to more than {limit} bytes")
    except (OSError, EOFError, zlib.error) as error:
        raise refuse(f"no gzip file ({error})") from error
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                plain = member.type == tarfile.REGTYPE and not member.issparse() and member.size <= len(data)
                if member.name not in MEMBERS or member.name in found or not plain:
                    raise refuse(f"one with {member.name!r}, which no bundle has")
                file = tar.extractfile(member)
                found[member.name] = file.read() if file else b""
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise refuse(f"no tar file inside ({error})") from error
    if missing := [name for name in MEMBERS if name not in found]:
        raise refuse(f"one without {', '.join(missing)}")
    return found


def _pack(frame: Frame) -> bytes:
    body = {name: x.tobytes() if isinstance(x, np.ndarray) else x for name, x in frame._asdict().items()}
    packed: bytes = msgpack.packb(body)
    return packed


def _unpack(path: Path, data: bytes, config: Config, tensors: int) -> Frame:
    """The frame of a bundle. Raises RunError unless each field has its type and length."""

    def refuse(got: object) -> RunError:
        return RunError(f"{path}, frame.msgpack: expected a frame of {tensors} tensors, got {got}; ask for it again")

    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise refuse(f"{type(error).__name__}: {error}") from error
    heard = len(sites(config.model)) - len(KINDS) * tensors
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "rows": ("<i8", (-1,)),
        "rng": ("<u8", (2, 4)),
        "sites": ("<u8", (heard,)),
    }
    shapes |= dict.fromkeys(("digest_in", "digest_out"), ("<u8", (len(KINDS), tensors)))
    counts, chain = ("step", "batch_digest", "tokens"), 16
    if not isinstance(body, dict) or set(body) != set(Frame._fields):
        raise refuse("other fields")
    if body["sites"] is None:
        del shapes["sites"]
    try:
        arrays = {name: np.frombuffer(body[name], dtype).reshape(shape) for name, (dtype, shape) in shapes.items()}
    except (TypeError, ValueError) as error:
        raise refuse(error) from error
    whole = all(type(body[name]) is int and 0 <= body[name] < 1 << 64 for name in counts)
    real = all(type(body[name]) is float for name in SCALARS)
    if not (whole and real and type(body["chain"]) is bytes and len(body["chain"]) == chain):
        raise refuse("fields of another type")
    if len(arrays["rows"]) != config.training.batch_size:
        raise refuse(f"{len(arrays['rows'])} rows of {config.training.batch_size}")
    return Frame(**{**body, **arrays})
