"""The command line as a user meets it: what it prints, how it ends, what bad input leaves behind (nothing)."""

from __future__ import annotations

import errno
import json
import pkgutil
import re
import signal
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from minitrain import cli, commands, keeper, trainer
from minitrain.cli import main
from minitrain.data.prepare import prepare
from minitrain.experiments import preset
from minitrain.inject import FAULTS
from minitrain.run_folder import RunFolder

SHORT = [
    "--set",
    "scheduler.total_steps=30",
    "--set",
    "scheduler.warmup_steps=5",
    "--set",
    "training.checkpoint_every=10",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for picture in ("write_curve", "write_page"):
        monkeypatch.setattr(trainer.report, picture, lambda *_: None)
    return tmp_path


def minitrain(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def train(*arguments: str) -> Result:
    return minitrain("train", *SHORT, "--out-dir", "run", *arguments)


def refused(result: Result, *words: str) -> None:
    """Exit code 2, one message with these words, no traceback, and no run folder."""
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.output
    assert not Path("run").exists()


def corpus() -> tuple[Path, Path]:
    """The built-in corpus under names of our own."""
    train, val = Path("mine/train.jsonl"), Path("mine/val.jsonl")
    prepare(train, val, heldout_policy="verbs_4", vocab_size=64, max_seq_len=32, generate_missing=True)
    Path("mine/MANIFEST.json").unlink()
    return train, val


def own_data(train: Path, val: Path) -> list[str]:
    return ["--set", f"data.train_path={train}", "--set", f"data.val_path={val}"]


def test_train_json_and_text():
    """--json prints one object with the stable keys and nothing else; without it a person reads the perplexities."""
    result = train("--json", "--seed", "7")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert {"run_dir", "steps", "final_loss", "val_loss", "digest", "wall_clock_s"} <= set(answer)
    assert result.stderr == ""
    assert RunFolder(Path("run")).read_manifest()["seed"] == 7
    text = minitrain("train", *SHORT).stdout
    assert "validation perplexity" in text
    assert "-> runs/default" in text
    assert "-> runs/default-2" in minitrain("train", *SHORT).stdout


def test_config_as_argument_and_as_option():
    """`train my.yaml` and `train --config my.yaml` are the same; --set and --seed lie over the file."""
    Path("my.yaml").write_text("training: {batch_size: 4, rng_seed: 1}\n")
    for i, arguments in enumerate((["my.yaml"], ["--config", "my.yaml"])):
        arguments = [*arguments, "--seed", "9", "--set", "training.batch_size=3"]
        result = minitrain("train", *SHORT, *arguments, "--out-dir", f"run{i}")
        assert result.exit_code == 0, result.output
    manifests = [RunFolder(Path(f"run{i}")).read_manifest() for i in range(2)]
    assert [m["config"]["training"]["batch_size"] for m in manifests] == [3, 3]
    assert [m["seed"] for m in manifests] == [9, 9]
    refused(train("my.yaml", "--config", "my.yaml"), "expected one configuration, got two")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.batchsize=4", ["training.batchsize", "unknown key", "did you mean 'batch_size'"]),
        ("model.n_head=5", ["model.n_head", "model.d_model"]),
        ("training.batch_size=many", ["training.batch_size", "expected an integer", "'many'"]),
        ("optimizer.lr_max=-1", ["optimizer.lr_max", "expected a finite number", "-1"]),
        ("scheduler.warmup_steps=31", ["scheduler.total_steps", "scheduler.warmup_steps"]),
        ("data.train_path=nope.txt", ["nope.txt", "expected a data file, found none"]),
        ("model.max_seq_len=8", ["expected at most 9 tokens", "raise model.max_seq_len", "train.jsonl, row"]),
        ("training.rng_seed=-1", ["training.rng_seed", "0 to 4294967295"]),
        ('data.train_path="a\\tb.txt"', ["data.train_path", "without control characters"]),
        ("training.batch_size=10000000", ["fits into", "GB of memory", "batch_size"]),
        ("model.n_layer=100000000", ["fits into", "GB of memory", "n_layer"]),
        ("data.train_path=/dev/zero", ["/dev/zero", "expected a regular file"]),
    ],
)
def test_bad_settings(setting, words):
    """Unknown key, wrong type, impossible value, missing data, sentence over the context."""
    refused(train("--set", setting), *words)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: b"", ["train.jsonl", "empty"]),
        (lambda text: text[:-20], ["train.jsonl", "1760"]),
        (lambda text: text.replace(b"She", b"S\xffe", 1), ["train.jsonl", "UTF-8"]),
        (lambda text: text.replace(b'"verb": "walk"', b'"verb": "wlak"', 1), ["verb", "'wlak'", "did you mean 'walk'"]),
        (lambda text: text.replace(b'"past_simple"', b'"pluperfect"', 1), ["tense", "pluperfect"]),
    ],
    ids=["empty", "torn", "bad-utf8", "unknown-verb", "unknown-tense"],
)
def test_bad_data(damage, words):
    """An empty, torn, wrongly encoded or mislabelled data file is refused with the place."""
    path, val = corpus()
    path.write_bytes(damage(path.read_bytes()))
    refused(train(*own_data(path, val)), *words)


