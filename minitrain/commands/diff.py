"""``minitrain diff``"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitrain.terminal import json_option

if TYPE_CHECKING:
    from minitrain.replay.diff import Diff, Recorded

SHOWN = 8
"""Recorded differences of the first step that are told one by one; ``--json`` has all."""
SCALARS = ("loss", "grad_norm", "grad_norm_clipped", "lr")


@click.command("diff", short_help="Where two runs part: the first step, and in it the first site.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@json_option
def command(a: Path, b: Path, as_json: bool) -> None:
    """Compare the records of runs A and B step by step, then run the first step that differs again in both.

    The step is found by what is recorded, without running anything; the site, element and bits by running that one
    step with each run's own settings and injections. Of runs of different lengths the common steps are compared. Exit
    code 0: equal; 1: different; 2: not comparable.

    \b
    minitrain diff runs/a runs/b
    minitrain diff runs/a runs/b --json
    """
    from minitrain.record.recorded import open_run
    from minitrain.replay.diff import diff

    found = diff(open_run(a), open_run(b))
    click.echo(json.dumps(diff_json(found), allow_nan=False) if as_json else "\n".join(diff_lines(a, b, found)))
    sys.exit(int(not found.equal))


def diff_json(found: Diff) -> dict[str, Any]:
    """The stable keys of ``diff --json``."""
    site = found.first_site and {key: _number(value) for key, value in found.first_site._asdict().items()}
    return {
        "equal": found.equal,
        "first_step": found.first_step,
        "first_site": site,
        "steps_compared": len(found.steps),
        "steps": [[steps.start, steps.stop] for steps in found.recorded_steps],
        "recorded": [difference._asdict() for difference in found.recorded],
        "sites_differing": found.sites_differing,
        "reproduced": found.reproduced and list(found.reproduced),
        "reason": found.reason,
        "config": found.config,
        "environment": found.environment,
    }


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def diff_lines(a: Path, b: Path, found: Diff) -> list[str]:
    """What a person reads."""
    lines = []
    one, other = found.recorded_steps
    if one != other:
        lines.append(f"{a} has {_steps(one)}, {b} {_steps(other)}: {_steps(found.steps)} are compared")
    if found.equal:
        lines.append(
            f"equal: {len(found.steps)} steps of {a} and {b} have the same batches, scalars and states, bit for bit"
        )
    else:
        earlier = (found.first_step or 0) - found.steps.start
        before = f"{earlier} earlier steps are identical" if earlier else "from the first step on"
        lines.append(f"different at step {found.first_step} ({before})")
        lines += [f"  recorded {_recorded(difference)}" for difference in found.recorded[:SHOWN]]
        if len(found.recorded) > SHOWN:
            lines.append(f"  ... and {len(found.recorded) - SHOWN} more (--json has all)")
        lines += _rerun(a, b, found)
    lines += [f"config {line}" for line in found.config] + [f"environment {line}" for line in found.environment]
    if not found.equal:
        lines.append(f"next: minitrain replay {a} --step {found.first_step}")
    return lines


def _steps(steps: range) -> str:
    return f"steps {steps.start} to {steps.stop - 1}"


def _recorded(difference: Recorded) -> str:
    import numpy as np

    if difference.site in SCALARS:
        a, b = (float(np.uint64(bits).view(np.float64)) for bits in (difference.a, difference.b))
        values = f"{a:.9g} and {b:.9g}"
    elif difference.site == "batch.rows" or difference.site.startswith("rng."):
        values = f"{difference.a} and {difference.b}"
    else:
        values = f"{difference.a:#018x} and {difference.b:#018x} (digests)"
    return f"{difference.site} ({difference.phase}): {values}"


def _rerun(a: Path, b: Path, found: Diff) -> list[str]:
    """What running the step again has shown."""
    if found.reproduced is None:
        return [f"  not run again: {found.reason}"]
    lines = []
    for path, same in zip((a, b), found.reproduced, strict=True):
        if not same:
            lines.append(
                f"  run again, step {found.first_step} of {path} is not what it has recorded: a fault that does not "
                f"repeat (minitrain verify {path} --audit)"
            )
    site = found.first_site
    if site is None:
        return [*lines, "  run again, every site is the same in both"]
    where = {"state": "as the step reads it", "left": "as the step leaves it, behind the update"}
    ulps = f": {site.ulps} ulp" if site.ulps is not None else ""
    return [
        *lines,
        f"  run again, the first to differ is {site.site} ({where.get(site.phase, site.phase)}), element "
        f"{list(site.index)}: {site.a:.9g} and {site.b:.9g}{ulps}; {site.differing} of {site.elements} elements "
        f"differ, {found.sites_differing} tensors in all",
    ]
