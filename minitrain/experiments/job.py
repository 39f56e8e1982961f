"""An experiment at work: its configuration, its folder, and how runs are made in it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from minitrain import trainer
from minitrain.assembly import Parts
from minitrain.config import Config
from minitrain.errors import ConfigError
from minitrain.experiments.preset import Preset
from minitrain.inject import load
from minitrain.loop import Listener
from minitrain.run_folder import RunFolder

Show = Callable[[str, Config], AbstractContextManager[Listener]]
"""Makes a listener that shows a run, by its name and configuration."""


class Stopped(Exception):
    """The user stopped a run of the experiment."""


class Finding(NamedTuple):
    """What an experiment found: a sentence, the content of results.json, and whether that is a problem."""

    headline: str
    results: dict[str, Any]
    problem: bool = False


@dataclass(frozen=True)
class Job:
    """``overrides`` lie over the preset's configuration, and under what a variant changes."""

    preset: Preset
    overrides: Sequence[str]
    folder: RunFolder
    command_line: Sequence[str]
    show: Show
    stop: Callable[[], bool]

    @cached_property
    def config(self) -> Config:
        return load(None, [*self.preset.settings, *self.overrides])

    @cached_property
    def variants(self) -> dict[str, Config]:
        """The configuration of each variant."""
        configs = {}
        for name, changes in self.preset.variants.items():
            try:
                configs[name] = load(None, [*self.preset.settings, *self.overrides, *changes])
            except ConfigError as error:
                raise ConfigError(f"{error}\n(in the variant {name} of the experiment: {' '.join(changes)})") from error
        return configs

    @property
    def title(self) -> str:
        """Of its page."""
        return f"Experiment {self.preset.name}"

    def again(self) -> str:
        """How to make it once more, for its page."""
        changes = "".join(f" --set {shlex.quote(text)}" for text in self.overrides)
        return f"```\nminitrain experiment {self.preset.name}{changes} --out-dir NEW\n```\n\n"

    def inner(self, name: str) -> RunFolder:
        """The folder of a run inside the experiment."""
        return RunFolder(self.folder.path / "runs" / name)

    def run(
        self,
        config: Config,
        inner: str = "",
        *,
        watchers: Sequence[Callable[[Parts], Listener]] = (),
        halt: Callable[[], bool] = lambda: False,
    ) -> trainer.Outcome:
        """Make the run of this configuration, or go on with what stands there of it, until it ends or ``halt`` says so.

        It stands in the experiment's own folder, or in an ``inner`` one. Raises Stopped.
        """
        name, folder = self.preset.name, self.inner(inner) if inner else self.folder
        with self.show(inner or name, config) as listener:
            outcome = trainer.run(
                config,
                folder.path,
                resume=folder.manifest.exists(),
                command_line=self.command_line,
                listeners=[listener],
                watchers=watchers,
                experiment=None if inner else name,
                stop=lambda: self.stop() or halt(),
            )
        if outcome.metrics.ended == "interrupted" and self.stop():
            raise Stopped
        return outcome

    def results(self, config: Config, inner: str = "") -> dict[str, Any]:
        """results.json of the run of this configuration, which is made if it does not stand there. Raises Stopped."""
        folder = self.inner(inner) if inner else self.folder
        if not folder.complete.exists():
            self.run(config, inner)
        return dict(json.loads(folder.results.read_text(encoding="utf-8")))
