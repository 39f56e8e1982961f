"""MiniGPT against a double-precision model of its own kind, written from primitive operations alone (textbook.py)."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import textbook

from minitrain._ext.plan import ReferenceBackend
from minitrain.model import MiniGPT
from minitrain.optim import AdamW
from minitrain.rng import Purpose, Stream
from minitrain.sections import ModelConfig, OptimizerConfig


def lively(model: MiniGPT, seed: int = 0) -> MiniGPT:
    """Weights large enough that every part of the model matters: at the start attention is nearly even."""
    rng = np.random.default_rng(seed)
    model.params.flat[:] += 0.2 * rng.standard_normal(len(model.params.flat))
    return model


def test_the_textbook_is_right(odd_config, make_batch):
    """Its gradient along a random direction in each tensor is the central difference of its loss."""
    config = odd_config.model_copy(update={"tie_weights": False})
    params = {k: v.astype(np.float64) for k, v in lively(MiniGPT(config)).params.items()}
    batch = make_batch(config, 3)
    loss, p, _ = textbook(config, params, batch)
    loss.backward()
    rng = np.random.default_rng(1)
    for name, value in params.items():
        direction = rng.standard_normal(value.shape)
        above, below = (
            textbook(config, params | {name: value + h * direction}, batch)[0].value.item() for h in (1e-5, -1e-5)
        )
        assert (p[name].grad * direction).sum() == pytest.approx((above - below) / 2e-5, rel=1e-6, abs=1e-9), name


def compare(batch, *models: MiniGPT, masks=None, floor=0.0) -> None:
    """Loss, logits and gradients of models that have the same parameters, against the textbook's: within 1e-5 of the
    largest element of each tensor, which counts as at least ``floor`` of the largest of all."""
    exact, p, exact_logits = textbook(models[0].config, models[0].params, batch, masks)
    exact.backward()
    sizes = {name: np.abs(x.grad).max() for name, x in p.items()}
    largest = max(sizes.values())
    for model in models:
        logits, loss = model.forward(*batch)
        assert loss == pytest.approx(exact.value.item(), rel=2e-6)
        assert np.abs(logits - exact_logits.value).max() <= 1e-5 * max(1, np.abs(exact_logits.value).max())
        for name, grad in model.backward().items():
            error = np.abs(grad - p[name].grad).max() / max(sizes[name], floor * largest)
            assert error <= 1e-5, f"{model.backend.isa}: {name}: {error:.2g}"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shape", ["default", "odd"])
@pytest.mark.parametrize("weights", ["initial", "lively"])
def test_gradients(shape, tied, weights, odd_config, make_batch, backends):
    """Loss, logits and every gradient are the textbook's in double precision, within 1e-5 of the largest element of
    the tensor, for every instruction set and thread count, and for the NumPy twins; batches hold padding."""
    config = (odd_config if shape == "odd" else ModelConfig()).model_copy(update={"tie_weights": tied})
    models = [MiniGPT(config, backend=backend) for backend in [*backends.values(), ReferenceBackend()]]
    if weights == "lively":
        models = [lively(model) for model in models]
    compare(make_batch(config, 3 if shape == "odd" else 8), *models)


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_shape(data, make_batch):
    """Gradients are the textbook's for shapes drawn at random (some tensors have none: one position needs no query)."""
    draw: Callable[[int, int], int] = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    heads = draw(1, 4)
    config = ModelConfig(
        n_layer=draw(1, 3),
        n_head=heads,
        d_model=2 * heads * draw(3, 9),  # a norm of two columns leaves nothing but signs
        d_ff=draw(1, 70),
        vocab_size=draw(5, 70),
        max_seq_len=draw(1, 40),
        tie_weights=data.draw(st.booleans()),
    )
    compare(make_batch(config, draw(1, 4), draw(0, 99)), lively(MiniGPT(config)), floor=0.01)


# The start, and that it learns


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_loss_before_training(seed, make_batch):
    """A fresh model knows nothing: its loss is ln V, within 0.5."""
    config = ModelConfig()
    loss = MiniGPT(config, seed=seed).forward(*make_batch(config, 8, seed))[1]
    assert abs(loss - math.log(config.vocab_size)) < 0.5