def test_out_dir_that_cannot_be():
    """A file, a foreign folder, another run or an unwritable place is no out-dir; what is there stays as it was."""
    Path("file").write_text("x")
    refused(minitrain("train", *SHORT, "--out-dir", "file"), "file", "got a file")
    refused(minitrain("train", *SHORT, "--out-dir", "file/run"), "cannot")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("x")
    refused(minitrain("train", *SHORT, "--out-dir", "full"), "other files")
    refused(minitrain("train", *SHORT, "--out-dir", "/proc/run"), "/proc")
    assert train().exit_code == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    again = train()
    assert again.exit_code == 2
    assert "got another run (complete)" in again.stderr
    assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}


def test_resume_refusals():
    """Not a run, no out-dir, a complete run, another configuration, other data, a damaged checkpoint."""
    refused(minitrain("train", "--resume"), "--resume: expected --out-dir")
    refused(minitrain("train", "--resume", "--out-dir", "nowhere"), "expected a run folder", "no such folder")
    Path("empty").mkdir()
    refused(minitrain("train", "--resume", "--out-dir", "empty"), "no manifest.json")
    assert train().exit_code == 0
    assert "got a complete one" in train("--resume").stderr
    Path("run/COMPLETE").unlink()
    other = train("--resume", "--set", "training.batch_size=5")
    assert other.exit_code == 2
    assert "training.batch_size: 8 -> 5" in other.stderr
    nothing_left = minitrain("train", "--resume", "--out-dir", "run", "--set", "training.threads=2")
    assert nothing_left.exit_code == 0
    assert nothing_left.stdout.startswith("0 steps in ")

    Path("run/COMPLETE").unlink()
    checkpoint = Path("run/checkpoint.safetensors")
    good = checkpoint.read_bytes()
    for damaged, words in (
        (good[:1000], "expected a readable checkpoint"),
        (good[:-1] + bytes([good[-1] ^ 1]), "has been changed or damaged"),
        (Path("run").glob("models/*").__next__().read_bytes(), "expected a checkpoint of format"),
    ):
        checkpoint.write_bytes(damaged)
        result = minitrain("train", "--resume", "--out-dir", "run")
        assert result.exit_code == 2
        assert words in result.stderr
    checkpoint.write_bytes(good)

    manifest = Path("run/manifest.json")
    text = manifest.read_text()
    manifest.write_text(text.replace('"data_manifest_hash": "', '"data_manifest_hash": "0'))
    assert "expected the data that the run was made from" in minitrain("train", "--resume", "--out-dir", "run").stderr
    manifest.write_text(text.replace('"schema_version": 1', '"schema_version": 99'))
    assert "expected schema_version 1, got 99" in minitrain("train", "--resume", "--out-dir", "run").stderr
    manifest.write_text(text[:100])
    assert "expected the manifest of a run" in minitrain("train", "--resume", "--out-dir", "run").stderr


