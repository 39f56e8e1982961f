"""Random faults in small runs, and whether `--nan-bisect` finds them: the campaign behind the README's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from minitrain import trainer
from minitrain.config import load_config
from minitrain.loop import Listener
from minitrain.record.recorded import open_run
from minitrain.replay.bisect import nan_bisect
from minitrain.tensors import activation_table, gradient_table, parameter_table, shared, sites

KINDS = (
    "param between steps",
    "m between steps",
    "v between steps",
    "param after the update",
    "m after the update",
    "v after the update",
    "NaN in a parameter",
    "v or m of a tensor scaled",
    "batch",
    "learning rate",
    "every gradient scaled",
    "NaN in an activation",
    "NaN backward",
    "NaN in a gradient",
    "finite activation, digests of sites",
    "finite backward, digests of sites",
    "finite activation",
    "finite backward",
    "finite gradient",
)
INEXACT = ("finite activation", "finite backward")
"""Without digests of the sites only the step is promised of these, and the verdict."""
STEPS = 30


class Truth(NamedTuple):
    """What was done. ``site`` is None where the record cannot tell, ``element`` where it is no element or not told."""

    kind: str
    step: int
    verdict: str
    site: str | None
    element: tuple[int, ...] | None
    settings: list[str]
    strike: Callable[[Any], Any] | None = None
    """Makes the watcher that strikes, given the parts of the run."""
    first: bool = False
    """Whether it must be there before the recorder."""


@dataclass
class Score:
    """Of one kind: counts, and what went wrong."""

    cases: int = 0
    no_trace: int = 0
    step: int = 0
    site_asked: int = 0
    site: int = 0
    element_asked: int = 0
    element: int = 0
    verdict: int = 0
    wrong: list[str] = field(default_factory=list)


class _Between(Listener):
    """Flips a bit of a tensor of the state between two steps."""

    def __init__(self, parts: Any, step: int, kind: str, name: str, element: tuple[int, ...], bit: int) -> None:
        self._parts, self._step, self._what = parts, step, (kind, name, element, bit)

    def stepped(self, stats: Any, state: Any) -> None:
        if state.step == self._step:
            kind, name, element, bit = self._what
            {"param": state.params, "m": state.m, "v": state.v}[kind][name].view(np.uint32)[element] ^= np.uint32(
                1 << bit
            )


def _at_site(parts: Any, step: int, site: str, element: tuple[int, ...], change: float, array: str) -> Listener:
    """Multiplies an element of a site as it comes out of its kernel."""

    def heard(name: str, tensor: Any) -> None:
        if parts.hooks.step == step:
            kind, _, parameter = array.partition(".")
            live = parts.model.grads[parameter] if kind == "grad" else parts.model.activations()[array]
            live[element] = live[element] * np.float32(change) + np.float32(1e-3)

    parts.hooks.listen(heard, site)
    return _Nobody()


class _Nobody(Listener):
    pass


def draw(kind: str, rng: np.random.Generator, base: list[str]) -> Truth:
    """A random fault of this kind in a random small run."""

    def pick(items: Any) -> Any:
        return items[int(rng.integers(len(items)))]

    settings = [
        *(f"training.rng_seed={rng.integers(1000)}", f"training.data_seed={rng.integers(1000)}"),
        f"record.moments={pick(('every_step', 'every_step', 'keyframes'))}",
        *(f"model.tie_weights={pick(('true', 'false'))}", f"model.n_layer={pick((1, 2))}"),
        *(f"model.dropout={pick((0, 0, 0.1))}", f"optimizer.clip={pick(('1.0', '0.1', 'null'))}"),
    ]
    digests = "digests of sites" in kind or (not kind.startswith("finite") and pick((False, False, True)))
    settings.append(f"record.sites={'digest' if digests else 'none'}")
    config = load_config(None, [*base, *settings])
    every, B, T = config.record.moments == "every_step", config.training.batch_size, config.model.max_seq_len
    step = int(rng.integers(1, STEPS - 1))
    parameter = pick(parameter_table(config.model))

    def place(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(rng.integers(n)) for n in shape)

    def inject(name: str, **more: Any) -> list[str]:
        told = {"name": name, "step": step, **more}
        return [f"injection.{key}={value}" for key, value in told.items()]

    state, _, when = kind.partition(" ")
    element = place(parameter.shape)
    if when == "between steps":
        bit = int(rng.integers(32))
        return Truth(
            kind, step, "stored_state", f"{state}.{parameter.name}", element, settings,
            lambda parts: _Between(parts, step, state, parameter.name, element, bit),
        )  # fmt: skip
    if when == "after the update":
        more = inject("bit_flip", target=f"{state}.{parameter.name}", element=list(element), bit=rng.integers(32))
        return Truth(kind, step, "stored_state", f"{state}.{parameter.name}", element, settings + more)
    if kind == "NaN in a parameter":
        more = inject("param_nan", target=parameter.name, element=list(element))
        return Truth(kind, step, "stored_state", f"param.{parameter.name}", element, settings + more)
    if kind == "v or m of a tensor scaled":
        which = pick("mv")
        more = inject(f"{which}_corrupt", target=parameter.name, factor=pick((100, 2, 10)))
        return Truth(kind, step, "stored_state", f"{which}.{parameter.name}", None, settings + more)
    if kind == "batch":
        return Truth(kind, step, "data", "batch", None, settings + inject(pick(("bad_batch", "duplicate_batch"))))
    if kind == "learning rate":
        return Truth(kind, step, "schedule", "lr", None, settings + inject("lr_jump", factor=pick((10, 1.5, 0))))
    if kind == "every gradient scaled":
        return Truth(kind, step, "transient", "clip", None, settings + inject("scale", factor=pick((50, 3, 0.25))))
    if kind == "NaN in a gradient":
        more = inject("grad_nan", target=parameter.name, element=list(element))
        return Truth(kind, step, "transient", f"grad.{parameter.name}", element, settings + more)
    if kind == "finite gradient":
        where = f"grad.{parameter.name}"
        return Truth(
            kind, step, "transient", where, element if every else None, settings,
            lambda parts: _at_site(parts, step, where, element, 1.5, where), True,
        )  # fmt: skip
    shapes = {a.name: a.shape for a in activation_table(config.model, B, T) + gradient_table(config.model, B, T)}
    arrays = {site: shared(config.model).get(site, site) for site in sites(config.model)}
    backward = "backward" in kind
    named = [s for s, a in arrays.items() if a in shapes and s.startswith("grad:") == backward]
    site = pick([s for s in named if s != "log_softmax" and not (backward and s.endswith("attn.probs"))])
    element = place(shapes[arrays[site]])
    if site.endswith("attn.probs"):
        element = (*element[:2], max(element[2:]), min(element[2:]))
    if kind.startswith("NaN"):
        more = inject("nan_activation", target=site, element=list(element))
        paired = site.startswith("grad:") and site.endswith((".q", ".k"))  # rope turns both of a pair before the clip
        return Truth(kind, step, "transient", site, None if paired else element, settings + more)
    return Truth(
        kind, step, "transient", site if digests else None, None, settings,
        lambda parts: _at_site(parts, step, site, element, 1.5, arrays[site]), True,
    )  # fmt: skip


def run_case(truth: Truth, folder: Path, train: Callable[..., Path]) -> None:
    """Train the run with its fault."""
    if truth.strike is None:
        train(folder, *truth.settings)
    elif not truth.first:
        train(folder, *truth.settings, watchers=[truth.strike])
    else:
        assemble, strike = trainer.assemble, truth.strike

        def struck(config: Any, data: Any) -> Any:
            parts = assemble(config, data)
            strike(parts)
            return parts

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "assemble", struck)
            train(folder, *truth.settings)


def judge(truth: Truth, folder: Path, twin: Callable[[], Path], score: Score) -> None:
    """Bisect the run, blind, and compare. A fault of which nothing at all was recorded is counted by itself."""
    found = nan_bisect(folder, blind=True, workers=1)
    score.cases += 1
    if found.finding is None:
        if open_run(folder).journal.steps == open_run(twin()).journal.steps:
            score.no_trace += 1
        else:
            score.wrong.append(f"nothing found: {truth[:5]} {truth.settings}")
        return
    place, told = found.finding.place, []
    score.step += place.step == truth.step
    score.verdict += found.finding.verdict == truth.verdict
    told += [] if (place.step, found.finding.verdict) == (truth.step, truth.verdict) else ["step or verdict"]
    if truth.site is not None:
        score.site_asked += 1
        score.site += place.site == truth.site
        told += [] if place.site == truth.site else ["site"]
    if truth.element is not None:
        score.element_asked += 1
        score.element += place.index == truth.element
        told += [] if place.index == truth.element else ["element"]
    if told:
        score.wrong.append(f"{', '.join(told)}: {truth[:5]} {place} {found.finding.verdict} {truth.settings}")


def localise(count: int, seed: int, folder: Path, train: Callable[..., Path], base: list[str]) -> dict[str, Score]:
    """``count`` random faults, the kinds in turn; a score of each kind."""
    scores: dict[str, Score] = {}
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        truth = draw(KINDS[number % len(KINDS)], rng, base)
        run = folder / str(number)
        run_case(truth, run, train)
        healthy = [s for s in truth.settings if not s.startswith("injection")]

        def twin(run: Path = run, healthy: list[str] = healthy) -> Path:
            return train(run.with_name(f"{run.name}-twin"), *healthy)

        judge(truth, run, twin, scores.setdefault(truth.kind, Score()))
    return scores
