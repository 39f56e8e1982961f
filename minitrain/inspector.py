"""The inspector: look into a model while it works, as with hooks of PyTorch, and keep running statistics.

>>> inspector = Inspector(model)
>>> inspector.register_forward("block.*.ffn.gelu")
>>> inspector.register_backward("block.0.*", lambda name, gradient: float(abs(gradient).max()))
>>> ...                                                       # steps
>>> inspector.stats["block.0.ffn.gelu"].variance

The same on a model that trains, on `Replay(run).at(t)`, and on what a reader has of a state: `observe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from minitrain.errors import HookError, did_you_mean
from minitrain.hooks import HookHandle, Hooks, Probe, SiteStats, merged, statistics
from minitrain.tensors import phase_of

Function = Callable[[str, NDArray[Any]], float | None]


_METHOD = {"forward": "forward", "backward": "backward", "update": "state"}
"""How the method that registers in a phase ends."""


class Inspected(Protocol):
    """What has sites: a model, the parts of a run, a replay and its live step."""

    @property
    def hooks(self) -> Hooks: ...


class Running(NamedTuple):
    """Streaming statistics of a function's numbers, one for each call that gave one (Welford 1962)."""

    count: int  # type: ignore[assignment]  # hides tuple's method
    mean: float
    variance: float
    """Of the population; NaN before the first number."""
    min: float
    max: float
    last: float

    @classmethod
    def empty(cls) -> Running:
        return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan)

    def add(self, x: float) -> Running:
        """With one number more. A number that is not finite makes mean and variance NaN, as it would any sum."""
        if not self.count:
            return Running(1, x, 0.0 if math.isfinite(x) else math.nan, x, x, x)
        count = self.count + 1
        apart = x - self.mean
        mean = self.mean + apart / count
        variance = (self.variance * self.count + apart * (x - mean)) / count
        return Running(count, mean, variance, min(self.min, x), max(self.max, x), x)


