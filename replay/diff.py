"""Two runs side by side: the first step at which their records differ, and the first site when it is run again in both.

By the record alone where that is enough: batch, random streams, state in, sites, scalars and state out have digests or
bits. Then the one step is run again in each run, with its own configuration and injections, for the elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitrain.config import differing_keys
from minitrain.errors import RunError
from minitrain.record.journal import FINGERPRINT, Frame
from minitrain.record.recorded import Run
from minitrain.replay.evidence import distance
from minitrain.replay.fingerprint import environment
from minitrain.replay.replayer import Replay
from minitrain.replay.source import RecordedRun, span
from minitrain.replay.states import named_tensors
from minitrain.replay.verifier import double_bits
from minitrain.tensors import KINDS, canonical_bits, parameter_table, phase_of, sites


class Recorded(NamedTuple):
    """Something of a step that was recorded otherwise: bits or digests, or whole numbers."""

    phase: str
    site: str
    a: int
    b: int


class SiteDifference(NamedTuple):
    """The first element of a tensor that differs."""

    site: str
    phase: str
    """state where the step read it otherwise; forward, backward, clip, update; or left, behind the update."""
    index: tuple[int, ...]  # type: ignore[assignment]  # hides tuple's method
    a: float
    b: float
    ulps: int | None
    """How many floating-point numbers lie between; None where one is no number."""
    differing: int
    elements: int


@dataclass
class Diff:
    """What two runs have in common, and where they part. ``steps`` are those that both have recorded."""

    steps: range
    recorded_steps: tuple[range, range]
    """Those of each."""
    config: list[str]
    """The keys that differ, a line each."""
    environment: list[str]
    """What else is different of data and machine."""
    first_step: int | None = None
    recorded: list[Recorded] = field(default_factory=list)
    """Everything that is recorded otherwise of that step, in the order of time."""
    first_site: SiteDifference | None = None
    """When that step is run again in both."""
    sites_differing: int = 0
    """Of all tensors that were compared: read, passed and left."""
    reproduced: tuple[bool, bool] | None = None
    """Whether each run's step, run again, is what it has recorded; None where it could not be run again."""
    reason: str | None = None
    """Why it could not."""

    @property
    def equal(self) -> bool:
        return self.first_step is None


def diff(a: Run, b: Run) -> Diff:
    """Raises RunError where the runs cannot be compared: other shapes, or no step that both have."""
    require_comparable(a, b)
    steps = range(max(a.start, b.start), min(a.end, b.end))
    found = Diff(steps, (a.steps, b.steps), differing_keys(a.config, b.config), [*_fingerprints(a, b)])
    found.environment += environment(a.manifest, b.manifest)
    found.first_step = next((t for t in steps if _differs(a, b, t)), None)
    if found.first_step is not None:
        names = _Names(a, b)
        found.recorded = list(names.differences(a.frame(found.first_step), b.frame(found.first_step)))
        try:
            _rerun(found, a, b, found.first_step)
        except RunError as error:
            found.reason = str(error)
    return found


def require_comparable(a: Run, b: Run) -> None:
    """Raises RunError unless both have the same arrays in a step, and a step in common."""
    for run in a, b:
        if not run.steps:
            raise RunError(f"{run.path}: expected at least one recorded step, got none; there is nothing to compare")
    shapes = []
    for run in a, b:
        model = {f"model.{key}": value for key, value in run.config.model.model_dump().items() if key != "dropout"}
        shapes.append({**model, "training.batch_size": run.config.training.batch_size})
    other = [f"{key}: {value} and {shapes[1][key]}" for key, value in shapes[0].items() if value != shapes[1][key]]
    if other:
        raise RunError(
            f"{a.path} and {b.path}: expected runs whose steps have the same arrays, got {', '.join(other)}; compare "
            "runs of the same model and batch size"
        )
    if max(a.start, b.start) >= min(a.end, b.end):
        raise RunError(
            f"{a.path} and {b.path}: expected runs with steps in common, got {span(a.steps)} and {span(b.steps)}; "
            "compare a forked run with one that reaches behind its first state"
        )


def _fingerprints(a: Run, b: Run) -> Iterator[str]:
    """What makes the same bits impossible, beside the configuration."""
    for key in FINGERPRINT:
        if key != "config_hash" and a.manifest.get(key) != b.manifest.get(key):
            yield f"{key} {str(a.manifest.get(key))[:12]} -> {str(b.manifest.get(key))[:12]}"


_SAME = ("rows", "batch_digest", "rng", "loss", "lr", "grad_norm", "grad_norm_clipped", "loss_scale", "digest_out")


