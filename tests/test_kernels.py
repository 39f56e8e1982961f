"""Every kernel against its NumPy twin in double precision, the twins against finite differences, and the one law:
the same bits for every instruction set and thread count."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain._ext import engine, reference
from minitrain._ext.plan import ReferenceBackend, call
from minitrain._ext.signatures import SIGNATURES

DOUBLE = ReferenceBackend(np.float64)
seeds = st.integers(0, 2**32 - 1)


def test_one_list_of_kernels():
    """Signatures, compiled addresses and twins name the same kernels; twins take the same parameters in order."""
    twins = {
        name: list(inspect.signature(f).parameters)
        for name, f in inspect.getmembers(reference, inspect.isfunction)
        if f.__module__ == reference.__name__ and not name.startswith("_")
    }
    assert twins == {name: s.parameters for name, s in SIGNATURES.items()}
    for isa in engine.instruction_sets():
        assert set(importlib.import_module(f"minitrain._ext.kernels_{isa}").addresses()) == set(SIGNATURES)
    assert set(TOLERANCE) == set(SIGNATURES)


# Against the twins

TOLERANCE = {
    "linear_forward": 8e-7,
    "linear_backward_input": 8e-7,
    "linear_backward_weight": 8e-7,
    "bias_backward": 5e-7,
    "sum_sequences": 3e-7,
    "embedding_forward": 0,
    "embedding_backward": 5e-7,
    "layernorm_forward": 4e-7,
    "layernorm_backward": 3e-6,
    "gelu_forward": 4e-6,  # slope, where 1 - s nearly cancels and x * dz is large; y is ten times better
    "gelu_backward": 1e-7,
    "residual_forward": 1e-7,
    "rope": 2e-7,
    "dropout": 2e-7,
    "attention_forward": 1.2e-6,
    "attention_backward": 2e-6,
    "cross_entropy_forward": 3e-7,
    "mean_loss": 1e-14,
    "cross_entropy_backward": 5e-8,
    "square_sums": 5e-7,
    "norm": 1e-14,
    "scale": 2e-7,
    "clamp": 1e-7,
    "adamw": 4.2e-7,  # seven roundings of 6e-8, where the step dwarfs theta: here m and v are drawn apart
    "adamw_copying": 4.2e-7,
    "adamw_theta": 2.7e-7,  # four and a half of the seven
    "exp": 2e-7,
    "log": 2e-7,
}
"""Largest error of an output, in units of `natural_size`."""

SUMS = (
    *("linear_forward", "linear_backward_input", "linear_backward_weight", "bias_backward", "sum_sequences"),
    *("embedding_forward", "embedding_backward", "gelu_backward", "residual_forward", "rope", "dropout", "mean_loss"),
    *("square_sums", "norm", "scale"),
)
"""Kernels that only add products: an element's error is measured against the sum of its terms' sizes."""


def natural_size(kernel: str, output: str, expected: np.ndarray, arguments: list[Any], kernels: Any) -> np.ndarray:
    """What an error is measured against; for most kernels max |expected|, but at least 1 because inputs of size 1
    may cancel."""
    if kernel in SUMS:
        absolute = [a if a is None or np.asarray(a).dtype.kind != "f" else abs(a) for a in arguments]
        return kernels.run(DOUBLE, kernel, absolute)[output]
    size = np.maximum(np.nanmax(np.abs(expected), initial=0), 1)
    if kernel == "layernorm_forward":  # rows of nearly equal values: what is left of x - mean is divided by almost 0
        x, gamma = arguments[3].astype(np.float64), np.abs(arguments[4]).max()
        largest, rstd = np.abs(x).max(), 1 / np.sqrt(x.var(-1).min() + 1e-5)
        size = np.maximum(size, {"y": largest * rstd * gamma, "mean": largest, "rstd": largest * rstd * rstd}[output])
    return size


@pytest.mark.parametrize("kernel", SIGNATURES)
@settings(deadline=None, max_examples=50)
@given(data=st.data(), seed=seeds)
def test_against_the_twin(kernel, kernels, isa_backend, data, seed):
    """For any shape and any optional argument, every element of every output is written, and is the twin's in
    double precision up to rounding."""
    sizes = kernels.sizes(kernel, lambda low, high: data.draw(st.integers(low, high)))
    arguments = kernels.arguments(kernel, sizes, np.random.default_rng(seed))
    actual = kernels.run(isa_backend, kernel, arguments)
    for name, expected in kernels.run(DOUBLE, kernel, arguments).items():
        if (kernel, name) == ("adamw_copying", "sums"):
            continue  # of bits, which are not the twin's; see test_what_an_update_copies
        allowed = TOLERANCE[kernel] * natural_size(kernel, name, expected, arguments, kernels)
        good = (np.abs(actual[name] - expected) <= allowed) | (np.isnan(actual[name]) & np.isnan(expected))
        worst = np.unravel_index(np.argmin(good), good.shape)
        assert good.all(), f"{name}[{worst}]: expected {expected[worst]} +- {allowed}, got {actual[name][worst]}"


# The same bits

GENTLE = (-0.0, 0.0, 1e-40, -1e-45, 3e-39, 1e-20, 1e15, -1e18)
HARSH = (np.nan, np.inf, -np.inf, 3e38, -3e38)


@pytest.mark.parametrize("kernel", SIGNATURES)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=seeds, values=st.sampled_from([(), GENTLE, HARSH, GENTLE + HARSH]))
def test_same_bits(kernel, kernels, backends, data, seed, values):
    """Outputs are equal bit for bit over all instruction sets and 1, 2, 3 threads, whatever stands in the inputs:
    also denormals, -0.0, numbers that overflow, Inf and NaN."""
    sizes = kernels.sizes(kernel, lambda low, high: data.draw(st.integers(low, high)))
    rng = np.random.default_rng(seed)
    arguments = kernels.arguments(kernel, sizes, rng)
    for i in kernels.read(kernel, arguments) if values else ():
        if arguments[i].dtype == np.float32:
            places = rng.random(arguments[i].shape) < rng.choice([0.02, 0.3])
            arguments[i][places] = rng.choice(values, places.sum())
            nan = np.isnan(arguments[i])  # of any payload, quiet or signalling, of either sign
            payloads = rng.integers(0x7F800001, 0x80000000, nan.sum()) | rng.integers(0, 2, nan.sum()) << 31
            arguments[i].view(np.uint32)[nan] = payloads
    results = {
        key: {name: kernels.bits(output) for name, output in kernels.run(backend, kernel, arguments).items()}
        for key, backend in backends.items()
    }
    if kernel == "adamw_copying" and values:  # of raw bits, where each processor has NaNs of its own
        for outputs in results.values():
            del outputs["sums"]
    first = next(iter(results))
    differing = [key for key, outputs in results.items() if outputs != results[first]]
    assert not differing, f"other bits than {first}"


def test_attention_leaves_what_is_masked(kernels, isa_backend):
    """Scores past the block of 16 queries are neither computed, read nor written: NaN may stand there."""
    sizes = {"B": 2, "T": 53, "C": 24, "H": 2}
    query, key = np.indices((53, 53))
    past = key >= np.minimum(53, query // 16 * 16 + 16)
    rng = np.random.default_rng(0)
    for kernel, position in (("attention_forward", 1), ("attention_backward", 3)):
        arguments = kernels.arguments(kernel, sizes, rng)
        clean = kernels.run(isa_backend, kernel, arguments)
        arguments[position][..., past] = np.nan
        if kernel == "attention_backward":
            arguments[5][..., past] = np.nan
        dirty = kernels.run(isa_backend, kernel, arguments)
        scores = SIGNATURES[kernel].arrays[position].name
        assert np.isnan(dirty[scores][..., past]).all()
        clean[scores][..., past] = np.nan
        for name in clean:
            assert kernels.bits(dirty[name]) == kernels.bits(clean[name]), f"{kernel}: {name}"


# The twins against finite differences


def twin(kernel: str, *arguments: Any) -> None:
    call(DOUBLE, kernel, *arguments)


def numeric_gradient(loss: Callable[[], float], x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of ``loss()`` for each element of x, which it reads."""
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + h
        above = loss()
        x[i] = kept - h
        gradient[i] = (above - loss()) / (2 * h)
        x[i] = kept
    return gradient


