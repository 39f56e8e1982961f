"""Injections: the same bits for the same inputs, exactly the declared change at step K, and replay with or without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from injecting import (
    SENTENCES,
    STEPS,
    TINY,
    Trace,
    baseline,
    copied,
    data,
    floats,
    injections,
    inside,
    same,
    tiny,
    trace,
)
from recording import Watch, contents

import minitrain
from minitrain import trainer
from minitrain._ext import engine
from minitrain.assembly import assemble
from minitrain.cli import main
from minitrain.config import config_from, config_hash, differing_keys, load_config
from minitrain.errors import RunError
from minitrain.inject import FAULTS, SENTENCE, load, targets, unread
from minitrain.loop import watched_step
from minitrain.replay import Replay
from minitrain.replay.bundle import write_bundle
from minitrain.replay.segments import verify
from minitrain.report.story import Story
from minitrain.run_folder import RunFolder
from minitrain.tensors import canonical_bits, sites


@pytest.fixture(scope="module", autouse=True)
def text(place: Path) -> None:
    """A text of few sentences, so that little is prepared and evaluated."""
    (place / "small.txt").write_text("\n\n".join(SENTENCES * 4) + "\n")


# The whole record


@pytest.mark.once
@inside(6)
@given(
    told=st.lists(injections(), min_size=1, max_size=2), stop=st.integers(1, STEPS - 1), seed=st.integers(0, 2**32 - 1)
)
def test_a_record_is_made_again_resumed_and_replayed(place, told, stop, seed):
    """Whole, and stopped and resumed on two threads: byte for byte one record, which verify makes again.

    The events stand once each at their steps, a replay without them gives what differs, and from the first step that
    has none the record is again what a healthy engine makes of the state.
    """
    more = (f"training.rng_seed={seed}", f"training.checkpoint_every={stop}")
    for name in ("one", "two"):
        shutil.rmtree(place / name, ignore_errors=True)
    config = tiny(*told, more=more)
    trainer.run(config, place / "one")
    cut = Watch(stop)
    threads = config.model_copy(update={"training": config.training.model_copy(update={"threads": 2})})
    trainer.run(threads, place / "two", listeners=[cut], stop=cut)
    trainer.run(threads, place / "two", resume=True)
    assert contents(place / "one") == contents(place / "two")
    run = minitrain.open_run(place / "one")
    assert [(e["step"], e["name"]) for e in run.events if e["event"] == "injection"] == sorted(
        ((one["step"], one["name"]) for one in told), key=lambda pair: pair[0]
    )
    assert run.config == config
    assert verify(run, workers=1).verified
    healthy = trace(tiny(more=more), steps=min(one["step"] for one in told))
    assert same(healthy.states[-1], copied(Replay(run).at(len(healthy.states) - 1).state))
    step = told[0]["step"]
    live = Replay(run).at(step)
    assert np.array_equal(live.batch.inputs, run.batch(step).batch.inputs)
    assert live.step().verified
    without = Replay(run, injections=False).at(step)
    started = {name: floats(x).copy() for name, x in copied(without.state).items()}
    without.step()
    plain = assemble(tiny(more=more), data())
    for kind, tensors in ("param", plain.state().params), ("m", plain.state().m), ("v", plain.state().v):
        for name, tensor in tensors.items():
            tensor[...] = started[f"{kind}.{name}"]
    plain.go_to(step)
    watched_step(plain.model, plain.optimizer, plain.scheduler, plain.batches.batch_at(step), [])
    assert same(copied(plain.state()), copied(without.state))


# Step K


@inside(40)
@given(told=injections())
def test_before_k_nothing_and_at_k_what_is_declared(told):
    """Every state and figure before step K is the baseline's; at K just the declared number is another."""
    name, K = told["name"], told["step"]
    fault, plain = FAULTS[name], baseline("optimizer.clip=null")
    seen = trace(tiny(told, more=("optimizer.clip=null",)), steps=K + 1)
    assert seen.stats[:K] == plain.stats[:K]
    assert all(same(a, b) for a, b in zip(seen.states[: K + 1], plain.states, strict=False))
    same_batch = np.array_equal(seen.batches[K].inputs, plain.batches[K].inputs)
    grads, were, factor = seen.grads[K], plain.grads[K], np.float32(told.get("factor", 1))
    after, before = seen.states[K + 1], plain.states[K + 1]
    if fault.point != "batch":
        assert same_batch
    if fault.point not in ("batch", "site", "gradients"):
        assert np.array_equal(grads, were)
        assert seen.stats[K].loss == plain.stats[K].loss
    with np.errstate(all="ignore"):
        if name == "scale":
            assert np.array_equal(grads, canonical_bits(floats(were) * factor))
        elif name == "grad_nan":
            assert (grads != were).sum() == 1
            assert np.isnan(floats(grads)[grads != were]).all()
        elif name == "lr_jump":
            assert seen.stats[K].lr == plain.stats[K].lr * told["factor"]
        elif name == "inverse_cosine":
            assert seen.stats[K].lr == 3e-4 + 3e-5 - plain.stats[K].lr
        elif name in ("v_corrupt", "m_corrupt"):
            where = f"{name[0]}.{told['target']}"
            assert same(after, before, but=(where,))
            assert np.array_equal(after[where], canonical_bits(floats(before[where]) * factor))
        elif name == "param_nan":
            where = f"param.{told['target']}"
            assert same(after, before, but=(where,))
            assert [list(i) for i in np.argwhere(after[where] != before[where])] == [told["element"]]
        elif name == "bit_flip":
            assert same(after, before, but=(told["target"],))
            flipped = before[told["target"]].copy()
            flipped[tuple(told["element"])] ^= np.uint32(1 << told["bit"])
            assert np.array_equal(after[told["target"]], canonical_bits(floats(flipped)))
    if name in ("decay_zero", "decay_huge"):
        assert all(np.array_equal(after[n], before[n]) for n in after if n.startswith(("m.", "v.")) or "bias" in n)
    if fault.point == "lr":
        assert all(np.array_equal(after[n], before[n]) for n in after if n.startswith(("m.", "v.")))


