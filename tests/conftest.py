"""What several files share: every instruction set and thread count, random arguments for every kernel, batches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the oracles' products are tiny, and their threads would fight over the cores

import numpy as np
import pytest
import recording

from minitrain import inject, trainer
from minitrain._ext import engine
from minitrain._ext.plan import Backend, CompiledBackend, ReferenceBackend, call
from minitrain._ext.signatures import SIGNATURES
from minitrain.loop import Listener
from minitrain.sections import ModelConfig
from minitrain.tensors import canonical_bits

THREADS = (1, 2, 3)
Sizes = dict[str, int]
Integer = Callable[[int, int], int]
"""Draws a whole number from low to high, both included: hypothesis, or a NumPy generator."""


def forced(isa: str, threads: int = 1) -> CompiledBackend:
    """The compiled backend of this instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRAIN_ISA", isa)
        return CompiledBackend(threads)


@pytest.fixture(scope="session")
def backends() -> dict[tuple[str, int], CompiledBackend]:
    """Every instruction set of this processor with 1, 2 and 3 threads."""
    return {(isa, n): forced(isa, n) for isa in engine.instruction_sets() for n in THREADS}


@pytest.fixture(scope="session", params=engine.instruction_sets())
def isa_backend(request: pytest.FixtureRequest, backends: dict[tuple[str, int], CompiledBackend]) -> CompiledBackend:
    """One instruction set after the other, one thread."""
    return backends[request.param, 1]


@pytest.fixture(autouse=True, scope="session")
def no_dashboards() -> Iterator[None]:
    """Runs in this process end without a dashboard, which takes longer than a short training and has tests of its own.

    Those at the command line, in processes of their own, have one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_dashboard", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the sources. Against an installed wheel, where `tests` stands alone, the test is skipped."""
    root = Path(__file__).parent.parent
    if not (root / "pyproject.toml").exists():
        pytest.skip("needs the sources beside tests")
    return root


# Kernels: arguments that fit a signature

IN_PLACE = {
    "linear_backward_weight": {"weight"},
    "rope": {"x"},
    "scale": {"g"},
    "clamp": {"g"},
    "adamw": {"theta", "m", "v"},
    "adamw_copying": {"theta", "m", "v", "sums", "todo"},
    "adamw_theta": {"theta"},
}
"""Outputs that are read as well. Those of `accumulate` come on top; all others but ZEROED hold NaN before the call."""

ZEROED = {"attention_forward": {"p"}, "attention_backward": {"dp"}}
"""Outputs that are zeros before the call: the kernel does not write what lies past the causal mask's blocks."""

HYPER = (1e-3, 0.9, 0.95, 1e-8, 0.1, 7.0)