def test_initial_weights():
    """Std 0.02, residual projections smaller by 1/sqrt(2 n_layer), gains 1, biases 0; a function of the seed."""
    model = MiniGPT(seed=1)
    for p in model.params.table:
        tensor = model.params[p.name]
        if p.init in ("zeros", "ones"):
            assert (tensor == (p.init == "ones")).all(), p.name
        else:
            expected = 0.02 / (2 if p.name.endswith(("attn.out.weight", "ffn.down.weight")) else 1)
            assert tensor.std() == pytest.approx(expected, rel=4 / math.sqrt(2 * tensor.size)), p.name
            assert abs(tensor.mean()) < 4 * expected / math.sqrt(tensor.size), p.name
    assert np.array_equal(MiniGPT(seed=1).params.flat, model.params.flat)
    assert not np.array_equal(MiniGPT(seed=2).params.flat, model.params.flat)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_one_batch_is_learnt_by_heart(tied, make_batch):
    """Loss below 0.05 after 300 steps on the same eight sentences."""
    config = ModelConfig(tie_weights=tied)
    model, batch = MiniGPT(config), make_batch(config, 8)
    batch.inputs[:, 0] = np.arange(8)  # or nothing tells the sentences apart
    optimizer = AdamW(OptimizerConfig(weight_decay=0), lr=3e-3, backend=model.backend)
    for _ in range(300):
        model.forward(*batch)
        optimizer.step(model.params, model.backward())
    assert model.forward(*batch)[1] < 0.05


# The same bits


def test_same_bits_for_every_instruction_set_and_thread_count(backends, kernels, make_batch, odd_config):
    """Five training steps with dropout leave the same parameters and moments, bit for bit."""
    config = odd_config.model_copy(update={"dropout": 0.1, "tie_weights": False})
    batch, found = make_batch(config, 3), set()
    for backend in backends.values():
        model, optimizer = MiniGPT(config, backend=backend), AdamW(backend=backend)
        for step in range(5):
            model.step = step
            model.forward(*batch)
            optimizer.step(model.params, model.backward())
        found.add((kernels.bits(model.params.flat), kernels.bits(optimizer.m.flat), kernels.bits(optimizer.v.flat)))
    assert len(found) == 1


def test_forward_and_backward_repeat_themselves(odd_config, make_batch):
    """The same pass twice, also with others in between and in another batch shape, has the same bits."""
    config = odd_config.model_copy(update={"dropout": 0.2})
    model, batch, other = MiniGPT(config), make_batch(config, 3), make_batch(config, 2, seed=1)

    def once():
        logits, loss = model.forward(*batch)
        return logits.copy(), loss, model.backward().flat.copy()

    first = once()
    second = once()
    model.forward(*other)
    model.backward()
    model.forward(*batch, training=False)
    third = once()
    for again in (second, third):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_evaluation_without_dropout_is_the_forward_pass(odd_config, make_batch):
    """`training` only decides about dropout (and hooks)."""
    model, batch = MiniGPT(odd_config), make_batch(odd_config, 3)
    training = model.forward(*batch)[0].copy()
    assert np.array_equal(model.forward(*batch, training=False)[0], training)


# Padding


def test_padding_does_not_reach_the_loss(odd_config, make_batch):
    """Other tokens at padded positions change neither the loss nor any gradient, bit for bit."""
    model, batch = lively(MiniGPT(odd_config)), make_batch(odd_config, 4)
    loss, grads = model.forward(*batch)[1], model.backward().flat.copy()
    rng = np.random.default_rng(5)
    inputs, targets = batch.inputs.copy(), batch.targets.copy()
    padded, uncounted = ~batch.attn_pad_mask, ~batch.loss_mask
    assert padded.any()
    inputs[padded] = rng.integers(0, 37, padded.sum())
    targets[uncounted] = rng.integers(0, 37, uncounted.sum())
    assert model.forward(inputs, targets, batch.attn_pad_mask, batch.loss_mask)[1] == loss
    assert np.array_equal(model.backward().flat, grads)


def test_the_future_does_not_reach_the_past(odd_config, make_batch):
    """Logits of positions before a changed token keep their bits; that position's own change."""
    model, batch = lively(MiniGPT(odd_config)), make_batch(odd_config, 2)
    before = model.forward(*batch)[0].copy()
    inputs = batch.inputs.copy()
    inputs[0, 7] = inputs[0, 7] % 36 + 1
    after = model.forward(inputs, batch.targets, batch.attn_pad_mask, batch.loss_mask)[0]
    assert np.array_equal(after[0, :7], before[0, :7])
    assert np.array_equal(after[1], before[1])
    assert (after[0, 7] != before[0, 7]).any()


def test_loss_sum_and_the_empty_mask(odd_config, make_batch):
    """`loss_sum` is what the mean is made of; a batch in which nothing counts has no mean, and no gradient."""
    model, batch = MiniGPT(odd_config), make_batch(odd_config, 3)
    loss = model.forward(*batch)[1]
    total, count = model.loss_sum
    assert count == batch.loss_mask.sum()
    assert loss == total / count
    empty = model.forward(batch.inputs, batch.targets, batch.attn_pad_mask, np.zeros_like(batch.loss_mask))[1]
    assert math.isnan(empty)
    assert model.loss_sum == (0, 0)
    assert not model.backward().flat.any()


