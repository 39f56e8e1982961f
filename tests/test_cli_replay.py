"""`minitrain replay`, `verify` and `info` as a user meets them: what they print, how they end, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from minitrain.cli import main
from minitrain.record.recorded import open_run
from minitrain.replay import fingerprint
from minitrain.run_folder import RunFolder
from minitrain.tensors import sites


def minitrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def refused(result: Result, *words: str) -> None:
    """Exit code 2, one message with these words, no traceback."""
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.output


def bump(tensor) -> None:
    """One bit of one element: the next number."""
    tensor.reshape(-1).view(np.uint32)[3] += 1


def hit(tensor) -> None:
    """One element, by so much that no rounding hides it."""
    tensor.reshape(-1)[3] *= 1.5


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory, record_run) -> Path:
    return record_run(tmp_path_factory.mktemp("healthy") / "run")


@pytest.fixture(scope="module")
def broken(tmp_path_factory, record_run, fault) -> Path:
    """A run with a fault in the update of step 13."""
    strike = fault(13, lambda parts: hit(parts.model.grads["ln_f.bias"]), "clip")
    return record_run(tmp_path_factory.mktemp("broken") / "run", watchers=[strike])


def test_replay_tells_a_person(run):
    """A row for every site in order, the figures of the step, the verdict in one sentence; exit code 0."""
    result = minitrain("replay", run, "--step", 17)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["site", "phase", "finite", "min", "max", "mean", "|x|", "record"]
    names = sites(open_run(run).config.model)
    assert [line.split()[0] for line in lines[1 : 1 + len(names)]] == names
    assert lines[1].split()[-1] == "-"
    assert lines[len(names)].split()[-1] == "same"
    assert "step 17: loss " in result.stdout
    assert (
        "verified: step 17 bit for bit as recorded (batch, random streams, loss, learning rate, norms, 48 " in lines[-1]
    )


def test_replay_json(run):
    """The stable keys; null where nothing was recorded; nothing else on stdout."""
    result = minitrain("replay", run, "--step", 17, "--json", "--threads", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert {"run", "step", "verified", "sites", "verdict"} <= set(told)
    assert (told["run"], told["step"], told["verified"], told["verdict"]) == (str(run), 17, True, "verified")
    assert "to" not in told
    assert "batch" not in told
    first, last = told["sites"][0], told["sites"][-1]
    assert list(first) == ["site", "phase", "finite", "min", "max", "mean_abs", "digest_match"]
    assert (first["site"], first["phase"], first["digest_match"]) == ("embed", "forward", None)
    assert (last["site"], last["phase"], last["digest_match"]) == ("param.lm_head.bias", "update", True)
    assert told["divergence"] is None


def test_a_range_of_steps_and_its_batches(run, book):
    """--to includes both ends; the table is of the last; --print-batch tells the samples of each step."""
    result = minitrain("replay", run, "--step", 3, "--to", 6, "--json", "--print-batch")
    told = json.loads(result.stdout)
    assert (told["step"], told["to"], told["sites_step"], told["verified"]) == (3, 6, 6, True)
    assert [sample["step"] for sample in told["batch"]] == [t for t in range(3, 7) for _ in range(3)]
    text = minitrain("replay", run, "--step", 3, "--to", 6, "--print-batch", "--sites", "loss").stdout
    assert "verified: steps 3 to 6 bit for bit as recorded" in text
    sample = told["batch"][-1]
    assert f"6  {sample['id']}  {sample['text']}" in text
    assert sample["text"] in book.read_text()


def test_a_divergence_is_told(broken):
    """Exit code 1; where, which bits, how far apart, and what to type next."""
    result = minitrain("replay", broken, "--step", 11, "--to", 15)
    assert result.exit_code == 1
    assert "divergence at step 13, m.ln_f.bias (update), element [3]" in result.stdout
    assert "recorded 0x" in result.stdout
    assert " ulp; 1 of 8 elements differ" in result.stdout
    assert "steps 11 to 12 are as recorded" in result.stdout
    assert f"next: minitrain replay {broken} --step 13 --bundle step.tar.gz" in result.stdout
    assert any(line.startswith("m.ln_f.bias") and line.endswith("differs") for line in result.stdout.splitlines())
    told = json.loads(minitrain("replay", broken, "--step", 13, "--json").stdout)
    assert (told["verified"], told["verdict"], told["differing_steps"]) == (False, "diverged", [13])
    assert told["divergence"]["index"] == [3]
    assert {row["site"]: row["digest_match"] for row in told["sites"]}["m.ln_f.bias"] is False


def test_what_differs_here_is_told_with_a_divergence(broken, monkeypatch):
    """Another processor or version moves no bit as a rule, so it is told where one has moved."""
    monkeypatch.setattr(fingerprint, "instruction_set", lambda: "avx1024")
    text = minitrain("replay", broken, "--step", 13).stdout
    assert "environments differ: instruction set" in text
    assert "-> avx1024" in text


def test_a_divergence_of_digests_is_told(tmp_path, record_run, fault):
    """Where no elements are recorded the digests stand for them; from a bundle there is nothing further to type."""
    strike = fault(13, lambda parts: hit(parts.model.grads["ln_f.bias"]), "clip")
    run = record_run(tmp_path / "run", "record.moments=keyframes", watchers=[strike])
    text = minitrain("replay", run, "--step", 13, "--bundle", "step.tar.gz").stdout
    assert "divergence at step 13, m.ln_f.bias (update)\n  recorded 0x" in text
    assert "(digests)" in text
    assert "-> step.tar.gz" in text
    result = minitrain("replay", "step.tar.gz")
    assert result.exit_code == 1
    assert "next:" not in result.stdout


def test_dump(run):
    """The tensors of the sites by name, in a file that any reader of safetensors opens."""
    result = minitrain("replay", run, "--step", 2, "--to", 4, "--sites", "*ln_f*", "--dump", "sites.safetensors")
    assert result.exit_code == 0, result.output
    assert "-> sites.safetensors" in result.stdout
    tensors = load_file("sites.safetensors")
    assert sorted(tensors) == sorted(s for s in sites(open_run(run).config.model) if "ln_f" in s)
    told = json.loads(minitrain("replay", run, "--step", 4, "--json").stdout)
    site = next(row for row in told["sites"] if row["site"] == "grad:ln_f")
    assert (site["min"], site["max"]) == (tensors["grad:ln_f"].min(), tensors["grad:ln_f"].max())


def test_a_question_asked_after_the_fact(run, folder):
    """--hook calls a function from a file in the current folder, at the sites of --sites."""
    (folder / "asking.py").write_text(
        "import numpy as np\n"
        "def entropy(site, p):\n"
        "    q = p[p > 0]\n"
        "    print('entropy', site, -(q * np.log(q)).sum() / np.prod(p.shape[:-1]))\n"
    )
    result = minitrain("replay", run, "--step", 5, "--sites", "block.*.attn.probs", "--hook", "asking:entropy")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("entropy")]
    assert [line[1] for line in lines] == ["block.0.attn.probs"]
    assert 0 < float(lines[0][2]) < np.log(12)


def test_hooks_that_cannot_be_called(run, folder):
    """No colon, no such module, one that fails, no such function, one that raises: one message each."""
    (folder / "faulty_questions.py").write_text("raise OSError('no disk')")
    (folder / "questions.py").write_text("number = 3\ndef entropy(site, p):\n    1 / 0\n")
    ask = ["replay", run, "--step", 5, "--hook"]
    for spec in ("questions", ":entropy", "questions:"):
        refused(minitrain(*ask, spec), f"--hook {spec}: expected MODULE:FUNCTION, as in entropy:show")
    refused(minitrain(*ask, "nowhere:f"), "expected a module nowhere that can be imported, got ModuleNotFoundError")
    refused(minitrain(*ask, "faulty_questions:f"), "got OSError: no disk")
    refused(minitrain(*ask, "questions:entropi"), "expected a function entropi, got none; did you mean 'entropy'?")
    refused(minitrain(*ask, "questions:number"), "expected a function number, got 3")
    refused(
        minitrain(*ask, "questions:entropy"), "hook entropy at site embed, step 5: ZeroDivisionError", "questions.py:3"
    )


def test_a_bundle_at_the_command_line(run, folder):
    """Written, copied elsewhere, replayed by its name alone."""
    assert minitrain("replay", run, "--step", 9, "--bundle", "step.tar.gz").exit_code == 0
    (folder / "other").mkdir()
    shutil.move("step.tar.gz", "other/copy.tar.gz")
    result = minitrain("replay", "other/copy.tar.gz", "--json", "--print-batch")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["step"], told["verified"], len(told["batch"])) == (9, True, 3)
    refused(minitrain("replay", "other/copy.tar.gz", "--step", 8), "expected one of the recorded steps 9 of other/copy")
    Path("x").write_text("x")
    refused(minitrain("replay", "x"), "expected a bundle of minitrain replay, or a run folder")


def test_bad_input(run):
    """Steps that are not there, a range that is none, sites that are none, folders that are none."""
    for step in (-1, 30, 10**12):
        refused(minitrain("replay", run, "--step", step), f"step {step}: expected one of the recorded steps 0..29 of ")
    refused(minitrain("replay", run), "expected --step N, one of the recorded steps 0..29")
    refused(minitrain("replay", run, "--step", 5, "--to", 4), "--to 4: expected 5 or a later step")
    refused(minitrain("replay", run, "--step", 5, "--to", 30), "--to 30: expected one of the recorded steps 0..29")
    refused(minitrain("replay", run, "--step", 5, "--sites", "block.0.atn.probs"), "did you mean 'block.0.attn.probs'")
    for option in "--dump", "--bundle":
        refused(
            minitrain("replay", run, "--step", 5, option, "no/where"), f"{option} no/where: expected a file in a fo"
        )
    for command in "verify", "info":
        refused(minitrain(command, run / "README.md"), "README.md: expected a run folder, got a file; name the --out")
    for command in ["replay", "--step", 1], ["verify"], ["info"]:
        refused(minitrain(command[0], "nowhere", *command[1:]), "nowhere: expected a run folder, got no such folder")
    assert not list(Path.cwd().iterdir())


def test_another_engine(run, monkeypatch):
    """Refused with the reason; --allow-mismatch replays, and claims nothing."""
    monkeypatch.setattr(fingerprint, "NUMERICS_VERSION", 2)
    refused(minitrain("replay", run, "--step", 5), "numerics_version: 1 -> 2")
    refused(minitrain("verify", run), "numerics_version: 1 -> 2")
    result = minitrain("replay", run, "--step", 5, "--allow-mismatch")
    assert result.exit_code == 0
    assert "verified" not in result.stdout
    assert "the same: step 5 bit for bit as recorded" in result.stdout
    assert "informational: the same bits are not promised here (recorded -> here): numerics_version: 1" in result.stdout
    told = json.loads(minitrain("replay", run, "--step", 5, "--allow-mismatch", "--json").stdout)
    assert (told["verified"], told["verdict"], told["mismatches"]) == (
        False,
        "informational",
        ["numerics_version: 1 -> 2"],
    )


def test_verify(run):
    """One sentence and exit code 0, or the stable keys."""
    result = minitrain("verify", run)
    assert result.exit_code == 0, result.output
    assert f"verified: 30 steps and 5 keyframes of {run} are bit for bit as recorded" in result.stdout
    told = json.loads(minitrain("verify", run, "--json", "--workers", 1).stdout)
    assert told == {"verified": True, "steps_checked": 30, "faulty_steps": [], "unverified_steps": []}


def test_verify_finds_a_fault(broken):
    """Exit code 1; the step and tensor, what is unverified, what to type next."""
    result = minitrain("verify", broken)
    assert result.exit_code == 1
    assert "fault: step 13: expected m.ln_f.bias (update) as recorded" in result.stdout
    assert "unverified: steps 14 to 15\n" in result.stdout
    assert f"next: minitrain replay {broken} --step 13" in result.stdout
    told = json.loads(minitrain("verify", broken, "--json").stdout)
    assert (told["verified"], told["unverified_steps"]) == (False, [14, 15])
    assert [{k: f[k] for k in ("step", "kind", "tensor")} for f in told["faulty_steps"]] == [
        {"step": 13, "kind": "m", "tensor": "ln_f.bias"}
    ]


def test_verify_tells_many_faults_briefly(run, tmp_path):
    """Damage all over: the first are told, the others counted."""
    copy = shutil.copytree(run, tmp_path / "run")
    shard = next((copy / "record.zarr/m").glob("c.*"))
    shard.write_bytes(b"\0" * len(shard.read_bytes()))
    text = minitrain("verify", copy).stdout
    assert text.count("fault: ") == 20
    assert "more (--json has all)" in text
    assert "30 steps checked" in text


def test_verify_shows_a_bar(run, monkeypatch):
    """At a terminal; its units are told by all workers."""
    monkeypatch.setattr("minitrain.commands.verify.bar_wanted", lambda quiet, as_json: True)
    result = minitrain("verify", run)
    assert result.exit_code == 0
    assert "verify" in result.stderr


def test_info(run):
    """A complete run: what is recorded, its sizes, where the checkpoint stands, how to replay."""
    text = minitrain("info", run).stdout
    assert f"{run}: complete, 30 of 30 steps" in text
    assert "m and v of every step, a keyframe every 8 steps" in text
    assert "5: states 0, 8, 16, 24, 30" in text
    assert f"minitrain replay {run} --step 29" in text
    assert "resume" not in text
    told = json.loads(minitrain("info", run, "--json").stdout)
    assert (told["state"], told["steps"], told["total_steps"], told["checkpoint_step"]) == ("complete", 30, 30, 30)
    assert told["keyframes"] == [0, 8, 16, 24, 30]
    record = sum(p.stat().st_size for p in [*(run / "record.zarr").rglob("*"), run / "journal.msgpack"] if p.is_file())
    parts = ("journal", "moments", "keyframes", "arrays")
    assert sum(told["sizes_mb"][part] for part in parts) == pytest.approx(record / 1e6, abs=0.002)
    assert told["bytes_per_parameter_and_step"] == pytest.approx(record / told["parameters"] / 30, abs=0.001)


def test_info_of_unfinished_runs(tmp_path, record_run, run):
    """Interrupted: all is saved. Killed: how many steps resume will run again. At work: somebody holds the folder."""

    class Stop:
        asked = 0

        def __call__(self) -> bool:
            self.asked += 1
            return self.asked > 14

    stopped = record_run(tmp_path / "run", "record.moments=keyframes", "record.sites=digest", stop=Stop())
    text = minitrain("info", stopped).stdout
    assert f"{stopped}: interrupted, 14 of 30 steps" in text
    assert "no moments between keyframes, a keyframe every 8 steps, digests of all sites" in text
    assert f"minitrain train --resume --out-dir {stopped}\n" in text
    (stopped / "checkpoint.safetensors").unlink()
    text = minitrain("info", stopped).stdout
    assert f"{stopped}: crashed, 14 of 30 steps" in text
    assert "checkpoint none" in text
    assert "(runs 14 steps again, to the same bits)" in text
    with RunFolder(stopped).hold(new=False):
        assert "at work, 14 of 30 steps" in minitrain("info", stopped).stdout
    (stopped / ".lock").unlink()
    assert "crashed" in minitrain("info", stopped).stdout


def test_info_of_other_ends(tmp_path, record_run, fault):
    """Not finite: with its incident and its event. Not recorded. A journal that is damaged: exit code 1."""
    wild = record_run(tmp_path / "wild", "optimizer.lr_max=1e30", "optimizer.clip=null")
    text = minitrain("info", wild).stdout
    assert "nonfinite, " in text
    assert "as it stood in memory" in text
    strike = fault(9, lambda parts: bump(parts.model.params["ln_f.bias"]))
    changed = record_run(tmp_path / "changed", watchers=[strike])
    text = minitrain("info", changed).stdout
    assert "memory_changed at step 9: tensors ['param.ln_f.bias']" in text
    assert f"minitrain replay {changed} --step 9" in text
    plain = record_run(tmp_path / "plain", "record.enabled=false")
    text = minitrain("info", plain).stdout
    assert "complete, 30 of 30 steps" in text
    assert "none (record.enabled: false)" in text
    journal = changed / "journal.msgpack"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    result = minitrain("info", changed)
    assert result.exit_code == 1
    assert "problem    " in result.stdout
    assert "as it was written" in result.stdout
