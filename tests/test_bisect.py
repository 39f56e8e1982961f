"""`--nan-bisect`: whatever went wrong is found, to the step always and to the element where the record has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import conftest
import localising
import numpy as np
import pytest
from bisecting import TARGET, flip, injection, minitrain, told
from campaigns import Campaign

from minitrain import trainer
from minitrain.errors import RunError
from minitrain.fork import fork
from minitrain.record.recorded import open_run
from minitrain.replay.bisect import nan_bisect


@pytest.fixture(autouse=True, scope="module")
def no_pages():
    """The page of a run has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.report, "write_page", lambda *_: None)
        yield


@pytest.fixture
def train(tmp_path, record_run):
    """``train(*settings, **how)``: the folder of a small run."""
    return lambda *settings, **how: record_run(tmp_path / "run", *settings, **how)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, record_run) -> Path:
    return record_run(tmp_path_factory.mktemp("healthy") / "run")


def base(book: Path) -> list[str]:
    return [*conftest.SMALL, f"data.train_path={book}"]


# Random faults


@pytest.mark.once
def test_random_faults_are_localised(tmp_path, record_run, book):
    """One or two of every kind, over tiers, dropout, tied weights, clips: step, verdict, site and element are exact."""
    scores = localising.localise(20, 3, tmp_path, record_run, base(book))
    assert set(scores) == set(localising.KINDS)
    assert [wrong for score in scores.values() for wrong in score.wrong] == []
    assert sum(score.no_trace for score in scores.values()) <= 2


@pytest.mark.long
def test_many_random_faults_are_localised(tmp_path, record_run, book):
    """323: the step exact in all, the site wherever it can be told, the element where keyframes or moments allow."""
    campaign = Campaign("Faults localised by --nan-bisect")
    scores = localising.localise(17 * len(localising.KINDS), 1, tmp_path, record_run, base(book))
    rows = []
    for kind, s in scores.items():
        seen = s.cases - s.no_trace
        asked = [f"{n} of {m}" if m else "-" for n, m in ((s.site, s.site_asked), (s.element, s.element_asked))]
        rows.append((kind, s.cases, s.no_trace, f"{s.step} of {seen}", f"{s.verdict} of {seen}", *asked))
    campaign.tell(("fault", "cases", "left no trace", "step", "verdict", "tensor or site", "element"), *rows)
    exact = [s for kind, s in scores.items() if kind not in localising.INEXACT]
    assert [wrong for score in exact for wrong in score.wrong] == []
    assert all(s.step == s.cases - s.no_trace for s in scores.values())


# Nothing is wrong


def accused(number: int, folder: Path, record_run: Any) -> bool:
    """Whether the bisect finds anything in a healthy run of this number."""
    run = record_run(
        folder / str(number),
        *(f"training.rng_seed={number}", f"training.data_seed={number + 1}", f"training.threads={1 + number % 2}"),
        *(f"model.dropout={0.1 * (number % 3)}", f"record.moments={('every_step', 'keyframes')[number // 2 % 2]}"),
        *(f"record.sites={('none', 'digest')[number // 4 % 2]}", f"record.keyframe_every={(8, 7, 100)[number % 3]}"),
        f"optimizer.clip={('1.0', 'null', '0.1')[number % 3]}",
    )
    found = nan_bisect(run, workers=1 + number % 2)
    return found.finding is not None or found.search.later is not None


@pytest.mark.parametrize("number", [0, 6, 15])
def test_healthy_runs_are_accused_of_nothing(tmp_path, record_run, number):
    """Three of them, over tiers, dropout, digests of sites, keyframes, clips and workers."""
    assert not accused(number, tmp_path, record_run)


@pytest.mark.long
def test_50_healthy_runs_are_accused_of_nothing(tmp_path, record_run):
    """Fifty of them."""
    campaign = Campaign("Healthy runs accused by --nan-bisect")
    wrong = sum(accused(number, tmp_path, record_run) for number in range(50))
    campaign.tell(("healthy runs", "accused"), (50, wrong))
    assert wrong == 0


