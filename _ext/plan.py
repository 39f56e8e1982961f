"""A plan: the operations of a pass in order, checked once, and the named sites between them.

The same plan runs on the compiled kernels or on their NumPy twins. Nobody listening costs one branch a pass: the whole
plan is one call. A hook at a site has the plan run up to there, the array shown to it, and the rest run on (hooks.pxi);
the bits are the same because the operations are.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minitrain._ext import engine, reference
from minitrain._ext.signatures import SIGNATURES, SPLITS
from minitrain.errors import KernelArgumentError, MinitrainError

Place = tuple[int, int]
"""Of a parameter: elements of its layer that come before it, and those of the whole layer."""


class Listeners(Protocol):
    """Who is called at sites; see minitrain.hooks."""

    step: int
    version: int

    def __bool__(self) -> bool: ...
    def at(self, site: str) -> list[engine.Hook]: ...
    def failed(self, listener: Callable[[str, NDArray[Any]], object], site: str, error: Exception) -> Exception: ...


def instruction_set() -> str:
    """The best one of this processor, or what MINITRAIN_ISA forces. Raises MinitrainError where it cannot run here."""
    able = engine.instruction_sets()
    forced = os.environ.get("MINITRAIN_ISA")
    if forced and forced not in able:
        raise MinitrainError(
            f"MINITRAIN_ISA: expected one of {', '.join(able)} (what this processor runs), got {forced!r}; "
            "unset it to have the best one chosen"
        )
    return forced or str(able[0])


def compiled() -> tuple[str, str]:
    """The compiler of the kernels that run here, and its flags. Raises MinitrainError as `instruction_set` does."""
    compiler, flags = _kernels(instruction_set()).compiled()
    return compiler, flags


def _kernels(isa: str) -> ModuleType:
    return importlib.import_module(f"minitrain._ext.kernels_{isa}")


def probes() -> tuple[int, int]:
    """Where the statistics of probes stand, and their sum. Raises MinitrainError as `instruction_set` does."""
    measure, merge = _kernels(instruction_set()).probes()
    return measure, merge


@functools.cache
def _warn_of_slowness() -> None:
    """Once a process, on stderr; not to those who ask for the portable kernels by name."""
    if os.environ.get("MINITRAIN_ISA") or engine.portable_is_fast():
        return
    if engine.instruction_sets() == ["portable"]:
        print(
            "warning: this processor lacks AVX2 or FMA: the portable kernels give the same bits, but a default step "
            "takes about 2 s (0.1 s with FMA alone) instead of 1 ms; MINITRAIN_ISA=portable silences this",
            file=sys.stderr,
        )


class CompiledBackend:
    """The compiled kernels of one instruction set, run by a pool of threads."""

    name = "compiled"

    def __init__(self, threads: int = 1) -> None:
        self.isa = instruction_set()
        _warn_of_slowness()
        self.pool = engine.Pool(threads)
        self._address: dict[str, int] = _kernels(self.isa).addresses()

    def program(self) -> CompiledProgram:
        return CompiledProgram(self.pool, self._address)


class CompiledProgram:
    def __init__(self, pool: engine.Pool, address: dict[str, int]) -> None:
        self.runner = engine.Program(pool)
        self.run = self.runner.run
        self._address = address
        self._alive: list[Any] = []  # the program holds addresses only

    def append(self, name: str, arguments: tuple[Any, ...], place: Place | None = None) -> None:
        signature = SIGNATURES[name]
        sizes = signature.sizes(arguments)
        assert not place or signature.split == "strips"
        arrays = arguments[: len(signature.arrays)]
        self._alive.append(arrays)
        self.runner.append(
            self._address[name],
            [0 if a is None else a.ctypes.data for a in arrays],
            list(sizes.values()),
            list(arguments[len(signature.arrays) :]),
            signature.units(sizes),
            SPLITS.index(signature.split),
            (*place, signature.strip(sizes)) if place else (0, 0, 0),
            signature.scratch(sizes),
        )


class ReferenceBackend:
    """The NumPy twins: the oracle of the tests, slow, with bits of their own."""

    name = "reference"
    isa = "numpy"

    def __init__(self, dtype: type[np.floating[Any]] = np.float32) -> None:
        self.dtype = np.dtype(dtype)

    def program(self) -> ReferenceProgram:
        return ReferenceProgram(self.dtype)


class ReferenceProgram:
    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self.runner = self
        self._calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def append(self, name: str, arguments: tuple[Any, ...], place: Place | None = None) -> None:
        SIGNATURES[name].sizes(arguments, floats=self._dtype)
        self._calls.append((getattr(reference, name), arguments))

    @property
    def length(self) -> int:
        return len(self._calls)

    def run(self, first: int, last: int) -> None:
        with np.errstate(all="ignore"):  # NaN and Inf are evidence here, not accidents
            for kernel, arguments in self._calls[first:last]:
                kernel(*arguments)


Backend = CompiledBackend | ReferenceBackend


class Plan:
    """Built once by `add` and `site`; `run` then repeats it on whatever the arrays hold."""

    def __init__(self, backend: Backend) -> None:
        self._program = backend.program()
        self.kernels: list[str] = []
        self._sites: list[tuple[int, str, NDArray[Any]]] = []
        self._roll: engine.Roll | None = None
        self._called: tuple[Listeners | None, int] = None, 0  # who is on the roll

    def add(self, kernel: str, *arguments: Any, place: Place | None = None) -> None:
        """Append a kernel: arrays in the order of its signature, then numbers. Raises KernelArgumentError.

        ``place`` is that of the parameter in its layer, where threads are to share the layer and not the parameter.
        """
        self._program.append(kernel, arguments, place)
        self.kernels.append(kernel)

    def site(self, name: str, tensor: NDArray[Any]) -> None:
        """Name this point, where hooks see ``tensor``, contiguous float32 or float64. Raises KernelArgumentError."""
        if tensor.dtype not in (np.float32, np.float64) or not tensor.flags.c_contiguous:
            raise KernelArgumentError(
                f"site {name}: expected contiguous float32 or float64, got {tensor.dtype} with strides {tensor.strides}"
            )
        self._sites.append((len(self.kernels), name, tensor))

    @property
    def sites(self) -> list[str]:
        return [name for _, name, _ in self._sites]

    def run(self, listeners: Listeners | None = None) -> None:
        if not listeners:
            self._program.run(0, len(self.kernels))
            return
        if self._roll is None or self._called[0] is not listeners or self._called[1] != listeners.version:
            self._called = listeners, listeners.version
            heard = [(at, name, _shown(x), hook) for at, name, x in self._sites for hook in listeners.at(name)]
            self._roll = engine.Roll(heard, *probes())
        self._roll.run(self._program.runner, listeners.step, listeners.failed)

    def run_part(self, first: int, last: int) -> None:
        """The operations first..last-1 alone, for measuring them."""
        self._program.run(first, last)


def _shown(tensor: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be made writeable again, one for each hook: another's changes of shape do not show."""
    return np.asarray(tensor.data.toreadonly())


def call(backend: Backend, kernel: str, *arguments: Any) -> None:
    """Run one kernel now."""
    plan = Plan(backend)
    plan.add(kernel, *arguments)
    plan.run()