def test_two_processes_in_one_folder(folder):
    """While one process writes a run, another may neither resume it nor begin there."""
    assert train().exit_code == 0
    Path("run/COMPLETE").unlink()
    with RunFolder(Path("run")).hold(new=False):
        result = minitrain("train", "--resume", "--out-dir", "run")
        assert result.exit_code == 2
        assert "another process is at work" in result.stderr
    assert minitrain("train", "--resume", "--out-dir", "run").exit_code == 0
    with RunFolder(Path("other")).hold(new=True):
        result = minitrain("train", *SHORT, "--out-dir", "other")
        assert "another process is at work" in result.stderr


def test_a_run_that_died_before_its_manifest():
    """What a process leaves that is killed before the manifest is no obstacle."""
    Path("run").mkdir()
    for name in ("config.yaml", "tokenizer.json", ".lock", ".manifest.json.x1.partial"):
        Path("run", name).write_text("torn")
    assert train().exit_code == 0


def test_damaged_log_is_named():
    """A line in the middle of the log that is no JSON stops the resume with its place."""
    assert train().exit_code == 0
    Path("run/COMPLETE").unlink()
    log = Path("run/train_log.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:3], "{rubbish}\n", *lines[4:]]))
    result = minitrain("train", "--resume", "--out-dir", "run")
    assert result.exit_code == 2
    assert "train_log.jsonl:4: expected a JSON object" in result.stderr


def test_disk_full(monkeypatch):
    """No room for a checkpoint: one message, exit code 2, and the run resumes from the last that was written.

    It then says which steps it has run, and what of the record was still missing.
    """
    write, count = keeper.save_checkpoint, [0]

    def fails_the_second_time(*arguments, **names):
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "run/checkpoint.safetensors")
        write(*arguments, **names)

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "save_checkpoint", fails_the_second_time)
        result = train()
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert " GB more of " not in result.stderr
    resumed = minitrain("train", "--resume", "--out-dir", "run")
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.stdout.startswith("steps 10 to 29 in ")
    assert re.search(r"^recording every step .*: about 0.0\d GB more of ", resumed.stderr)


def test_what_will_be_injected_is_said_at_the_start():
    """A line for each injection; a resumed run leaves those out that are behind it."""
    Path("two.yaml").write_text("injections: [{name: scale, step: 7}, {name: decay_zero, step: 9}]")
    scale, decay = "injecting scale at step 7 (factor 50)\n", "injecting decay_zero from step 9\n"
    assert train("two.yaml").stderr.endswith(f"free\n{scale}{decay}")
    Path("run/COMPLETE").unlink()
    assert minitrain("train", "--resume", "--out-dir", "run").stderr.endswith(f"free\n{decay}")


def test_nonfinite_ends_with_1():
    """A run that went non-finite says at which step and ends with 1."""
    result = train("--set", "optimizer.lr_max=1e30", "--set", "optimizer.clip=null")
    assert result.exit_code == 1
    assert "not finite at step" in result.stdout


def test_nonfinite_that_goes_on_ends_with_1():
    """With on_nonfinite: continue all steps are taken, and the end says where it began."""
    setting = ["optimizer.lr_max=1e30", "optimizer.clip=null", "training.on_nonfinite=continue"]
    result = train(*(word for s in setting for word in ("--set", s)))
    assert result.exit_code == 1
    assert "went on: loss or gradient norm is not finite at step" in result.stdout
    assert "nan" not in result.stdout


def test_a_resumed_run_knows_what_went_before():
    """The alert, the first step that was not finite and the final loss come from the whole log."""
    flat = ["optimizer.lr_max=1e-9", "optimizer.lr_min=0", "scheduler.total_steps=220", "training.batch_size=2"]
    arguments = [word for setting in flat for word in ("--set", setting)]
    whole = train(*arguments)
    assert whole.exit_code == 1
    assert "alert: not learning" in whole.stdout
    results = json.loads(Path("run/results.json").read_text())
    Path("run/COMPLETE").unlink()
    again = minitrain("train", "--resume", "--out-dir", "run")
    assert again.exit_code == 1
    assert "alert: not learning" in again.stdout
    resumed = json.loads(Path("run/results.json").read_text())
    assert {k: v for k, v in resumed.items() if k not in ("wall_clock_s", "peak_rss_mb")} == {
        k: v for k, v in results.items() if k not in ("wall_clock_s", "peak_rss_mb")
    }