def test_bad_batch_reads_the_sentence_and_moves_no_stream():
    """The tokens of step K are the sentence, its rows name no sample, and step K+1 reads what it would have read."""
    seen, plain = trace(tiny({"name": "bad_batch", "step": 4})), baseline()
    batch, tokens = seen.batches[4], data().tokenizer.sequence(SENTENCE)
    assert [row[: len(tokens)].tolist() for row in batch.inputs] == [tokens[:32]] * 4
    assert data().tokenizer.decode(batch.targets[0][batch.loss_mask[0]]).startswith("She has written the letter.")
    assert batch.loss_mask.sum() == 4 * (len(tokens) - 1)
    assert batch.attn_pad_mask.sum() == 4 * len(tokens)
    assert set(batch.rows.tolist()) == {-1}
    assert batch.ids == ("",) * 4
    for t in set(range(STEPS)) - {4}:
        assert np.array_equal(seen.batches[t].rows, plain.batches[t].rows)
        assert np.array_equal(seen.batches[t].inputs, plain.batches[t].inputs)


def test_duplicate_batch_reads_the_batch_before():
    """Step K reads what step K-1 read, rows and all; step K+1 what it would have read."""
    seen, plain = trace(tiny({"name": "duplicate_batch", "step": 4})), baseline()
    assert [seen.batches[t].rows.tolist() for t in (3, 4, 5)] == [plain.batches[t].rows.tolist() for t in (3, 3, 5)]


def test_scale_shows_in_the_norm_and_hardly_behind_the_clip():
    """The norm is 50 times the baseline's; a clip that was engaged gives the update the same gradients but for ulps."""
    seen, plain = (
        f("optimizer.clip=0.01") for f in (lambda x: trace(tiny({"name": "scale", "step": 5}, more=(x,))), baseline)
    )
    assert np.isclose(seen.stats[5].grad_norm, 50 * plain.stats[5].grad_norm, rtol=1e-6)
    assert np.allclose(floats(seen.grads[5]), floats(plain.grads[5]), rtol=1e-5, atol=0)
    assert seen.stats[5].loss == plain.stats[5].loss


def test_no_clip_lasts():
    """From step K on the norm after the clip is the norm before it."""
    seen = trace(tiny({"name": "no_clip", "step": 5}, more=("optimizer.clip=0.01",)))
    assert [s.grad_norm == s.grad_norm_clipped for s in seen.stats] == [t >= 5 for t in range(STEPS)]


@inside(10)
@given(told=injections(st.sampled_from([name for name, fault in FAULTS.items() if fault.factor is not None])))
def test_factor_one_changes_nothing(told):
    """A run with it is the baseline's, bit for bit."""
    seen, plain = trace(tiny(told | {"factor": 1.0})), baseline()
    assert seen.stats == plain.stats
    assert all(same(a, b) for a, b in zip(seen.states, plain.states, strict=True))


