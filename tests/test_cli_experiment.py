"""`minitrain experiment` as a user meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from minitrain import trainer
from minitrain.cli import main
from minitrain.experiments import overhead, preset, timing
from minitrain.loop import StepStats
from minitrain.run_folder import RunFolder
from minitrain.state import State

NAMES = preset.names()


@pytest.fixture
def experiment(tiny: list[str]):
    """``experiment(name, *arguments)``: typed with the settings of a tiny run."""

    def typed(*arguments: str) -> Result:
        settings = [word for setting in tiny for word in ("--set", setting)]
        return CliRunner().invoke(
            main, ["experiment", *arguments[:1], *settings, *arguments[1:]], catch_exceptions=False
        )

    return typed


def plain(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["experiment", *arguments], catch_exceptions=False)


def test_the_list():
    """Without a name, or with --list: every experiment with its line, and how to go on; as JSON by name."""
    assert plain().stdout == plain("--list").stdout
    for name in NAMES:
        assert f"{name}  " in plain().stdout
    assert plain().stdout.endswith("next: minitrain experiment NAME\n")
    assert max(map(len, plain().stdout.splitlines())) <= 100
    assert json.loads(plain("--list", "--json").stdout) == {name: preset.load(name).about for name in NAMES}


def test_wrong_names_and_settings(experiment):
    """Exit code 2, the nearest name, and nothing written."""
    for result, words in (
        (plain("18-train-mimi"), "did you mean '18-train-mini'?"),
        (plain("42"), "known are 14-ngram-baseline"),
        (plain("18-train-mini", "--set", "training.batchsize=4"), "did you mean 'batch_size'"),
        (plain("18-train-mini", "--outdir", "x"), "--out-dir"),
        (experiment("18-checkpoint-roundtrip", "--set", "model.dropout=0"), "expected more than 0"),
    ):
        assert result.exit_code == 2
        assert words in result.stderr
        assert not Path("experiments").exists()


def test_text_json_and_where_it_goes(experiment):
    """A sentence and the page's path; --json gives results.json with the folder; --seed lies over the preset."""
    result = experiment("18-checkpoint-roundtrip")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (
        "5 of 5 state machines come back to the bit\n-> experiments/18-checkpoint-roundtrip/README.md\n"
    )
    result = experiment("18-checkpoint-roundtrip", "--json", "--seed", "5", "--out-dir", "mine")
    answer = json.loads(result.stdout)
    assert result.stderr == ""
    assert (answer.pop("experiment"), answer.pop("out_dir")) == ("18-checkpoint-roundtrip", "mine")
    results = json.loads(Path("mine/results.json").read_text())
    assert answer == {key: value for key, value in results.items() if key != "experiment"}
    manifest = RunFolder(Path("mine")).read_manifest()
    assert (manifest["seed"], manifest["experiment"]) == (5, "18-checkpoint-roundtrip")
    assert manifest["command_line"][:3] == ["minitrain", "experiment", "18-checkpoint-roundtrip"]


@pytest.mark.parametrize(
    ("name", "headline", "key"),
    [
        ("19-healthy", "A healthy run in seven panels: ", "panels"),
        ("19-overhead", "All metrics make the loop ", "bars"),
    ],
)
def test_runs_that_are_looked_into(experiment, monkeypatch: pytest.MonkeyPatch, name: str, headline: str, key: str):
    """Exit code 0 whatever was found, since a sign that is otherwise and a bar not met are no faults of the run."""
    for module, constant in ((overhead, "ROUNDS"), (overhead, "LOOP_TURNS"), (timing, "TURNS"), (timing, "BURST")):
        monkeypatch.setattr(module, constant, 1)
    monkeypatch.setattr(timing, "build_page", lambda run: timing.Page(99.0, 1.0))
    result = experiment(name)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(headline)
    assert result.stdout.endswith(f"-> experiments/{name}/README.md\n")
    answer = json.loads(experiment(name, "--json", "--out-dir", "mine").stdout)
    assert answer["experiment"] == name
    assert answer[key]


def test_a_finished_one(experiment):
    """Refused with 2; --force tells where the old one went, and ends with 0."""
    assert experiment("14-ngram-baseline").exit_code == 0
    again = experiment("14-ngram-baseline")
    assert again.exit_code == 2
    assert "got this experiment, finished" in again.stderr
    forced = experiment("14-ngram-baseline", "--force")
    assert forced.exit_code == 0
    assert "experiments/14-ngram-baseline is now experiments/14-ngram-baseline-old" in forced.stderr


def test_a_problem_ends_with_1(experiment):
    """A run that is not finite, as with `train`."""
    settings = ["--set", "optimizer.lr_max=1e30", "--set", "optimizer.clip=null"]
    result = experiment("18-train-mini", *settings)
    assert result.exit_code == 1
    assert "No finite validation perplexity" in result.stdout


@pytest.mark.parametrize(
    ("name", "more"), [("18-train-mini", ""), ("18-checkpoint-roundtrip", " --force")], ids=["resumes", "begins-anew"]
)
def test_ctrl_c(experiment, monkeypatch: pytest.MonkeyPatch, name: str, more: str):
    """130 at the next step boundary, and the command that goes on or begins anew works."""
    stepped = trainer.Keeper.stepped

    def interrupted(self: trainer.Keeper, stats: StepStats, state: State) -> None:
        stepped(self, stats, state)
        if stats.step == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Keeper, "stepped", interrupted)
        result = experiment(name)
    assert result.exit_code == 130
    assert result.stdout.startswith(f"stopped\nnext: minitrain experiment {name} --set ")
    assert result.stdout.endswith(f"{more}\n")
    assert len(list(RunFolder(Path("experiments") / name).log_lines())) == 8
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Keeper, "stepped", interrupted)
        stopped = experiment(name, "--json", "--out-dir", "other")
    assert json.loads(stopped.stdout) == {"experiment": name, "out_dir": "other", "ended": "interrupted"}
    again = experiment(name, *more.split(), "--set", "scheduler.total_steps=40")
    assert again.exit_code == 0, again.stderr


def test_the_forwarder(tiny: list[str]):
    """scripts/train_mini.py is `minitrain train`, whatever folder it is called from."""
    script = Path(__file__).parent.parent / "scripts" / "train_mini.py"
    if not script.exists():
        pytest.skip("scripts/ is not beside the tests")
    Path("my.yaml").write_text("scheduler: {total_steps: 3, warmup_steps: 0}\n")
    arguments = ["--config", "my.yaml", "--out-dir", "out", "--seed", "3", "--quiet"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = RunFolder(Path("out"))
    assert run.read_manifest()["command_line"] == ["minitrain", "train", *arguments]
    assert run.stored_config().training.rng_seed == run.read_manifest()["seed"] == 3
    assert run.stored_config().scheduler.total_steps == 3