def test_a_healthy_run_is_told_so(healthy):
    """Exit code 0, the method and its reason."""
    result = minitrain("replay", healthy, "--nan-bisect")
    assert result.exit_code == 0
    assert f"nothing is wrong in steps 0 to 29 of {healthy}: each replays bit for bit as recorded" in result.output
    assert "method   segments: every loss and norm of steps 0 to 29 is finite, so each segment" in result.output
    document = json.loads(minitrain("replay", healthy, "--step", 12, "--nan-bisect", "--json").output)
    assert (document["found"], document["step"], document["first_bad"], document["verdict"]) == (False, 12, None, None)


# Verdicts


@pytest.mark.parametrize("moments", ["every_step", "keyframes"])
@pytest.mark.parametrize("step", [8, 13])
def test_memory_that_changed_between_two_steps(train, fault, moments, step):
    """A stored number, to the element, at a keyframe and between two; the lowest bit of one m is enough."""
    broken = fault(step, lambda parts: flip(parts.optimizer.m["ln_f.bias"], 3, 0))
    found = nan_bisect(train(f"record.moments={moments}", watchers=[broken]))
    assert told(found) == ("stored_state", step, "state", "m.ln_f.bias", (3,))
    assert found.finding is not None
    assert f"step {step} read m.ln_f.bias with other bits than the step before had left" in found.finding.proof
    assert "(element [3] has bit 0 flipped)" in found.finding.proof
    assert found.remedy is not None
    assert found.remedy.commands[0].startswith(f"minitrain train --from {found.path} --step {step} --out-dir ")


def test_the_element_is_found_without_the_incident(train, fault):
    """A digest proves a guess: of every single bit only one gives the tensor that was read."""
    one = fault(13, lambda parts: flip(parts.model.params["ln_f.weight"], 5, 31))
    run = train(watchers=[one])
    open_run(run).folder.incident(13).unlink()
    assert told(nan_bisect(run)) == ("stored_state", 13, "state", "param.ln_f.weight", (5,))


def test_a_nan_in_a_parameter_is_found_by_what_the_journal_says(train):
    """The step before the first that is not finite, from the state that one read; nothing but its segment is run."""
    run = train(*injection("param_nan", 20, target=TARGET, element=[3, 7]))
    found = nan_bisect(run)
    assert told(found) == ("stored_state", 20, "update", f"param.{TARGET}", (3, 7))
    assert found.search.method == "finiteness"
    assert found.search.nonfinite == 21
    assert found.search.unchecked == range(16)
    assert [event["name"] for event in found.journal] == ["param_nan"]
    assert nan_bisect(run, blind=True).journal == ()


def test_a_nan_that_nothing_reads_yet(train):
    """The embedding of <unk>, which no sample has: every loss is finite, and it is found where it was put."""
    run = train("model.tie_weights=false", *injection("param_nan", 9, target="embed.weight", element=[3, 2]))
    found = nan_bisect(run)
    assert found.search.method == "segments"
    assert told(found) == ("stored_state", 9, "update", "param.embed.weight", (3, 2))


@pytest.mark.parametrize("tier", ["every_step", "keyframes"])
def test_a_flipped_bit_that_is_gone_again(train, tier):
    """The lowest bit of v, in the middle of a segment whose end may well be as it should."""
    more = injection("bit_flip", 18, target="v.lm_head.bias", element=[7], bit=0)
    assert told(nan_bisect(train(f"record.moments={tier}", *more)))[:4] == (
        "stored_state", 18, "update", "v.lm_head.bias",
    )  # fmt: skip


def test_special_tokens_have_names(train):
    """The head's bias of <eos>."""
    found = nan_bisect(train(*injection("param_nan", 9, target="lm_head.bias", element=[2])))
    assert found.sample is not None
    assert found.sample.token == "<eos>"


def test_a_scaled_moment(train):
    """Every element by the same factor, which the proof names."""
    found = nan_bisect(train(*injection("v_corrupt", 11)))
    assert told(found)[:4] == ("stored_state", 11, "update", "v.lm_head.bias")
    assert found.finding is not None
    assert "every element is 100 times what it should be" in found.finding.proof