def draw_sizes(kernel: str, integer: Integer) -> Sizes:
    """Dimensions for a kernel: odd ones, sums longer than a block of 256, more than one block of 4096."""
    letters = {d for a in SIGNATURES[kernel].arrays for d in a.dims}
    limits = {"B": 4, "T": 24, "C": 40, "N": 40, "K": 40, "V": 70, "H": 4, "P": 200, "S": 4, "G": 5}
    sizes = {d: integer(1, limits[d]) for d in sorted(letters & set(limits))}
    if "K" in letters and integer(0, 3) == 0:
        sizes["K"] = integer(250, 540)
    if kernel == "linear_backward_weight" and integer(0, 3) == 0:
        sizes["T"] = integer(65, 140)  # here the sum runs over B * T
    if kernel == "linear_backward_input" and integer(0, 3) == 0:
        sizes["N"] = integer(250, 540)
    if kernel.startswith("attention"):
        sizes["T"], sizes["C"] = integer(1, 70), sizes["H"] * integer(1, 20)
    if kernel == "rope":
        sizes["C"] *= 2
    if kernel == "square_sums" or (kernel.startswith("adamw") and integer(0, 3) == 0):
        sizes["P"] = integer(1, 9000)
    if kernel in ("square_sums", "adamw_copying"):
        sizes["G"] = -(-sizes["P"] // 4096)
    if kernel.startswith("adamw"):
        sizes["E"] = sizes["S"] + 1
    fixed = {"mean_loss": 3, "cross_entropy_backward": 3}
    fixed |= dict.fromkeys(("adamw", "adamw_copying", "adamw_theta"), len(HYPER))
    return sizes | {"R": fixed.get(kernel, 1), "W": 3, "L": 4}


def draw_arguments(kernel: str, sizes: Sizes, rng: np.random.Generator) -> list[Any]:
    """Arrays and numbers that make sense together, in the order of the signature; outputs hold NaN."""
    normal = rng.standard_normal

    def mask(shape: tuple[int, ...]) -> Any:
        return rng.random(shape) < 0.7

    def causal(shape: tuple[int, ...]) -> Any:
        p = np.tril(rng.random(shape))
        return p / p.sum(-1, keepdims=True)

    special: dict[str, Callable[[tuple[int, ...]], Any]] = {
        "tokens": lambda shape: rng.integers(sizes["V"], size=shape),
        "targets": lambda shape: rng.integers(sizes["V"], size=shape),
        "loss_mask": mask,
        "key_mask": mask,
        "p": causal,
        "rstd": lambda shape: rng.uniform(0.3, 3, shape),
        "softmax": lambda shape: rng.dirichlet(np.ones(shape[-1]), shape[:-1]),
        "result": lambda shape: [2.5, 17.5, 7.0],
        "sums": lambda shape: rng.random(shape) if kernel == "norm" else rng.integers(2**32, size=shape),
        "factor": rng.random,
        "limit": rng.random,
        "v": lambda shape: normal(shape) ** 2,
        "key": lambda shape: rng.integers(2**32, size=shape),
        "offsets": lambda shape: [0, *sorted(rng.integers(0, sizes["P"] + 1, shape[0] - 2)), sizes["P"]],
        "decays": mask,
        "todo": lambda shape: np.ones(shape),
        "hyper": lambda shape: HYPER,
    }
    if kernel.startswith("attention"):
        del special["v"]
    if kernel == "log":
        special["x"] = lambda shape: np.exp(4 * normal(shape))
    numbers = {
        "accumulate": int(rng.integers(2)),
        "eps": 1e-5,
        "direction": 1.0 - 2.0 * int(rng.integers(2)),
        "site": int(rng.integers(2**31)),
        "rate": float(rng.uniform(0, 0.95)),
    }
    signature = SIGNATURES[kernel]
    read = IN_PLACE.get(kernel, set())
    if "accumulate" in signature.numbers and numbers["accumulate"]:
        read = {signature.arrays[0].name}
    arguments: list[Any] = []
    for a in signature.arrays:
        shape = tuple(sizes[d] for d in a.dims)
        if a.optional and rng.random() < 0.5:
            arguments.append(None)
        elif a.output and a.name in ZEROED.get(kernel, ()):
            arguments.append(np.zeros(shape, a.dtype))
        elif a.output and a.name not in read:
            arguments.append(np.full(shape, np.nan, a.dtype))
        else:
            values = special.get(a.name, normal)(shape)
            arguments.append(np.broadcast_to(np.asarray(values, a.dtype), shape).copy())
    return arguments + [numbers[name] for name in signature.numbers]


def as_type(arguments: list[Any], floats: type[np.floating[Any]]) -> list[Any]:
    """A copy; float32 arrays become ``floats``."""
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the inputs
        return [
            a if not isinstance(a, np.ndarray) else a.astype(floats) if a.dtype == np.float32 else a.copy()
            for a in arguments
        ]


def bits(array: np.ndarray) -> bytes:
    """Raw bits with every NaN the same, of float32 or float64."""
    if array.dtype == np.float32:
        return canonical_bits(array).tobytes()
    return np.where(np.isnan(array), np.nan, array).tobytes()


class Kernels:
    """Random arguments for any kernel, and what a backend makes of them."""

    sizes = staticmethod(draw_sizes)
    arguments = staticmethod(draw_arguments)
    bits = staticmethod(bits)

    @staticmethod
    def read(kernel: str, arguments: list[Any]) -> list[int]:
        """The positions of the floating-point arrays that the kernel reads."""
        signature = SIGNATURES[kernel]
        accumulates = "accumulate" in signature.numbers and arguments[signature.parameters.index("accumulate")]
        return [
            i
            for i, a in enumerate(signature.arrays)
            if arguments[i] is not None
            and a.dtype.kind == "f"
            and (not a.output or a.name in IN_PLACE.get(kernel, ()) or (i == 0 and accumulates))
        ]

    @staticmethod
    def run(backend: Backend, kernel: str, arguments: list[Any]) -> dict[str, np.ndarray]:
        """The outputs by name; the arguments stay as they are. A reference backend decides the float type."""
        copy = as_type(arguments, backend.dtype.type if isinstance(backend, ReferenceBackend) else np.float32)
        call(backend, kernel, *copy)
        return {a.name: x for a, x in zip(SIGNATURES[kernel].arrays, copy, strict=False) if a.output and x is not None}


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """See `Kernels`."""
    return Kernels()


# Models


@dataclass(frozen=True)
class Sentences:
    """One batch: real tokens in front, padding (token 0) behind, as the data room makes them."""

    inputs: np.ndarray
    targets: np.ndarray
    attn_pad_mask: np.ndarray
    loss_mask: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.inputs, self.targets, self.attn_pad_mask, self.loss_mask))


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Sentences]:
    """``make_batch(config, B, seed)``: random sentences of 1 to T tokens; the first one is full."""

    def make(config: ModelConfig, B: int, seed: int = 0) -> Sentences:
        rng = np.random.default_rng(seed)
        T = config.max_seq_len
        lengths = rng.integers(1, T + 1, B)
        lengths[0] = T
        tokens = rng.integers(1, config.vocab_size, (B, T + 1)).astype(np.int32)
        tokens[np.arange(T + 1) > lengths[:, None]] = 0
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        return Sentences(inputs, targets, inputs != 0, targets != 0)

    return make


