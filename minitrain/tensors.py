"""The one table: every parameter, activation and site, named once and in order.

Memory, checkpoint, decay mask, digests and the list of sites derive from it. Shapes: B sequences, T positions,
C = d_model, F = d_ff, V = vocab_size, H heads.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from minitrain.sections import ModelConfig

Init = Literal["normal", "residual", "zeros", "ones"]


@dataclass(frozen=True)
class Parameter:
    """``residual`` starts smaller, by 1/sqrt(2 n_layer): its output is added to the residual stream."""

    name: str
    shape: tuple[int, ...]
    init: Init

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices and embeddings only."""
        return len(self.shape) == 2


def parameter_table(c: ModelConfig) -> list[Parameter]:
    """All parameters in order. Matrices are (out, in), as in PyTorch's nn.Linear."""
    C, F, V = c.d_model, c.d_ff, c.vocab_size

    def norm(name: str) -> list[Parameter]:
        return [Parameter(f"{name}.weight", (C,), "ones"), Parameter(f"{name}.bias", (C,), "zeros")]

    table = [Parameter("embed.weight", (V, C), "normal")]
    for i in range(c.n_layer):
        b = f"block.{i}"
        table += [
            *norm(f"{b}.ln1"),
            Parameter(f"{b}.attn.q.weight", (C, C), "normal"),
            Parameter(f"{b}.attn.k.weight", (C, C), "normal"),
            Parameter(f"{b}.attn.v.weight", (C, C), "normal"),
            Parameter(f"{b}.attn.out.weight", (C, C), "residual"),
            *norm(f"{b}.ln2"),
            Parameter(f"{b}.ffn.up.weight", (F, C), "normal"),
            Parameter(f"{b}.ffn.up.bias", (F,), "zeros"),
            Parameter(f"{b}.ffn.down.weight", (C, F), "residual"),
            Parameter(f"{b}.ffn.down.bias", (C,), "zeros"),
        ]
    table += norm("ln_f")
    if not c.tie_weights:
        table.append(Parameter("lm_head.weight", (V, C), "normal"))
    return [*table, Parameter("lm_head.bias", (V,), "zeros")]


@dataclass(frozen=True)
class Activation:
    """One array of a pass. ``site`` tells whether listeners may hear it; the others are the engine's own."""

    name: str
    shape: tuple[int, ...]
    site: bool = True


def activation_table(c: ModelConfig, B: int, T: int) -> list[Activation]:
    """The arrays that the forward pass writes, in order."""
    C, F, V, H = c.d_model, c.d_ff, c.vocab_size, c.n_head
    wide, inner, vocab, each = (B, T, C), (B, T, F), (B, T, V), (B, T)

    def norm(name: str) -> list[Activation]:
        return [
            Activation(name, wide),
            Activation(f"{name}.mean", each, False),
            Activation(f"{name}.rstd", each, False),
        ]

    table = [Activation("embed", wide)]
    for i in range(c.n_layer):
        b = f"block.{i}"
        table += [
            *norm(f"{b}.ln1"),
            *(Activation(f"{b}.{x}", wide) for x in "qkv"),
            Activation(f"{b}.attn.probs", (B, H, T, T)),
            Activation(f"{b}.attn.heads", wide, False),
            Activation(f"{b}.attn.out", wide),
            Activation(f"{b}.mid", wide, False),  # the residual stream between attention and FFN
            *norm(f"{b}.ln2"),
            Activation(f"{b}.ffn.pre", inner),
            Activation(f"{b}.ffn.gelu", inner),
            Activation(f"{b}.ffn.slope", inner, False),
            Activation(f"{b}.ffn.out", wide),
            Activation(f"{b}.out", wide, False),  # the residual stream after the block
        ]
    return [
        *table,
        *norm("ln_f"),
        Activation("logits", vocab),
        Activation("softmax", vocab),
        Activation("log_softmax", vocab),
        Activation("losses", each, False),
    ]


def gradient_table(c: ModelConfig, B: int, T: int) -> list[Activation]:
    """The arrays that the backward pass writes for activations, in the order of the forward pass."""
    unmaterialised = {"softmax", "log_softmax", "losses", *(f"block.{i}.ffn.slope" for i in range(c.n_layer))}
    alike = shared(c)
    table = [
        Activation(f"grad:{a.name}", a.shape, a.site)
        for a in activation_table(c, B, T)
        if a.name not in unmaterialised and not a.name.endswith((".mean", ".rstd")) and f"grad:{a.name}" not in alike
    ]
    if c.dropout:  # the gradient before the mask, which the weights need
        kept = [f"block.{i}.{x}" for i in range(c.n_layer) for x in ("attn.kept", "ffn.kept")]
        table += [Activation(f"grad:{name}", (B, T, c.d_model), False) for name in ["embed.kept", *kept]]
    return table


def shared(c: ModelConfig) -> dict[str, str]:
    """Sites that are heard in another's array: a branch has the gradient of the residual stream that it is added to."""
    pairs = ("attn", "mid"), ("ffn", "out")
    return {f"grad:block.{i}.{x}.out": f"grad:block.{i}.{y}" for i in range(c.n_layer) for x, y in pairs}


