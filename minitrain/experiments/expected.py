"""What each injection was expected to do, line by line, held against what was measured: pure functions of an effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from minitrain.config import Config
from minitrain.experiments.effect import PLATEAU
from minitrain.report.words import count, number
from minitrain.sections import Injection
from minitrain.stability import CALM, SPIKE

Effect = Mapping[str, Any]


class Line(NamedTuple):
    """One expectation; ``seen`` is made from figures alone."""

    expected: str
    seen: str
    as_expected: bool


def lines(e: Effect, config: Config) -> list[Line]:
    """The expectations of the injection of this configuration, and what was seen of each."""
    (one,) = config.injections
    more = OF.get(one.name)
    return [_before(e), *(more(e, one, config) if more else ())]


def _before(e: Effect) -> Line:
    K, first = e["step"], e["before"]["first_difference"]
    seen = f"all {K:,} the same" if e["before"]["same_bits"] else f"step {first:,} differs"
    return Line("every step before as in the baseline, bit for bit", seen, e["before"]["same_bits"])


def _scale(e: Effect, one: Injection, config: Config) -> Iterator[Line]:
    factor, clip = one.factor or 0.0, config.optimizer.clip
    norm, after = e["grad_norm"], e["clipped_at_step"]
    yield Line(
        f"norm before the clip ~{factor:g} ×",
        f"{_number(norm['at_step'])}, {_number(e['norm_ratio'])} × the baseline's {_number(norm['baseline_at_step'])}",
        e["norm_ratio"] is not None and abs(e["norm_ratio"] - factor) <= abs(factor) / 10,
    )
    if clip is not None:
        yield Line(f"~{clip:.1f} behind it", _number(after, 4), after is not None and abs(after - clip) <= clip / 100)
    yield Line("a visible loss spike", peak(e), bool(e["spikes"]))
    yield Line("recovery in 20–40 steps", way_back(e), e["recovery"] is not None and 20 <= e["recovery"] <= 40)


def _bad_batch(e: Effect, one: Injection, config: Config) -> Iterator[Line]:
    norm, loss = e["grad_norm"], e["loss"]
    yield Line("a small loss spike", peak(e), bool(e["spikes"]))
    yield Line(
        "a larger spike of the norm",
        f"{_number(norm['peak'])} at step {norm['peak_step']:,}, {sigmas(norm['peak_sigmas'])}",
        (norm["peak_sigmas"] or 0.0) > max(SPIKE, loss["peak_sigmas"] or 0.0),
    )
    yield Line("recovery in ~50 steps", way_back(e), e["recovery"] is not None and e["recovery"] >= 40)


def _corrupt(e: Effect, one: Injection, config: Config) -> Iterator[Line]:
    kind, factor, K = one.name[0], one.factor or 0.0, e["step"]
    changed = [part for part in e["parts"] if part["different"]]
    exact = [p["names"] for p in changed] == [[f"{kind}.{one.target}"]] and changed[0]["exact"]
    yield Line(
        f"{kind} of `{one.target}` × {factor:g} exactly in state {K + 1:,}, all else as in the baseline",
        "; ".join(_changed(p, factor) for p in changed) or "nothing differs",
        exact,
    )
    yield Line("no loss spike", peak(e), not e["spikes"])
    if kind == "v":
        forgotten = e["trace"]["v"]
        still = f"; v is {_number(forgotten[PLATEAU - 1], 1)} × then" if len(forgotten) >= PLATEAU else ""
        yield Line(
            f"a plateau of ~{PLATEAU} steps, until v forgets",
            f"over {PLATEAU} steps the loss lies {sigmas(e['plateau_sigmas'], 3)} above the baseline's{still}",
            (e["plateau_sigmas"] or 0.0) > CALM,
        )


OF: dict[str, Callable[[Effect, Injection, Config], Iterator[Line]]] = {
    "scale": _scale,
    "bad_batch": _bad_batch,
    "v_corrupt": _corrupt,
    "m_corrupt": _corrupt,
}
"""By the name of the injection; of another one nothing was expected but the steps before it."""


# In words


def sigmas(x: float | None, digits: int = 2) -> str:
    """``2.49 σ``"""
    return "not finite" if x is None else f"{number(x, digits)} σ"


def peak(e: Effect) -> str:
    """How high the loss went, and how high the baseline's did."""
    loss = e["loss"]
    kind = "a spike" if e["spikes"] else "none"
    return (
        f"{kind}: at most {sigmas(loss['peak_sigmas'])}, at step {loss['peak_step']:,} "
        f"(baseline {sigmas(loss['baseline_peak_sigmas'])})"
    )


def way_back(e: Effect) -> str:
    """How long the loss took to be what is usual again."""
    if not e["spikes"]:
        return "no spike to recover from"
    return "not in 50 steps" if e["recovery"] is None else count(e["recovery"], "step")


def _number(x: float | None, digits: int = 2) -> str:
    return "not finite" if x is None else number(x, digits)


def _changed(part: Mapping[str, Any], factor: float) -> str:
    names = ", ".join(f"`{name}`" for name in part["names"])
    if part["different"] > len(part["names"]):
        names = f"{part['different']} arrays of {part['part']}"
    return f"{names} × {factor:g}, to the bit" if part["exact"] else f"{names}, by other factors"
