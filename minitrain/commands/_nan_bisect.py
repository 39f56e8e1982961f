"""What ``minitrain replay RUN --nan-bisect`` prints."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitrain.errors import RunError
from minitrain.terminal import bar_wanted, steps_bar, width

if TYPE_CHECKING:
    from minitrain.replay.bisect import Bisection

WIDTH = 116
"""Characters of a line at most; more are broken at a space, and where a terminal has fewer."""


def find(path: Path, step: int | None, blind: bool, as_json: bool) -> None:
    """Find the first bad number, print it, and exit: 0 where there is none, 1 where there is one."""
    from minitrain.record.recorded import open_run
    from minitrain.replay.bisect import nan_bisect

    if path.is_file():
        raise RunError(f"{path}: --nan-bisect expects a run folder, got a bundle: it has one step, which replay runs")
    steps = len(open_run(path).steps)
    with steps_bar(bar_wanted(False, as_json), steps, "bisect") as show:
        found = nan_bisect(path, step, blind=blind, show=show)
    click.echo(json.dumps(as_dict(found), allow_nan=False) if as_json else text(found))
    sys.exit(int(found.finding is not None))


def as_dict(found: Bisection) -> dict[str, Any]:
    """The stable keys of ``replay --nan-bisect --json``, which docs/bisect.md explains."""
    search, finding = found.search, found.finding
    place = None
    if finding and found.sample:
        place = {
            **finding.place._asdict(),
            **{k: v for k, v in found.sample._asdict().items() if k != "text"},
        }
    return {
        "run": str(found.path),
        "step": found.last,
        "verified": finding is None,
        "found": finding is not None,
        "first_bad": place,
        "method": search.method,
        "reason": search.reason,
        "first_nonfinite": search.nonfinite,
        "later": search.later,
        "unchecked_before": search.unchecked.stop,
        "verdict": finding and finding.verdict,
        "proof": finding and finding.proof,
        "remedy": found.remedy and found.remedy.advice,
        "commands": list(found.remedy.commands) if found.remedy else [],
        "before": [{**row, "max_abs": {k: _number(x) for k, x in row["max_abs"].items()}} for row in found.magnitudes],
        "journal": list(found.journal),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def text(found: Bisection) -> str:
    """What a person reads."""
    from minitrain.replay.causes import MEANING

    search, finding = found.search, found.finding
    if finding is None or found.sample is None or found.remedy is None:
        return _nothing(found)
    place, sample = finding.place, found.sample
    where = f"first bad number: step {place.step}, {place.phase}"
    where += f", {place.site}" if place.site != place.phase else ""
    where += f", element {list(place.index)}" if place.index is not None else ""
    lines = [where]
    if place.replayed:
        known = place.recorded is not None
        recorded = _bits(place.recorded) if place.recorded else "not known"
        what = "are not finite" if finding.verdict == "arithmetic" else "differ"
        count = f" ({place.differing} of {place.elements} elements {what})" if known and place.elements else ""
        lines.append(f"  recorded {recorded}, replayed {_bits(place.replayed)}{count}")
    if place.rows:
        lines.append(f"  rows {', '.join(map(str, place.rows))} of the batch")
    elif told := _whose(sample):
        lines.append(f"  {told}")
    lines += ["", *_block("verdict", f"{finding.verdict}: {MEANING[finding.verdict]}"), *_block("proof", finding.proof)]
    for event in found.journal:
        about = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("event", "name", "step"))
        lines += _block("journal", f"injection {event['name']} at step {event['step']}{f' ({about})' if about else ''}")
    lines += _block("method", f"{search.method}: {search.reason}")
    if search.unchecked:
        last = search.unchecked.stop - 1
        lines.append(f"         steps {found.first} to {last} were not run again: minitrain verify {found.path}")
    lines += ["", *_magnitudes(found), "", *_block("remedy", found.remedy.advice)]
    lines += [f"         {command}" for command in found.remedy.commands]
    return "\n".join(lines)


def _nothing(found: Bisection) -> str:
    search = found.search
    lines = [
        f"nothing is wrong in steps {found.first} to {found.last} of {found.path}: each replays bit for bit as recorded"
    ]
    if search.later is not None:
        lines += [
            f"the first faulty step comes after them: {search.later}",
            f"  minitrain replay {found.path} --step {search.later} --nan-bisect",
        ]
    return "\n".join([*lines, *_block("method", f"{search.method}: {search.reason}")])


def _whose(sample: Any) -> str:
    """Row, position, token and sample, as far as they are known."""
    parts = [
        f"row {sample.row}" if sample.row is not None else "",
        f"position {sample.position}" if sample.position is not None else "",
        f"token {sample.token!r}" if sample.token is not None else "",
        f"sample {sample.sample_id} {sample.text!r}" if sample.sample_id else "",
    ]
    return ", ".join(filter(None, parts))


def _bits(bits: str) -> str:
    from minitrain.replay.evidence import number

    return f"{number(bits):.9g} ({bits})"


def _block(name: str, sentence: str) -> list[str]:
    """A paragraph beside its name."""
    import textwrap

    return textwrap.wrap(
        sentence,
        width(WIDTH),
        initial_indent=f"{name:<9}",
        subsequent_indent=" " * 9,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _magnitudes(found: Bisection) -> list[str]:
    """The largest |x| of each layer, a line a step."""
    layers = list(found.magnitudes[-1]["max_abs"])
    width = max(9, *(len(layer) + 2 for layer in layers))
    lines = ["largest |x| in each layer, as replayed", f"{'step':>9}" + "".join(f"{x:>{width}}" for x in layers)]
    for row in found.magnitudes:
        lines.append(f"{row['step']:>9}" + "".join(f"{row['max_abs'][x]:>{width}.3g}" for x in layers))
    return lines