@pytest.mark.parametrize("length", [1, 5])
def test_shorter_batches(length, odd_config, make_batch):
    """Logits of the first positions do not depend on how many follow, bit for bit."""
    model, batch = lively(MiniGPT(odd_config)), make_batch(odd_config, 2)
    whole = model.forward(*batch)[0].copy()
    short = model.forward(*(np.ascontiguousarray(x[:, :length]) for x in batch))[0]
    assert np.array_equal(short, whole[:, :length])


# Memory


def test_memory_does_not_grow(make_batch):
    """After the first step nothing is allocated any more: arrays keep their addresses, the heap its size."""
    config = ModelConfig(dropout=0.1)
    model, batch = MiniGPT(config), make_batch(config, 8)
    optimizer = AdamW(backend=model.backend)

    def step() -> None:
        model.step += 1
        model.forward(*batch)
        optimizer.step(model.params, model.backward())

    def addresses() -> list[int]:
        work = model.passes(8, 32)
        arrays = [*work.arrays.values(), model.params.flat, model.grads.flat, optimizer.m.flat, optimizer.v.flat]
        return [array.ctypes.data for array in arrays]

    step()
    before = addresses()
    tracemalloc.start()
    try:
        for _ in range(20):
            step()
        gc.collect()
        start = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(50):
            step()
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        end = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert end - start < 2048
    assert peak - start < 16384  # not even for a moment is there a copy of an array
    assert addresses() == before


# Dropout


def masks_of(config: ModelConfig, seed: int, step: int, B: int) -> list[np.ndarray]:
    """What each site of dropout multiplies by, from the words of the stream alone."""
    shape = (B, config.max_seq_len, config.d_model)
    scale = np.float64(np.float32(1 / (1 - config.dropout)))
    limit = int(config.dropout * 2**32)
    stream = Stream(seed, Purpose.DROPOUT)
    words = (stream.words(math.prod(shape), step, site) for site in range(2 * config.n_layer + 1))
    return [scale * (w >= limit).reshape(shape) for w in words]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_gradients_with_dropout(rate, tied, odd_config, make_batch):
    """Loss and gradients are the textbook's with the masks that (seed, step, site) name."""
    config = odd_config.model_copy(update={"dropout": rate, "tie_weights": tied})
    model = lively(MiniGPT(config, seed=11, threads=2))
    model.step = 7
    compare(make_batch(config, 3), model, masks=masks_of(config, 11, 7, 3))
    model.reseed(12)
    compare(make_batch(config, 3), model, masks=masks_of(config, 12, 7, 3))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_share(rate, kernels, isa_backend):
    """A share of 1 - rate is kept and scaled by 1 / (1 - rate), the rest is 0: the mean stays."""
    n = 60_000
    x, key = np.ones((3, 20, n // 60), np.float32), np.array([5, Purpose.DROPOUT, 9], np.uint32)
    y = kernels.run(isa_backend, "dropout", [np.empty_like(x), x, key, 4, rate])["y"]
    assert set(np.unique(y)) <= {np.float32(0), np.float32(1 / (1 - rate))}
    assert abs((y != 0).mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / n) + 1e-9


def test_masks_are_a_function_of_seed_step_and_site(odd_config, make_batch):
    """The loss repeats with the step and the seed, whatever ran between, and differs with either of them."""
    config = odd_config.model_copy(update={"dropout": 0.3})
    model, batch = MiniGPT(config, seed=1), make_batch(config, 3)

    def loss(step: int, seed: int = 1) -> float:
        model.step = step
        model.reseed(seed)
        return model.forward(*batch)[1]

    losses = [loss(900), loss(0), loss(1), loss(0, seed=2)]
    assert len(set(losses)) == 4
    assert [loss(0), loss(1), loss(900), loss(0, seed=2)] == [losses[1], losses[2], losses[0], losses[3]]
    masks = masks_of(config, 1, 0, 3)
    assert all(not np.array_equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_evaluation_ignores_dropout(odd_config, make_batch):
    """An evaluation has the bits of a model without dropout, and draws nothing that training would miss."""
    batch = make_batch(odd_config, 3)
    plain, dropping = MiniGPT(odd_config), MiniGPT(odd_config.model_copy(update={"dropout": 0.5}))
    expected = plain.forward(*batch, training=False)[0]
    trained = dropping.forward(*batch)[1]
    assert np.array_equal(dropping.forward(*batch, training=False)[0], expected)
    assert dropping.forward(*batch)[1] == trained != plain.forward(*batch)[1]