def test_none_is_no_injection(tmp_path):
    """However it is spelt; the hash is that of a configuration without the key."""
    plain = load(None, TINY)
    (tmp_path / "a.yaml").write_text("injection: none\ninjection_step: 500\n")
    (tmp_path / "b.yaml").write_text("injections:\ninjection:\n")
    (tmp_path / "c.yaml").write_text("injections: [{name: scale, step: 3}]\n")
    same = [load(None, [*TINY, "injection=none", "injection_step=3"]), load(tmp_path / "a.yaml", TINY)]
    same += [load(tmp_path / "b.yaml", TINY), load(tmp_path / "c.yaml", [*TINY, "injection=none"])]
    assert all(config == plain and config_hash(config) == config_hash(plain) for config in same)
    told = plain.model_dump()
    del told["injections"]
    assert config_hash(config_from(told, "x")) == config_hash(plain)
    assert config_hash(load(None, [*TINY, "injection=scale", "injection_step=3"])) != config_hash(plain)


def test_two_compose_in_order():
    """At a point in the order of the list; the points in the order of the step, whatever the list says."""
    target = {"target": "v.lm_head.bias", "element": [3], "bit": 23}
    flip, corrupt = {"name": "bit_flip", "step": 5, **target}, {"name": "v_corrupt", "step": 5, "factor": 3.0}
    healthy = floats(baseline().states[6]["v.lm_head.bias"])
    for told in ([flip, corrupt], [corrupt, flip]):
        expected = healthy.copy()
        for one in told:
            if one is corrupt:
                expected *= np.float32(3)
            else:
                expected.view(np.uint32)[3] ^= np.uint32(1 << 23)
        assert np.array_equal(trace(tiny(*told)).states[6]["v.lm_head.bias"], expected.view(np.uint32))
    bad, twice = {"name": "bad_batch", "step": 5}, {"name": "duplicate_batch", "step": 5}
    assert trace(tiny(bad, twice)).batches[5].rows.tolist() == baseline().batches[4].rows.tolist()
    assert set(trace(tiny(twice, bad)).batches[5].rows.tolist()) == {-1}
    a, b = (trace(tiny(*told)) for told in ([corrupt, bad], [bad, corrupt]))
    assert all(same(x, y) for x, y in zip(a.states, b.states, strict=True))


@inside(6)
@given(told=injections(), threads=st.sampled_from([2, 3]))
def test_threads_and_instruction_sets_do_not_matter(told, threads):
    """The same bits on 1, 2 and 3 threads and on every instruction set."""
    expected = trace(tiny(told))
    for isa in engine.instruction_sets():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINITRAIN_ISA", isa)
            seen = trace(tiny(told, more=(f"training.threads={threads}",)))
        assert all(same(a, b) for a, b in zip(seen.states, expected.states, strict=True)), isa


def test_every_site_that_is_offered_is_read_and_no_other():
    """NaN in its first element reaches the next state; at those that are refused nothing would follow but the loss."""
    config = tiny()
    offered = targets(config, FAULTS["nan_activation"])
    heard = [s for s in sites(config.model) if not s.startswith(("grad.", "param.", "m.", "v.")) and s != "clip"]
    assert sorted([*offered, *unread(config)]) == sorted(heard)
    for site in heard:
        seen = (
            trace(tiny({"name": "nan_activation", "step": 1, "target": site}), 2) if site in offered else silent(site)
        )
        assert same(seen.states[2], baseline().states[2]) == (site not in offered), site


def silent(site: str) -> Trace:
    """A run with NaN at a site that is refused."""
    config = tiny({"name": "nan_activation", "step": 1, "target": "logits"})
    parts = assemble(config, data())
    seen = Trace([copied(parts.state())])
    if site in parts.model.passes(4, 32).arrays or site.startswith("grad:"):
        one = config.injections[0].model_copy(
            update={"target": site, "element": [0, 0, 0, 0][: 4 if "probs" in site else 3]}
        )
        for handle in list(parts.hooks._hooks):
            parts.hooks._remove(handle[1])
        parts.injector.injections = [one]
        parts.injector.listen(parts.hooks, parts.model.activations)
    else:
        parts.injector.off = True  # the loss is no array of the engine's that anything could read
    for step in range(2):
        batch = parts.batches.batch_at(step)
        watched_step(parts.model, parts.optimizer, parts.scheduler, batch, [seen], parts.injector)
    return seen


def test_listeners_hear_what_was_injected():
    """Whoever listens at the site, or probes it, has the NaN; their view is read-only still."""
    parts = assemble(
        tiny({"name": "nan_activation", "step": 1, "target": "grad:block.0.ffn.out", "element": [2, 1, 0]}), data()
    )
    heard = []
    parts.hooks.listen(
        lambda site, x: heard.append((np.isnan(x).sum(), np.isnan(x[2, 1, 0]), x.flags.writeable)),
        "grad:block.0.ffn.out",
    )
    for step in range(2):
        watched_step(parts.model, parts.optimizer, parts.scheduler, parts.batches.batch_at(step), [], parts.injector)
    assert heard == [(0, False, False), (1, True, False)]