def _differs(a: Run, b: Run, t: int) -> bool:
    """By what stands in the two journals; every NaN is the same there."""
    one, other = a.journal.body(t), b.journal.body(t)
    if any(_plain(one[key]) != _plain(other[key]) for key in _SAME):
        return True
    if (one["digest_in"] is not None or other["digest_in"] is not None) and not np.array_equal(
        a.frame(t).digest_in, b.frame(t).digest_in
    ):
        return True
    both = one.get("sites") is not None and other.get("sites") is not None
    return both and one["sites"] != other["sites"]


def _plain(value: Any) -> Any:
    return double_bits(value) if isinstance(value, float) else value


class _Names:
    """What the digests of a frame are of."""

    def __init__(self, a: Run, b: Run) -> None:
        every = sites(a.config.model)
        names = [p.name for p in parameter_table(a.config.model)]
        self._tensors = [f"{kind}.{name}" for kind in KINDS for name in names]
        self._sites = every[: -3 * len(names)]

    def differences(self, a: Frame, b: Frame) -> Iterator[Recorded]:
        """In the order of time."""
        yield from _each("data", ["batch.rows"] * a.rows.size, a.rows, b.rows)
        yield from _each("data", ["batch"], [a.batch_digest], [b.batch_digest])
        yield from _each("data", ["rng.training_control"] * 4 + ["rng.data"] * 4, a.rng.ravel(), b.rng.ravel())
        yield from _each("state", self._tensors, a.digest_in.ravel(), b.digest_in.ravel())
        passed = list(_each("", self._sites, a.sites, b.sites)) if a.sites is not None and b.sites is not None else []
        passed = [d._replace(phase=phase_of(d.site)) for d in passed if d.site != "loss"]
        yield from (d for d in passed if d.phase == "forward")
        yield from _each("forward", ["loss"], [double_bits(a.loss)], [double_bits(b.loss)])
        yield from (d for d in passed if d.phase != "forward")
        for name, phase in ("grad_norm", "clip"), ("grad_norm_clipped", "clip"), ("lr", "update"):
            yield from _each(phase, [name], [double_bits(getattr(a, name))], [double_bits(getattr(b, name))])
        left = list(_each("update", self._tensors, a.digest_out.ravel(), b.digest_out.ravel()))
        yield from sorted(left, key=lambda d: ("m", "v", "param").index(d.site.split(".")[0]))


def _each(phase: str, names: list[str], a: Any, b: Any) -> Iterator[Recorded]:
    """The first of each name."""
    told: set[str] = set()
    for name, x, y in zip(names, a, b, strict=True):
        if int(x) != int(y) and name not in told:
            told.add(name)
            yield Recorded(phase, name, int(x), int(y))


def _rerun(found: Diff, a: Run, b: Run, t: int) -> None:
    """Run step t again in both, and compare every tensor: as read, at each site, as left."""
    kept: dict[tuple[str, str], NDArray[Any]] = {}
    sources = RecordedRun(a), RecordedRun(b)
    if a.config.data == b.config.data:
        sources[1].data = sources[0].data  # read once; each run holds it against its own manifest
    replays = Replay(sources[0]), Replay(sources[1])
    live = replays[0].at(t)
    if np.array_equal(a.frame(t).digest_in, b.frame(t).digest_in):
        lives = live, replays[1].take(live.state)
    else:
        lives = live, replays[1].at(t)

    def keep(phase: str, site: str, tensor: NDArray[Any]) -> None:
        kept[phase, site] = tensor.copy()

    def compare(phase: str, site: str, tensor: NDArray[Any]) -> None:
        difference = _first(phase, site, kept[phase, site], tensor)
        if difference:
            found.sites_differing += 1
            found.first_site = found.first_site or difference

    reproduced = []
    for replay, live, look in zip(replays, lives, (keep, compare), strict=True):

        def passed(site: str, tensor: NDArray[Any], look: Any = look) -> None:
            look(phase_of(site), site, tensor)

        for name, tensor in named_tensors(live.state).items():
            look("state", name, tensor)
        with replay.hooks.listen(passed):
            reproduced.append(live.step("loss").verified)
        for name, tensor in named_tensors(live.state).items():
            look("left", name, tensor)
    found.reproduced = (reproduced[0], reproduced[1])


def _first(phase: str, site: str, a: NDArray[Any], b: NDArray[Any]) -> SiteDifference | None:
    """The first element whose bits differ."""
    then, now = _bits(a), _bits(b)
    other = then != now
    if not other.any():
        return None
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(other)), other.shape))
    ulps = distance(then[index], now[index])
    return SiteDifference(site, phase, index, float(a[index]), float(b[index]), ulps, int(other.sum()), other.size)


def _bits(x: NDArray[Any]) -> NDArray[Any]:
    if x.dtype == np.float32:
        return canonical_bits(x)
    return np.where(np.isnan(x), np.nan, x).view(np.uint64)
