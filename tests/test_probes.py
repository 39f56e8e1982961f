"""The statistics of probes: what NumPy says in float64, and the same bits everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitrain._ext.plan import CompiledBackend, Plan, ReferenceBackend
from minitrain.hooks import Hooks, SiteStats, statistics
from minitrain.model import MiniGPT

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-39, 3.4e38, -3.4e38, 1.0]


@st.composite
def tensors(draw):
    """float32 or float64 of 0 to 3000 elements about some mean, with special values strewn in."""
    size = draw(st.one_of(st.integers(0, 40), st.integers(0, 3000)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = draw(st.sampled_from([0.0, 1.0, -1e6])) + rng.standard_normal(size) * draw(st.sampled_from([1e-30, 1.0, 1e4]))
    x = x.astype(draw(st.sampled_from([np.float32, np.float64])))
    strewn = rng.random(size) < draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    x[strewn] = rng.choice(draw(st.lists(st.sampled_from(SPECIAL), min_size=1)), strewn.sum())
    return x


@given(tensors())
def test_statistics_are_those_of_numpy(x):
    """Counts and extremes exactly; sums to 1e-12 of the sum of their absolute terms, in float64 over the finite."""
    got = statistics(x)
    finite = x[np.isfinite(x)].astype(np.float64)
    n = len(finite)
    assert got.count == x.size
    assert (got.zeros, got.nan, got.inf) == ((x == 0).sum(), np.isnan(x).sum(), np.isinf(x).sum())
    assert got.finite == (n == x.size)
    if not n:
        assert np.isnan([got.mean, got.mean_abs, got.variance, got.min, got.max, got.l2]).all()
        return
    assert (got.min, got.max) == (finite.min(), finite.max())
    mean_abs = np.abs(finite).mean()
    assert got.mean == pytest.approx(finite.mean(), rel=0, abs=1e-12 * mean_abs)
    assert got.mean_abs == pytest.approx(mean_abs, rel=1e-12)
    assert got.variance == pytest.approx(np.var(finite), rel=1e-9, abs=1e-24 * mean_abs**2)
    assert got.l2 == pytest.approx(np.sqrt(np.square(finite).sum()), rel=1e-12)


def test_a_large_mean_costs_no_digits():
    """The variance of numbers far from 0, in more than one block, with an outlier in front."""
    rng = np.random.default_rng(0)
    x = np.concatenate([[0], 1e9 + rng.standard_normal(5000)])
    exact = [np.longdouble(e) for e in x]
    mean = sum(exact) / len(exact)
    variance = float(sum((e - mean) ** 2 for e in exact) / len(exact))
    assert statistics(x).variance == pytest.approx(variance, rel=1e-12)
    assert statistics(x[1:]).variance == pytest.approx(x[1:].var(), rel=1e-8)


def test_other_layouts():
    """Any order and any number of dimensions; what is not a number of ours is refused."""
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert statistics(x.T).l2 == pytest.approx(np.linalg.norm(x))
    assert statistics(x[:, 1]).count == 8
    with pytest.raises(ValueError, match="expected contiguous float32 or float64, got int32"):
        statistics(np.arange(3, dtype=np.int32))


def test_bits():
    """These are the bits on every processor."""
    x = (np.arange(3000) * 37 % 171 - 60).astype(np.float32) * np.float32(0.01)
    x[[5, 900, 2999]] = np.nan, np.inf, -np.inf
    figures = [f.hex() if isinstance(f, float) else f for f in statistics(x)]
    assert figures == [
        3000,
        "0x1.ff0cd56882851p-3",
        "0x1.daef619c253e2p-2",
        "0x1.f2e791a5842abp-3",
        "-0x1.3333320000000p-1",
        "0x1.19999a0000000p+0",
        17,
        1,
        2,
        "0x1.e46f1f0e0b2cdp+4",
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_probes_measure_what_listeners_see(threads, odd_config, make_batch):
    """At every site of the passes, for any number of threads, compiled or not: the statistics of the array there."""
    config = odd_config.model_copy(update={"dropout": 0.1})
    for backend in CompiledBackend(threads), ReferenceBackend():
        model, seen = MiniGPT(config, backend=backend), {}
        probe = model.hooks.probe()
        model.hooks.listen(lambda site, tensor, seen=seen: seen.update({site: statistics(tensor)}))
        model.forward(*make_batch(config, 3))
        model.backward()
        assert len(seen) > 50
        assert probe.stats == seen


@pytest.mark.parametrize("backend", [CompiledBackend(), ReferenceBackend()], ids=["compiled", "reference"])
def test_probes_see_what_is_not_finite(backend, odd_config, make_batch):
    """One NaN in a weight is counted where it has come to, and nowhere before."""
    model = MiniGPT(odd_config, backend=backend)
    model.params["block.1.ffn.up.weight"][3, 2] = np.nan
    with model.hooks.probe() as probe:
        model.forward(*make_batch(odd_config, 2))
    bad = [site for site, stats in probe.stats.items() if not stats.finite]
    head = ["ln_f", "logits", "softmax", "log_softmax", "loss"]
    assert bad == [*(f"block.1.ffn.{x}" for x in ("pre", "gelu", "out")), *head]
    B, T = 2, odd_config.max_seq_len
    assert probe.stats["block.1.ffn.pre"].nan == B * T
    assert math.isnan(probe.stats["loss"].mean)


def test_an_empty_site():
    """Of nothing there is nothing to say but that."""
    plan, hooks = Plan(CompiledBackend()), Hooks()
    plan.site("nothing", np.zeros(0, np.float32))
    probe = hooks.probe()
    plan.run(hooks)
    assert probe.stats["nothing"].count == 0
    assert math.isnan(probe.stats["nothing"].max)
    assert isinstance(probe.stats["nothing"], SiteStats)
