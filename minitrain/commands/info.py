"""``minitrain info``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from minitrain.terminal import json_option


@click.command("info", short_help="What a run has recorded, whether it is complete, how to go on.")
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def command(run: Path, as_json: bool) -> None:
    """Tell what stands in RUN: steps, keyframes, sizes, events; complete or crashed; how to resume and replay it.

    \b
    minitrain info runs/a
    minitrain info runs/a --json
    """
    from minitrain.replay.about import about

    told = about(run)
    click.echo(json.dumps(told) if as_json else info_text(told))
    sys.exit(int(told["problem"] is not None))


def info_text(told: dict[str, Any]) -> str:
    """What a person reads."""
    saved, steps, record = told["checkpoint_step"], told["steps"], told["record"]
    lines = [("run", f"{told['run']}: {told['state']}, {steps} of {told['total_steps']} steps")]
    if parent := told["parent"]:
        changed = f" with {'; '.join(parent['settings'])}" if parent["settings"] else ", nothing changed"
        lines.append(("forked", f"from {parent['run']} at state {parent['step']}{changed}"))
    if record is None:
        lines.append(("record", "none (record.enabled: false)"))
    else:
        what = "m and v of every step" if record["moments"] == "every_step" else "no moments between keyframes"
        sites = ", digests of all sites" if record["sites"] == "digest" else ""
        lines.append(("record", f"{what}, a keyframe every {record['keyframe_every']} steps{sites}"))
        lines.append(("keyframes", _listed(told["keyframes"])))
    sizes = ", ".join(f"{name} {size:,.2f}" for name, size in told["sizes_mb"].items() if size)
    lines.append(("sizes", f"{sizes} MB"))
    if told["bytes_per_parameter_and_step"]:
        lines.append(("", f"{told['bytes_per_parameter_and_step']} bytes of record a parameter and step"))
    lines += [("event", _event(event)) for event in told["events"]]
    lines += [("incident", f"state {step} as it stood in memory") for step in told["incidents"]]
    lines.append(("checkpoint", "none" if saved is None else f"state {saved}"))
    if told["problem"]:
        lines.append(("problem", told["problem"]))
    if told["resume"]:
        again = steps - (saved or 0)
        lines.append(("resume", told["resume"] + (f" (runs {again} steps again, to the same bits)" if again else "")))
    if told["replay"]:
        lines.append(("replay", told["replay"]))
        lines.append(("verify", f"minitrain verify {told['run']}"))
    return "\n".join(f"{name:<11}{text}" for name, text in lines)


def _listed(keyframes: list[int]) -> str:
    """The first and the last few."""
    few = keyframes if len(keyframes) < 9 else [*keyframes[:4], "...", *keyframes[-2:]]
    return f"{len(keyframes)}: states {', '.join(map(str, few))}" if keyframes else "none"


def _event(event: dict[str, Any]) -> str:
    more = "; ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "step"))
    return f"{event['event']} at step {event['step']}" + (f": {more}" if more else "")