Case = Iterator[tuple[str, Callable[[], float], np.ndarray, np.ndarray]]
"""For each input: its name, the loss, the input, the gradient as the backward twins have it."""


def linear(rng: np.random.Generator) -> Case:
    x, w, b, g = (rng.standard_normal(s) for s in ((2, 3, 5), (4, 5), (4,), (2, 3, 4)))
    y, dx, dw, db, part = np.empty_like(g), np.ones_like(x), np.empty_like(w), np.empty_like(b), np.empty((2, 4))

    def loss() -> float:
        twin("linear_forward", y, x, w, b)
        return float((g * y).sum())

    twin("linear_backward_input", dx, g, w, 1)
    twin("linear_backward_weight", dw, None, g, x)
    twin("bias_backward", part, g)
    twin("sum_sequences", db, part)
    yield from (("x", loss, x, dx - 1), ("weight", loss, w, dw), ("bias", loss, b, db))


def layernorm(rng: np.random.Generator) -> Case:
    x, dy, dresidual = (rng.standard_normal((2, 3, 7)) for _ in range(3))
    gamma, beta = rng.standard_normal((2, 7))
    y, dx = np.empty((2, 2, 3, 7))
    mean, rstd = np.empty((2, 2, 3))
    part = np.empty((2, 2, 7))

    def loss() -> float:
        twin("layernorm_forward", y, mean, rstd, x, gamma, beta, 1e-5)
        return float((dy * y + dresidual * x).sum())  # x also goes on past the layer

    loss()
    twin("layernorm_backward", dx, part[0], part[1], dy, dresidual, x, mean, rstd, gamma)
    dgamma, dbeta = np.empty(7), np.empty(7)
    twin("sum_sequences", dgamma, part[0])
    twin("sum_sequences", dbeta, part[1])
    yield from (("x", loss, x, dx), ("gamma", loss, gamma, dgamma), ("beta", loss, beta, dbeta))


