"""``minitrain replay``"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitrain.commands._nan_bisect import find
from minitrain.errors import RunError, did_you_mean
from minitrain.terminal import columns, json_option

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from minitrain.replay.replayer import Live, Replay, SiteReport, StepReport
    from minitrain.sections import Injection


@click.command("replay", short_help="Take a recorded step back and run it again, bit for bit.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=int, metavar="N", help="Step N turns state N into state N+1 [a bundle has one only].")
@click.option("--to", "last", type=int, metavar="M", help="Run steps N to M, both included.")
@click.option("--sites", default="*", metavar="GLOB", show_default=True, help="Of these sites only: table, hook, dump.")
@click.option("--dump", type=click.Path(path_type=Path), metavar="FILE.safetensors", help="Write the sites' tensors.")
@click.option("--print-batch", is_flag=True, help="Print ids and texts of the samples that the step read.")
@click.option("--hook", metavar="MODULE:FUNCTION", help="Call FUNCTION(site, tensor) at every site.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="FILE.tar.gz",
    help="Write step N and all that running it elsewhere needs.",
)
@click.option("--nan-bisect", is_flag=True, help="Find the first bad number in steps 0..N, its cause and its remedy.")
@click.option("--no-injection", is_flag=True, help="Leave recorded injections out: what should have happened.")
@click.option("--blind", is_flag=True, help="The same, without reading what the record says of injections.")
@click.option("--allow-mismatch", is_flag=True, help="Replay with another engine or other data: proves nothing.")
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="No bit depends on them.")
@json_option
def command(
    run: Path,
    step: int | None,
    last: int | None,
    sites: str,
    dump: Path | None,
    print_batch: bool,
    hook: str | None,
    bundle: Path | None,
    nan_bisect: bool,
    no_injection: bool,
    blind: bool,
    allow_mismatch: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Put back what step N of RUN read, run the step again, and hold it against the record bit by bit.

    RUN is a run folder or a bundle. The table shows the sites in the order in which the step passes them.

    With --nan-bisect find the first bad number of steps 0 to N (of all, without --step): step, site, element, token and
    sample, what kind of fault it was, the proof, and the command that goes on without it (docs/bisect.md).

    \b
    minitrain replay runs/a --step 500
    minitrain replay runs/a --step 500 --sites "block.1.attn.*" --hook entropy:show
    minitrain replay runs/a --step 500 --bundle step500.tar.gz
    minitrain replay step500.tar.gz
    minitrain replay runs/a --nan-bisect
    """
    if nan_bisect:
        given = {"--to": last, "--dump": dump, "--print-batch": print_batch, "--hook": hook, "--bundle": bundle}
        refuse_together("--nan-bisect", given | {"--allow-mismatch": allow_mismatch})
        find(run, step, blind, as_json)
    from minitrain.replay.bundle import write_bundle
    from minitrain.replay.replayer import Replay

    for option, path in ("--dump", dump), ("--bundle", bundle):
        if path and not path.absolute().parent.is_dir():
            raise RunError(f"{option} {path}: expected a file in a folder that exists, got no {path.parent}; make it")
    listener = None if hook is None else load_hook(hook)
    replay = Replay(run, threads=threads, allow_mismatch=allow_mismatch, injections=not no_injection, blind=blind)
    first, last = steps_of(replay, step, last)
    live = replay.at(first)
    if bundle:
        write_bundle(bundle, replay.source, live.state)
    done = run_steps(replay, live, range(first, last + 1), sites, listener, keep=dump is not None)
    if dump:
        write_dump(dump, done, run)
    if as_json:
        click.echo(json.dumps(replay_json(replay, done, print_batch), allow_nan=False))
    else:
        if print_batch:
            click.echo("\n".join(f"{s['step']}  {s['id']}  {s['text']}" for s in done.samples))
        print_table(done.shown.sites)
        click.echo(verdict_text(replay, done))
        for path in filter(None, (bundle, dump)):
            click.echo(f"-> {path}")
    sys.exit(int(bool(done.differing)))


def refuse_together(option: str, others: Mapping[str, object]) -> None:
    """Raises UsageError where one of the others was given too."""
    for name, value in others.items():
        if value not in (None, False):
            raise click.UsageError(f"{name}: not together with {option}, which looks at the whole run")


@dataclass
class Done:
    """Steps that were run again. ``shown`` is the first that differs, else the last, and ``tensors`` its sites'."""

    steps: range
    shown: StepReport = field(init=False)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    differing: list[int] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def steps_of(replay: Replay, step: int | None, last: int | None) -> tuple[int, int]:
    """The first and the last step to run. A bundle has but one."""
    from minitrain.replay.source import span

    there = replay.source.steps
    if step is None:
        if not replay.source.path.is_file():
            raise click.UsageError(f"expected --step N, one of the recorded steps {span(there)}")
        step = there[0]
    if last is not None and last < step:
        raise click.UsageError(f"--to {last}: expected {step} or a later step, since the first is --step {step}")
    if last is not None and step in there and last not in there:
        raise RunError(f"--to {last}: expected one of the recorded steps {span(there)}, got {last}")
    return step, step if last is None else last


