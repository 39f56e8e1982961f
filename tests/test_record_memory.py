"""Memory that changes behind a run's back is seen, told and kept by the step that reads it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from recording import Watch, config, damages

import minitrain
from minitrain import trainer
from minitrain.loop import Listener, StepStats
from minitrain.replay import Replay
from minitrain.state import State
from minitrain.tensors import parameter_table


class Flips(Listener):
    """Changes memory after step 70 was recorded."""

    def stepped(self, stats: StepStats, state: State) -> None:
        if stats.step == 70:
            state.m["lm_head.bias"][3] += 1


class Swaps(Listener):
    """Exchanges two weights that stand at the same place in two blocks, after step 70 was recorded."""

    def stepped(self, stats: StepStats, state: State) -> None:
        if stats.step == 70:
            a, b = (state.params[f"block.{i}.ffn.up.weight"].reshape(-1)[5:6] for i in (0, 1))
            a[:], b[:] = b.copy(), a.copy()


def test_memory_that_is_exchanged_between_steps(place):
    """Numbers that change places are seen as well, and the run can be replayed from what was read."""
    trainer.run(config("model.n_layer=2"), place / "swapped", listeners=[Swaps()])
    names = ["param.block.0.ffn.up.weight", "param.block.1.ffn.up.weight"]
    assert minitrain.open_run(place / "swapped").events == [{"event": "memory_changed", "step": 71, "tensors": names}]
    replay = Replay(place / "swapped")
    assert all(replay.at(step).step().verified for step in (70, 71, 72))


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_of_layers_of_many_blocks(place, threads):
    """One number in the middle of a layer: the state that is kept is the one that was read, there and elsewhere."""

    class Strikes(Watch):
        def stepped(self, stats: StepStats, state: State) -> None:
            if stats.step == 6:
                state.v["block.0.ffn.down.weight"][40, 100] *= 2
            super().stepped(stats, state)

    sizes = ("model.d_model=64", "model.d_ff=256", "scheduler.total_steps=12", "scheduler.warmup_steps=2")
    watch = Strikes()
    trainer.run(config(*sizes, f"training.threads={threads}"), place / f"struck{threads}", listeners=[watch])
    run = minitrain.open_run(place / f"struck{threads}")
    tensors = ["v.block.0.ffn.down.weight"]
    assert run.events == [{"event": "memory_changed", "step": 7, "tensors": tensors}]
    from safetensors.numpy import load_file

    kept, names = load_file(run.folder.incident(7)), [p.name for p in parameter_table(run.config.model)]
    for kind, flat in zip(("param", "m", "v"), watch.states[7], strict=True):
        assert np.concatenate([kept[f"{kind}.{name}"].ravel() for name in names]).tobytes() == flat.tobytes()
    assert all(Replay(place / f"struck{threads}").at(step).step().verified for step in (6, 7, 8))


def test_memory_that_becomes_nan_between_steps(place):
    """The step is not finite either: what is kept has the state as it was read, and the gradients and activations."""

    class Strikes(Listener):
        def stepped(self, stats: StepStats, state: State) -> None:
            if stats.step == 70:
                state.params["lm_head.bias"][3] = np.nan

    trainer.run(config(), place / "nan", listeners=[Strikes()])
    run = minitrain.open_run(place / "nan")
    assert [event["event"] for event in run.events] == ["memory_changed"]
    from safetensors import safe_open

    with safe_open(run.folder.incident(71), framework="numpy") as file:
        assert np.isnan(file.get_tensor("param.lm_head.bias")).tolist().index(True) == 3
        assert {"grad.lm_head.bias", "logits"} <= set(file.keys())
        assert json.loads(file.metadata()["minitrain"])["reason"] == "nonfinite"


def test_memory_that_changes_between_steps(place, whole):
    """The step after says so: an event, the state as it then was, and an alert."""
    outcome = trainer.run(config(), place / "flipped", listeners=[Flips()])
    run = minitrain.open_run(place / "flipped")
    assert run.events == [{"event": "memory_changed", "step": 71, "tensors": ["m.lm_head.bias"]}]
    assert not np.array_equal(run.frame(71).digest_in, run.frame(70).digest_out)
    assert run.moments(71).m.flat.tobytes() == whole[1].states[71][1].tobytes()  # as step 70 left it
    assert outcome.results["alerts"] == ["memory changed before step 71: m.lm_head.bias"]
    from safetensors import safe_open

    with safe_open(run.folder.incident(71), framework="numpy") as file:
        changed = file.get_tensor("m.lm_head.bias") - run.moments(71)["lm_head.bias"].m
        assert np.nonzero(changed)[0].tolist() == [3]
    assert damages(place / "flipped") == []
