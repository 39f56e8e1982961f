"""What an injection did, measured: an injected run held against its twin, the same run without it, by their records.

Everything here is a number of JSON (None where it is not finite). σ is the population standard deviation of the loss in
the `stability.WINDOW` steps before step K, in which the two runs are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.record.recorded import Run, open_run
from minitrain.replay import Replay
from minitrain.report.log import Log
from minitrain.run_folder import RunFolder
from minitrain.stability import CALM, PATIENCE, WINDOW, Spike, Usual, recovery, spikes, usual
from minitrain.state import State
from minitrain.trainer import finite_or_none

PLATEAU = 30
"""Steps behind K over which the loss is averaged to see a plateau."""
HELD = 20
"""So many steps in a row must the loss be near that of the twin to be back there."""
TRACED = 100
"""States behind K that are taken from both runs, step by step."""

Arrays = Mapping[str, NDArray[Any]]


def effect(folder: RunFolder, twin: RunFolder, target: str | None) -> dict[str, Any]:
    """Hold the injected run against its twin; ``target`` is the parameter that the injection is about, if any.

    Raises RunError where a record cannot be read.
    """
    a, b = open_run(folder.path), open_run(twin.path)
    K = a.config.injections[0].step
    first = first_difference(a, b)
    return {
        "step": K,
        "before": {"first_difference": first, "same_bits": first is None or first >= K},
        "parts": at_step(folder, twin, K, a.config.injections[0].factor),
        **afterwards(Log.read(folder), Log.read(twin), K),
        "trace": trace(folder, twin, K, target),
        "distance": [
            {"state": t, **_distance(a.keyframe(t), b.keyframe(t))}
            for t in sorted({*a.keyframes} & {*b.keyframes})
            if t > K
        ],
    }


# Before, and at the step itself


def first_difference(a: Run, b: Run) -> int | None:
    """The first step that read or left other bits in one run than in the other, or whose numbers differ."""

    def bits(run: Run, t: int) -> tuple[object, ...]:
        f = run.frame(t)
        states = (f.digest_in.tobytes(), f.digest_out.tobytes())
        return (*states, f.rng.tobytes(), f.batch_digest, f.loss, f.lr, f.grad_norm, f.grad_norm_clipped)

    return next((t for t in a.steps if t in b.steps and bits(a, t) != bits(b, t)), None)


def at_step(folder: RunFolder, twin: RunFolder, step: int, factor: float | None = None) -> list[dict[str, Any]]:
    """What is different in this step, part by part: both are run again from their records, and every array is held
    against its like.

    ``different`` of ``arrays`` differ, in ``different_elements`` elements; ``ratio`` is the range of injected / twin
    over those of them whose twin is not 0, and ``exact`` says whether every element of the arrays that differ is that
    of the twin times ``factor``, in float32.
    """
    return list(_parts(_passed(folder, step), _passed(twin, step), factor))


def _passed(folder: RunFolder, step: int) -> dict[str, dict[str, NDArray[Any]]]:
    """Copies of what a step reads, what passes its sites, and what it leaves, by part and name."""
    replay = Replay(folder.path)
    live = replay.at(step)
    seen: dict[str, NDArray[Any]] = {}
    batch = {"inputs": live.batch.inputs, "targets": live.batch.targets}
    with replay.hooks.listen(lambda site, x: seen.__setitem__(site, x.copy())):
        live.step("loss")
    state = live.state
    return {
        "batch": batch,
        "forward": {site: x for site, x in seen.items() if not site.startswith(("grad", "clip", "m.", "v.", "param."))},
        "backward": {site: x for site, x in seen.items() if site.startswith("grad")},
        "clipped gradient": {f"clip.{name}": x for name, x in _split(seen["clip"], state).items()},
        **{kind: {f"{kind}.{name}": x.copy() for name, x in getattr(state, group).items()} for kind, group in STATE},
    }


STATE = (("m", "m"), ("v", "v"), ("param", "params"))
"""What a step leaves, and what a State calls it."""


def _split(flat: NDArray[Any], state: State) -> dict[str, NDArray[Any]]:
    bounds = state.params.offsets
    return {name: flat.ravel()[a:b] for name, a, b in zip(state.params, bounds[:-1], bounds[1:], strict=True)}


def _parts(a: Mapping[str, Arrays], b: Mapping[str, Arrays], factor: float | None) -> Iterator[dict[str, Any]]:
    for part, arrays in a.items():
        changed, elements, ratios, exact = [], 0, [], factor is not None
        for name, x in arrays.items():
            y = b[part][name]
            differs = _bits(x) != _bits(y)
            if differs.any():
                changed.append(name)
                elements += int(differs.sum())
                usable = differs & (y != 0)
                with np.errstate(all="ignore"):
                    exact = exact and bool((_bits(x) == _bits(y * x.dtype.type(factor))).all())
                    ratios.append((x[usable].astype(np.float64) / y[usable]).ravel())
        ratio = np.concatenate([*ratios, np.zeros(0)])
        ratio = ratio[np.isfinite(ratio)]
        yield {
            "part": part,
            "arrays": len(arrays),
            "different": len(changed),
            "elements": int(sum(x.size for x in arrays.values())),
            "different_elements": elements,
            "names": changed[:3],
            "exact": exact and bool(changed),
            "ratio": [float(ratio.min()), float(ratio.max())] if len(ratio) and part != "batch" else None,
        }


def _bits(x: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


# Afterwards


def afterwards(log: Log, twin: Log, K: int) -> dict[str, Any]:
    """Loss and norms from K on, as logged: peaks in σ, spikes as the stability check defines them, and the way back."""
    frozen, norms = usual(twin.loss, K), usual(twin.norm, K)
    near = slice(K, K + PATIENCE + 1)
    apart = (log.loss - twin.loss) / frozen.deviation
    caused = [s for s in spikes(log.loss) if near.start <= s.step < near.stop]
    healthy = {s.step for s in spikes(twin.loss)}
    caused = [s for s in caused if s.step not in healthy]
    largest = max(caused, key=lambda s: s.sigmas, default=None)
    behind = apart[K + 1 : K + 1 + PLATEAU]
    left, back = band(apart, K)
    window = slice(K - 1, K + PATIENCE + 1)
    return finite_or_none(
        {
            "usual": {"loss": frozen._asdict(), "grad_norm": norms._asdict()},
            "loss": _peak(log.loss, twin.loss, near, frozen),
            "grad_norm": _peak(log.norm, twin.norm, near, norms),
            "norm_ratio": float(log.norm[K] / twin.norm[K]),
            "clipped_at_step": float(log.norm_clipped[K]),
            "excess_sigmas": float(np.nanmax(apart[near])),
            "excess_step": K + int(np.nanargmax(apart[near])),
            "plateau_sigmas": float(behind.mean()),
            "spikes": [s._asdict() for s in caused],
            "recovery": _recovery(log, largest, frozen),
            "left_band": left,
            "back_in_band": back,
            "series": {
                "step": [int(t) for t in log.step[window]],
                **{
                    f"{name}{which}": [float(x) if np.isfinite(x) else None for x in column[window]]
                    for which, of in (("", log), ("_baseline", twin))
                    for name, column in (
                        ("loss", of.loss),
                        ("grad_norm", of.norm),
                        ("grad_norm_clipped", of.norm_clipped),
                    )
                },
            },
        }
    )


def _peak(series: NDArray[np.float64], twin: NDArray[np.float64], near: slice, frozen: Usual) -> dict[str, Any]:
    """The highest number from K on, and the twin's own, in standard deviations over what was usual."""
    at = near.start + int(np.nanargmax(series[near]))
    return finite_or_none(
        {
            "at_step": float(series[near.start]),
            "baseline_at_step": float(twin[near.start]),
            "at_step_sigmas": frozen.sigmas(float(series[near.start])),
            "peak": float(series[at]),
            "peak_step": at,
            "peak_sigmas": frozen.sigmas(float(series[at])),
            "baseline_peak_sigmas": frozen.sigmas(float(np.nanmax(twin[near]))),
        }
    )


