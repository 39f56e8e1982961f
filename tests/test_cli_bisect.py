"""`replay --nan-bisect` as a user meets it: what it prints, how it ends, bad input."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
from bisecting import TARGET, injection, minitrain

from minitrain import trainer
from minitrain.errors import RunError
from minitrain.record.recorded import open_run
from minitrain.replay.bisect import nan_bisect
from minitrain.replay.causes import MEANING


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


def test_a_fault_after_the_steps_asked_about(train):
    """Nothing in 0..N; the step to ask about is named. N itself is included."""
    run = train(*injection("bit_flip", 13, target=f"param.{TARGET}", element=[3, 7]))
    for last in (3, 12):
        result = minitrain("replay", run, "--step", last, "--nan-bisect")
        assert result.exit_code == 0
        assert f"nothing is wrong in steps 0 to {last} of" in result.output
        assert f"minitrain replay {run} --step 13 --nan-bisect" in result.output
    assert minitrain("replay", run, "--step", 13, "--nan-bisect").exit_code == 1


def test_what_a_person_reads(train):
    """Place, bits, whose it is, verdict, proof, method, what came before, and the remedy with its command."""
    run = train(*injection("nan_activation", 14, target="block.0.ffn.pre", element=[1, 4, 2]))
    result = minitrain("replay", run, "--nan-bisect")
    assert result.exit_code == 1
    for words in (
        "first bad number: step 14, forward, block.0.ffn.pre, element [1, 4, 2]\n",
        "  recorded nan (0x7fc00000), replayed ",
        "  row 1, position 4, token ",
        "verdict  transient: not reproducible: other bits out of the same inputs\n",
        "journal  injection nan_activation at step 14 (target block.0.ffn.pre, element [1, 4, 2])\n",
        "method   finiteness: step 14 is the first whose loss or norm is not finite, as the journal says;",
        "largest |x| in each layer, as replayed\n     step    embed  block.0     ln_f   logits\n        9 ",
        "remedy   go on from state 14: the same step comes out right.",
        f"minitrain train --from {run} --step 14 --injection none --out-dir {run}-from-14\n",
    ):
        assert words in result.output
    blind = minitrain("replay", run, "--nan-bisect", "--blind").output
    assert "injection none" not in blind
    assert "journal  injection" not in blind


def test_the_remedy_can_be_carried_out(train):
    """The command as it is printed: the fork is right where its parent was not."""
    run = train(*injection("param_nan", 14, target=TARGET, element=[1, 2]))
    remedy = nan_bisect(run).remedy
    assert remedy is not None
    assert minitrain(*shlex.split(remedy.commands[0])[1:]).exit_code == 0
    found = nan_bisect(run.with_name("run-from-14"))
    assert (found.first, found.last, found.finding) == (14, 29, None)


def test_what_a_machine_reads(train):
    """The stable keys."""
    run = train(*injection("grad_nan", 14, target="lm_head.bias", element=[7]))
    document = json.loads(minitrain("replay", run, "--nan-bisect", "--json").output)
    assert list(document) == [
        *(
            "run",
            "step",
            "verified",
            "found",
            "first_bad",
            "method",
            "reason",
            "first_nonfinite",
            "later",
            "unchecked_before",
        ),
        *("verdict", "proof", "remedy", "commands", "before", "journal"),
    ]
    bad = document["first_bad"]
    expected = {"step": 14, "phase": "backward", "site": "grad.lm_head.bias", "tensor": "lm_head.bias", "index": [7]}
    assert {key: bad[key] for key in expected} == expected
    assert set(bad) - set(expected) == {
        *("recorded", "replayed", "differing", "elements", "rows"),
        *("row", "position", "token", "sample_id"),
    }
    assert bad["token"] == open_run(run).data.tokenizer.decode([7])
    assert document["verdict"] in MEANING
    assert [row["step"] for row in document["before"]] == [9, 10, 11, 12, 13, 14]
    assert all(math.isfinite(x) for row in document["before"] for x in row["max_abs"].values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "30"], "--step 30: expected one of the recorded steps 0..29 of"),
        (["--step", "-1"], "--step -1: expected one of the recorded steps 0..29 of"),
        (["--to", "20"], "--to: not together with --nan-bisect, which looks at the whole run"),
        (["--bundle", "x.tar.gz"], "--bundle: not together with --nan-bisect"),
        (["--allow-mismatch"], "--allow-mismatch: not together with --nan-bisect"),
    ],
)
def test_bad_input(healthy, arguments, words):
    """One message, exit code 2."""
    result = minitrain("replay", healthy, "--nan-bisect", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_what_cannot_be_bisected(healthy, tmp_path, record_run):
    """A bundle, and a run without a step."""
    bundle = tmp_path / "step.tar.gz"
    assert minitrain("replay", healthy, "--step", 3, "--bundle", bundle).exit_code == 0
    result = minitrain("replay", bundle, "--nan-bisect")
    assert result.exit_code == 2
    assert "--nan-bisect expects a run folder, got a bundle: it has one step, which replay runs" in result.stderr
    empty = record_run(tmp_path / "empty", stop=lambda: True)
    with pytest.raises(RunError, match="expected at least one recorded step, got none; there is nothing to bisect"):
        nan_bisect(empty)
