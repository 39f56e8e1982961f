"""What every kernel takes: one line each, for the compiled kernels and their NumPy twins alike.

``outputs; inputs; numbers``. An array is written ``name[dims]``, float32 unless a dtype follows, optional with ``?``;
a letter stands for the same size wherever a line uses it. ``split`` says what threads share out:

* ``sequence`` - sequences of the batch (dimension B): all work on activations;
* ``strips`` - 16 rows of the first output each: all work on parameters' gradients. Operations that follow each other
  with this split or one of the next two must not read what another of them writes, unless the shares are the same;
* ``blocks`` - blocks of 4096 elements, ``elements`` - groups of 16: work on the flat buffers;
* ``none`` - one thread.

``weight`` of linear_backward_weight keeps its bits, but threads take its cache lines from each other: nobody may read
it meanwhile.

``todo`` of adamw_copying says how a block is updated: 1 as it is, 2 if its ``sums`` are those of the last time; it is 0
when that has been done.

Values are the caller's business: token ids within the vocabulary (MiniGPT checks them), ``offsets`` that rise to P,
attention weights and their gradients that are 0 past the causal blocks when they are made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitrain.errors import KernelArgumentError

NUMERICS_VERSION = 1
"""Raised by every change that moves a bit of a run (CHANGELOG.md says which)."""

SPLITS = ("none", "sequence", "strips", "blocks", "elements")
MATMUL_FLOATS = 16 * (256 * 8 + 16) + 1024 * 256
"""Scratch of a matrix product: a packed block of the left-hand side and packed columns of the right (include/tile.h:
BLOCK_TILES * TILE_FLOATS(DEPTH) + BLOCK_COLUMNS * DEPTH, with the larger of the two TILE_ROWS)."""

Sizes = dict[str, int]
Rule = tuple[str, str, Callable[[Sizes], bool]]
"""An argument, what its shape must be beside its letters, and the test."""


@dataclass(frozen=True)
class Argument:
    name: str
    dims: tuple[str, ...]
    dtype: np.dtype[Any]
    optional: bool
    output: bool


@dataclass(frozen=True)
class Signature:
    """The arguments of one kernel, in order: arrays (outputs, then inputs), then numbers."""

    name: str
    arrays: tuple[Argument, ...]
    numbers: tuple[str, ...]
    split: str
    scratch: Callable[[Sizes], int]
    rules: tuple[Rule, ...]

    @property
    def parameters(self) -> list[str]:
        return [a.name for a in self.arrays] + list(self.numbers)

    def sizes(self, arguments: Sequence[Any], *, floats: np.dtype[Any] | None = None) -> Sizes:
        """Check the arguments and return the dimensions by letter, in the order in which the line names them.

        ``floats`` replaces float32 (the twins also run in float64). Raises KernelArgumentError naming the argument,
        what was expected and what came.
        """
        if len(arguments) != len(self.parameters):
            raise KernelArgumentError(
                f"{self.name}: expected {len(self.parameters)} arguments "
                f"({', '.join(self.parameters)}), got {len(arguments)}"
            )
        sizes: Sizes = {}
        for argument, value in zip(self.arrays, arguments, strict=False):
            if value is None and argument.optional:
                continue
            self._check(argument, value, sizes, floats)
        for name, expected, holds in self.rules:
            if not holds(sizes):
                shape = arguments[self.parameters.index(name)].shape
                raise KernelArgumentError(f"{self.name}: argument {name}: expected {expected}, got shape {shape}")
        return sizes

    def _check(self, argument: Argument, value: Any, sizes: Sizes, floats: np.dtype[Any] | None) -> None:
        def refuse(expected: object, got: object) -> None:
            raise KernelArgumentError(f"{self.name}: argument {argument.name}: expected {expected}, got {got}")

        dtype = floats if floats is not None and argument.dtype == np.float32 else argument.dtype
        if not isinstance(value, np.ndarray):
            refuse(f"a NumPy array of {dtype}", f"{type(value).__name__}")
        if value.dtype != dtype:
            refuse(f"dtype {dtype}", f"dtype {value.dtype}")
        expected = tuple(sizes.get(d, d) for d in argument.dims)
        shown = "(" + ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "") + ")"
        if value.ndim != len(expected) or any(
            isinstance(e, int) and e != s for e, s in zip(expected, value.shape, strict=True)
        ):
            refuse(f"shape {shown}", f"shape {value.shape}")
        for dim, size in zip(argument.dims, value.shape, strict=True):
            if sizes.setdefault(dim, size) != size or size < 1:
                refuse(f"shape {shown}", f"shape {value.shape}")
        if not value.flags.c_contiguous:
            refuse("a C-contiguous array", f"strides {value.strides} for shape {value.shape}")
        if argument.output and not value.flags.writeable:
            refuse("a writeable array", "a read-only one")

    def units(self, sizes: Sizes) -> int:
        """How many shares there are at most."""
        if self.split == "none":
            return 1
        if self.split == "sequence":
            return sizes["B"]
        if self.split == "blocks":
            return -(-sizes["P"] // 4096)
        if self.split == "elements":
            return -(-sizes["P"] // 16)
        return -(-sizes[self.arrays[0].dims[0]] // 16)

    def strip(self, sizes: Sizes) -> int:
        """Elements of a strip."""
        return 16 * math.prod(sizes[d] for d in self.arrays[0].dims[1:])


_ARRAY = re.compile(r"(\w+)\[([\w,]+)\](?::(\w+))?(\?)?")


def _signature(
    name: str, text: str, split: str, scratch: Callable[[Sizes], int] = lambda _: 0, rules: tuple[Rule, ...] = ()
) -> Signature:
    outputs, inputs, numbers = (text.split(";") + [""])[:3]
    arrays = [
        Argument(m[1], tuple(m[2].split(",")), np.dtype(m[3] or "f4"), bool(m[4]), part is outputs)
        for part in (outputs, inputs)
        for m in _ARRAY.finditer(part)
    ]
    assert split in SPLITS
    return Signature(name, tuple(arrays), tuple(numbers.replace(",", " ").split()), split, scratch, rules)


def _attention_scratch(s: Sizes) -> int:
    """Score gradients (T, T), the lane masks of the keys, and panels of (T, D) or (D, T), widths rounded up to 32."""
    T, D = s["T"], s["C"] // s["H"]
    return T * T + T + max(T * (D + 32), D * (T + 32)) + 64


_HEADS: Rule = ("p", "(B, H, T, T) with H heads that divide C", lambda s: s["C"] % s["H"] == 0)
_RESULT: Rule = ("result", "mean, sum and count", lambda s: s["R"] == 3)
_KEY: Rule = ("key", "seed, purpose and step", lambda s: s["W"] == 3)
_PAIRS: Rule = ("x", "(B, T, C) with C even", lambda s: s["C"] % 2 == 0)
_BLOCKS: Rule = ("sums", "one sum for each 4096 elements of g", lambda s: s["G"] == -(-s["P"] // 4096))
_SEGMENTS: Rule = ("offsets", "one more than segments in decays", lambda s: s["E"] == s["S"] + 1)
_FOUR: Rule = ("sums", "one for theta, m and v each, and one more", lambda s: s["L"] == 4)
_HYPER: Rule = ("hyper", "lr, beta1, beta2, eps, decay and t", lambda s: s["R"] == 6)

SIGNATURES: dict[str, Signature] = {
    s.name: s
    for s in [
        _signature("linear_forward", "y[B,T,N]; x[B,T,K], weight[N,K], bias[N]?", "sequence", lambda _: MATMUL_FLOATS),
        _signature(
            "linear_backward_input",
            "dx[B,T,K]; dy[B,T,N], weight[N,K]; accumulate",
            "sequence",
            lambda _: MATMUL_FLOATS,
        ),
        _signature(
            "linear_backward_weight",
            "dweight[N,K], weight[N,K]?; dy[B,T,N], x[B,T,K]",
            "strips",
            lambda _: MATMUL_FLOATS,
        ),
        _signature("bias_backward", "dbias[B,N]; dy[B,T,N]", "sequence"),
        _signature("sum_sequences", "total[N]; partial[B,N]", "strips"),
        _signature("embedding_forward", "x[B,T,C]; tokens[B,T]:i4, weight[V,C]", "sequence"),
        _signature("embedding_backward", "dweight[V,C]; tokens[B,T]:i4, dx[B,T,C]; accumulate", "strips"),
        _signature("layernorm_forward", "y[B,T,C], mean[B,T], rstd[B,T]; x[B,T,C], gamma[C], beta[C]; eps", "sequence"),
        _signature(
            "layernorm_backward",
            "dx[B,T,C], dgamma[B,C], dbeta[B,C];"
            " dy[B,T,C], dresidual[B,T,C]?, x[B,T,C], mean[B,T], rstd[B,T], gamma[C]",
            "sequence",
        ),
        _signature("gelu_forward", "y[B,T,C], slope[B,T,C]; x[B,T,C]", "sequence"),
        _signature("gelu_backward", "dx[B,T,C]; dy[B,T,C], slope[B,T,C]", "sequence"),
        _signature("residual_forward", "y[B,T,C]; x[B,T,C], branch[B,T,C]", "sequence"),
        _signature("rope", "x[B,T,C]; cosine[T,C], sine[T,C]; direction", "sequence", rules=(_PAIRS,)),
        _signature("dropout", "y[B,T,C]; x[B,T,C], key[W]:u4; site, rate", "sequence", rules=(_KEY,)),
        _signature(
            "attention_forward",
            "o[B,T,C], p[B,H,T,T]; q[B,T,C], k[B,T,C], v[B,T,C], key_mask[B,T]:u1",
            "sequence",
            _attention_scratch,
            (_HEADS,),
        ),
        _signature(
            "attention_backward",
            "dq[B,T,C], dk[B,T,C], dv[B,T,C], dp[B,H,T,T]; do[B,T,C], p[B,H,T,T], q[B,T,C], k[B,T,C], v[B,T,C]",
            "sequence",
            _attention_scratch,
            (_HEADS,),
        ),
        _signature(
            "cross_entropy_forward",
            "losses[B,T], softmax[B,T,V], log_softmax[B,T,V]; logits[B,T,V], targets[B,T]:i4, loss_mask[B,T]:u1",
            "sequence",
            lambda s: 2 * s["T"],
        ),
        _signature("mean_loss", "result[R]:f8; losses[B,T], loss_mask[B,T]:u1", "none", rules=(_RESULT,)),
        _signature(
            "cross_entropy_backward",
            "dlogits[B,T,V]; softmax[B,T,V], targets[B,T]:i4, loss_mask[B,T]:u1, result[R]:f8",
            "sequence",
            rules=(_RESULT,),
        ),
        _signature("square_sums", "sums[G]:f8; g[P]", "blocks", rules=(_BLOCKS,)),
        _signature("norm", "result[R]:f8; sums[G]:f8", "none"),
        _signature("scale", "g[P]; factor[R]:f8", "elements"),
        _signature("clamp", "g[P]; limit[R]:f8", "elements"),
        _signature(
            "adamw",
            "theta[P], m[P], v[P]; g[P], offsets[E]:i8, decays[S]:u1, hyper[R]:f8",
            "elements",
            rules=(_SEGMENTS, _HYPER),
        ),
        _signature(
            "adamw_copying",
            "theta[P], m[P], v[P], theta_copy[P], m_copy[P], v_copy[P], sums[G,L]:u4, todo[G]:u1;"
            " g[P], offsets[E]:i8, decays[S]:u1, hyper[R]:f8",
            "blocks",
            rules=(_SEGMENTS, _HYPER, _FOUR, _BLOCKS),
        ),
        _signature(
            "adamw_theta",
            "theta[P]; m[P], v[P], offsets[E]:i8, decays[S]:u1, hyper[R]:f8",
            "elements",
            rules=(_SEGMENTS, _HYPER),
        ),
        _signature("exp", "y[P]; x[P]", "none"),
        _signature("log", "y[P]; x[P]", "none"),
    ]
}
