"""What only a terminal or a pipe shows: the bar and the lines around it, the width of prose, readers that go away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

INJECTED = ("injection.name=nan_activation", "injection.step=14", "training.on_nonfinite=continue")
SIZES = [*("model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.d_ff=32"), "metrics.enabled=false"]
SHORT = [word for size in (*SIZES, "scheduler.total_steps=30", "scheduler.warmup_steps=5") for word in ("--set", size)]
BAR = "━"


@pytest.fixture(scope="module")
def run(tmp_path_factory, record_run) -> Path:
    """Complete, with a number that is not finite."""
    return record_run(tmp_path_factory.mktemp("terminal") / "run", *INJECTED)


def on_terminal(*arguments: object, columns: int = 100) -> list[str]:
    """The lines that `minitrain ARGUMENTS` writes to a terminal of so many columns, the bar's among them."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (50, columns))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "minitrain", *map(str, arguments)]
    written = b""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm"}
    ):
        os.close(theirs)
        try:
            while part := os.read(ours, 1 << 16):
                written += part
        except OSError:  # how Linux says that nobody writes any more
            pass
    os.close(ours)
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", written.decode())  # colours and movements
    return [line for line in re.split(r"[\r\n]+", text) if line]


def unread(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`minitrain ARGUMENTS` into a pipe that nobody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        command = [sys.executable, "-m", "minitrain", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(theirs)


def test_what_is_told_stands_whole_above_the_bar(tmp_path, monkeypatch):
    """The bar appears behind the lines that a training begins with, in a new run and in a fork, where it goes on."""
    monkeypatch.chdir(tmp_path)
    lines = on_terminal("train", *SHORT, "--out-dir", "run", "--injection", "scale", "--injection-step", 7)
    assert re.fullmatch(r"recording every step with its moments to run/record.zarr: about .* GB free", lines[0])
    assert lines[1] == "injecting scale at step 7 (factor 50)"
    assert lines[2].startswith(BAR)
    assert any(line.startswith(BAR) and "30/30" in line for line in lines)
    lines = on_terminal("train", "--from", "run", "--step", 20, "--out-dir", "fork")
    assert lines[0].startswith("recording every step")
    assert lines[1].startswith(BAR)
    assert "20/30" in lines[1]


def test_a_refused_run_leaves_no_bar(tmp_path, monkeypatch, run):
    """Nothing but the error stands on the terminal."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("done").symlink_to(run)
    for arguments, words in (
        (["train", "--set", "data.train_path=no.txt"], "error: no.txt: expected a data file, found none"),
        (["train", "--set", "data.train_path=empty.txt"], "error: empty.txt: expected"),
        (["train", "--out-dir", "done"], "error: --out-dir done: expected an empty folder, got another run"),
        (["train", "--resume", "--out-dir", "done"], "error: --resume done: expected an unfinished run"),
        (["replay", "done", "--nan-bisect", "--step", 99], "error: --step 99: expected one of the recorded steps"),
    ):
        lines = on_terminal(*arguments, columns=200)
        assert len(lines) == 1, lines
        assert lines[0].startswith(words)


def test_prose_is_as_wide_as_the_terminal(run, monkeypatch):
    """What --nan-bisect explains is broken at the columns there are, at 116 where there are more."""
    monkeypatch.chdir(run.parent)
    for columns, most in (70, 70), (300, 116):
        lines = on_terminal("replay", "run", "--nan-bisect", columns=columns)
        start, end = (next(i for i, x in enumerate(lines) if x.startswith(word)) for word in ("verdict", "largest |x|"))
        assert most - 20 < max(map(len, lines[start:end])) <= most


def test_nobody_reads_on(run, tmp_path):
    """A closed pipe ends a command without a word, as `minitrain replay RUN --step 3 | head` closes it."""
    (tmp_path / "talk.py").write_text("def loud(site, tensor):\n    print(site, '.' * 10000)\n")
    step = ["replay", run, "--step", 3]
    for arguments in (["selftest"], ["info", run], step, [*step, "--hook", "talk:loud"], [*step, "--help"]):
        done = unread(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (141, ""), arguments


def test_a_pipe_of_somebody_else(run, tmp_path):
    """A hook whose own pipe is closed has failed like any other: standard output is still read."""
    lines = (
        "import os",
        "def send(site, tensor):",
        " ours, theirs = os.pipe()",
        " os.close(ours)",
        " os.write(theirs, b'x')",
    )
    (tmp_path / "talk.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "minitrain", "replay", str(run), "--step", "3", "--hook", "talk:send"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Broken pipe" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_to_a_full_disk(run):
    """Is an error as it ever was."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minitrain", "info", str(run)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device; ")
