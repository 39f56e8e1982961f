"""Measures minitrain against PyTorch and against the machine, and writes RESULTS.md.

    python benchmarks/run.py [--rounds 5]

Timings on a shared machine wander, so everything is measured in rounds, one side after the other, each in a process of
its own, pinned to the same core; ratios are formed within a round. Nothing fails because of a timing. PyTorch goes into
an environment of its own under build/; without it (no network, say) its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from minitrain._ext import engine
from minitrain._ext.signatures import NUMERICS_VERSION
from minitrain.assembly import prepare_data
from minitrain.checkpoint import save_model
from minitrain.config import Config, config_from
from minitrain.data.batches import Batch, TrainBatches
from minitrain.environment import hardware, versions
from minitrain.model import MiniGPT
from minitrain.schedule import Scheduler

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "build" / "bench-venv"
RESULTS = HERE / "RESULTS.md"

LANES = {"avx512": 16, "avx2": 8, "portable": 4}
BATCHES = 64
PINS = hasattr(os, "sched_setaffinity")  # not on macOS
LARGER = {
    "model": {"n_layer": 4, "d_model": 256, "d_ff": 1024, "vocab_size": 512, "max_seq_len": 128},
    "training": {"batch_size": 16},
}

Round = dict[str, dict[str, Any]]


# ------------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Workload:
    """A folder with batches.npz, the untrained model and about.json, which both sides read."""

    folder: Path
    config: Config
    steps: int

    @property
    def flops(self) -> int:
        """Of the matrix products of a step, attention in full and padding included; backward is twice forward."""
        m = self.config.model
        tokens = self.config.training.batch_size * m.max_seq_len
        linear = m.n_layer * (4 * m.d_model**2 + 2 * m.d_model * m.d_ff) + m.d_model * m.vocab_size
        attention = m.n_layer * 2 * m.max_seq_len * m.d_model
        return 3 * 2 * tokens * (linear + attention)


def write_workload(folder: Path, config: Config, batches: Iterable[Batch], steps: int) -> Workload:
    folder.mkdir()
    names = ("inputs", "targets", "attn_pad_mask", "loss_mask", "rows")
    taken = list(batches)
    np.savez(folder / "batches.npz", **{name: np.stack([getattr(b, name) for b in taken]) for name in names})
    model = MiniGPT(config.model, seed=config.training.rng_seed)
    path = save_model(folder, model.params, config.model)
    scheduler, rates = Scheduler.from_config(config), []
    for _ in range(steps):
        rates.append(scheduler.lr)
        scheduler.step()
    about = {"config": config.model_dump(), "model": path.name, "lr": rates}
    (folder / "about.json").write_text(json.dumps(about))
    return Workload(folder, config, steps)


def default_workload(folder: Path) -> Workload:
    """The default run: the first batches of the built-in corpus."""
    config = Config()
    source = TrainBatches(prepare_data(config).train, config.training.batch_size, config.training.data_seed)
    return write_workload(folder, config, map(source.batch_at, range(BATCHES)), 400)


def larger_workload(folder: Path) -> Workload:
    """A model of 3.3 million parameters on random tokens, where a step is nearly all matrix products."""
    config = config_from(LARGER, "LARGER")
    shape = (config.training.batch_size, config.model.max_seq_len)
    draw = np.random.default_rng(0)

    def batch() -> Batch:
        tokens = draw.integers(4, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
        everywhere = np.ones(shape, np.bool_)
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        return Batch(inputs, targets, everywhere, everywhere, np.arange(shape[0]), ())

    return write_workload(folder, config, (batch() for _ in range(4)), 4)


@dataclass
class Bench:
    """Runs one side at a time and remembers, by round, what it measured."""

    folder: Path
    peers: Path | None
    """The Python that has the peers, if any."""
    cores: list[int]
    rounds: list[Round] = field(default_factory=list)

    def process(self, command: Sequence[object], threads: int, **environment: str) -> tuple[str, float]:
        """Its output and its seconds, from start to end, pinned to as many cores as threads."""
        cores = set(self.cores[-threads:])
        libraries = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        start = perf_counter()
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, **libraries, **environment},
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if PINS else None,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        return done.stdout, perf_counter() - start

    def peak(self, isa: str) -> dict[str, Any]:
        """The peak of one core in GFLOP/s."""
        program = self.folder / f"peak-{isa}"
        if not program.exists():
            flags = ["-O3", "-march=native", "-ffp-contract=fast", f"-DLANES={LANES[isa]}"]
            subprocess.run(["cc", *flags, str(HERE / "peak.c"), "-o", str(program)], check=True)
        text, _ = self.process([program], 1)
        return {"gflops": float(text.split()[0])}

    def minitrain(self, work: Workload, isa: str, threads: int = 1, steps: int | None = None) -> dict[str, Any]:
        command = [sys.executable, HERE / "step_minitrain.py", work.folder, steps or work.steps, threads]
        return self._timed(command, threads, MINITRAIN_ISA=isa)

    def torch(self, work: Workload, threads: int = 1, steps: int | None = None) -> dict[str, Any]:
        command = [self.peers, HERE / "step_torch.py", work.folder, steps or work.steps, threads]
        return self._timed(command, threads)

    def _timed(self, command: Sequence[object], threads: int, **environment: str) -> dict[str, Any]:
        text, wall = self.process(command, threads, **environment)
        result = json.loads(text)
        times = result.pop("seconds")
        warm = times[max(1, len(times) // 10) :] or times
        return {"min": min(warm), "median": median(warm), "process": wall, **result}

    def command(self, name: str) -> dict[str, Any]:
        """A default run by `minitrain train`, with the log, evaluation, checkpoints and the plot; nothing pinned."""
        out = self.folder / name
        start = perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "minitrain", "train", "--out-dir", str(out), "--json"],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        results = json.loads((out / "results.json").read_text())
        unit = 1 if sys.platform == "darwin" else 1024
        return {"wall": wall, "training": results["wall_clock_s"], "rss_mb": usage.ru_maxrss * unit / 1e6}


def measure(bench: Bench, rounds: int) -> tuple[Workload, Workload, list[str]]:
    default, larger = default_workload(bench.folder / "default"), larger_workload(bench.folder / "larger")
    isas = [isa for isa in engine.instruction_sets() if isa != "portable"] or ["portable"]
    best = isas[0]
    sides: dict[str, Callable[[], dict[str, Any]]] = {}
    for isa in isas:
        sides[f"peak {isa}"] = lambda isa=isa: bench.peak(isa)
        sides[f"minitrain {isa}"] = lambda isa=isa: bench.minitrain(default, isa)
    sides["minitrain 2 threads"] = lambda: bench.minitrain(default, best, threads=2)
    sides["minitrain larger"] = lambda: bench.minitrain(larger, best)
    sides["minitrain first"] = lambda: bench.minitrain(default, best, steps=1)
    if bench.peers:
        sides["torch"] = lambda: bench.torch(default)
        sides["torch 2 threads"] = lambda: bench.torch(default, threads=2)
        sides["torch larger"] = lambda: bench.torch(larger)
        sides["torch first"] = lambda: bench.torch(default, steps=1)
    if len(bench.cores) < 2:
        sides = {name: side for name, side in sides.items() if "2 threads" not in name}
    # A B A B: what is compared stands side by side, so that a slow minute slows both.
    order = sorted(sides, key=lambda name: (" ".join(name.split()[1:]).replace(best, ""), name))
    for number in range(rounds):
        bench.rounds.append({})
        for name in order:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            bench.rounds[-1][name] = sides[name]()
        bench.rounds[-1]["command"] = bench.command(f"run-{number}")
    return default, larger, isas


# ------------------------------------------------------------------------------------------------ what is reported


@dataclass(frozen=True)
class Figure:
    """A quantity, once a round. ``target`` is "≥ 60" or "≤ 5", or nothing."""

    name: str
    values: list[float]
    form: str
    target: str = ""

    def met(self) -> str:
        if not self.target:
            return ""
        sign, limit = self.target.split()
        good = sum(v >= float(limit) if sign == "≥" else v <= float(limit) for v in self.values)
        return {0: "**no**", len(self.values): "yes"}.get(good, f"**in {good} of {len(self.values)} rounds**")

    def row(self) -> str:
        show = self.form.format
        spread = f"{show(min(self.values))} to {show(max(self.values))}"
        return f"| {self.name} | {self.target} | {show(median(self.values))} | {spread} | {self.met()} |"


def figures(rounds: list[Round], default: Workload, larger: Workload, isas: list[str]) -> list[Figure]:
    """Those whose sides were measured."""
    best, times, percent, seconds = isas[0], "{:.2f}×", "{:.1f} %", "{:.2f} s"
    mine, mine_2, theirs, theirs_2 = f"minitrain {best}", "minitrain 2 threads", "torch", "torch 2 threads"
    found = []

    def add(name: str, form: str, value: Callable[[Round], float], target: str = "") -> None:
        with suppress(KeyError):  # of a side that this machine does not have
            found.append(Figure(name, [value(r) for r in rounds], form, target))

    def ratio(slow: str, fast: str, what: str = "min") -> Callable[[Round], float]:
        return lambda r: r[slow][what] / r[fast][what]

    def share(isa: str, side: str, flops: int) -> Callable[[Round], float]:
        return lambda r: 100 * flops / r[side]["min"] / 1e9 / r[f"peak {isa}"]["gflops"]

    def python(isa: str) -> Callable[[Round], float]:
        return lambda r: 100 * median(r[f"minitrain {isa}"]["python"]) / r[f"minitrain {isa}"]["median"]

    add(f"a step, PyTorch / minitrain, {best}", times, ratio(theirs, mine), "≥ 1.8")
    add("the same by medians", times, ratio(theirs, mine, "median"))
    for isa in isas[1:]:
        add(f"a step, PyTorch / minitrain held to {isa}", times, ratio(theirs, f"minitrain {isa}"))
    for isa in isas:
        add(f"a step, share of the FMA peak, {isa}", percent, share(isa, f"minitrain {isa}", default.flops), "≥ 60")
    for isa in isas:
        add(f"Python over the engine, share of a step, {isa}", percent, python(isa), "≤ 5")
    add("`minitrain train`, 2000 steps, to the results", seconds, lambda r: r["command"]["training"], "≤ 8")
    add("the same, whole process: import to plot", seconds, lambda r: r["command"]["wall"], "≤ 8")
    add("peak memory of that process", "{:.0f} MB", lambda r: r["command"]["rss_mb"], "≤ 400")
    add("fresh process: import, model, first step", seconds, lambda r: r["minitrain first"]["process"], "≤ 0.5")
    add("the same in PyTorch", seconds, lambda r: r["torch first"]["process"])
    add("a step, 1 thread / 2 threads", times, ratio(mine, mine_2))
    add("2 threads, PyTorch / minitrain", times, ratio(theirs_2, mine_2))
    add("larger model, PyTorch / minitrain", times, ratio("torch larger", "minitrain larger"))
    add("larger model, share of the FMA peak", percent, share(best, "minitrain larger", larger.flops))
    add("PyTorch's matrix product, share of the FMA peak", percent, lambda r: 100 * product(r) / peak(r, best))
    for isa in isas[1:]:
        add(f"the same of the {isa} peak", percent, lambda r, isa=isa: 100 * product(r) / peak(r, isa))
    return found


def sides_table(rounds: list[Round]) -> list[str]:
    lines = ["| a step | smallest, ms | median, ms | medians of the rounds, ms |", "|---|---|---|---|"]
    for name in rounds[0]:
        if "min" in rounds[0][name] and "first" not in name:
            medians = [1e3 * r[name]["median"] for r in rounds]
            smallest = 1e3 * min(r[name]["min"] for r in rounds)
            lines.append(
                f"| {name} | {smallest:.3f} | {median(medians):.3f} | {min(medians):.3f} to {max(medians):.3f} |"
            )
    return lines


HEAD = """\
# Benchmark results

