"""``minitrain train``"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitrain.cli import INTERRUPTED
from minitrain.terminal import (
    Progress,
    bar_wanted,
    json_option,
    quiet_option,
    seed_option,
    set_option,
    settings_from,
    stop_signals,
)

if TYPE_CHECKING:
    from minitrain.trainer import Outcome


def _injections(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """What the shell may complete the name of a fault to."""
    from minitrain.inject import FAULTS

    return [name for name in ("none", "help", *FAULTS) if name.startswith(begun)]


@click.command("train", short_help="Train as a YAML file says, or with the defaults.")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--config", "config_option", type=click.Path(path_type=Path), help="The same as the argument CONFIG.")
@seed_option
@click.option("--out-dir", type=click.Path(path_type=Path), help="The run folder [default: runs/<name of the config>].")
@set_option
@click.option(
    "--injection",
    metavar="NAME",
    shell_complete=_injections,
    help="A fault to cause, none, or help: lists them and their parameters.",
)
@click.option("--injection-step", type=int, metavar="K", help="The step at which (a setting: from which) it acts.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --out-dir.")
@click.option(
    "--from",
    "parent",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Begin with a state of this run: --step N.",
)
@click.option("--step", type=int, metavar="N", help="With --from: state N, which step N of RUN read.")
@json_option
@quiet_option
@click.pass_obj
def command(
    command_line: list[str],
    config: Path | None,
    config_option: Path | None,
    seed: int | None,
    out_dir: Path | None,
    overrides: tuple[str, ...],
    injection: str | None,
    injection_step: int | None,
    resume: bool,
    parent: Path | None,
    step: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train as the YAML file CONFIG says, or with the defaults on the built-in corpus.

    \b
    minitrain train --seed 42 --out-dir runs/a
    minitrain train my.yaml --set training.batch_size=16 --set optimizer.clip=null
    minitrain train --set data.train_path=book.txt
    minitrain train --resume --out-dir runs/a
    minitrain train --injection v_corrupt --injection-step 500 --set injection.factor=100
    minitrain train --from runs/a --step 499 --set optimizer.clip=0.5 --out-dir runs/a-clipped

    With --from, settings are those of RUN under those that are given; the numbers of the steps go on at N.
    """
    from minitrain.inject import load
    from minitrain.run_folder import RunFolder, new_path
    from minitrain.trainer import run

    if injection == "help":
        click.echo(injection_help())
        return
    if config and config_option:
        raise click.UsageError(f"expected one configuration, got two: {config} and {config_option}")
    path = config or config_option
    if parent and resume:
        raise click.UsageError(
            "expected --from or --resume, got both; a forked run goes on with --resume --out-dir RUN"
        )
    if (parent is None) != (step is None):
        raise click.UsageError("expected --from RUN and --step N together: the run, and the state of it to begin with")
    if resume:
        if out_dir is None:
            raise click.UsageError("--resume: expected --out-dir RUN, the folder of the run to go on with")
        RunFolder(out_dir).require_run()
        path = path or RunFolder(out_dir).config
    told = {"injection": injection, "injection_step": injection_step}
    caused = [f"{key}={value}" for key, value in told.items() if value is not None]
    given, origin = [*settings_from(overrides, seed), *caused], None
    if parent is None or step is None:
        settings = load(path, given)
        folder = out_dir or new_path(path.stem if path else "default")
    else:
        from minitrain.fork import fork

        folder = out_dir or new_path(f"{parent.resolve().name}-from-{step}")
        RunFolder.require_free(folder)  # before steps are run again
        settings, origin = fork(parent, step, path, given)

    show = Progress(settings, visible=bar_wanted(quiet, as_json))
    with stop_signals() as stop, show:
        outcome = run(
            settings,
            folder,
            resume=resume,
            origin=origin,
            command_line=command_line,
            listeners=[show],
            stop=stop,
            tell=(lambda text: None) if as_json or quiet else partial(click.echo, err=True),
        )
    if as_json:
        click.echo(json.dumps(train_json(outcome)))
    else:
        click.echo(train_text(outcome))
    ended = outcome.metrics.ended
    problem = outcome.metrics.first_nonfinite_step is not None or bool(outcome.results.get("alerts"))
    sys.exit(INTERRUPTED if ended == "interrupted" else int(problem))


def injection_help() -> str:
    """The table of faults, with their parameters and defaults."""
    from minitrain.inject import table

    rows = [("name", "where", "what happens at step K", "parameters"), *table()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows]
    example = "minitrain train --injection param_nan --injection-step 731 --set 'injection.target=lm_head.bias[3]'"
    return "\n".join([*lines, "", example])


def train_json(outcome: Outcome) -> dict[str, Any]:
    """The stable keys of ``train --json``; null where a number is not finite or was not reached."""
    from minitrain.trainer import finite_or_none

    return finite_or_none(
        {
            "run_dir": str(outcome.folder.path),
            "ended": outcome.metrics.ended,
            "steps": outcome.metrics.steps,
            "final_loss": outcome.metrics.final_loss,
            "val_loss": outcome.results.get("val_loss"),
            "digest": outcome.digest,
            "wall_clock_s": outcome.wall_clock_s,
        }
    )


def train_text(outcome: Outcome) -> str:
    """What a person reads at the end."""
    folder, metrics, r, start = outcome.folder, outcome.metrics, outcome.results, outcome.start
    which = f"steps {start} to {metrics.steps - 1}" if metrics.steps > start > 0 else f"{metrics.steps - start} steps"
    if metrics.ended == "interrupted":
        return f"stopped after {which}; the state is saved\nnext: minitrain train --resume --out-dir {folder.path}"
    lines = [f"{which} in {outcome.wall_clock_s:.1f} s -> {folder.path}"]
    if metrics.first_nonfinite_step is not None:
        ending = "stopped" if metrics.ended == "nonfinite" else "went on"
        lines.append(
            f"{ending}: loss or gradient norm is not finite at step {metrics.first_nonfinite_step} (see {folder.log})"
        )
    if math.isfinite(r["val_ppl"]):
        change = r["ppl_improvement_pct"]
        lines.append(
            f"validation perplexity {r['val_ppl']:.2f}, n-gram baseline {r['ngram_baseline_val_ppl']:.2f}: "
            f"{abs(change):.1f} % {'better' if change > 0 else 'worse'}"
        )
    if metrics.ended == "complete":
        lines.append(f"digest {outcome.digest} (parameters, m, v)")
    return "\n".join([*lines, *(f"alert: {alert}" for alert in r["alerts"])])