def test_another_batch(train):
    """The rows that are not the stream's; a sentence that is no sample has no id."""
    found = nan_bisect(train(*injection("bad_batch", 14)))
    assert told(found) == ("data", 14, "data", "batch", None)
    assert found.finding is not None
    assert found.finding.place.rows == (0, 1, 2)
    assert found.finding.proof.startswith("3 of 3 samples are not those that the stream gives step 14: row 0 held no ")
    assert found.sample is not None
    assert (found.sample.row, found.sample.sample_id) == (0, None)


def test_a_batch_that_came_twice(train):
    """Here the samples are known."""
    run = train(*injection("duplicate_batch", 14))
    found = nan_bisect(run)
    assert found.sample is not None
    assert found.sample.sample_id == open_run(run).data.train.ids[open_run(run).frame(13).rows[0]]


def test_another_learning_rate(train):
    """The schedule says another; loss and norms are the same."""
    found = nan_bisect(train(*injection("lr_jump", 14, factor=10)))
    assert told(found) == ("schedule", 14, "update", "lr", None)
    assert found.finding is not None
    assert ", 10 times as high; loss and norms are the same" in found.finding.proof


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        ("no_clip", "grad_norm_clipped", "the gradients were not clipped: their norm was"),
        ("decay_huge", "param.embed.weight", "the update went by another weight_decay than the configured 0.1"),
    ],
)
@pytest.mark.parametrize("digests", ["none", "digest"])
def test_other_settings_than_the_configured(train, digests, name, site, words):
    """They differ from step K on: the first is named, and which setting."""
    found = nan_bisect(train("optimizer.clip=0.1", f"record.sites={digests}", *injection(name, 14)))
    assert told(found)[:2] == ("schedule", 14)
    assert found.finding is not None
    assert found.finding.place.site == site
    assert words in found.finding.proof


@pytest.mark.parametrize("clip", ["null", "0.1"])
def test_scaled_gradients(train, clip):
    """Also where the clip hides all but the norm: fifty times the replayed gradients explain the whole state."""
    found = nan_bisect(train(f"optimizer.clip={clip}", *injection("scale", 14)))
    assert told(found) == ("transient", 14, "clip", "clip", None)
    assert found.finding is not None
    assert "every gradient times 50 after the backward pass gives the recorded norm" in found.finding.proof


@pytest.mark.parametrize("site", ["block.0.attn.probs", "block.0.ffn.pre", "grad:block.0.attn.out", "grad:ln_f"])
@pytest.mark.parametrize("digests", ["none", "digest"])
def test_a_nan_at_a_site(train, site, digests):
    """The element, its row of the batch, its token and its sample."""
    element = [1, 0, 4, 2] if "probs" in site else [1, 4, 2]
    run = train(f"record.sites={digests}", *injection("nan_activation", 14, target=site, element=element))
    found = nan_bisect(run)
    phase = "backward" if site.startswith("grad:") else "forward"
    assert told(found) == ("transient", 14, phase, site, tuple(element))
    recorded = open_run(run)
    token = recorded.data.tokenizer.decode([recorded.batch(14).batch.inputs[1, 4]])
    assert found.sample is not None
    assert found.sample[:4] == (1, 4, token, recorded.batch(14).ids[1])


def test_arithmetic(train):
    """A rate that no float survives: the replay gives the same numbers, and the first site that is not finite."""
    run = train("optimizer.lr_max=1e25", "optimizer.lr_min=1e24", "optimizer.weight_decay=0")
    found = nan_bisect(run)
    assert found.finding is not None
    assert found.finding.verdict == "arithmetic"
    assert found.finding.place.step <= (found.search.nonfinite or 0)
    assert "the replay from the first state on gives the recorded bits" in found.finding.proof
    assert found.remedy is not None
    assert "--set optimizer.lr_max=1e+24 --set optimizer.clip=0.5 --out-dir" in found.remedy.commands[0]


def test_arithmetic_of_an_update(train):
    """A rate that is infinite in float32: parameters overflow in the update, a step before a loss shows it."""
    run = train("optimizer.lr_max=1e39", "optimizer.lr_min=1e38", "scheduler.warmup_steps=0")
    found = nan_bisect(run)
    assert found.search.nonfinite == 1
    assert told(found)[:4] == ("arithmetic", 0, "update", "param.embed.weight")
    assert found.finding is not None
    assert "numbers of param.embed.weight (update) are the first that are not finite" in found.finding.proof