class Inspector:
    """Registers hooks on ``source`` by name or glob and keeps what they saw.

    Without a function the statistics of the tensor are kept, by the engine and without Python: `stats` has them over
    all elements of all steps since `reset`, `snapshot` those of the last step. A function is called as
    ``f(site, tensor)`` with a read-only view; the number that it returns, if any, is kept in the same way. Nothing that
    is registered changes a bit of the run. ``source`` None is for `observe` alone.
    """

    def __init__(self, source: Inspected | None = None) -> None:
        self._hooks = None if source is None else source.hooks
        self._registered: list[_Registered] = []

    def register_forward(self, name: str = "*", fn: Function | None = None, *, every: int = 1) -> HookHandle:
        """At the forward sites that match the name or glob: activations and the loss. Raises HookError."""
        return self._register("forward", name, fn, every)

    def register_backward(self, name: str = "*", fn: Function | None = None, *, every: int = 1) -> HookHandle:
        """At the gradients that match: ``block.0.q`` is an activation's, ``block.0.attn.q.weight`` a parameter's.

        Raises HookError.
        """
        return self._register("backward", name, fn, every)

    def register_state(self, name: str = "param.*", fn: Function | None = None, *, every: int = 1) -> HookHandle:
        """At parameters and moments after the update: ``param.*``, ``m.*``, ``v.lm_head.bias``. Raises HookError."""
        return self._register("update", name, fn, every)

    def _register(self, phase: str, pattern: str, fn: Function | None, every: int) -> HookHandle:
        if fn is not None and not callable(fn):
            raise HookError(f"hook: expected a function f(name, tensor) or None, got {fn!r}")
        one = _Registered(phase, pattern, fn)
        if self._hooks is not None:
            sites = [site for site in self._hooks.sites if one.hears(site)]
            if self._hooks.sites and not sites:
                there = sorted({name_of(site) for site in self._hooks.sites if phase_of(site) == phase})
                raise HookError(
                    f"register_{_METHOD[phase]}: expected the name of a site or a glob, got {pattern!r}, which matches "
                    f"none of {len(there)}{did_you_mean(pattern, there)} (minitrain.tensors.sites lists them)"
                )
            one.handles = [self._attach(one, site, every) for site in sites]
        self._registered.append(one)
        return Registration(self, one)

    def _attach(self, one: _Registered, site: str, every: int) -> HookHandle:
        assert self._hooks is not None
        if one.fn is None:
            return self._hooks.probe(site, every, totals=True)
        return self._hooks.listen(one.call, site, every)

    def observe(self, tensors: Mapping[str, NDArray[Any]], prefix: str = "param") -> None:
        """Show these to what is registered, as if a step had passed them: ``observe(run.params(500))``.

        ``prefix`` says what they are: ``param``, ``m``, ``v``, ``grad``, or "" for names of sites.
        """
        for name, tensor in tensors.items():
            site = f"{prefix}.{name}" if prefix else name
            for one in self._registered:
                if one.hears(site):
                    one.see(site, tensor)

    @property
    def stats(self) -> dict[str, SiteStats | Running]:
        """By site, over everything since `reset`. Where several are registered at a site, those of the first."""
        return self._collected(lambda one: one.totals())

    def snapshot(self) -> dict[str, SiteStats | float]:
        """By site, what was seen last: statistics, or a function's number. A copy: later steps do not change it."""
        return self._collected(lambda one: one.lasts())

    def _collected(self, of: Callable[[_Registered], Mapping[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in reversed(self._registered):
            found |= of(one)
        return found

    def reset(self) -> None:
        """Forget what was seen; what is registered stays."""
        for one in self._registered:
            one.reset()

    def remove(self, one: _Registered) -> None:
        """Take one off; twice is no harm. What it has seen goes with it."""
        for handle in one.handles:
            handle.remove()
        self._registered = [other for other in self._registered if other is not one]

    def remove_all(self) -> None:
        """Take everything off."""
        for one in list(self._registered):
            self.remove(one)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove_all()


class Registration(HookHandle):
    """Takes what was registered off again: ``handle.remove()``, or leave the ``with`` block."""

    def __init__(self, inspector: Inspector, one: _Registered) -> None:
        self._inspector, self._one = inspector, one

    def remove(self) -> None:
        self._inspector.remove(self._one)


class _Registered:
    """One call of register: a glob in a phase, and what was seen there."""

    def __init__(self, phase: str, pattern: str, fn: Function | None) -> None:
        self.phase, self.pattern, self.fn = phase, pattern, fn
        self.handles: list[HookHandle] = []
        self._numbers: dict[str, Running] = {}
        self._observed: dict[str, tuple[SiteStats, SiteStats]] = {}

    def hears(self, site: str) -> bool:
        name = name_of(site)
        return phase_of(site) == self.phase and (fnmatchcase(name, self.pattern) or fnmatchcase(site, self.pattern))

    def call(self, site: str, tensor: NDArray[Any]) -> None:
        assert self.fn is not None
        told = self.fn(site, tensor)
        if told is not None:
            self._numbers[site] = self._numbers.get(site, Running.empty()).add(float(told))

    def see(self, site: str, tensor: NDArray[Any]) -> None:
        if self.fn is not None:
            view = np.asarray(tensor).view()
            view.flags.writeable = False
            self.call(site, view)
            return
        last = statistics(tensor)
        before = self._observed.get(site)
        self._observed[site] = last, merged(before[1], last) if before else last

    def totals(self) -> dict[str, SiteStats | Running]:
        found: dict[str, SiteStats | Running] = dict(self._numbers)
        for handle in self.handles:
            if isinstance(handle, Probe):
                found |= handle.totals
        return found | {site: total for site, (_, total) in self._observed.items()}

    def lasts(self) -> dict[str, SiteStats | float]:
        found: dict[str, SiteStats | float] = {site: numbers.last for site, numbers in self._numbers.items()}
        for handle in self.handles:
            if isinstance(handle, Probe):
                found |= handle.stats
        return found | {site: last for site, (last, _) in self._observed.items()}

    def reset(self) -> None:
        self._numbers.clear()
        self._observed.clear()
        for handle in self.handles:
            if isinstance(handle, Probe):
                handle.reset()


def name_of(site: str) -> str:
    """The site without ``grad:`` or ``grad.``: the activation or parameter that it is the gradient of."""
    return site[len("grad:") :] if phase_of(site) == "backward" else site
