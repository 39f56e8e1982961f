"""The command line: finds the command, tells what went wrong. The commands themselves are in ``minitrain/commands/``.

Exit codes: 0 done and healthy, 1 done and a problem was found, 2 wrong usage or unusable input; 130 stopped by Ctrl-C
at a step boundary, resumable; 141 where whoever read the output has gone, as in ``| head``.
"""

from __future__ import annotations

import os
import select
import sys
from importlib import import_module
from typing import Any

import click

from minitrain.errors import MinitrainError, RunError, did_you_mean

COMMANDS = ("train", "replay", "verify", "diff", "info", "dashboard", "experiment", "sample", "selftest")
"""In the order of ``--help``. Each is ``command`` in a module of its name, which is loaded when it is asked for."""

INTERRUPTED = 130  # what shells report for a process ended by SIGINT
UNREAD = 141  # and by SIGPIPE


class Commands(click.Group):
    """Says what went wrong in one message; a traceback is for bugs of ours."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"minitrain.commands.{name.replace('-', '_')}").command
        return command

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.obj = ["minitrain", *args]  # for manifests: what was typed, without the path of the program
        return super().parse_args(context, args)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            context.fail(f"No such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(context, args)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            context.exit(INTERRUPTED)
        except MemoryError as error:
            click.echo(f"error: not enough memory ({error}); lower training.batch_size or the sizes of model", err=True)
            context.exit(2)
        except MinitrainError as error:
            _end_unread(context, error.__cause__)  # what a hook printed
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_code)
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            _end_unread(context, error)
            where = f"{error.filename}: " if error.filename else ""
            click.echo(
                f"error: {where}{error.strerror}; what was finished before stands, make room and resume", err=True
            )
            context.exit(2)


def _end_unread(context: click.Context, error: BaseException | None) -> None:
    """Quietly, if the error is that nobody reads standard output any more. What it still holds goes nowhere."""
    if isinstance(error, BrokenPipeError) and _reader_gone():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        context.exit(UNREAD)


def _reader_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # no standard output, or none that a pipe could be
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def version_text() -> str:
    """Two lines: what runs, and how its kernels were compiled."""
    from minitrain._ext.plan import compiled, instruction_set
    from minitrain._ext.signatures import NUMERICS_VERSION
    from minitrain.environment import versions

    compiler, flags = compiled()
    return (
        f"minitrain {versions()['minitrain']} (numerics {NUMERICS_VERSION}, {instruction_set()})\n"
        f"compiled by {compiler} with {flags}"
    )


def _print_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(version_text())
        context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Version and instruction set.",
)
def main() -> None:
    """Train a mini-GPT on the CPU, deterministic to the bit."""


if os.name != "posix":  # pragma: no cover - the threads and the signals are POSIX
    raise RunError("minitrain needs a POSIX system (Linux or macOS)")