Written by `make bench` (`python benchmarks/run.py`): do not edit, run it again.

- {date} UTC, {rounds} rounds, load {before} before and {after} after.
- {machine}.
- FMA peak of one core: {peaks}.
- minitrain {minitrain} (numerics {numerics}), Python {python}, NumPy {numpy}, PyTorch {torch}; {compiler} for the peak.
- A step is forward, backward, clipping and AdamW of the default model on batches of the built-in corpus: {flops:.1f}
  MFLOP in matrix products (attention in full, padding included, backward twice forward).
- PyTorch runs the same model and batches in eager mode at its best: one product for query, key and value, the rotation
  as a complex product, fused causal attention without a mask, fused AdamW; targets and rates are prepared.
- The larger model: {layers} layers, d_model {width}, {batch} × {positions} random tokens, {larger:.1f} GFLOP a step.
- 1 thread{pinned}, unless said. Ratios and shares compare the smallest times within a round.
"""

REMARKS = """\
- The lead depends on the processor: PyTorch's matrix library may leave instructions unused that minitrain uses (its
  share of the peak is in the table). Held to the same instructions the lead is the one in the row "held to".
- What is left of the peak goes to what is no matrix product (GELU, softmax, norms, AdamW), and to small heads.
- 2 threads are worth having only where both cores are free.
- Not measured: torch.compile, JAX, bfloat16, other processors, more than 2 threads.
"""


def report(bench: Bench, default: Workload, larger: Workload, isas: list[str], before: str, after: str) -> str:
    rounds, machine, known = bench.rounds, hardware(), versions()
    found = figures(rounds, default, larger, isas)
    ram = f"{machine['ram_bytes'] / 1e9:.0f} GB" if isinstance(machine["ram_bytes"], int) else "memory unknown"
    head = HEAD.format(
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        rounds=len(rounds),
        before=before,
        after=after,
        machine=f"{machine['cpu']}, {machine['cores']} cores, {ram}, {platform.system()} on {platform.machine()}",
        peaks=", ".join(f"{isa} {max(peak(r, isa) for r in rounds):.0f} GFLOP/s" for isa in isas),
        minitrain=known["minitrain"],
        numerics=NUMERICS_VERSION,
        python=known["python"],
        numpy=known["numpy"],
        torch=rounds[0]["torch"]["version"] if bench.peers else "not installed: its rows are left out",
        compiler=subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.partition("\n")[0],
        flops=default.flops / 1e6,
        pinned=", pinned to one core" if PINS else "",
        layers=larger.config.model.n_layer,
        width=larger.config.model.d_model,
        batch=larger.config.training.batch_size,
        positions=larger.config.model.max_seq_len,
        larger=larger.flops / 1e9,
    )
    lines = [
        "| what | target | median of the rounds | from, to | met |",
        "|---|---|---|---|---|",
        *(figure.row() for figure in found),
        "",
        *sides_table(rounds),
        "",
    ]
    if bench.peers:
        mine, theirs = rounds[-1][f"minitrain {isas[0]}"]["loss"], rounds[-1]["torch"]["loss"]
        lines += [f"Loss after {default.steps} steps: minitrain {mine:.6f}, PyTorch {theirs:.6f}.", ""]
    missed = [f"- {figure.name}: {figure.met().strip('*')}." for figure in found if figure.met() not in ("", "yes")]
    lines += ["## What is not won", "", *(missed or ["- Every target was met in every round."])]
    return head + "\n" + "\n".join(lines) + "\n" + REMARKS


def peak(r: Round, isa: str) -> float:
    return float(r[f"peak {isa}"]["gflops"])


def product(r: Round) -> float:
    return float(r["torch"]["product_gflops"])


# ------------------------------------------------------------------------------------------------ the command


def peers_python() -> Path | None:
    """The Python of an environment with requirements.txt installed, made at first use; None where that fails."""
    python, wanted, installed = PEERS / "bin" / "python", HERE / "requirements.txt", PEERS / "requirements.txt"
    try:
        if not installed.exists() or installed.read_text() != wanted.read_text():
            venv.create(PEERS, clear=True, with_pip=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(wanted)], check=True)
            installed.write_text(wanted.read_text())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"PyTorch is left out, it could not be installed: {error}", file=sys.stderr)
        return None
    return python


def load_average() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    peers = peers_python()
    before = load_average()
    cores = sorted(os.sched_getaffinity(0)) if PINS else list(range(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the corpus is generated here, not in the user's own data/
        bench = Bench(Path(folder), peers, cores)
        default, larger, isas = measure(bench, arguments.rounds)
        text = report(bench, default, larger, isas, before, load_average())
        os.chdir(HERE)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