def test_a_run_that_did_not_begin_at_its_seed(train, monkeypatch):
    """State 0 is not trusted either."""
    assemble = trainer.assemble

    def altered(config, data):
        parts = assemble(config, data)
        parts.model.params["embed.weight"].view(np.uint32)[2, 5] ^= 1
        return parts

    monkeypatch.setattr(trainer, "assemble", altered)
    assert told(nan_bisect(train())) == ("stored_state", 0, "state", "param.embed.weight", (2, 5))


# Odd runs


def test_a_run_that_went_on_after_it_was_not_finite(train):
    """Only the first step of many that are not finite has an incident, and the fault is the step before."""
    run = train("training.on_nonfinite=continue", *injection("param_nan", 11, target=TARGET, element=[3, 7]))
    found = nan_bisect(run)
    assert open_run(run).end == 30
    assert found.search.nonfinite == 12
    assert told(found) == ("stored_state", 11, "update", f"param.{TARGET}", (3, 7))


def test_a_run_of_the_twins(train):
    """``backend: reference`` too: the replay and every guess about the update go by the kernels of the run."""
    found = nan_bisect(train("training.backend=reference", *injection("scale", 7, factor=3)))
    assert told(found) == ("transient", 7, "clip", "clip", None)


def test_a_run_that_was_stopped(train):
    """An unfinished run is searched up to where it came."""

    class Stop:
        asked = 0

        def __call__(self) -> bool:
            self.asked += 1
            return self.asked > 14

    found = nan_bisect(train(*injection("lr_jump", 9), stop=Stop()))
    assert (found.last, told(found)[:2]) == (13, ("schedule", 9))


@pytest.mark.parametrize("lost", [8, 16])
def test_a_lost_keyframe(train, lost):
    """The segment is reached from the keyframe before, through the fault or to it."""
    run = train("record.moments=keyframes", *injection("grad_nan", 18, target=TARGET, element=[1, 2]))
    for kind in ("param", "m", "v"):
        (run / f"record.zarr/keyframe_{kind}/c.{lost // 8}.0").unlink()
    assert told(nan_bisect(run)) == ("transient", 18, "backward", f"grad.{TARGET}", (1, 2))


def test_a_forked_run(train, tmp_path):
    """It begins with a state of its parent, which is trusted; what is before is asked of the parent."""
    config, origin = fork(train(), 12, None, injection("v_corrupt", 20))
    trainer.run(config, run := tmp_path / "fork", origin=origin)
    found = nan_bisect(run)
    assert told(found)[:4] == ("stored_state", 20, "update", "v.lm_head.bias")
    assert "every loss and norm of steps 12 to 29 is finite" in found.search.reason
    assert nan_bisect(run, 19).finding is None
    with pytest.raises(RunError, match=r"--step 5: expected one of the recorded steps 12..29 of .*forked at state 12"):
        nan_bisect(run, 5)


def test_two_faults(train, fault):
    """What shows is told; what no replay has looked at is said to be so, and found if it is asked about."""
    broken = fault(5, lambda parts: parts.model.grads["ln_f.bias"].__imul__(np.float32(2)), "clip")
    run = train(*injection("param_nan", 20), watchers=[broken])
    found = nan_bisect(run)
    assert told(found)[:2] == ("stored_state", 20)
    assert found.search.unchecked == range(16)
    assert told(nan_bisect(run, 19))[:4] == ("transient", 5, "backward", "grad.ln_f.bias")
    assert "steps 0 to 15 were not run again: minitrain verify " in minitrain("replay", run, "--nan-bisect").output


def test_a_fault_that_the_journal_tells_comes_before_one_that_shows(train, fault):
    """Memory that changed needs no replay to be seen, however early it was."""
    broken = fault(5, lambda parts: flip(parts.optimizer.v["ln_f.bias"], 3, 0))
    found = nan_bisect(train(*injection("param_nan", 20), watchers=[broken]))
    assert told(found) == ("stored_state", 5, "state", "v.ln_f.bias", (3,))