def _recovery(log: Log, spike: Spike | None, frozen: Usual) -> int | None:
    """Steps from the largest spike back to what was usual before K; None without one, or not in time."""
    return recovery(log.loss, spike.step, frozen) if spike else None


def band(apart: NDArray[np.float64], K: int) -> tuple[int | None, int | None]:
    """The first step whose loss is more than `CALM` σ away from the twin's, and the first from which `HELD` in a row
    are not; None where there is none."""
    near = np.abs(apart) <= CALM
    away = np.flatnonzero(~near[K:])
    if not len(away):
        return None, None
    left = K + int(away[0])
    back = (t for t in range(left + 1, len(near) - HELD + 1) if near[t : t + HELD].all())
    return left, next(back, None)


def trace(folder: RunFolder, twin: RunFolder, K: int, target: str | None) -> dict[str, Any]:
    """States K+1 to K+`TRACED` of both, run again step by step.

    ``distance`` is between the parameters. ``v`` and ``update`` are of the target, or else of all parameters: the mean
    of v, and the L2 norm of what the step changed, over those of the twin.
    """
    live = [Replay(f.path).at(K) for f in (folder, twin)]
    found: dict[str, list[float | None]] = {"distance": [], "v": [], "update": []}
    for _ in range(min(TRACED, Log.read(twin).step.size - K)):
        before = [_of(each.state.params, target).copy() for each in live]
        for each in live:
            each.step("loss")
        a, b = (each.state for each in live)
        moved = [_l2(_of(s.params, target) - p) for s, p in zip((a, b), before, strict=True)]
        means = [float(_of(s.v, target).mean(dtype=np.float64)) for s in (a, b)]
        for name, (x, y) in {"v": means, "update": moved}.items():
            found[name].append(x / y if y and np.isfinite(x / y) else None)
        found["distance"].append(_distance(a, b)["l2"])
    return {"of": target, **found}


def _of(tensors: Any, target: str | None) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensors[target] if target else tensors.flat
    return array


def _l2(x: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def _distance(a: State, b: State) -> dict[str, float | None]:
    """Between the parameters of two states, also relative to the norm of the second's."""
    l2, norm = _l2(a.params.flat - b.params.flat), _l2(b.params.flat)
    return finite_or_none({"l2": l2, "relative": l2 / norm})


def within(K: int, steps: int) -> bool:
    """Whether there are enough steps before K and behind it to measure anything."""
    return WINDOW < K <= steps - PLATEAU - 1