@pytest.fixture(scope="session")
def odd_config() -> ModelConfig:
    """No dimension is a multiple of 16."""
    return ModelConfig(n_layer=2, n_head=2, d_model=12, d_ff=20, vocab_size=37, max_seq_len=13)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., Any]:
    """``run_python(code, cwd=…, **environment)`` in a new interpreter: its CompletedProcess."""

    def run(code: str, cwd: Any = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


# Experiments


@pytest.fixture(scope="session")
def words() -> Callable[[str], int]:
    """How many words a page has, without code, pictures and what tables are drawn with."""
    return lambda text: len(re.findall(r"\S*\w\S*", re.sub(r"(?ms)```.*?```|^!\[.*?$", "", text)))


TINY = [
    "data.train_path=book.txt",
    *("model.n_layer=1", "model.n_head=2", "model.d_model=16", "model.d_ff=16", "model.vocab_size=24"),
    *("model.max_seq_len=16", "scheduler.total_steps=40", "scheduler.warmup_steps=5", "training.batch_size=4"),
    *("training.val_every=10", "training.checkpoint_every=15"),
]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of a tiny run, in a working folder where its text stands and no curve is drawn (that has its tests)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer.report, "write_curve", lambda *_: None)
    words = [("old", "new"), ("cat", "dog"), ("saw", "ate"), "abcde"]
    Path("book.txt").write_text("\n".join("the {} {} {} the {}.".format(*four) for four in product(*words)))
    return list(TINY)


# Recorded runs


SMALL = [
    *("model.n_layer=1", "model.n_head=2", "model.d_model=8", "model.d_ff=12", "model.vocab_size=24"),
    *("model.max_seq_len=12", "scheduler.total_steps=30", "scheduler.warmup_steps=3", "training.batch_size=3"),
    *("training.val_every=10", "training.checkpoint_every=11", "record.keyframe_every=8"),
]


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 60 short lines."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    words = [("old", "new", "red"), ("cat", "dog"), ("saw", "ate"), "abcde"]
    path.write_text("\n".join("the {} {} {} {}.".format(*four) for four in product(*words)))
    return path


@pytest.fixture(scope="session")
def record_run(book: Path) -> Callable[..., Path]:
    """``record_run(folder, *settings, **how)``: the folder of a small recorded run of 30 steps, keyframes every 8.

    ``yaml`` is a file with more settings; ``how`` goes to `trainer.run`; ``seen`` is a list that gets the Outcome.
    """

    def make(folder: Path, *settings: str, yaml: Path | None = None, seen: list[Any] | None = None, **how: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.report, "write_curve", lambda *_: None)
            outcome = trainer.run(inject.load(yaml, [*SMALL, f"data.train_path={book}", *settings]), folder, **how)
        if seen is not None:
            seen.append(outcome)
        return folder

    return make


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the corpus; no pictures are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("record")
        patch.chdir(folder)
        patch.setattr(trainer.report, "write_curve", lambda *_: None)
        patch.setattr(trainer.report, "write_page", lambda *_: None)
        yield folder


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, recording.Watch]:
    """A run of recording.SMALL, never touched, and what was seen while it ran."""
    watch = recording.Watch()
    trainer.run(recording.config(), place / "whole", listeners=[watch])
    return place / "whole", watch


@pytest.fixture
def copy(whole: tuple[Path, recording.Watch], tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


class Fault(Listener):
    """Damages a run: ``strike(parts)`` at a site of step t, or with site None between step t-1 and step t."""

    def __init__(self, step: int, strike: Callable[[Any], None], site: str | None = None) -> None:
        self._step, self._strike, self._site = step, strike, site

    def __call__(self, parts: Any) -> Fault:
        """As one of the ``watchers`` of a run, whose recorder has heard a site before this does."""
        self._parts = parts
        if self._site:
            parts.hooks.listen(self._heard, self._site)
        return self

    def _heard(self, site: str, tensor: Any) -> None:
        if self._parts.hooks.step == self._step:
            self._strike(self._parts)

    def stepped(self, stats: Any, state: Any) -> None:
        if self._site is None and state.step == self._step:
            self._strike(self._parts)


@pytest.fixture(scope="session")
def fault() -> type[Fault]:
    """See `Fault`."""
    return Fault
