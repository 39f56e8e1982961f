"""Which arrays a record has: the one table from which metadata, writer and reader derive."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from minitrain.config import Config
from minitrain.record.digests import STREAMS
from minitrain.record.journal import FORMAT_VERSION
from minitrain.tensors import KINDS, parameter_table, sites

SHARD = 64
"""Steps in a shard of m or v."""
BLOCK = 512
"""Steps in a chunk of any other array of steps: seventeen small files are not to be written too often."""
FORMAT = "minitrain-record"
ALIGNMENT = 4096
"""Bytes, at multiples of which large rows begin, so that they can be written past the page cache."""
ALIGNED_FROM = 1 << 16
"""Bytes of a row from which on it is large: a twentieth of it at most is lost, and the disk is worth waiting for."""
FILL: dict[str, Any] = {"f": math.nan, "i": -1, "u": 0}
"""What stands where nothing was written, by the kind of the dtype."""


@dataclass(frozen=True)
class ArraySpec:
    """One array. ``shape`` and ``dims`` without the first axis, which is step or keyframe."""

    name: str
    dtype: str
    form: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    attributes: Mapping[str, Any]
    block: int = BLOCK
    """Rows in a chunk of an array in blocks."""

    @cached_property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @cached_property
    def stride(self) -> int:
        """Bytes from one of ``rows`` to the next: the row and its crc32c, filled up with zeros where it is large."""
        size = self.row_bytes + 4
        return size if size < ALIGNED_FROM else -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Layout:
    """All arrays of a record. B samples a batch, N tensors of P numbers, S sites."""

    start: int
    """The first step: row r of an array of steps is step ``start`` + r. 0, but in a run forked from another."""
    end: int
    """The state that the last step leaves."""
    keyframe_every: int
    moments: bool
    """Whether m and v of every step are recorded."""
    B: int
    N: int
    P: int
    S: int
    attributes: Mapping[str, Any]
    """Of the group: names of tensors, kinds, streams and sites."""

    @property
    def steps(self) -> range:
        """Those that have a row, in order."""
        return range(self.start, self.end)

    @cached_property
    def keyframes(self) -> list[int]:
        """The states that are recorded whole: the first, every ``keyframe_every``-th, and the last."""
        second = (self.start // self.keyframe_every + 1) * self.keyframe_every
        return [self.start, *range(second, self.end, self.keyframe_every), self.end]

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        P, B, N, S = ("parameter", self.P), ("sample", self.B), ("tensor", self.N), ("site", self.S)
        kind, stream, word, half = ("kind", 3), ("stream", 2), ("word", 4), ("half", 2)
        of_step = "step t, which turns state t into state t+1"
        before, after = "state t, as step t read it", "the row of step t is state t+1, as it left it; state 0 is zeros"
        keyframe = "the state that keyframe_step says"
        moment = "moment of the gradients (AdamW)"

        def spec(
            name: str, dtype: str, form: str, long_name: str, belongs_to: str, *axes: tuple[str, int], units: str = "1"
        ) -> ArraySpec:
            first = "keyframe" if name.startswith("keyframe_") else "step"
            about = {"long_name": long_name, "units": units, "belongs_to": belongs_to}
            return ArraySpec(name, dtype, form, (first, *(a for a, _ in axes)), tuple(n for _, n in axes), about)

        def scalar(name: str, long_name: str, units: str = "1") -> ArraySpec:
            return spec(name, "<f8", "blocks", long_name, of_step, units=units)

        specs = [
            spec("step", "<i8", "once", "step", of_step),
            spec("batch_ids", "<i8", "blocks", "number of the sample in the training split", of_step, B),
            spec("batch_digest", "<u8", "blocks", "xxh3-64 of the tokens and masks", of_step),
            spec("rng", "<u8", "blocks", "random streams before the batch was drawn", of_step, stream, word),
            scalar("loss", "mean cross entropy over the tokens of the batch", "nat"),
            scalar("lr", "learning rate"),
            scalar("grad_norm", "global L2 norm of the gradients before clipping"),
            scalar("grad_norm_clipped", "global L2 norm of the gradients after clipping"),
            scalar("loss_scale", "factor on the loss before the backward pass"),
            spec("digest_in", "<u8", "blocks", "xxh3-64 of each tensor", before, kind, N),
            spec("digest_out", "<u8", "blocks", "xxh3-64 of each tensor", after, kind, N),
            spec("chain", "<u8", "blocks", "hash chain of the journal", of_step, half),
            spec("keyframe_step", "<i8", "once", "state of the keyframe", keyframe),
            spec("keyframe_param", "<f4", "keyframes", "parameters", keyframe, P),
            spec("keyframe_m", "<f4", "keyframes", f"first {moment}", keyframe, P),
            spec("keyframe_v", "<f4", "keyframes", f"second {moment}", keyframe, P),
        ]
        if self.moments:
            specs += [spec(k, "<f4", "rows", f"{n} {moment}", after, P) for k, n in (("m", "first"), ("v", "second"))]
        if self.S:
            specs.append(spec("site_digest", "<u8", "blocks", "xxh3-64 of each site", of_step, S))
        return {s.name: s for s in specs}

    def of(self, form: str) -> list[ArraySpec]:
        """The arrays that stand on disk in this form."""
        return [s for s in self.arrays.values() if s.form == form]

    @property
    def disk_bytes(self) -> int:
        """About how many bytes the whole record takes, with the journal."""
        rows = sum(s.stride + 16 for s in self.of("rows"))
        frame = 250 + 8 * (self.B + 8 + 3 * self.N + self.S)
        blocks = -(-len(self.steps) // BLOCK) * BLOCK * sum(s.row_bytes for s in self.of("blocks"))
        return len(self.steps) * (rows + frame) + blocks + len(self.keyframes) * 12 * self.P

    def metadata(self) -> dict[str, bytes]:
        """Every ``zarr.json`` by its path in the group."""
        about = {"format": FORMAT, "format_version": FORMAT_VERSION, "keyframe_every": self.keyframe_every}
        lengths = {"keyframe": len(self.keyframes), "step": len(self.steps)}
        return metadata({**about, **self.attributes}, self.arrays.values(), lengths)


def metadata(
    attributes: Mapping[str, Any], arrays: Iterable[ArraySpec], lengths: Mapping[str, int]
) -> dict[str, bytes]:
    """Every ``zarr.json`` of a group by its path; ``lengths`` of the first axes by their names."""
    from zarr import create_group
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    store = MemoryStore()
    group = create_group(store=store, zarr_format=3, attributes=dict(attributes))
    for s in arrays:
        length = lengths[s.dims[0]]
        chunk = {"rows": 1, "keyframes": 1, "blocks": s.block, "once": length}[s.form]
        group.create_array(
            s.name,
            shape=(length, *s.shape),
            dtype=s.dtype,
            chunks=(chunk, *s.shape),
            shards=(SHARD, *s.shape) if s.form == "rows" else None,
            compressors=[Crc32cCodec()],
            filters=None,
            serializer=BytesCodec(endian="little"),
            fill_value=FILL[np.dtype(s.dtype).kind],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=list(s.dims),
            attributes=dict(s.attributes),
        )
    return {path: buffer.to_bytes() for path, buffer in store._store_dict.items()}


def layout_of(config: Config, start: int = 0, end: int | None = None) -> Layout:
    """The arrays of the record of this run, which begins at step ``start``, up to state ``end`` if it ended early."""
    record, table = config.record, parameter_table(config.model)
    heard = sites(config.model)[: -3 * len(table)] if record.sites == "digest" else []
    offsets = [0, *accumulate(math.prod(p.shape) for p in table)]
    return Layout(
        start=start,
        end=config.scheduler.total_steps if end is None else end,
        keyframe_every=record.keyframe_every,
        moments=record.moments == "every_step",
        B=config.training.batch_size,
        N=len(table),
        P=offsets[-1],
        S=len(heard),
        attributes={
            "kinds": list(KINDS),
            "streams": list(STREAMS),
            "words": ["seed", "purpose", "step or epoch", "offset in the epoch"],
            "tensors": [
                {"name": p.name, "shape": list(p.shape), "offset": at} for p, at in zip(table, offsets, strict=False)
            ],
            "sites": heard,
        },
    )
