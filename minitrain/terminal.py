"""What the commands share at the terminal: options, the progress bar, Ctrl-C."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from minitrain.config import Config

seed_option = click.option("--seed", type=int, help="training.rng_seed: initial weights and dropout.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any key of the configuration; may be repeated."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress bar.")


def settings_from(overrides: tuple[str, ...], seed: int | None) -> list[str]:
    """``--set`` and ``--seed`` as overrides; the seed wins."""
    return [*overrides, *([] if seed is None else [f"training.rng_seed={seed}"])]


def bar_wanted(quiet: bool, as_json: bool) -> bool:
    return sys.stderr.isatty() and not (quiet or as_json)


def width(most: int) -> int:
    """Characters of a line of prose: ``most``, or what the terminal has where that is less."""
    return min(most, shutil.get_terminal_size().columns) if sys.stdout.isatty() else most


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table without rules; the columns of ``right`` are flush right. For long ones, which rich draws slowly."""
    table = [header, *rows]
    widths = [max(len(click.unstyle(line[i])) for line in table) for i in range(len(header))]

    def cell(text: str, i: int) -> str:
        space = " " * (widths[i] - len(click.unstyle(text)))
        return space + text if i in right else text + space

    return "\n".join("  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in table)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the loop to stop at the next step boundary; a second one, or one before, stops at once."""
    asked = training = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not training:
            raise KeyboardInterrupt
        asked = True

    def stop() -> bool:
        nonlocal training
        training = True  # the loop has begun: from now on it is asked
        return asked

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextmanager
def steps_bar(visible: bool, total: int, name: str) -> Iterator[Callable[[int], None]]:
    """A bar of ``total`` units of work; what is given back is told how many have been done, by any thread.

    It appears when it is first told, so that a run that is refused finds the terminal free.
    """
    if not visible:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), TimeRemainingColumn(compact=True))
    bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=8)
    task = bar.add_task(name, total=total)

    closed = False

    def show(done: int) -> None:
        if not closed:  # a thread may be late
            bar.start()  # does nothing where it has been
            bar.advance(task, done)

    try:
        yield show
    finally:
        closed = True
        bar.stop()


class Progress:
    """The bar: loss, learning rate, gradient norm and tokens/s, every ``log_every`` steps. A listener of the loop.

    It appears with the first step: what is told before it, and a run that is refused, find the terminal free.
    """

    def __init__(self, config: Config, visible: bool, name: str = "") -> None:
        self._every = config.training.log_every
        self._total = config.scheduler.total_steps
        self._visible = visible
        self._name = f"{name}  " if name else ""
        self._tokens = 0
        self._clock = 0.0

    def __enter__(self) -> Progress:
        if not self._visible:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=8)
        return self

    def __exit__(self, *error: object) -> None:
        if self._visible:
            self._bar.stop()

    def starting(self, step: int, batch: Any, state: Any) -> None:
        if self._visible and not self._bar.live.is_started:
            self._task = self._bar.add_task(self._name, total=self._total, completed=step)
            self._bar.start()

    def stepped(self, stats: Any, state: Any) -> None:
        if not self._visible:
            return
        self._tokens += stats.tokens
        if state.step % self._every and state.step != self._total:
            return
        now = perf_counter()
        rate = self._tokens / (now - self._clock) if self._clock else 0.0
        self._tokens, self._clock = 0, now
        text = f"loss {stats.loss:.3f}  lr {stats.lr:.1e}  norm {stats.grad_norm:.2f}  {rate / 1000:.0f}k tok/s"
        self._bar.update(self._task, completed=state.step, description=self._name + text)

    def evaluated(self, batch: Any) -> None:
        pass

    def validated(self, step: int, result: Any) -> None:
        self._tokens, self._clock = 0, perf_counter()  # the rate is that of training
