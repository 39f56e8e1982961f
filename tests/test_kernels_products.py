"""Matrix products: large ones in blocks, and gradients of which whole rows are zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain._ext import engine
from minitrain._ext.signatures import SIGNATURES

LARGE = {  # B, T, N, K past the point where the left-hand side is packed, odd in every direction
    "linear_forward": dict(B=3, T=131, N=1061, K=277),
    "linear_backward_input": dict(B=3, T=131, K=101, N=523),
    "linear_backward_weight": dict(B=3, T=101, N=521, K=103),
}


@pytest.mark.parametrize("kernel", LARGE)
def test_large_products_are_small_ones(kernel, kernels, backends):
    """A product that is done block by block has the bits of the same product done in pieces of up to 90 rows and
    columns, which are too small for blocks: on every instruction set and thread count."""
    sizes = LARGE[kernel]
    arguments = kernels.arguments(kernel, sizes, np.random.default_rng(0))
    if kernel != "linear_backward_weight":
        arguments[-1] = np.arange(sizes["N"], dtype=np.float32) if kernel == "linear_forward" else 1
    if kernel == "linear_backward_input":
        arguments[0][...] = 0.5

    def cut(array: np.ndarray, axis: int, low: int, high: int) -> np.ndarray:
        return np.ascontiguousarray(array[(slice(None),) * axis + (slice(low, high),)])

    if kernel == "linear_backward_weight":
        arguments[1] = np.zeros_like(arguments[0])
    expected = np.empty_like(arguments[0])
    columns = expected.shape[-1]
    for low in range(0, columns, 90):
        high = min(low + 90, columns)
        out, *rest = (a.copy() if isinstance(a, np.ndarray) else a for a in arguments)
        beside = [cut(rest.pop(0), 1, low, high)] if kernel == "linear_backward_weight" else []  # the parameter
        left, right, *rest = rest
        axis = 0 if kernel == "linear_forward" else right.ndim - 1  # where the columns stand in the right-hand side
        right = cut(right, axis, low, high)
        if kernel == "linear_forward":
            rest = [cut(rest[0], 0, low, high)]
        piece = [cut(out, out.ndim - 1, low, high), *beside, left, right, *rest]
        expected[..., low:high] = kernels.run(backends[engine.instruction_sets()[0], 1], kernel, piece)[
            SIGNATURES[kernel].arrays[0].name
        ]
    for key, backend in backends.items():
        actual = kernels.run(backend, kernel, arguments)[SIGNATURES[kernel].arrays[0].name]
        assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32)), key


GAPS = {  # small and large products, of more and of less than one block of k
    "small": dict(B=3, T=37, N=61, K=70),
    "long sums": dict(B=1, T=50, N=300, K=33),
    "large": dict(B=3, T=131, N=301, K=101),
}


@pytest.mark.parametrize("size", GAPS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), accumulate=st.booleans(), harsh=st.booleans())
def test_rows_of_zeros_change_no_bit(size, kernels, backends, seed, accumulate, harsh):
    """Tiles of a gradient that are nothing but zeros, of either sign, are left out: what comes out has the bits of the
    dense product (a forward product with the weights turned), also where a weight is NaN or Inf."""
    B, T, N, K = GAPS[size].values()
    rng = np.random.default_rng(seed)
    dx, dy, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, K), (B, T, N), (N, K)))
    for sequence in dy:  # as padding leaves it, and some rows between
        sequence[rng.integers(T + 1) :] = 0
        sequence[rng.random(T) < 0.3] = 0
    dy[rng.random(dy.shape) < 0.01] = -0.0
    dx[rng.random(dx.shape) < 0.1] = -0.0
    if harsh:
        weight[rng.integers(N), rng.integers(K)] = rng.choice([np.nan, np.inf, -np.inf])
    for key, backend in backends.items():
        expected = dx if accumulate else None
        for low in range(0, N, 256):  # each block of k is a sum of its own
            part = [np.ascontiguousarray(a) for a in (dy[..., low : low + 256], weight[low : low + 256].T)]
            dense = kernels.run(backend, "linear_forward", [np.empty_like(dx), *part, None])["y"]
            with np.errstate(all="ignore"):
                expected = dense if expected is None else expected + dense
        actual = kernels.run(backend, "linear_backward_input", [dx, dy, weight, int(accumulate)])["dx"]
        assert np.array_equal(kernels.bits(actual), kernels.bits(expected)), key