def load_hook(spec: str) -> Callable[[str, Any], object]:
    """The function that MODULE:FUNCTION names; modules in the current folder count. Raises RunError."""
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise RunError(f"--hook {spec}: expected MODULE:FUNCTION, as in entropy:show for show() in ./entropy.py")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the user's module does while it is imported
        raise RunError(
            f"--hook {spec}: expected a module {module_name} that can be imported, got {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = f"none{did_you_mean(name, vars(module))}" if function is None else repr(function)
        raise RunError(f"--hook {spec}: expected a function {name}, got {found}")
    loaded: Callable[[str, Any], object] = function
    return loaded


def run_steps(
    replay: Replay, live: Live, steps: range, sites: str, listener: Callable[[str, Any], object] | None, keep: bool
) -> Done:
    """Run the steps; with ``keep`` copy the tensors of the one that is shown."""
    copies: dict[str, NDArray[Any]] = {}
    done = Done(steps)
    with ExitStack() as heard:
        if listener:
            heard.enter_context(replay.hooks.listen(listener, sites))
        if keep:
            heard.enter_context(replay.hooks.listen(lambda site, x: copies.update({site: x.copy()}), sites))
        for step in steps:
            samples = [
                {"step": step, "row": row, "id": id, "text": text}
                for row, id, text in zip(live.batch.rows.tolist(), live.batch.ids, live.texts, strict=True)
            ]
            report = live.step(sites)
            if not done.differing:
                done.shown, done.tensors = report, dict(copies)
            done.differing += [] if report.verified else [step]
            done.samples += samples
    return done


def write_dump(path: Path, done: Done, run: Path) -> None:
    """The tensors by the names of their sites, as safetensors."""
    import numpy as np
    from safetensors.numpy import save

    from minitrain.files import write_atomic

    about = json.dumps({"run": str(run), "step": done.shown.step}, sort_keys=True)
    write_atomic(path, save({k: np.ascontiguousarray(x) for k, x in done.tensors.items()}, {"minitrain": about}))


def verdict(replay: Replay, done: Done) -> str:
    """``verified``, ``diverged``, or ``informational`` where the bits were not promised."""
    return "informational" if replay.mismatches else "diverged" if done.differing else "verified"


def replay_json(replay: Replay, done: Done, print_batch: bool) -> dict[str, Any]:
    """The stable keys of ``replay --json``. ``sites`` are of ``sites_step``: the first that differs, else the last."""
    divergence = done.shown.divergence
    return {
        "run": str(replay.source.path),
        "step": done.steps[0],
        **({"to": done.steps[-1]} if len(done.steps) > 1 else {}),
        "verified": verdict(replay, done) == "verified",
        "verdict": verdict(replay, done),
        "differing_steps": done.differing,
        "injections": [one.model_dump(exclude_none=True) for one in injected(replay, done)],
        "no_injection": not replay.injections or replay.blind,
        "divergence": divergence and divergence._asdict(),
        "mismatches": replay.mismatches,
        "sites_step": done.shown.step,
        "sites": [{k: _number(x) for k, x in row._asdict().items()} for row in done.shown.sites],
        **({"batch": done.samples} if print_batch else {}),
    }


def injected(replay: Replay, done: Done) -> list[Injection]:
    """What the record has injected into these steps; nothing when blind."""
    from minitrain.inject import acts

    return [one for one in replay.source.config.injections if any(acts(one, step) for step in done.steps)]


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(rows: list[SiteReport]) -> None:
    words = {True: "same", False: click.style("differs", "red"), None: "-"}
    figures = [["-" if math.isnan(x) else f"{x:.4g}" for x in (row.min, row.max, row.mean_abs)] for row in rows]
    lines = [
        (row.site, row.phase, "yes" if row.finite else "NO", *numbers, words[row.digest_match])
        for row, numbers in zip(rows, figures, strict=True)
    ]
    click.echo(columns(("site", "phase", "finite", "min", "max", "mean |x|", "record"), lines, right=(3, 4, 5)))


def verdict_text(replay: Replay, done: Done) -> str:
    """The end of what a person reads."""
    from minitrain.inject import spelt
    from minitrain.replay.evidence import tell
    from minitrain.replay.fingerprint import changes

    stats, first, last = done.shown.stats, done.steps[0], done.steps[-1]
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    clipped = "" if stats.grad_norm == stats.grad_norm_clipped else f" -> {stats.grad_norm_clipped:.4g}"
    lines = [f"\nstep {stats.step}: loss {stats.loss:.6g}  lr {stats.lr:.4g}  grad_norm {stats.grad_norm:.4g}{clipped}"]
    if done.shown.divergence:
        lines.append(tell(done.shown.divergence, changes(replay.source.manifest)))
        if done.steps[0] < done.shown.step:
            lines.append(f"  steps {first} to {done.shown.step - 1} are as recorded")
        if not replay.source.path.is_file():
            lines.append(f"  next: minitrain replay {replay.source.path} --step {done.shown.step} --bundle step.tar.gz")
    else:
        sites = "" if done.shown.recorded.sites is None else f", {len(done.shown.recorded.sites)} sites"
        tensors = done.shown.recorded.digest_out.size
        what = f"batch, random streams, loss, learning rate, norms{sites}, {tensors} tensors of the state"
        lines.append(f"verified: {which} bit for bit as recorded ({what})")
    if caused := "; ".join(spelt(one) for one in injected(replay, done)):
        lines.append(f"injected, as recorded: {caused}" if replay.injections else f"left out of the replay: {caused}")
    if replay.mismatches:
        told = "; ".join(replay.mismatches)
        lines[1] = lines[1].replace("verified", "the same", 1)
        lines.append(f"informational: the same bits are not promised here (recorded -> here): {told}")
    return "\n".join(lines)