def gelu(rng: np.random.Generator) -> Case:
    x, dy = 3 * rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 5))
    y, slope, dx = np.empty_like(x), np.empty_like(x), np.empty_like(x)

    def loss() -> float:
        twin("gelu_forward", y, slope, x)
        return float((dy * y).sum())

    loss()
    twin("gelu_backward", dx, dy, slope)
    yield "x", loss, x, dx


def residual(rng: np.random.Generator) -> Case:
    x, branch, dy = rng.standard_normal((3, 2, 3, 5))
    y = np.empty_like(x)

    def loss() -> float:
        twin("residual_forward", y, x, branch)
        return float((dy * y).sum())

    yield from (("x", loss, x, dy), ("branch", loss, branch, dy))


def rope(rng: np.random.Generator) -> Case:
    x, dy = rng.standard_normal((2, 2, 3, 8))
    angle = np.repeat(rng.standard_normal((3, 4)), 2, -1)
    cosine, sine = np.cos(angle), np.sin(angle) * np.tile([-1, 1], 4)
    dx = dy.copy()
    twin("rope", dx, cosine, sine, -1)

    def loss() -> float:
        y = x.copy()
        twin("rope", y, cosine, sine, 1)
        return float((dy * y).sum())

    yield "x", loss, x, dx


def dropout(rng: np.random.Generator) -> Case:
    x, dy = rng.standard_normal((2, 2, 3, 5))
    y, dx, key = np.empty_like(x), np.empty_like(x), np.array([1, 2, 3], np.uint32)
    twin("dropout", dx, dy, key, 4, 0.4)

    def loss() -> float:
        twin("dropout", y, x, key, 4, 0.4)
        return float((dy * y).sum())

    yield "x", loss, x, dx


def embedding(rng: np.random.Generator) -> Case:
    weight, dx = rng.standard_normal((6, 5)), rng.standard_normal((2, 4, 5))
    tokens = np.array([[0, 1, 1, 5], [1, 2, 0, 0]], np.int32)
    x, dweight, more = np.empty_like(dx), np.empty_like(weight), np.ones_like(weight)
    twin("embedding_backward", dweight, tokens, dx, 0)
    twin("embedding_backward", more, tokens, dx, 1)
    np.testing.assert_allclose(more, 1 + dweight, atol=1e-14)

    def loss() -> float:
        twin("embedding_forward", x, tokens, weight)
        return float((dx * x).sum())

    yield "weight", loss, weight, dweight


def attention(rng: np.random.Generator) -> Case:
    B, T, H, C = 2, 5, 2, 6
    q, k, v, do = rng.standard_normal((4, B, T, C))
    key_mask = np.array([[1, 1, 1, 1, 0], [0, 1, 0, 1, 1]], np.uint8)  # padding behind, and a query that sees no key
    o, p, dp = np.empty_like(q), np.empty((B, H, T, T)), np.empty((B, H, T, T))
    dq, dk, dv = np.empty((3, B, T, C))

    def loss() -> float:
        twin("attention_forward", o, p, q, k, v, key_mask)
        return float((do * o).sum())

    loss()
    twin("attention_backward", dq, dk, dv, dp, do, p, q, k, v)
    assert not p[1, :, 0].any()
    yield from (("q", loss, q, dq), ("k", loss, k, dk), ("v", loss, v, dv))


def cross_entropy(rng: np.random.Generator) -> Case:
    B, T, V = 2, 4, 7
    logits, targets = 2 * rng.standard_normal((B, T, V)), rng.integers(V, size=(B, T)).astype(np.int32)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 1]], np.uint8)
    softmax, log_softmax, dlogits = np.empty((3, B, T, V))
    losses, result = np.empty((B, T)), np.empty(3)

    def loss() -> float:
        twin("cross_entropy_forward", losses, softmax, log_softmax, logits, targets, mask)
        twin("mean_loss", result, losses, mask)
        return float(result[0])

    loss()
    twin("cross_entropy_backward", dlogits, softmax, targets, mask, result)
    yield "logits", loss, logits, dlogits


FAMILIES = (linear, layernorm, gelu, residual, rope, dropout, embedding, attention, cross_entropy)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_the_twins(family, seed):
    """In double precision the backward twins are the central differences of the forward ones: the oracle is right."""
    for name, loss, x, gradient in family(np.random.default_rng(seed)):
        expected = numeric_gradient(loss, x)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8 * max(1, np.abs(expected).max()), err_msg=name)


def test_every_backward_kernel_is_in_a_family():
    """A backward kernel that no finite difference has seen would be an oracle on trust."""
    source = "".join(inspect.getsource(f) for f in FAMILIES)
    assert not [name for name in SIGNATURES if "backward" in name and f'"{name}"' not in source]
