"""A run from a configuration to a finished folder: the parts put together, the loop run, the results written."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minitrain import report
from minitrain._ext.signatures import NUMERICS_VERSION
from minitrain.assembly import Parts, assemble, prepare_data, require_memory
from minitrain.checkpoint import load_checkpoint, save_model
from minitrain.config import Config, config_hash, to_yaml
from minitrain.dashboard import write_dashboard
from minitrain.data.batches import EvalBatches
from minitrain.data.prepare import Prepared
from minitrain.environment import git_state, hardware, peak_rss_mb, versions
from minitrain.errors import RunError
from minitrain.files import write_atomic, write_json
from minitrain.inject import acts_from, resolved, spelt
from minitrain.keeper import Keeper, write_checkpoint
from minitrain.loop import Evaluation, Listener, Metrics, evaluate, perplexity, train
from minitrain.metrics.meter import Meter
from minitrain.model import MiniGPT
from minitrain.record.journal import FINGERPRINT
from minitrain.record.layout import Layout, layout_of
from minitrain.record.recorder import Recorder, require_room
from minitrain.run_folder import SCHEMA_VERSION, RunFolder, start_of
from minitrain.state import State


@dataclass(frozen=True)
class Origin:
    """Where a run begins that was forked from another."""

    state: State
    parent: dict[str, Any]
    """As the manifest will have it: run, step, config_hash, digest, chain, settings."""
    tokenizer_hash: str
    data_manifest_hash: str | None
    """That of the parent, where the fork is to read the same text."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended; ``metrics.ended`` tells whether it is complete. ``digest`` is over parameters, m and v."""

    folder: RunFolder
    metrics: Metrics
    results: dict[str, Any]
    digest: str
    wall_clock_s: float
    start: int
    """The state with which it began, or went on where it was resumed."""


