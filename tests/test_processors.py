"""One wheel for every processor: no code of the machine that built it, and the same bits where another one runs it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from campaigns import Campaign

from minitrain import _ext
from minitrain._ext import engine, plan
from minitrain._ext.plan import CompiledBackend

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="what is asked of x86-64")
WIDE = {"engine": "", "kernels_portable": "", "kernels_avx2": "y", "kernels_avx512": "yz"}
"""The registers beyond the baseline that each compiled module may use: y for %ymm, z for %zmm."""


def module_file(name: str) -> Path:
    (path,) = (p for folder in _ext.__path__ for p in Path(folder).glob(f"{name}.*.so"))
    return path


def flags(isa: str) -> list[str]:
    return list(importlib.import_module(f"minitrain._ext.kernels_{isa}").compiled()[1].split())


# Code


@x86
@pytest.mark.parametrize("name", WIDE)
def test_only_the_vector_kernels_hold_vector_code(name):
    """Disassembled, each module uses the registers of its instruction set; the engine and the portable kernels none."""
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed (binutils)")
    code = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", module_file(name)], text=True)
    assert "%xmm" in code
    assert set(re.findall(r"%([yz])mm", code)) == set(WIDE[name])


@pytest.mark.parametrize("isa", engine.instruction_sets())
def test_flags_keep_the_law(isa):
    """No flag reorders or fuses arithmetic, and the last -march is the baseline of all x86-64 processors."""
    given = flags(isa)
    assert "-ffp-contract=off" in given
    assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-mcpu=native"} & set(given)
    if platform.machine() == "x86_64":
        assert [flag for flag in given if flag.startswith("-march=")][-1] == "-march=x86-64"
        assert [flag for flag in given if flag.startswith("-mtune=")][-1] == "-mtune=generic"


@x86
def test_flags_of_the_environment_reach_no_wheel():
    """CFLAGS come before ours, so that the compiler forgets a -march=native there: it defines no extension."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler is installed")
    command = [compiler, "-march=native", "-mtune=native", *flags("portable"), "-dM", "-E", "-x", "c", os.devnull]
    defined = subprocess.check_output(command, text=True)
    assert "__SSE2__" in defined
    assert not re.findall(r"__(?:AVX\w*|FMA|SSE3|SSSE3|SSE4\w*|BMI2?)__", defined)


# A processor without AVX2 or FMA


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A processor that runs the portable kernels with fmaf as a call."""
    plan._warn_of_slowness.cache_clear()
    monkeypatch.delenv("MINITRAIN_ISA", raising=False)
    monkeypatch.setattr(engine, "instruction_sets", lambda: ["portable"])
    monkeypatch.setattr(engine, "portable_is_fast", lambda: False)
    return monkeypatch


def test_a_slow_processor_is_told_of_once(slow, capsys):
    """The portable kernels run, and one line on stderr says that they are slow and how to silence it."""
    assert [CompiledBackend().isa for _ in range(2)] == ["portable"] * 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: this processor lacks AVX2 or FMA: ")
    assert "MINITRAIN_ISA=portable" in line


@pytest.mark.parametrize("reason", ["asked for", "has FMA", "has AVX2"])
def test_nobody_else_is(slow, capsys, reason):
    """Not who asks for the portable kernels, nor aarch64, whose portable kernels have FMA, nor a faster processor."""
    if reason == "asked for":
        slow.setenv("MINITRAIN_ISA", "portable")
    elif reason == "has FMA":
        slow.setattr(engine, "portable_is_fast", lambda: True)
    else:
        slow.undo()
        if engine.instruction_sets()[0] == "portable":
            pytest.skip("this processor has no AVX2")
    CompiledBackend()
    assert capsys.readouterr().err == ""


# Other processors, emulated

STEPS = """
import numpy as np
from minitrain._ext import engine
from minitrain.sections import ModelConfig
from minitrain.model import MiniGPT
from minitrain.optim import AdamW
from minitrain.tensors import digest

print(*engine.instruction_sets())
model = MiniGPT(ModelConfig(n_layer=2, n_head=2, d_model=12, d_ff=20, vocab_size=37, max_seq_len=13), seed=1, threads=2)
optimizer = AdamW(backend=model.backend)
tokens = (np.arange(3 * 14, dtype=np.int32).reshape(3, 14) * 7) % 37
inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
for _ in range(3):
    model.forward(inputs, targets, inputs != 0, targets != 0)
    optimizer.step(model.params, model.backward())
m, v = optimizer.bind(model.params, model.grads)
print(digest(model.params.flat, m.flat, v.flat))
"""
HASWELL = "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid"  # less what QEMU lacks, so that it does not warn


def run_steps(*emulator: str) -> subprocess.CompletedProcess[str]:
    """Three steps of a small model in a new interpreter."""
    environ = {name: value for name, value in os.environ.items() if name != "MINITRAIN_ISA"}
    command = [*emulator, sys.executable, "-c", STEPS]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300, check=True)


@x86
@pytest.mark.parametrize(("cpu", "able"), [(HASWELL, "avx2 portable"), (f"{HASWELL},-fma", "portable")])
def test_bits_on_an_older_processor(cpu, able):
    """Emulated, a Haswell has no AVX-512, and one without FMA is slow and says so; both compute our bits."""
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if not emulator:
        pytest.skip("QEMU is not installed (Debian: qemu-user-static)")
    there = run_steps(emulator, "-cpu", cpu)
    assert there.stdout.splitlines() == [able, run_steps().stdout.splitlines()[1]]
    assert ("warning: this processor lacks AVX2 or FMA" in there.stderr) == (able == "portable")


@pytest.mark.long
def test_bits_on_aarch64_and_older_processors(repository, tmp_path):
    """Cross-compiled for aarch64, and as it is on a Haswell and without FMA: the golden bits of the default run."""
    script = repository / "scripts" / "check_aarch64.sh"
    missing = [tool for tool in ("apt-get", "dpkg") if not shutil.which(tool)]
    if platform.machine() != "x86_64" or missing or os.getuid():
        pytest.skip(f"{script.name} needs root on a Debian x86-64")
    campaign = Campaign("The default run on other processors, emulated")
    done = subprocess.run([script, tmp_path / "emulated", "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all the same\n")
    campaign.tell(
        ("run", "bits"), ("aarch64, Haswell, x86-64 without FMA: default to state 100", "those of this machine")
    )
