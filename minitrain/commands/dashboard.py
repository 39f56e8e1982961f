"""``minitrain dashboard``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitrain.terminal import json_option

if TYPE_CHECKING:
    from minitrain.dashboard.gather import RunData


@click.command("dashboard", short_help="The page of a run: seven panels over its steps, in one file.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("other", required=False, type=click.Path(path_type=Path))
@click.option("--text", is_flag=True, help="A summary for the terminal; no file is written.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file [default: in RUN, dashboard.html, or dashboard-<name of OTHER>.html].",
)
@json_option
def command(run: Path, other: Path | None, text: bool, out: Path | None, as_json: bool) -> None:
    """Write dashboard.html of RUN anew, or a page with a second run laid over it.

    The page opens from disk in any browser and asks the network for nothing. Each panel says in a sentence what its
    data show; drag to zoom, click a step for the command that replays it. A run that crashed, or is at work, has a
    page too.

    \b
    minitrain dashboard runs/a
    minitrain dashboard runs/a runs/b --out compared.html
    minitrain dashboard runs/a --text
    """
    from minitrain.dashboard.gather import RunData
    from minitrain.errors import RunError
    from minitrain.run_folder import RunFolder

    if text and (out or as_json):
        raise click.UsageError("--text: expected it alone, it goes to the terminal; leave out --out and --json")
    if out and not out.absolute().parent.is_dir():
        raise click.UsageError(
            f"--out {out}: expected a file in a folder that exists, got no {out.parent}; make it first"
        )
    folders = [RunFolder(path) for path in (run, other) if path is not None]
    runs = [RunData.read(folder) for folder in folders]
    if text:
        from minitrain.dashboard.terminal import summary

        click.echo(summary(runs, style=sys.stdout.isatty()))
        return
    from minitrain.dashboard import default_path, write_page

    where = out or default_path(*folders)
    try:
        write_page(runs, where)
    except OSError as error:
        raise RunError(
            f"{where}: expected a file that can be written, got: {error.strerror}; name another with --out"
        ) from error
    if as_json:
        click.echo(json.dumps(told(runs, where), allow_nan=False))
    else:
        click.echo(f"{where} ({where.stat().st_size / 1e6:.1f} MB)")


def told(runs: list[RunData], where: Path) -> dict[str, Any]:
    """The stable keys of ``--json``."""
    from minitrain.dashboard.checks import checks
    from minitrain.dashboard.header import first_difference
    from minitrain.dashboard.panels import panels

    return {
        "run": runs[0].path,
        "other": runs[1].path if len(runs) > 1 else None,
        "page": str(where),
        "bytes": where.stat().st_size,
        "panels": [
            {
                "panel": panel.number,
                "title": panel.title,
                "question": panel.question,
                "readings": list(panel.readings),
                "drawn": any(lane.drawn for lane in panel.lanes),
            }
            for panel in panels(runs)
        ],
        "checks": [check._asdict() for check in checks(runs[0])],
        "marks": [mark._asdict() for mark in runs[0].marks],
        "spikes": [spike._asdict() for spike in runs[0].spikes],
        "notes": list(runs[0].notes),
        "first_difference": first_difference(runs[0], runs[1]) if len(runs) > 1 else None,
    }
