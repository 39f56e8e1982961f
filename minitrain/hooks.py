"""Who listens at sites.

A listener is any ``f(site, tensor)``; the tensor is a read-only view of the array as it is at that moment. With nobody
registered the step pays one branch a pass, and with anybody the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

Listener = Callable[[str, NDArray[Any]], None]


class HookHandle:
    """Takes a listener off again: ``handle.remove()``, or leave the ``with`` block."""

    def __init__(self, hooks: Hooks, entry: tuple[str, Listener]) -> None:
        self._hooks, self._entry = hooks, entry

    def remove(self) -> None:
        self._hooks._remove(self._entry)

    def __enter__(self) -> HookHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Hooks:
    """The listeners of a model, called in the order in which they were added."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Listener]] = []
        self._heard: dict[str, list[Listener]] = {}

    def listen(self, listener: Listener, sites: str = "*") -> HookHandle:
        """Call ``listener(site, tensor)`` at every site whose name matches the glob."""
        entry = (sites, listener)
        self._entries.append(entry)
        self._heard.clear()
        return HookHandle(self, entry)

    def _remove(self, entry: tuple[str, Listener]) -> None:
        self._entries = [e for e in self._entries if e is not entry]
        self._heard.clear()

    def __bool__(self) -> bool:
        return bool(self._entries)

    def _at(self, site: str) -> list[Listener]:
        if site not in self._heard:
            self._heard[site] = [f for pattern, f in self._entries if fnmatchcase(site, pattern)]
        return self._heard[site]

    def hears(self, site: str) -> bool:
        return bool(self._at(site))

    def fire(self, site: str, tensor: NDArray[Any]) -> None:
        for listener in self._at(site):
            listener(site, tensor)

    def show(self, site: str, tensor: NDArray[Any]) -> None:
        """Fire with a read-only view, if anybody hears this site."""
        if self.hears(site):
            view = tensor.view()
            view.flags.writeable = False
            self.fire(site, view)
