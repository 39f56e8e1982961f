"""The statistics of probes: what NumPy says in float64, and the same bits everywhere."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitrain._ext import engine
from minitrain._ext.engine import instruction_sets
from minitrain._ext.plan import CompiledBackend, Plan, ReferenceBackend
from minitrain.hooks import Hooks, SiteStats, merged, statistics
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
    """Counts and extremes exactly; sums over the finite to 1e-12 of the sum of their absolute terms, float32 to 4e-6.

    That is 64 roundings of float32. Where mean and spread say so, or something is not finite, float32 is as exact.
    """
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
    mean_abs, square = np.abs(finite).mean(), np.square(finite).mean()
    sums, squares = (4e-6, 4.2e-6) if x.dtype == np.float32 else (1e-12, 1e-12)
    assert got.mean == pytest.approx(finite.mean(), rel=0, abs=sums * mean_abs)
    assert got.mean_abs == pytest.approx(mean_abs, rel=sums)
    # E x^2 - (E x)^2 in float32 is only trusted where (E x)^2 <= 16 of it: then E x^2 <= 17 variances
    spread = 1e-9 if x.dtype == np.float64 else 17 * (squares + 3 * sums)
    assert got.variance == pytest.approx(np.var(finite), rel=spread, abs=1e-24 * mean_abs**2)
    assert got.l2 == pytest.approx(np.sqrt(square * n), rel=squares)


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


@given(tensors())
def test_every_instruction_set_measures_the_same(x):
    """The same bits, by the fast pass and by the exact one."""
    addresses = [importlib.import_module(f"minitrain._ext.kernels_{isa}").probes()[0] for isa in instruction_sets()]
    told = [[repr(figure) for figure in engine.statistics(x, address)] for address in addresses]
    assert all(figures == told[0] for figures in told)


def test_bits_of_the_fast_pass():
    """These are the bits on every processor where all is finite and near 0."""
    x = (np.arange(3000) * 37 % 171 - 60).astype(np.float32) * np.float32(0.01)
    figures = [f.hex() if isinstance(f, float) else f for f in statistics(x)]
    assert figures == FAST


FAST = [
    3000,
    "0x1.ff52fb4e81b4fp-3",
    "0x1.db2aadc805762p-2",
    "0x1.f333035886533p-3",
    "-0x1.3333320000000p-1",
    "0x1.19999a0000000p+0",
    17,
    0,
    0,
    "0x1.e4d7e6b05171bp+4",
]


@given(st.lists(tensors(), min_size=1, max_size=4))
def test_totals_are_those_of_all_tensors_together(several):
    """Merged one after the other, statistics are those of one long tensor; a probe with totals does the same."""
    several = [x.astype(np.float64) for x in several]
    total = statistics(several[0])
    for x in several[1:]:
        total = merged(total, statistics(x))
    whole = statistics(np.concatenate(several))
    assert (total.count, total.zeros, total.nan, total.inf) == (whole.count, whole.zeros, whole.nan, whole.inf)
    assert (total.min, total.max) == pytest.approx((whole.min, whole.max), nan_ok=True)
    size = 0.0 if math.isnan(whole.mean_abs) else whole.mean_abs
    assert total.mean == pytest.approx(whole.mean, rel=0, abs=1e-11 * size, nan_ok=True)
    assert total.mean_abs == pytest.approx(whole.mean_abs, rel=1e-11, nan_ok=True)
    assert total.variance == pytest.approx(whole.variance, rel=1e-8, abs=1e-24 * size**2, nan_ok=True)
    assert total.l2 == pytest.approx(whole.l2, rel=1e-11, nan_ok=True)


def test_a_probe_adds_up():
    """With totals it merges what passes, until it is reset; without it keeps the last alone."""
    plan, hooks, x = Plan(CompiledBackend()), Hooks(), np.zeros(50, np.float32)
    plan.site("x", x)
    adding, plain = hooks.probe(totals=True), hooks.probe()
    expected = None
    for seed in range(3):
        x[:] = np.random.default_rng(seed).standard_normal(50)
        plan.run(hooks)
        expected = statistics(x) if expected is None else merged(expected, statistics(x))
    assert adding.totals["x"] == pytest.approx(expected, rel=1e-12)
    assert adding.stats["x"] == plain.stats["x"] == statistics(x)
    assert plain.totals == {}
    adding.reset()
    assert adding.totals == adding.stats == {}


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
