"""Clipping and AdamW, against the textbook in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain.errors import KernelArgumentError
from minitrain.optim import AdamW, Norms, global_grad_norm
from minitrain.sections import ModelConfig, OptimizerConfig
from minitrain.tensors import Parameter, Tensors, parameter_table

CONFIG = ModelConfig(n_layer=1, n_head=2, d_model=12, d_ff=20, vocab_size=37)
NO_CLIP = OptimizerConfig(clip=None)


def make(seed: int = 0) -> tuple[Tensors, Tensors]:
    """Parameters and gradients of size about 1."""
    rng = np.random.default_rng(seed)
    params = Tensors(parameter_table(CONFIG))
    grads = params.like()
    params.flat[:], grads.flat[:] = rng.standard_normal((2, len(params.flat)))
    return params, grads


def exact_norm(grads: Tensors) -> float:
    return float(np.sqrt((grads.flat.astype(np.float64) ** 2).sum()))


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(0, 0.1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.sampled_from([1e-8, 1e-3]),
    decay=st.floats(0, 1),
)
def test_against_the_textbook(seed, lr, beta1, beta2, eps, decay):
    """20 steps of Loshchilov & Hutter's algorithm 2, decay on matrices alone, with a rate that changes."""
    params, grads = make(seed)
    rng = np.random.default_rng(seed)
    config = OptimizerConfig(clip=None, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)
    optimizer = AdamW(config)
    decays = np.concatenate([np.full(math.prod(p.shape), len(p.shape) == 2) for p in params.table])
    theta, m, v = params.flat.astype(np.float64), 0.0, 0.0
    for t in range(1, 21):
        grads.flat[:] = rng.standard_normal(len(grads.flat)) * rng.choice([1e-3, 1, 30])
        g, optimizer.lr = grads.flat.astype(np.float64), lr / t
        optimizer.step(params, grads)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        theta = theta - lr / t * (step + decay * decays * theta)
    assert optimizer.updates == 20
    for actual, exact in ((optimizer.m.flat, m), (optimizer.v.flat, v), (params.flat, theta)):
        assert np.abs(actual - exact).max() <= 1e-5 * np.abs(exact).max()


def test_decay_is_for_matrices():
    """With zero gradients matrices and embeddings shrink by lr * decay, vectors stay bit for bit."""
    params, grads = make()
    grads.flat[:] = 0
    before = params.flat.copy()
    AdamW(OptimizerConfig(weight_decay=0.5), lr=0.1).step(params, grads)
    for p, start, end in zip(params.table, params.offsets[:-1], params.offsets[1:], strict=True):
        kept = before[start:end]
        if len(p.shape) == 2:
            np.testing.assert_allclose(params.flat[start:end], 0.95 * kept, rtol=2e-7)
        else:
            assert np.array_equal(params.flat[start:end], kept), p.name


def test_first_step_has_the_size_of_the_rate():
    """Bias correction: whatever the gradient's size, step 1 moves each element by lr against its sign."""
    params, grads = make()
    before = params.flat.copy()
    AdamW(OptimizerConfig(clip=None, weight_decay=0), lr=0.01).step(params, grads)
    np.testing.assert_allclose(params.flat - before, -0.01 * np.sign(grads.flat), atol=2e-6)


# Norm and clipping


@settings(deadline=None, max_examples=20)
@given(size=st.floats(1e-15, 1e15), seed=st.integers(0, 2**32 - 1))
def test_global_norm(size, seed):
    """The L2 norm over all tensors as NumPy has it in double precision, from Tensors or any mapping."""
    _, grads = make(seed)
    grads.flat *= np.float32(size)
    assert global_grad_norm(grads) == pytest.approx(exact_norm(grads), rel=1e-6)
    assert global_grad_norm(dict(grads)) == global_grad_norm(grads)


@pytest.mark.parametrize("clip", [None, 1e9])
def test_below_the_limit_nothing_happens(clip):
    """No limit, or one that the norm does not reach: the gradients keep their bits."""
    params, grads = make()
    before = grads.flat.copy()
    optimizer = AdamW(OptimizerConfig(clip=clip))
    norms = optimizer.clip(params, grads)
    assert np.array_equal(grads.flat, before)
    assert norms.before == norms.after == pytest.approx(exact_norm(grads), rel=1e-6)
    assert optimizer.norms == norms


def test_above_the_limit_the_norm_becomes_the_limit():
    """All elements by the same factor, clip / norm."""
    params, grads = make()
    before, norm = grads.flat.copy(), exact_norm(grads)
    norms = AdamW(OptimizerConfig(clip=0.5)).clip(params, grads)
    np.testing.assert_allclose(grads.flat, before * (0.5 / norm), rtol=1e-6)
    assert norms.before == pytest.approx(norm, rel=1e-6)
    assert norms.after == pytest.approx(0.5, rel=1e-6)
    assert exact_norm(grads) == pytest.approx(norms.after, rel=1e-6)


