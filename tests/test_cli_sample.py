"""`minitrain sample` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from minitrain import trainer
from minitrain.checkpoint import save_model
from minitrain.cli import main
from minitrain.config import load_config
from minitrain.model import MiniGPT
from minitrain.run_folder import RunFolder

SHORT = ["scheduler.total_steps=60", "scheduler.warmup_steps=5", "training.batch_size=4", "training.val_every=60"]


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    for picture in ("write_curve", "write_page"):
        patch.setattr(trainer.report, picture, lambda *_: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs: `run` finished, `half` interrupted before its first step, `broken` not finite."""
    place = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        without_pictures(patch)
        trainer.run(load_config(None, SHORT), place / "run")
        trainer.run(load_config(None, SHORT), place / "half", stop=lambda: True)
        explodes = ["optimizer.lr_max=1e30", "optimizer.clip=null"]
        trainer.run(load_config(None, [*SHORT, *explodes]), place / "broken")
    return place


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to damage."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    return tmp_path


def sample(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["sample", *arguments], catch_exceptions=False)


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one message with these words."""
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stdout == ""


def test_text_goes_on_from_the_prompt():
    """One line a text, the prompt first; greedy says the same whatever the seed; a model file serves like its run."""
    result = sample("run", "--prompt", "She has")
    assert result.exit_code == 0
    assert result.stdout.startswith("She has")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert sample("run", "--prompt", "She has", "--seed", "9").stdout == result.stdout
    assert sample(str(RunFolder(Path("run")).require_model()), "--prompt", "She has").stdout == result.stdout


def test_json():
    """Everything that made the texts, and the texts in parts."""
    answer = json.loads(sample("run", "--prompt", "Z", "--num", "3", "--max-tokens", "9", "--json").stdout)
    assert list(answer) == ["model", "prompt", "unknown", "temperature", "top_k", "max_tokens", "seed", "samples"]
    assert (answer["temperature"], answer["unknown"]) == (1.0, ["Z"])
    assert len(answer["samples"]) == 3
    for each in answer["samples"]:
        assert each["text"] == "Z" + each["continuation"]
        assert len(each["tokens"]) <= 9
        assert each["finished"] == (len(each["tokens"]) < 9)
    assert len({each["text"] for each in answer["samples"]}) > 1


def test_draws():
    """--top-k and --num ask for drawing; a seed gives its texts again, and more of them begin with the same."""
    two, three = (sample("run", "--num", n, "--seed", "4").stdout.splitlines() for n in "23")
    assert three[:2] == two
    assert len(set(three)) == 3
    assert sample("run", "--num", "3", "--seed", "5").stdout.splitlines() != three
    greedy = sample("run", "--num", "2", "--temperature", "0").stdout.splitlines()
    assert greedy[0] == greedy[1] == sample("run", "--top-k", "1").stdout.strip()


def test_what_the_model_cannot_read_is_told():
    """Unknown characters and a prompt over the context: a note each, beside the text."""
    result = sample("run", "--prompt", "Zoë has", "--max-tokens", "3")
    assert result.exit_code == 0
    assert "never read 'Z' 'ë'; it sees <unk> there" in result.stderr
    assert result.stdout.startswith("Zoë has")
    long = sample("run", "--prompt", "She has " * 9, "--max-tokens", "3")
    assert "the model sees the last 32" in long.stderr
    assert long.exit_code == 0


def test_a_model_of_own_text():
    """Its own tokenizer, with fewer tokens than the model has room for, comes with the file."""
    Path("book.txt").write_text("the sun was low\nthe sun was red\n" * 9)
    run = trainer.run(load_config(None, [*SHORT, "data.train_path=book.txt"]), Path("own"))
    assert run.metrics.ended == "complete"
    shutil.copy(RunFolder(Path("own")).require_model(), "alone.safetensors")
    result = sample("alone.safetensors", "--prompt", "the", "--num", "4", "--temperature", "3")
    assert result.exit_code == 0, result.stderr
    assert set(result.stdout) <= set("the sunwalord\n\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere: expected a run folder, got no such folder"]),
        (["."], ["expected a run folder, got no manifest.json in it"]),
        (["half"], ["half: expected a finished run", "minitrain train --resume --out-dir half"]),
        (["broken"], ["broken: expected a finished run, got one that stopped at step", "not finite"]),
        (["run/README.md"], ["expected a readable model"]),
        (["run/checkpoint.safetensors"], ["expected a model of format minigpt-1"]),
        (["run", "--temperature", "-1"], ["temperature: expected a finite number, 0 (greedy) or more, got -1.0"]),
        (["run", "--temperature", "nan"], ["temperature", "got nan"]),
        (["run", "--temperature", "warm"], ["--temperature", "'warm' is not a valid float"]),
        (["run", "--top-k", "0"], ["top_k: expected an integer of at least 1, got 0"]),
        (["run", "--max-tokens", "0"], ["max_tokens: expected an integer of at least 1"]),
        (["run", "--num", "0"], ["--num", "x>=1"]),
        (["run", "--seed", "-3"], ["seed: expected an integer from 0 to 4294967295, got -3"]),
        (["run", "--prompt", "\udcff"], ["prompt: expected UTF-8 text"]),
        (["run", "--topk", "3"], ["No such option", "--top-k"]),
        ([], ["Missing argument 'RUN'"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str]):
    """One message, exit code 2, no text."""
    Path("run/README.md").write_text("# A run\n")
    refused(sample(*arguments), *words)


def test_models_that_cannot_be_used():
    """None, two, without a tokenizer, with a damaged or too large one, damaged."""
    models = Path("run/models")
    file = RunFolder(Path("run")).require_model()
    model = MiniGPT(load_config(None, []).model)
    save_model(models, model.params, model.config, stem="other")
    refused(sample("run"), "expected one model, got minigpt-", "other-", "name the file instead of the run")
    bare = save_model(Path("bare"), model.params, model.config)
    refused(sample(str(bare)), "expected a model with its tokenizer")
    for characters, words in (
        ("aa", "expected distinct characters"),
        ("".join(map(chr, range(40, 140))), "expected a tokenizer of at most 64 tokens, got 104"),
    ):
        tokenizer = json.dumps({"format": "minitrain-bpe-1", "characters": characters, "merges": []}).encode()
        refused(sample(str(save_model(Path("bare"), model.params, model.config, tokenizer))), str(bare), words)
    shutil.rmtree(models)
    refused(sample("run"), "got a complete run without one", "minitrain train --config run/config.yaml --out-dir NEW")
    models.mkdir()
    Path(models / file.name).write_bytes(b"half a file")
    refused(sample("run"), file.name, "expected a readable model")
