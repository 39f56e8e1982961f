"""The law over whole runs: the same bits however they are run, interrupted, resumed or looked at."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from minitrain import selftest, trainer
from minitrain.config import Config, load_config
from minitrain.loop import Listener, StepStats
from minitrain.state import State

SHORT = [
    "scheduler.total_steps=60",
    "scheduler.warmup_steps=10",
    "training.val_every=20",
    "training.checkpoint_every=25",
]


class StopAt(Listener):
    """Asks the loop to stop before step n."""

    def __init__(self, n: int) -> None:
        self.n, self.seen, self.digests = n, -1, {}

    def stepped(self, stats: StepStats, state: State) -> None:
        self.seen = stats.step
        self.digests[state.step] = state.digest() if state.step % 100 == 0 else ""

    def __call__(self) -> bool:
        return self.seen + 1 >= self.n


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, so that the default data paths are there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*settings: str) -> Config:
    return load_config(None, [*SHORT, *settings])


def steps_of(run: trainer.Outcome) -> list[dict]:
    """The log without what a clock wrote."""
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in run.folder.log_lines()]


@pytest.mark.once
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("val_every", [50, 1])
@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
def test_state_500_of_the_default_run(folder, monkeypatch, isa, threads, val_every, resumed):
    """Parameters, m and v after 500 default steps are the golden bits, for every instruction set, thread count and
    evaluation cadence, and for a run that was stopped at a random step and resumed.
    """
    from minitrain._ext.engine import instruction_sets

    if isa not in instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("MINITRAIN_ISA", isa)
    # The validation set is cut to one batch: evaluating every step must not change a bit, whatever it reads.
    trainer.prepare_data(Config())
    rows = Path("data/processed/val.jsonl").read_text().splitlines(keepends=True)
    Path("val.jsonl").write_text("".join(rows[i] for i in range(0, len(rows), 5)))
    data = ["data.val_path=val.jsonl", "data.train_path=data/processed/train.jsonl"]
    conf = load_config(None, [f"training.threads={threads}", f"training.val_every={val_every}", *data])
    if resumed:
        first = StopAt(int.from_bytes(os.urandom(2)) % 499 + 1)
        trainer.run(conf, folder / "run", listeners=[first], stop=first)
    last = StopAt(500)
    outcome = trainer.run(conf, folder / "run", resume=resumed, listeners=[last], stop=last)
    assert outcome.metrics.steps == 500
    assert outcome.digest == selftest.GOLDEN[500], f"stopped at {first.n if resumed else None}"


def test_golden_states(monkeypatch):
    """The digests in the README are those of the default run, at 3 threads too."""
    assert all(found == expected for _, found, expected in selftest.digests(threads=3))


def test_portable_equals_golden_for_20_steps(folder, monkeypatch):
    """The portable kernels give the bits of the vector ones."""
    digests = set()
    for isa in ("portable", None):
        monkeypatch.setenv("MINITRAIN_ISA", isa) if isa else monkeypatch.delenv("MINITRAIN_ISA")
        stop = StopAt(20)
        digests.add(trainer.run(Config(), folder / str(isa), listeners=[stop], stop=stop).digest)
    assert len(digests) == 1


@pytest.mark.once
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@example(stop=33, dropout=0.0, tied=True, seed=1177704)  # a metric on the edge between two roundings
@given(stop=st.integers(1, 59), dropout=st.sampled_from([0.0, 0.3]), tied=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_resumed_equals_uninterrupted(tmp_path_factory, stop, dropout, tied, seed):
    """Stopped at any step and resumed: the same state, log, validations and model file as in one go."""
    place = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for picture in ("write_curve", "write_page"):  # the picture costs more than the training
            patch.setattr(trainer.report, picture, lambda *_: None)
        conf = config(f"training.rng_seed={seed}", f"model.dropout={dropout}", f"model.tie_weights={str(tied).lower()}")
        whole = trainer.run(conf, place / "whole")
        halt = StopAt(stop)
        half = trainer.run(conf, place / "half", listeners=[halt], stop=halt)
        assert half.metrics.ended == "interrupted"
        again = trainer.run(conf, place / "half", resume=True)
    assert again.digest == whole.digest
    assert steps_of(again) == steps_of(whole)
    assert again.results["model"] == whole.results["model"]
    assert again.results["best_val_step"] == whole.results["best_val_step"]
    model = whole.results["model"]
    assert (again.folder.path / model).read_bytes() == (whole.folder.path / model).read_bytes()


def spawn(*arguments: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "minitrain", "train", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of at least ``step`` stands there."""
    log = run / "train_log.jsonl"
    for _ in range(3000):
        if log.exists() and log.read_text().count("\n") > step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run did not get going")


LONG = [
    "--set",
    "record.moments=keyframes",
    "--set",
    "scheduler.total_steps=3000",
    "--set",
    "training.checkpoint_every=100",
    "--out-dir",
    "run",
]


@pytest.mark.once
def test_killed_run_resumes_to_the_same_bits(folder):
    """kill -9 at an arbitrary instant loses nothing that a checkpoint held; the resumed run ends in the same bits."""
    trainer.prepare_data(Config())
    process = spawn(*LONG, cwd=folder)
    wait_for_step(folder / "run", 300, process)
    time.sleep(int.from_bytes(os.urandom(1)) / 1000)
    process.kill()
    process.communicate()
    assert not (folder / "run" / "COMPLETE").exists()
    resumed = spawn(*LONG, "--resume", "--json", cwd=folder)
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    whole = trainer.run(
        load_config(None, ["scheduler.total_steps=3000", "training.checkpoint_every=100", "record.moments=keyframes"]),
        folder / "whole",
    )
    assert json.loads(out)["digest"] == whole.digest
    assert [line["step"] for line in whole.folder.log_lines()] == [
        json.loads(line)["step"] for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()
    ]


