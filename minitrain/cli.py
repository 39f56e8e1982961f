"""The command line. Exit codes: 0 done and healthy, 1 done and a problem was found, 2 wrong usage or unusable input;
130 stopped by Ctrl-C at a step boundary, resumable.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from minitrain.errors import MinitrainError, RunError

if TYPE_CHECKING:
    from minitrain.config import Config
    from minitrain.trainer import Outcome

INTERRUPTED = 130  # what shells report for a process ended by SIGINT


class Commands(click.Group):
    """Says what went wrong in one message; a traceback is for bugs of ours."""

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
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_code)
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            where = f"{error.filename}: " if error.filename else ""
            click.echo(
                f"error: {where}{error.strerror}; what was finished before stands, make room and resume", err=True
            )
            context.exit(2)


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


@main.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--config", "config_option", type=click.Path(path_type=Path), help="The same as the argument CONFIG.")
@click.option("--seed", type=int, help="training.rng_seed: initial weights and dropout.")
@click.option("--out-dir", type=click.Path(path_type=Path), help="The run folder [default: runs/<name of the config>].")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any key of the configuration; may be repeated."
)
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --out-dir.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def train(
    config: Path | None,
    config_option: Path | None,
    seed: int | None,
    out_dir: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train as the YAML file CONFIG says, or with the defaults on the built-in corpus.

    \b
    minitrain train --seed 42 --out-dir runs/a
    minitrain train my.yaml --set training.batch_size=16 --set optimizer.clip=null
    minitrain train --set data.train_path=book.txt
    minitrain train --resume --out-dir runs/a
    """
    from minitrain.config import load_config
    from minitrain.run_folder import RunFolder, new_path
    from minitrain.trainer import run

    if config and config_option:
        raise click.UsageError(f"expected one configuration, got two: {config} and {config_option}")
    path = config or config_option
    if resume:
        if out_dir is None:
            raise click.UsageError("--resume: expected --out-dir RUN, the folder of the run to go on with")
        RunFolder(out_dir).require_run()
        path = path or RunFolder(out_dir).config
    settings = load_config(path, [*overrides, *([] if seed is None else [f"training.rng_seed={seed}"])])
    folder = out_dir or new_path(path.stem if path else "default")

    show = Progress(settings, visible=sys.stderr.isatty() and not (quiet or as_json))
    with stop_signals() as stop, show:
        outcome = run(settings, folder, resume=resume, command_line=sys.argv, listeners=[show], stop=stop)
    if as_json:
        click.echo(json.dumps(train_json(outcome)))
    else:
        click.echo(train_text(outcome))
    ended = outcome.metrics.ended
    problem = outcome.metrics.first_nonfinite_step is not None or bool(outcome.results.get("alerts"))
    sys.exit(INTERRUPTED if ended == "interrupted" else int(problem))


@main.command()
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="No bit depends on them.")
def selftest(threads: int) -> None:
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
    folder, metrics, r = outcome.folder, outcome.metrics, outcome.results
    if metrics.ended == "interrupted":
        return (
            f"stopped after {metrics.steps} steps; the state is saved\n"
            f"next: minitrain train --resume --out-dir {folder.path}"
        )
    lines = [f"{metrics.steps} steps in {outcome.wall_clock_s:.1f} s -> {folder.path}"]
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


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the loop to stop at the next step boundary; a second one, or one before, stops at once."""
    asked = training = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not training:
            raise KeyboardInterrupt
        asked = True

    def stop() -> bool:
        nonlocal training
        training = True  # the loop has begun: from now on it is asked
        return asked

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Progress:
    """The bar: loss, learning rate, gradient norm and tokens/s, every ``log_every`` steps. A listener of the loop."""

    def __init__(self, config: Config, visible: bool) -> None:
        self._every = config.training.log_every
        self._total = config.scheduler.total_steps
        self._visible = visible
        self._tokens = 0
        self._clock = 0.0

    def __enter__(self) -> Progress:
        if not self._visible:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=8)
        self._task = self._bar.add_task("", total=self._total)
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._visible:
            self._bar.stop()

    def stepped(self, stats: Any, state: Any) -> None:
        if not self._visible:
            return
        self._tokens += stats.tokens
        if state.step % self._every and state.step != self._total:
            return
        now = perf_counter()
        rate = self._tokens / (now - self._clock) if self._clock else 0.0
        self._tokens, self._clock = 0, now
        text = f"loss {stats.loss:.3f}  lr {stats.lr:.1e}  norm {stats.grad_norm:.2f}  {rate / 1000:.0f}k tok/s"
        self._bar.update(self._task, completed=state.step, description=text)

    def validated(self, step: int, result: Any) -> None:
        self._tokens, self._clock = 0, perf_counter()  # the rate is that of training


if os.name != "posix":  # pragma: no cover - the threads and the signals are POSIX
    raise RunError("minitrain needs a POSIX system (Linux or macOS)")
