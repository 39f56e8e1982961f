"""``minitrain experiment``"""

from __future__ import annotations

import json
import shlex
import sys
from functools import partial
from pathlib import Path

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


def _names(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """What the shell may complete NAME to."""
    from minitrain.experiments.preset import names

    return [name for name in names() if name.startswith(begun)]


@click.command("experiment", short_help="Make an experiment, and a page of what it found.")
@click.argument("name", required=False, shell_complete=_names)
@click.option("--list", "as_list", is_flag=True, help="Print the experiments that there are; the same without NAME.")
@seed_option
@click.option("--out-dir", type=click.Path(path_type=Path), help="Its folder [default: experiments/NAME].")
@set_option
@click.option("--force", is_flag=True, help="Put aside what stands there (as NAME-old) and begin anew.")
@json_option
@quiet_option
@click.pass_obj
def command(
    command_line: list[str],
    name: str | None,
    as_list: bool,
    seed: int | None,
    out_dir: Path | None,
    overrides: tuple[str, ...],
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the experiment NAME: its runs, and a page that tells what they found.

    One that was stopped is gone on with; a finished one is left alone, unless --force.

    \b
    minitrain experiment --list
    minitrain experiment 18-train-mini
    minitrain experiment 18-train-mini --seed 43 --out-dir experiments/18-train-mini-43
    """
    if name is None or as_list:
        _list(as_json)
        return
    from minitrain.experiments import runner

    visible = bar_wanted(quiet, as_json)
    with stop_signals() as stop:
        made = runner.run(
            name,
            out_dir,
            overrides=settings_from(overrides, seed),
            force=force,
            command_line=command_line,
            show=lambda run, config: Progress(config, visible, run),
            stop=stop,
            tell=partial(click.echo, err=True),
        )
    finding, identity = made.finding, {"experiment": name, "out_dir": str(made.folder.path)}
    if finding is None:
        words = [word for word in command_line if word != "--force"] + ([] if made.resumes else ["--force"])
        stopped = json.dumps(identity | {"ended": "interrupted"})
        click.echo(stopped if as_json else f"stopped\nnext: {shlex.join(words)}")
        sys.exit(INTERRUPTED)
    done = f"{finding.headline}\n-> {made.folder.readme}"
    click.echo(json.dumps(identity | finding.results) if as_json else done)
    sys.exit(int(finding.problem))


def _list(as_json: bool) -> None:
    from minitrain.experiments.preset import available as read

    available = read()
    if as_json:
        click.echo(json.dumps(available))
        return
    width = max(map(len, available))
    for name, about in available.items():
        click.echo(f"{name:{width}}  {about}")
    click.echo("\nnext: minitrain experiment NAME")
