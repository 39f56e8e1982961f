"""Who listens at the sites of a step: Python functions, and probes, which keep statistics without Python.

The engine calls them (`_ext/hooks.pxi`); here stand names, globs and messages. With nobody registered a pass is one
call, and with anybody the bits are the same.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from minitrain._ext import engine
from minitrain._ext.plan import probes
from minitrain.errors import HookError, did_you_mean

Listener = Callable[[str, NDArray[Any]], object]


class SiteStats(NamedTuple):
    """What a tensor holds. ``nan`` and ``inf`` count those elements, ``zeros`` both 0.0 and -0.0, ``count`` all.

    The rest is over the finite elements, NaN where there is none: ``mean``, ``mean_abs`` (of the absolute values),
    ``variance`` (population), ``min``, ``max`` and ``l2``, the square root of the sum of squares. Extremes are exact;
    sums over float32 are right to 4e-6 of the sum of their absolute terms, over float64 to 1e-12 (statistics.h).
    """

    count: int  # type: ignore[assignment]  # hides tuple's method
    mean: float
    mean_abs: float
    variance: float
    min: float
    max: float
    zeros: int
    nan: int
    inf: int
    l2: float

    @property
    def finite(self) -> bool:
        """Whether every element is."""
        return not self.nan and not self.inf


def statistics(tensor: NDArray[Any]) -> SiteStats:
    """What a probe keeps, of any float32 or float64 array: the same bits on every processor. Raises ValueError."""
    return SiteStats(*engine.statistics(np.ascontiguousarray(tensor), probes()[0]))


def merged(a: SiteStats, b: SiteStats) -> SiteStats:
    """Of both, as if they had been one tensor (Chan, Golub & LeVeque 1979); what a probe with totals does."""
    n, m = (s.count - s.nan - s.inf for s in (a, b))
    count, zeros, nan, inf = a.count + b.count, a.zeros + b.zeros, a.nan + b.nan, a.inf + b.inf
    if not n or not m:
        return (a if n else b)._replace(count=count, zeros=zeros, nan=nan, inf=inf)
    apart, share = b.mean - a.mean, m / (n + m)
    variance = (a.variance * n + b.variance * m + apart * apart * (n * m / (n + m))) / (n + m)
    mean, mean_abs = a.mean + apart * share, a.mean_abs + (b.mean_abs - a.mean_abs) * share
    low, high, l2 = min(a.min, b.min), max(a.max, b.max), math.hypot(a.l2, b.l2)
    return SiteStats(count, mean, mean_abs, variance, low, high, zeros, nan, inf, l2)


class HookHandle:
    """Takes a hook off again: ``handle.remove()``, or leave the ``with`` block."""

    def __init__(self, hooks: Hooks, hook: engine.Hook) -> None:
        self._hooks, self._hook = hooks, hook

    def remove(self) -> None:
        """It is not called any more; twice is no harm."""
        self._hooks._remove(self._hook)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Probe(HookHandle):
    """The statistics of its sites, measured by the engine without the GIL."""

    @property
    def step(self) -> int | None:
        """The last step at which it measured anything."""
        return self._hook.step if self._hook.step >= 0 else None

    @property
    def stats(self) -> dict[str, SiteStats]:
        """By site, as measured the last time the step came by. Read it between steps, or in a hook."""
        told = ((site, tally.told()) for site, tally in self._hook.tallies.items())
        return {site: SiteStats(*figures) for site, figures in told if figures}

    @property
    def totals(self) -> dict[str, SiteStats]:
        """By site, over all that was measured since `reset`: Welford's streaming form, a tensor at a time (Chan).

        Empty unless the probe was asked for totals.
        """
        told = ((site, tally.total()) for site, tally in self._hook.tallies.items())
        return {site: SiteStats(*figures) for site, figures in told if figures}

    def reset(self) -> None:
        """Forget what was measured."""
        for tally in self._hook.tallies.values():
            tally.reset()


class Hooks:
    """The hooks of a model and its optimizer, called in the order in which they were added at each site.

    ``step`` is the step that is running. ``sites`` are the names that globs are held against; with none, any glob goes.
    """

    def __init__(self, sites: Sequence[str] = ()) -> None:
        self.sites = tuple(sites)
        self.step = 0
        self.version = 0
        """Another after each change; who keeps what `at` said looks here."""
        self._hooks: list[tuple[str, engine.Hook]] = []

    def listen(self, listener: Listener, sites: str = "*", every: int = 1) -> HookHandle:
        """Call ``listener(site, tensor)`` at the sites that match the glob, at steps that are multiples of ``every``.

        The tensor is a read-only view of the array as it is at that moment; copy what is to be kept. What the listener
        raises ends the step as HookError: the state is then between two steps. Who is added or removed by a listener
        comes in with the next pass and goes at once. Raises HookError where nothing matches.
        """
        if not callable(listener):
            raise HookError(f"hook: expected a function f(site, tensor), got {listener!r}")
        return HookHandle(self, self._add(listener, sites, every))

    def probe(self, sites: str = "*", every: int = 1, *, totals: bool = False) -> Probe:
        """Keep statistics of the sites that match the glob, with ``totals`` also over all steps.

        Raises HookError where no site matches.
        """
        return Probe(self, self._add(None, sites, every, totals))

    def _add(self, call: Listener | None, pattern: str, every: int, totals: bool = False) -> engine.Hook:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise HookError(f"hook: every: expected a number of steps, at least 1, got {every!r}")
        if self.sites and not any(fnmatchcase(site, pattern) for site in self.sites):
            raise HookError(
                f"hook: sites: expected the name of a site or a glob, got {pattern!r}, which matches none of "
                f"{len(self.sites)}{did_you_mean(pattern, self.sites)} (minitrain.tensors.sites lists them)"
            )
        hook = engine.Hook(call, every, totals)
        self._hooks.append((pattern, hook))
        self.version += 1
        return hook

    def _remove(self, hook: engine.Hook) -> None:
        hook.remove()
        self._hooks = [entry for entry in self._hooks if entry[1] is not hook]
        self.version += 1

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def at(self, site: str) -> list[engine.Hook]:
        """Who hears this site, in order."""
        return [hook for pattern, hook in self._hooks if fnmatchcase(site, pattern)]

    def failed(self, listener: Listener, site: str, error: Exception) -> HookError:
        """What ends the step in which ``listener`` raised ``error``."""
        name = getattr(listener, "__qualname__", None) or repr(listener)
        where = traceback.extract_tb(error.__traceback__)
        line = f" ({where[-1].filename}:{where[-1].lineno})" if where else ""
        return HookError(f"hook {name} at site {site}, step {self.step}: {type(error).__name__}: {error}{line}")
