"""Processes of the race: pinned to as many cores as they have threads, in an environment that steers none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from sides import SIDES

from measure.environments import BENCHMARKS, has_packages, peers_python

PINS = hasattr(os, "sched_setaffinity")  # not on macOS
STEERING = (
    *("MINITRAIN_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_"),
    *("TORCH", "XLA_", "JAX_", "NPY_", "PYTHONDONTWRITEBYTECODE"),
)
"""Variables of the caller's shell that begin so would hold a side to fewer threads or other kernels. With the last, our
modules would be compiled in every process; those of the others were when they were installed."""
LANES = {"avx512": 16, "avx2": 8, "portable": 4}


class SideFailed(RuntimeError):
    """A process of a side ended without a result."""


@dataclass(frozen=True)
class Track:
    """Where processes run: ``scratch`` is theirs, ``cores`` are those that we may use."""

    scratch: Path
    cores: list[int] = field(
        default_factory=lambda: sorted(os.sched_getaffinity(0)) if PINS else list(range(os.cpu_count() or 1))
    )

    def pins(self, threads: int) -> list[int]:
        """The last cores, as many as threads: interrupts keep to the first. More threads than cores share them."""
        return self.cores[-threads:]

    def run(
        self,
        side: str,
        workload: Path,
        *,
        threads: int = 1,
        warmup: int = 1,
        steps: int = 0,
        digests_after: tuple[int, ...] = (),
        extras: bool = False,
        held: Mapping[str, str] | None = None,
        library: Path | None = None,
    ) -> dict[str, Any]:
        """What `python -m sides` tells. ``held`` are variables for it, ``library`` a build of minitrain to use.

        Raises SideFailed with the end of what it said.
        """
        python = peers_python() if SIDES[side].packages else sys.executable
        command: list[object] = [python, "-P", "-m", "sides", side, workload, "--threads", threads]
        command += ["--warmup", warmup, "--steps", steps]
        command += ["--cores", *self.pins(threads)] if PINS else []
        command += ["--digests-after", *digests_after] if digests_after else []
        command += ["--extras"] if extras else []
        number = str(threads)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(STEERING)} | {
            "PYTHONPATH": os.pathsep.join(map(str, [library, BENCHMARKS] if library else [BENCHMARKS])),
            **{f"{runtime}_NUM_THREADS": number for runtime in ("OMP", "MKL", "OPENBLAS")},
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            **(held or {}),
        }
        done = subprocess.run(
            [*map(str, command), "--launched", str(monotonic())],
            cwd=self.scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SideFailed(f"{side} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def peak(self, isa: str, cores: int) -> float:
        """GFLOP/s of fused multiply-adds on so many cores at the same time, by peak.c."""
        flags = ["-march=native", "-ffp-contract=fast", f"-DLANES={LANES[isa]}"]
        program = self._compiled("peak.c", f"peak-{isa}", flags)
        bursts = [
            subprocess.Popen(
                [program],
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=(lambda core=core: os.sched_setaffinity(0, [core])) if PINS else None,
            )
            for core in self.pins(cores)
        ]
        return sum(float(burst.communicate()[0].split()[0]) for burst in bursts)

    def round_trip(self) -> float | None:
        """Nanoseconds of a cache line from one of two cores to the other and back, by round_trip.c.

        None where a process cannot be kept to a core, or there is but one.
        """
        cores = self.pins(2)
        if not PINS or len(cores) < 2:
            return None
        program = self._compiled("round_trip.c", "round-trip", ["-pthread"])
        told = subprocess.run([program, *map(str, cores)], stdout=subprocess.PIPE, text=True, check=True)
        return float(told.stdout.split()[0])

    def _compiled(self, source: str, name: str, flags: list[str]) -> Path:
        program = self.scratch / name
        if not program.exists():
            subprocess.run(["cc", "-O3", *flags, BENCHMARKS / source, "-o", program], check=True)
        return program


def available(sides: list[str]) -> tuple[list[str], list[str]]:
    """Those of ``sides`` whose packages are there, and those that are left out."""
    here = [side for side in sides if not SIDES[side].packages or has_packages(peers_python(), SIDES[side].packages)]
    return here, [side for side in sides if side not in here]