def test_a_hole_in_the_log_is_named():
    """A log that lacks steps before the checkpoint is not gone on with."""
    assert train().exit_code == 0
    Path("run/COMPLETE").unlink()
    log = Path("run/train_log.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:7], *lines[8:]]))
    result = minitrain("train", "--resume", "--out-dir", "run")
    assert result.exit_code == 2
    assert "got no step 7" in result.stderr


def test_ctrl_c_before_the_first_step(monkeypatch):
    """Stopped while the data are read: 130, nothing written."""

    def interrupted(config):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "prepare_data", interrupted)
    result = train()
    assert result.exit_code == 130
    assert not Path("run").exists()


def test_out_of_memory(monkeypatch):
    """What the estimate did not see ends in a message too."""

    def too_much(config):
        raise MemoryError("1 TiB")

    monkeypatch.setattr(trainer, "prepare_data", too_much)
    refused(train(), "not enough memory (1 TiB)", "lower training.batch_size")


def test_wrong_names_get_a_hint():
    """A wrong command or option: exit code 2 and the nearest right one."""
    assert "No such command 'trian'; did you mean 'train'?" in minitrain("trian").stderr
    result = minitrain("train", "--outdir", "x")
    assert result.exit_code == 2
    assert "--out-dir" in result.stderr


def test_the_shell_completes_names():
    """Commands, options, experiments and faults, as docs/completion.md says; nothing where nothing begins so."""

    def completed(*words: str) -> list[str]:
        shell = ShellComplete(main, {}, "minitrain", "_MINITRAIN_COMPLETE")
        return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]

    assert completed("tr") == ["train"]
    assert completed("train", "--o") == ["--out-dir"]
    assert completed("experiment", "14") == ["14-ngram-baseline"]
    assert completed("experiment", "") == preset.names()
    assert completed("train", "--injection", "") == ["none", "help", *FAULTS]
    assert completed("train", "--injection", "param_n") == ["param_nan"]
    assert completed("experiment", "x") == []


def test_an_experiments_preset_is_no_configuration():
    """The message says which command takes it."""
    refused(train(str(preset.FOLDER / "19-healthy.yaml")), "19-healthy.yaml", "`minitrain experiment 19-healthy`")


def test_every_command_has_a_file_and_an_example():
    """What `--help` lists are the modules of minitrain/commands; each command's own help shows how to type it.

    A module whose name begins with _ is a part of a command.
    """
    modules = [name for _, name, _ in pkgutil.iter_modules(commands.__path__) if not name.startswith("_")]
    files = {name.replace("_", "-") for name in modules}
    assert sorted(cli.COMMANDS) == sorted(files)
    listed = minitrain("--help").stdout
    for name in cli.COMMANDS:
        assert f"\n  {name} " in listed
        shown = minitrain(name, "--help")
        assert shown.exit_code == 0
        assert f"\n  minitrain {name}" in shown.stdout


def test_starting_loads_only_what_the_command_needs(run_python):
    """`--help` loads no engine, no NumPy, no configuration and no plotting."""
    heavy = "{'numpy', 'pydantic', 'rich', 'altair', 'vl_convert', 'safetensors', 'ruamel'}"
    code = f"""
import sys
from minitrain.cli import main
main(["--help"], standalone_mode=False)
print(sorted({heavy} & set(sys.modules)))
"""
    assert run_python(code).stdout.splitlines()[-1] == "[]"


def test_the_manifest_says_what_was_typed_without_the_place_of_the_program():
    """`command_line` is `minitrain` and the arguments, wherever minitrain is installed."""
    assert train("--quiet").exit_code == 0
    line = RunFolder(Path("run")).read_manifest()["command_line"]
    assert line == ["minitrain", "train", *SHORT, "--out-dir", "run", "--quiet"]


def test_selftest_and_version(monkeypatch):
    """`selftest` confirms the golden digests; on other bits it says so and ends with 1."""
    monkeypatch.setattr("minitrain.selftest.GOLDEN", {0: "0b3ad252bf127c43a59507ede321c765", 1: "other"})
    result = minitrain("selftest", "--threads", "2")
    assert result.exit_code == 1
    assert "as expected" in result.stdout
    assert "expected other" in result.stdout
    assert "numerics 1" in minitrain("--version").stdout