def sites(c: ModelConfig) -> list[str]:
    """Every site in the order in which a training step passes it: forward, backward, clip, moments, parameters."""
    forward = [a.name for a in activation_table(c, 1, 1) if a.site]
    backward = [f"grad:{name}" for name in reversed(forward) if name not in ("softmax", "log_softmax")]
    names = [p.name for p in parameter_table(c)]

    def of_parameters(prefix: str, where: str) -> list[str]:
        return [f"{prefix}.{name}" for name in names if name.startswith(where)]

    order: list[str] = []
    for name in backward:
        order.append(name)
        if name.startswith("grad:block.") and name.endswith(".ln1"):  # the last of a block: then its parameters
            order += of_parameters("grad", name.removeprefix("grad:").removesuffix("ln1"))
    order += of_parameters("grad", "ln_f") + of_parameters("grad", "lm_head") + of_parameters("grad", "embed")
    update = ["clip", *(f"{kind}.{name}" for kind in ("m", "v", "param") for name in names)]
    return [*forward, "loss", *order, *update]


KINDS = ("param", "m", "v")
"""What a state is made of: what the names of its sites begin with."""


def phase_of(site: str) -> str:
    """The phase in which a site is passed."""
    if site.startswith(("grad:", "grad.")):
        return "backward"
    if site.startswith(tuple(f"{kind}." for kind in KINDS)):
        return "update"
    return "clip" if site == "clip" else "forward"


def parameter_of(site: str) -> str | None:
    """The parameter that a site is about, such as ``ln_f.bias`` of ``grad.ln_f.bias``; None where it is about none."""
    kind, _, name = site.partition(".")
    return name if kind in (*KINDS, "grad") else None


@dataclass(frozen=True)
class Layer:
    """Neighbours in a table: tensors first..last-1, elements start..end-1 of the flat buffer."""

    name: str
    first: int
    last: int
    start: int
    end: int


class Tensors(Mapping[str, NDArray[np.float32]]):
    """Named views into one flat float32 buffer: parameters, gradients, m or v.

    ``tensors["lm_head.bias"]`` is a writeable view; ``tensors.flat`` (P,) is the buffer; ``offsets`` (n + 1,) int64
    says where each tensor starts.
    """

    def __init__(self, table: Sequence[Parameter], flat: NDArray[np.float32] | None = None) -> None:
        """Zeros, or the numbers that stand in ``flat``."""
        self.table = list(table)
        counts = [math.prod(p.shape) for p in self.table]
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.flat = zeros(int(self.offsets[-1])) if flat is None else flat
        bounds = zip(self.table, self.offsets[:-1], self.offsets[1:], strict=True)
        self._views = {p.name: self.flat[a:b].reshape(p.shape) for p, a, b in bounds}

    @property
    def layers(self) -> list[Layer]:
        """Which tensors belong together, in order: embedding, blocks, last normalisation, head. Empty ones left out."""

        def layer(i: int) -> str:
            words = self.table[i].name.split(".")
            return ".".join(words[: 1 + (words[0] == "block")])

        runs = [(name, list(run)) for name, run in groupby(range(len(self.table)), layer)]
        ends = self.offsets.tolist()
        layers = [Layer(name, run[0], run[-1] + 1, ends[run[0]], ends[run[-1] + 1]) for name, run in runs]
        return [layer for layer in layers if layer.start < layer.end]

    def place(self, name: str) -> tuple[int, int]:
        """Elements of its layer that come before a tensor, and those of the whole layer."""
        i = next(i for i, p in enumerate(self.table) if p.name == name)
        layer = next(layer for layer in self.layers if layer.first <= i < layer.last)
        return int(self.offsets[i]) - layer.start, layer.end - layer.start

    def like(self) -> Tensors:
        """The same names and shapes, zeros."""
        return Tensors(self.table)

    def copy(self) -> Tensors:
        """The same names, shapes and bits."""
        copy = self.like()
        copy.flat[:] = self.flat
        return copy

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


CACHE_LINE = 64
"""Bytes; also the widest vector of the kernels, whose loads cost twice across two lines."""


def zeros(*shape: int) -> NDArray[np.float32]:
    """Zeros that begin at a cache line: 3 % of a step, against arrays that begin where malloc puts them."""
    size = 4 * math.prod(shape)
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(np.float32).reshape(shape)


def pages(size: int) -> memoryview:
    """Zeros from the front of a page on; large pages where the system has them, which are less work for its kernel."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def canonical_bits(array: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The bits that digests and comparisons use: every NaN becomes 0x7FC00000 (payloads differ between processors)."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    nan = np.isnan(array)
    return np.where(nan, np.uint32(0x7FC00000), bits) if nan.any() else bits


def digest(*arrays: NDArray[np.float32]) -> str:
    """xxh3-128 over the arrays' canonical little-endian bits, as 32 hex digits. -0.0 and 0.0 differ."""
    h = xxhash.xxh3_128()
    for array in arrays:
        h.update(canonical_bits(array).view(np.uint8).data)
    return str(h.hexdigest())