def run(
    config: Config,
    out_dir: Path,
    *,
    resume: bool = False,
    origin: Origin | None = None,
    command_line: Sequence[str] = (),
    listeners: Sequence[Listener] = (),
    watchers: Sequence[Callable[[Parts], Listener]] = (),
    experiment: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Train as configured into ``out_dir``, from ``origin`` if any, or go on with the run that stands there.

    ``watchers`` make listeners that may look at the parts. ``experiment`` is the one that a new run is made for.
    ``tell`` is told what the run will take of the disk, and what will be injected.
    Raises MinitrainError with nothing half written: everything is checked before the folder is touched.
    """
    started = time.perf_counter()
    config = resolved(config)
    folder = RunFolder(out_dir)
    if resume:
        require_unfinished(folder, config)
    else:
        RunFolder.require_free(out_dir)
    require_memory(config)
    data = prepare_data(config)
    if resume:
        require_data(folder, data)
    if origin:
        require_same_text(origin, config, data)
    parts = assemble(config, data)
    if origin:
        parts.put(origin.state)
    if config.record.enabled:
        first = start_of(folder.read_manifest()) if resume else parts.scheduler.step_count
        tell(announcement(folder, layout_of(config, first)))
    with folder.hold(new=not resume):
        write_atomic(folder.config, to_yaml(config))
        write_atomic(folder.tokenizer, data.tokenizer.to_json())
        if resume:
            write_json(folder.manifest, without_outcome(folder.read_manifest()))  # it has not ended after all
            go_on(folder, parts)
        else:
            folder.checkpoint.unlink(missing_ok=True)  # of a fork that was killed before its manifest
            if origin:  # nothing else leads back to this state
                write_checkpoint(folder, config, parts)
            told = manifest(config, data, parts.model, command_line, experiment, origin.parent if origin else None)
            write_json(folder.manifest, told)
        start = parts.scheduler.step_count
        for one in config.injections:
            if acts_from(one, start):
                tell(f"injecting {spelt(one)}")
        with ExitStack() as open_:
            recorder = open_.enter_context(recording(folder, config, parts))
            meter = open_.enter_context(measuring(folder, config, data, parts))
            keeper = open_.enter_context(closing(Keeper(folder, config, parts, recorder, meter)))
            metrics = train(
                parts.model,
                parts.optimizer,
                parts.scheduler,
                parts.batches,
                parts.validation,
                config.scheduler.total_steps,
                config.training.val_every,
                config.training.log_every,
                config.training.rng_seed,
                listeners=[
                    *(one for one in (recorder, meter, keeper) if one),
                    *(make(parts) for make in watchers),
                    *listeners,
                ],
                injector=parts.injector,
                on_nonfinite=config.training.on_nonfinite,
                stop=stop,
            )
            if metrics.ended != "nonfinite":  # else the last finite checkpoint stays
                keeper.save(parts.state())
        keeper.alerts += recorder.alerts if recorder else []
        metrics.validations = keeper.earlier | metrics.validations
        metrics.first_nonfinite_step, metrics.final_loss = keeper.first_nonfinite, keeper.last_loss
        ended = metrics.ended != "interrupted"
        results = finish(folder, config, data, parts, metrics, keeper, started) if ended else {}
    return Outcome(folder, metrics, results, parts.state().digest(), time.perf_counter() - started, start)


def require_unfinished(folder: RunFolder, config: Config) -> None:
    """Raises RunError unless a run stands there that ``config`` made and that is not complete."""
    folder.require_run()
    folder.require_config(config)
    stored = folder.stored_config()
    record = stored.record.model_copy(update={"on_error": config.record.on_error})
    for section, then, now in (("record", record, config.record), ("metrics", stored.metrics, config.metrics)):
        if then != now:
            raise RunError(
                f"--resume {folder.path}: expected the settings of {section} that the run began with, "
                f"{then.model_dump()}, got {now.model_dump()}; resume with those, or start a new run"
            )
    if folder.complete.exists():
        raise RunError(
            f"--resume {folder.path}: expected an unfinished run, got a complete one; start a new one with --out-dir"
        )


def without_outcome(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that is at work."""
    return {key: value for key, value in manifest.items() if key != "outcome"}


def recording(folder: RunFolder, config: Config, parts: Parts) -> AbstractContextManager[Recorder | None]:
    """The recorder of this run, or none."""
    if not config.record.enabled:
        return nullcontext()
    told = folder.read_manifest()
    return closing(Recorder(folder, config, parts, {key: told[key] for key in FINGERPRINT}, start_of(told)))


def measuring(folder: RunFolder, config: Config, data: Prepared, parts: Parts) -> AbstractContextManager[Meter | None]:
    """The meter of this run, or none."""
    if not config.metrics.enabled:
        return nullcontext()
    return closing(Meter(folder, config, data, parts, start_of(folder.read_manifest())))


def announcement(folder: RunFolder, layout: Layout) -> str:
    """What the record will take, beyond what is there. Raises RunError if the disk cannot hold it."""
    free, there = require_room(folder, layout)
    needed = f"{max(layout.disk_bytes - there, 0) / 1e9:,.2f} GB{' more' if there else ''}"
    what = "every step with its moments" if layout.moments else f"a whole state every {layout.keyframe_every} steps"
    return f"recording {what} to {folder.record}: about {needed} of {free / 1e9:,.0f} GB free"


def require_data(folder: RunFolder, data: Prepared) -> None:
    """Raises RunError unless these are the data that the run was made from."""
    if folder.read_manifest()["data_manifest_hash"] != data.manifest_hash:
        raise RunError(
            f"--resume {folder.path}: expected the data that the run was made from (data_manifest_hash in "
            f"{folder.manifest}), got other files; restore them"
        )


def require_same_text(origin: Origin, config: Config, data: Prepared) -> None:
    """Raises RunError unless the state that a fork begins with speaks of the tokens of these data."""
    parent = origin.parent["run"]
    if origin.data_manifest_hash not in (None, data.manifest_hash):
        raise RunError(
            f"--from {parent}: expected the data that it was trained on, got other files as {config.data.train_path} "
            "and data.val_path; restore them, or name others with --set data.train_path=..."
        )
    if origin.tokenizer_hash != data.tokenizer.hash:
        raise RunError(
            f"data.train_path {config.data.train_path}: expected text with the vocabulary of {parent}, of which its "
            "parameters speak, got text with another; keep the data of the parent, or train a new run on these"
        )


def go_on(folder: RunFolder, parts: Parts) -> None:
    """Bring the parts to the checkpoint, or leave them at state 0. Raises RunError where a fork has lost its own."""
    state = parts.state()
    if folder.checkpoint.exists():
        again = folder.begin_again()
        parts.go_to(load_checkpoint(folder.checkpoint, state.params, state.m, state.v, again)["step"])
    elif folder.read_manifest().get("parent"):
        raise RunError(
            f"{folder.checkpoint}: expected the state from which the forked run goes on, got no such file; restore it, "
            f"or {folder.begin_again()}"
        )


def finish(
    folder: RunFolder, config: Config, data: Prepared, parts: Parts, metrics: Metrics, keeper: Keeper, started: float
) -> dict[str, Any]:
    """Write what a finished run leaves, the marker COMPLETE last, and return its results."""
    on_train = evaluate(parts.model, EvalBatches(data.train, config.training.batch_size))
    results = summary(data, metrics, on_train, keeper.alerts, time.perf_counter() - started)
    if metrics.ended == "complete":
        path = save_model(folder.models, parts.model.params, config.model, data.tokenizer.to_json(), model_stem(folder))
        results["model"] = str(path.relative_to(folder.path))
    digest = parts.state().digest()
    ending = {key: results[key] for key in ("ended", "steps", "first_nonfinite_step")} | {"digest": digest}
    write_json(folder.manifest, {**folder.read_manifest(), "outcome": ending})
    write_json(folder.results, finite_or_none(results))  # before the picture, should that fail
    report.write_curve(folder, config, results, data.baseline["best_perplexity"])
    results["peak_rss_mb"] = peak_rss_mb()  # most of it was the picture's
    report.write_page(folder, config, results, data.baseline["best_perplexity"])
    write_json(folder.results, finite_or_none(results))
    write_dashboard(folder)
    if metrics.ended == "complete":
        write_atomic(folder.complete, digest + "\n")
    return results


def model_stem(folder: RunFolder) -> str:
    """How the name of the model file begins: that of an experiment names its phase, the number of the experiment."""
    phase, dash, _ = (folder.read_manifest().get("experiment") or "").partition("-")
    return f"minigpt-phase{phase}" if dash else "minigpt"


def manifest(
    config: Config,
    data: Prepared,
    model: MiniGPT | None,
    command_line: Sequence[str],
    experiment: str | None = None,
    parent: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What must be known to run it again, and where it ran. Of this, ``started_at`` alone is a clock's.

    ``model`` is None where none is trained, ``parent`` where the run begins at state 0.
    """
    git = git_state(Path.cwd())
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment,
        **({"parent": parent} if parent else {}),
        "seed": config.training.rng_seed,
        "versions": versions(),
        "numerics_version": NUMERICS_VERSION,
        "config": config.model_dump(),
        "config_hash": config_hash(config),
        "dtype": config.training.dtype,
        "backend": config.training.backend,
        "parameters": int(model.params.flat.size) if model else None,
        "git_sha": git["sha"],
        "git_dirty": git["dirty"],
        "data_manifest_hash": data.manifest_hash,
        "tokenizer_hash": hashlib.sha256(data.tokenizer.to_json()).hexdigest(),
        "samples": {"train": len(data.train), "val": len(data.val)},
        "hardware": {**hardware(), "instruction_set": model.backend.isa if model else None},
        "command_line": list(command_line),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def summary(
    data: Prepared, metrics: Metrics, on_train: Evaluation, alerts: list[str], wall_clock_s: float
) -> dict[str, Any]:
    """results.json. Perplexities are over whole splits with the final parameters."""
    last = metrics.validations.get(metrics.steps)
    best = metrics.best
    baseline = data.baseline["best_perplexity"]
    val_ppl = last.perplexity if last else math.nan
    return {
        "ended": metrics.ended,
        "steps": metrics.steps,
        "first_nonfinite_step": metrics.first_nonfinite_step,
        "final_loss": metrics.final_loss,
        "train_ppl": perplexity(on_train.loss),
        "val_loss": last.loss if last else math.nan,
        "val_ppl": val_ppl,
        "best_val_step": best[0] if best else None,
        "best_val_ppl": best[1].perplexity if best else math.nan,
        "ngram_baseline_val_ppl": baseline,
        "ngram_val_ppl": data.baseline["perplexity"],
        "ngram_best_n": data.baseline["best_n"],
        "beats_baseline": val_ppl < baseline,
        "ppl_improvement_pct": 100 * (baseline - val_ppl) / baseline,
        "peak_rss_mb": peak_rss_mb(),
        "alerts": alerts,
        "wall_clock_s": round(wall_clock_s, 3),
    }


def finite_or_none(results: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in results.items()}
