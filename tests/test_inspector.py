"""The inspector: hooks by name or glob on a live model, in replay and on a reader's data, with streaming statistics."""

from __future__ import annotations

import numpy as np
import pytest
import recording
from hypothesis import given
from hypothesis import strategies as st

from minitrain import Inspector, load_config, open_run
from minitrain.assembly import learner
from minitrain.data.batches import Batch
from minitrain.errors import HookError
from minitrain.hooks import statistics
from minitrain.inspector import Running
from minitrain.loop import train_step
from minitrain.replay import Replay

ROWS = np.zeros(4, np.int64)


class Trained:
    """A small model and its steps."""

    def __init__(self, make_batch):
        config = load_config(None, recording.SMALL)
        self.learner = learner(config)
        self._batches = make_batch(config.model, 4)

    def step(self):
        parts, (inputs, targets, attn, loss) = self.learner, self._batches
        train_step(parts.model, parts.optimizer, parts.scheduler, Batch(inputs, targets, attn, loss, ROWS, ()))


@pytest.fixture
def trained(make_batch):
    return Trained(make_batch)


def test_statistics_stream_over_steps(trained):
    """Over several steps the statistics are those of all the tensors together, and a snapshot is the last one's."""
    learner, step = trained.learner, trained.step
    inspector, seen = Inspector(learner), []
    inspector.register_forward("block.0.ffn.gelu")
    learner.hooks.listen(lambda site, x: seen.append(x.copy()), "block.0.ffn.gelu")
    for _ in range(5):
        step()
    everything = np.stack(seen).astype(np.float64)
    got = inspector.stats["block.0.ffn.gelu"]
    assert got.count == everything.size
    assert got.mean == pytest.approx(everything.mean(), abs=4e-6 * np.abs(everything).mean())
    assert got.variance == pytest.approx(everything.var(), rel=1e-4)
    assert (got.min, got.max) == (everything.min(), everything.max())
    assert inspector.snapshot()["block.0.ffn.gelu"] == statistics(seen[-1])


def test_names_globs_phases(trained):
    """A glob hears its phase alone; parameters' gradients and activations' go by the names of what they are of."""
    learner, step = trained.learner, trained.step
    inspector = Inspector(learner)
    inspector.register_forward("block.*.q")
    inspector.register_backward("block.0.q")
    inspector.register_backward("lm_head.bias")
    inspector.register_state("v.lm_head.*")
    step()
    assert set(inspector.stats) == {"block.0.q", "grad:block.0.q", "grad.lm_head.bias", "v.lm_head.bias"}


def test_functions(trained):
    """A function gets a read-only view, and its numbers are kept with mean, population variance, extremes and last."""
    learner, step = trained.learner, trained.step
    inspector, told = Inspector(learner), []

    def norm(site, x):
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 0
        told.append(float(np.linalg.norm(x)))
        return told[-1]

    inspector.register_backward("logits", norm, every=2)
    for _ in range(6):
        step()
    got = inspector.stats["grad:logits"]
    assert got.count == len(told) == 3
    assert got.mean == pytest.approx(np.mean(told))
    assert got.variance == pytest.approx(np.var(told), abs=1e-12)
    assert (got.min, got.max, got.last) == (min(told), max(told), told[-1])
    assert inspector.snapshot() == {"grad:logits": told[-1]}


def test_reset_and_removal(trained):
    """Reset forgets and goes on; a removed hook is not called and its figures are gone; twice is no harm."""
    learner, step = trained.learner, trained.step
    with Inspector(learner) as inspector:
        handle = inspector.register_forward("logits")
        inspector.register_forward("embed")
        step()
        inspector.reset()
        assert inspector.stats == {}
        step()
        assert inspector.stats["logits"].count == inspector.snapshot()["logits"].count
        handle.remove()
        handle.remove()
        assert set(inspector.stats) == {"embed"}
        with inspector.register_forward("ln_f"):
            assert learner.hooks.at("ln_f")
        assert not learner.hooks.at("ln_f")
    assert not learner.hooks.at("embed")
    assert inspector.stats == {}


def test_no_bit_moves(make_batch):
    """A run that is looked into has the bits of one that is not."""
    watched, alone = Trained(make_batch), Trained(make_batch)
    inspector = Inspector(watched.learner)
    for register in (inspector.register_forward, inspector.register_backward, inspector.register_state):
        register("*")
        register("*", lambda site, x: float(x.sum()))
    for _ in range(4):
        watched.step()
        alone.step()
    assert watched.learner.state().digest() == alone.learner.state().digest()


def test_in_replay_and_on_a_readers_data(whole):
    """The same inspector on a step that is run again, and on states that were recorded."""
    recorded_run = whole[0]
    live = Replay(recorded_run).at(3)
    inspector = Inspector(live)
    inspector.register_forward("logits")
    live.step()
    assert inspector.stats["logits"].count
    run, reader = open_run(recorded_run), Inspector()
    reader.register_state("m.*")
    reader.register_state("v.lm_head.bias", lambda site, v: float(v.max()))
    for t in (2, 3):
        moments = run.moments(t)
        reader.observe(moments.m, "m")
        reader.observe(moments.v, "v")
    both = np.concatenate([run.moments(t).m["lm_head.bias"] for t in (2, 3)]).astype(np.float64)
    assert reader.stats["m.lm_head.bias"].mean == pytest.approx(both.mean(), abs=4e-6 * np.abs(both).mean())
    assert reader.stats["v.lm_head.bias"].last == run.moments(3).v["lm_head.bias"].max()
    assert reader.snapshot()["m.lm_head.bias"] == statistics(run.moments(3).m["lm_head.bias"])


def test_bad_input(trained):
    """A name that matches nothing is told with the nearest one; so is something that cannot be called."""
    inspector = Inspector(trained.learner)
    with pytest.raises(HookError, match=r"register_forward: expected the name .*'blok.0.q'.*did you mean 'block.0.q'"):
        inspector.register_forward("blok.0.q")
    with pytest.raises(HookError, match="register_backward: expected the name"):
        inspector.register_backward("softmax")
    with pytest.raises(HookError, match="register_state: expected the name"):
        inspector.register_state("logits")
    with pytest.raises(HookError, match="expected a function"):
        inspector.register_forward("logits", 3)
    with pytest.raises(HookError, match="every"):
        inspector.register_forward("logits", every=0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_running_numbers(numbers):
    """Mean, population variance and extremes of a stream are those of the whole list."""
    got = Running.empty()
    for x in numbers:
        got = got.add(x)
    assert got.count == len(numbers)
    assert got.mean == pytest.approx(np.mean(numbers), abs=1e-9 * max(1, np.abs(numbers).max()))
    assert got.variance == pytest.approx(np.var(numbers), rel=1e-9, abs=1e-6)
    assert (got.min, got.max, got.last) == (min(numbers), max(numbers), numbers[-1])


def test_a_stream_with_a_number_that_is_not_finite():
    """Its mean and variance are no numbers any more; the count goes on."""
    got = Running.empty().add(1.0).add(float("nan")).add(2.0)
    assert got.count == 3
    assert np.isnan([got.mean, got.variance]).all()
