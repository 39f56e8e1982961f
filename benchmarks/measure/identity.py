"""Are the bits of a side the same for any number of threads, any instruction set, any compiler flags?

Nothing here is timed. Every run is a fresh process from the same weights; it tells a digest of what it has computed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from numpy._core._multiarray_umath import __cpu_dispatch__ as NUMPY_DISPATCH
from sides import SIDES

from measure.environments import build_copy
from measure.processes import SideFailed, Track
from measure.race import Say
from measure.workloads import Size
from minitrain.selftest import GOLDEN

THREADS, PEER_THREADS = (1, 2, 3), (1, 2)
BUILDS = {"-O3": None, "-O1": "-O1"}
"""Flags after minitrain's own; None is the installed engine, which is compiled with -O3."""

Run = dict[str, Any]
"""``isa``, ``threads``, ``build`` (minitrain only), ``steps`` and ``digest``, or ``error``."""


def peer_levels(isas: list[str]) -> list[str]:
    """The instruction sets of this machine that a peer can be held to, best first."""
    vectors = [isa for isa in isas if isa != "portable"]
    return [*vectors, "sse4"] if vectors else ["native"]


def holds(side: str, isa: str) -> dict[str, str]:
    """The variables that keep a peer, with the libraries in it, to ``isa``; all but oneDNN's are documented as such."""
    wide = [name for name in NUMPY_DISPATCH if isa != "avx2" or "512" in name or name == "X86_V4"]
    return {
        ("torch", "avx2"): {
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
        },
        ("torch", "sse4"): {
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
        },
        ("jax", "avx2"): {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"},
        ("jax", "sse4"): {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2"},
        ("numpy", "avx2"): {"OPENBLAS_CORETYPE": "Haswell", "NPY_DISABLE_CPU_FEATURES": " ".join(wide)},
        ("numpy", "sse4"): {"OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": " ".join(wide)},
    }.get((side.partition("-")[0], isa), {})


def minitrain_runs(
    track: Track, size: Size, workload: Path, isas: list[str], libraries: dict[str, Path | None]
) -> Iterator[Run]:
    """Every instruction set × threads × build; the portable kernels, which are slow, once and for a few steps."""
    steps = tuple(sorted({size.peer_identity_steps, size.identity_steps}))
    vectors = [isa for isa in isas if isa != "portable"]
    runs = [(isa, threads, build, steps) for build, isa, threads in product(libraries, vectors, THREADS)]
    if size.name == "default":
        runs.append(("portable", 1, "-O3", steps[:1]))
    for isa, threads, build, marks in runs:
        run = {"isa": isa, "threads": threads, "build": build}
        held = {"MINITRAIN_ISA": isa}
        yield from _told(track, "minitrain", workload, run, marks, held, libraries[build])


def peer_runs(track: Track, size: Size, workload: Path, side: str, isas: list[str]) -> Iterator[Run]:
    """Every instruction set × threads. At sizes that take long no further once two runs differ."""
    levels = peer_levels(isas)
    seen = set()
    for isa, threads in product(levels, PEER_THREADS):
        held = {} if isa == levels[0] else holds(side, isa)
        # torch.compile is to compile: its caches would bring back code made for other instructions.
        with tempfile.TemporaryDirectory(dir=track.scratch) as cache:
            held |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            run = {"isa": isa, "threads": threads}
            for told in _told(track, side, workload, run, (size.peer_identity_steps,), held, None):
                yield told
                seen.add(told.get("digest"))
        if size.name != "default" and len(seen - {None}) > 1:
            return


def _told(
    track: Track,
    side: str,
    workload: Path,
    run: Run,
    marks: tuple[int, ...],
    held: dict[str, str],
    library: Path | None,
) -> Iterator[Run]:
    try:
        told = track.run(
            side,
            workload,
            threads=run["threads"],
            warmup=max(marks),
            digests_after=marks,
            held=held,
            library=library,
        )
    except SideFailed as failure:
        yield run | {"steps": max(marks), "error": str(failure)}
        return
    for steps, digest in told["digests"].items():
        yield run | {"steps": int(steps), "digest": digest}


def identity(
    track: Track, size: Size, workload: Path, sides: list[str], isas: list[str], say: Say
) -> dict[str, list[Run]]:
    """The runs of every side, by side."""
    found: dict[str, list[Run]] = {}
    for side in sides:
        found[side] = []
        if side == "minitrain":
            libraries = _libraries(track, say)
            runs = minitrain_runs(track, size, workload, isas, libraries)
        else:
            runs = peer_runs(track, size, workload, side, isas)
        for run in runs:
            say(f"{SIDES[side].title}: " + ", ".join(f"{key} {value}" for key, value in run.items()))
            found[side].append(run)
    return found


def golden(size: Size) -> str | None:
    """What `minitrain selftest` expects after as many steps of the default run."""
    return GOLDEN.get(size.identity_steps) if size.name == "default" else None


def _libraries(track: Track, say: Say) -> dict[str, Path | None]:
    libraries: dict[str, Path | None] = {}
    for build, flags in BUILDS.items():
        folder = track.scratch / f"build{build}"
        if flags and not folder.exists():
            say(f"building minitrain with {flags}")
            build_copy(folder, flags)
        libraries[build] = folder / "library" if flags else None
    return libraries
