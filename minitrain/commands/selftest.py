"""``minitrain selftest``"""

from __future__ import annotations

import sys

import click

from minitrain.cli import version_text


@click.command("selftest", short_help="Check that this installation computes the right bits.")
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="No bit depends on them.")
def command(threads: int) -> None:
    """Check this installation: 500 default steps must give the known bits.

    \b
    minitrain selftest
    """
    from minitrain.selftest import digests

    click.echo(version_text())
    wrong = 0
    for step, found, expected in digests(threads):
        wrong += found != expected
        click.echo(f"state {step:>3}  {found}  {'as expected' if found == expected else f'expected {expected}'}")
    if wrong:
        click.echo("this installation computes other bits; please report it with the lines above")
    sys.exit(int(wrong > 0))