def test_clip_value_comes_first():
    """Elements are cut to +-clip_value, then the norm of what is left is held against clip; `before` is of neither."""
    params, grads = make()
    raw, norm = grads.flat.copy(), exact_norm(grads)
    norms = AdamW(OptimizerConfig(clip=None, clip_value=0.3)).clip(params, grads)
    cut = np.clip(raw, np.float32(-0.3), np.float32(0.3))
    assert np.array_equal(grads.flat, cut)
    assert norms.before == pytest.approx(norm, rel=1e-6)
    assert norms.after == pytest.approx(exact_norm(grads), rel=1e-6)
    grads.flat[:] = raw
    norms = AdamW(OptimizerConfig(clip=2.0, clip_value=0.3)).clip(params, grads)
    np.testing.assert_allclose(grads.flat, cut * (2 / np.sqrt((cut.astype(float) ** 2).sum())), rtol=1e-6)
    assert norms == Norms(pytest.approx(norm, rel=1e-6), pytest.approx(2, rel=1e-6))


def test_zero_gradients():
    """A norm of 0 divides nothing."""
    params, grads = make()
    grads.flat[:] = 0
    before = params.flat.copy()
    optimizer = AdamW(OptimizerConfig(weight_decay=0))
    assert optimizer.step(params, grads) == Norms(0, 0)
    assert np.array_equal(params.flat, before)


@pytest.mark.parametrize("config", [OptimizerConfig(), NO_CLIP, OptimizerConfig(clip=1.0, clip_value=1.0)])
@pytest.mark.parametrize("place", [0, 5, -1])
def test_nan_stays_where_it_is(config, place):
    """One NaN: both norms are NaN, nothing is scaled, and the update takes it to its own parameter alone."""
    params, grads = make()
    grads.flat[place] = np.nan
    before = grads.flat.copy()
    optimizer = AdamW(config)
    norms = optimizer.step(params, grads)
    assert math.isnan(norms.before)
    assert math.isnan(norms.after)
    limit = config.clip_value or np.inf
    assert np.array_equal(grads.flat, before.clip(-limit, limit), equal_nan=True)
    for changed in (params, optimizer.m, optimizer.v):
        assert np.flatnonzero(np.isnan(changed.flat)).tolist() == [place % len(before)]


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_is_not_hidden(value):
    """An infinite gradient shows in `before`, also where clip_value then cuts it off."""
    params, grads = make()
    grads.flat[7] = value
    norms = AdamW(OptimizerConfig()).clip(params, grads)
    assert norms.before == np.inf
    assert norms.after == np.inf
    assert grads.flat[7] == value
    grads.flat[7] = value
    grads.flat[:7] = grads.flat[8:] = 0
    norms = AdamW(OptimizerConfig(clip_value=0.5)).clip(params, grads)
    assert norms == Norms(np.inf, 0.5)
    assert grads.flat[7] == np.copysign(0.5, value)


# Buffers


def test_moments_appear_with_the_first_binding():
    """m and v have the parameters' names, start as zeros, and stay the same arrays when buffers change."""
    params, grads = make()
    optimizer = AdamW()
    assert optimizer.m is None
    m, v = optimizer.bind(params, grads)
    assert list(m) == list(v) == list(params)
    assert not m.flat.any()
    assert not v.flat.any()
    assert optimizer.bind(*make(1)) == (m, v)
    optimizer.step(params, grads)
    assert optimizer.m is m
    assert m.flat.any()


@pytest.mark.parametrize(("rows", "got"), [(5, 20), (3, 12)])
def test_gradients_of_other_parameters(rows, got):
    """Gradients are as many as parameters, whatever they are called; nothing is clipped or updated otherwise."""
    params = Tensors([Parameter("w", (4, 4), "ones")])
    grads = Tensors([Parameter("w", (rows, 4), "ones")])
    with pytest.raises(KernelArgumentError, match=f"AdamW: gradients: expected 16 elements, .* got {got}"):
        AdamW().step(params, grads)


def test_tensors_of_any_name():
    """Names without dots, of one layer or of many, one of no elements: each is updated, once."""
    shapes = {"a": (3, 5), "b.c": (0,), "b.d": (7,), "block.x": (2, 2), "block": (1,)}
    params, grads = (Tensors([Parameter(name, shape, "ones") for name, shape in shapes.items()]) for _ in range(2))
    grads.flat[:] = 1e-3
    AdamW(OptimizerConfig(weight_decay=0), lr=0.5).step(params, grads)
    assert params.flat == pytest.approx(-0.5, rel=1e-4)


def test_rebinding_updates_the_new_buffers():
    """After a step on one pair of buffers, a step on another moves those and not the first."""
    optimizer = AdamW()
    first, second = make(), make(1)
    optimizer.step(*first)
    kept, moved = first[0].flat.copy(), second[0].flat.copy()
    optimizer.step(*second)
    assert np.array_equal(first[0].flat, kept)
    assert not np.array_equal(second[0].flat, moved)