# What the record gives back


@pytest.fixture(scope="module")
def made(place: Path, text: None) -> Path:
    """A run with one injection of many kinds."""
    told = [
        {"name": "decay_huge", "step": 1},
        {"name": "bad_batch", "step": 3},
        {"name": "param_nan", "step": 9, "target": "block.0.ffn.up.weight[3,7]"},
        {"name": "duplicate_batch", "step": 6},
        {"name": "v_corrupt", "step": 7, "factor": 100.0},
    ]
    trainer.run(tiny(*told), place / "made")
    return place / "made"


def test_params_and_batches_are_given_back(made):
    """States follow from the moments through settings and injected parameters; not through injected moments."""
    run = minitrain.open_run(made)
    for t in (2, 4, 7, 10, 12):
        assert same(copied(run.state(t)), copied(Replay(made).at(t).state)) if t < 12 else run.state(12)
    with pytest.raises(
        RunError, match=r"^state 8: expected moments .*, got some changed by v_corrupt at step 7 \(lm_head"
    ):
        run.params(8)
    assert Replay(made).at(8).step().verified
    assert [run.batch(t).ids for t in (3, 6)] == [("",) * 4, run.batch(5).ids]
    manifest = json.loads((made / "manifest.json").read_text())["config"]["injections"]
    assert manifest[2] == {
        "name": "param_nan",
        "step": 9,
        "target": "block.0.ffn.up.weight",
        "element": [3, 7],
        "factor": None,
        "bit": None,
    }
    assert load_config(made / "config.yaml") == run.config


def test_the_page_of_the_run_tells_them(made):
    """Among the settings that are not the default, by name and step."""
    folder = RunFolder(made)
    page = Story.read(folder, folder.stored_config(), json.loads(folder.results.read_text()), 1.0).settings()
    assert "faults that were caused on purpose" in page
    line = differing_keys(load(None, TINY), folder.stored_config())[-1]
    assert line.startswith("injections: none -> decay_huge at step 1, bad_batch at step 3, param_nan at step 9")


def test_blind_reads_nothing_of_it(made):
    """Neither events nor keys: the steps are replayed without, and verify finds them as faults."""
    run = minitrain.open_run(made, blind=True)
    assert run.events == []
    assert run.config.injections == []
    assert [fault.step for fault in verify(run, workers=1).faults][:1] == [1]
    assert not Replay(made, blind=True).at(1).step().verified
    with pytest.raises(
        RunError, match=r"^step 3: expected samples of the training split, got others that are not record"
    ):
        run.batch(3)


@pytest.mark.parametrize("step", [3, 6, 7, 9])
def test_a_bundle_carries_them(made, tmp_path, step):
    """With the batch that the data gave: replayed with them it is as recorded, without them the baseline's step."""
    replay = Replay(made)
    write_bundle(tmp_path / "b.tar.gz", replay.source, replay.at(step).state)
    live = Replay(tmp_path / "b.tar.gz").at(step)
    assert np.array_equal(live.batch.inputs, replay.at(step).batch.inputs)
    assert live.step().verified
    for options in {"injections": False}, {"blind": True}:
        here = Replay(tmp_path / "b.tar.gz", **options).at(step)
        there = Replay(made, injections=False).at(step)
        assert np.array_equal(here.batch.inputs, there.batch.inputs)
        here.step()
        there.step()
        if options != {"blind": True}:
            assert same(copied(here.state), copied(there.state))


def test_replay_at_the_command_line(made):
    """With them verified, without them not, and it says which was left out; blind it says nothing of them."""

    def replay(*more: str) -> Any:
        return CliRunner().invoke(main, ["replay", str(made), "--step", "7", "--sites", "loss", *more])

    assert "\ninjected, as recorded: decay_huge from step 1 (factor 100); v_corrupt at step 7 (" in replay().output
    assert replay().exit_code == 0
    left = replay("--no-injection")
    assert left.exit_code == 1
    assert "\nleft out of the replay: decay_huge from step 1 (factor 100); v_corrupt at step 7 (" in left.output
    assert "corrupt" not in replay("--blind").output
    told = json.loads(replay("--no-injection", "--json").output)
    assert (told["no_injection"], told["injections"][1]["name"], told["verified"]) == (True, "v_corrupt", False)