@pytest.mark.once
def test_ctrl_c_ends_at_a_step_boundary(folder):
    """One SIGINT: exit 130, a resumable run, and the command that resumes it."""
    slow = ["--set", "model.n_layer=4", "--set", "scheduler.total_steps=1500"]  # half the steps, each twice as long
    process = spawn(*LONG, *slow, cwd=folder)
    wait_for_step(folder / "run", 100, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "minitrain train --resume --out-dir run" in out
    resumed = spawn("--resume", "--out-dir", "run", "--json", cwd=folder)
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert json.loads(out)["steps"] == 1500


def test_files_of_a_run(folder):
    """A finished run holds every file of the contract, the log has every step in order, the manifest every key."""
    outcome = trainer.run(config(), folder / "run", command_line=["minitrain", "train"])
    run = outcome.folder
    names = ["manifest", "config", "log", "checkpoint", "tokenizer", "results", "curve", "readme", "complete"]
    assert all(getattr(run, name).exists() for name in names)
    lines = list(run.log_lines())
    assert [x["step"] for x in lines if "loss" in x] == list(range(60))
    assert [x["step"] for x in lines if "val_loss" in x] == [20, 40, 60]
    assert {"step", "loss", "lr", "grad_norm", "grad_norm_clipped", "tokens_per_s"} == set(lines[0])
    manifest = run.read_manifest()
    assert {"seed", "versions", "config", "git_sha", "data_manifest_hash", "hardware"} <= set(manifest)
    assert {"cpu", "cores", "ram_bytes", "instruction_set"} <= set(manifest["hardware"])
    results = json.loads(run.results.read_text())
    expected = "train_ppl val_ppl best_val_step best_val_ppl ngram_baseline_val_ppl beats_baseline ppl_improvement_pct"
    assert {*expected.split(), "wall_clock_s", "peak_rss_mb"} <= set(results)
    assert results["beats_baseline"] == (results["val_ppl"] < results["ngram_baseline_val_ppl"])
    assert load_config(run.config) == run.stored_config() == config()
    assert run.complete.read_text().strip() == outcome.digest == manifest["outcome"]["digest"]


def test_manifest_stands_before_step_0(folder):
    """Whoever dies in step 0 leaves a manifest."""

    class Dies(Listener):
        def stepped(self, stats, state):
            assert (folder / "run" / "manifest.json").exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer.run(config(), folder / "run", listeners=[Dies()])
    assert (folder / "run" / "config.yaml").exists()


@pytest.mark.parametrize("mode", ["stop", "continue"])
def test_nonfinite(folder, mode):
    """A learning rate of 1e30 overflows: strict JSON tells of it, the run ends (or goes on), and says where."""
    conf = config("optimizer.lr_max=1e30", "optimizer.clip=null", f"training.on_nonfinite={mode}")
    outcome = trainer.run(conf, folder / "run")
    step = outcome.metrics.first_nonfinite_step
    assert step is not None
    assert outcome.metrics.steps == (step + 1 if mode == "stop" else 60)
    text = outcome.folder.log.read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [x for x in lines if x["step"] == step][-1]["nonfinite"]
    assert f"step {step}" in outcome.folder.readme.read_text()
    json.loads(outcome.folder.results.read_text(), parse_constant=pytest.fail)
    if mode == "stop":
        assert outcome.metrics.ended == "nonfinite"
        assert not outcome.folder.complete.exists()


@pytest.mark.once
def test_alert_of_a_run_that_does_not_learn(folder):
    """A loss that stays near ln V for 200 steps raises the alert; a default run does not."""
    slow = trainer.run(
        load_config(None, ["optimizer.lr_max=1e-9", "optimizer.lr_min=0", "scheduler.total_steps=250"]), folder / "slow"
    )
    assert ["not learning" in alert for alert in slow.results["alerts"]] == [True]
    assert not trainer.run(load_config(None, ["scheduler.total_steps=250"]), folder / "fine").results["alerts"]


def test_own_text(folder):
    """A plain text file trains; its last tenth validates; there is no corpus then."""
    Path("book.txt").write_text("The sun was low, and the river ran on to the sea.\nNobody came.\n" * 40)
    outcome = trainer.run(config("data.train_path=book.txt"), folder / "run")
    assert outcome.metrics.ended == "complete"
    assert not Path("data").exists()
    assert outcome.metrics.final_loss < 3.8


@pytest.mark.once
def test_reference_backend_trains(folder):
    """The NumPy twins train the same model to nearly the same loss."""
    losses = [
        trainer.run(config("scheduler.total_steps=12", f"training.backend={name}"), folder / name).metrics.final_loss
        for name in ("compiled", "reference")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_global_generators_are_left_alone(folder):
    """Training seeds the global generators once and draws from neither."""
    trainer.run(config("scheduler.total_steps=12"), folder / "run")
    after = np.random.random(), random.random()  # noqa: NPY002
    np.random.seed(42)  # noqa: NPY002
    random.seed(42)
    assert after == (np.random.random(), random.random())  # noqa: NPY002
