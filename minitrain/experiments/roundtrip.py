"""Experiments of the kind ``roundtrip``: is a checkpoint the whole state? Five state machines, each held to the bit.

One run goes through from step 0 to T. A second one, the same, is stopped at step K and leaves a checkpoint. That file
is read into buffers full of NaN and held against state K of the first run (*reload*); then the second run is resumed
from it, and each of its steps is held against the same step of the first (*resume*).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from minitrain.assembly import Parts, assemble, prepare_data
from minitrain.checkpoint import load_checkpoint
from minitrain.config import Config
from minitrain.errors import ConfigError
from minitrain.experiments.job import Finding, Job
from minitrain.files import write_atomic
from minitrain.loop import Listener, StepStats, train_step
from minitrain.report.page import listed, page
from minitrain.report.story import machine_name
from minitrain.report.words import count, number
from minitrain.run_folder import RunFolder
from minitrain.state import State
from minitrain.tensors import canonical_bits, digest
from minitrain.trainer import finite_or_none

SECOND = "second"
"""The run inside the experiment that is stopped and resumed."""

ASSERTIONS = {
    "parameters": ("every element is that of state {K}", "every state up to {T} has the same elements"),
    "optimizer": ("m, v and t are those of state {K}", "every state up to {T} has the same m, v and t"),
    "scheduler": ("it stands at step {K} with its learning rate", "every step has the same learning rate"),
    "data_position": ("its epoch, offset and next tokens are those of step {K}", "every step reads the same tokens"),
    "training_control": ("its seed, step and next masks are those of step {K}", "every step drops the same units"),
}
"""What is asserted of each state machine: reloaded from the file, and resumed from there."""

Notes = Mapping[str, str]


class Witness(Listener):
    """A listener that notes, at each step, the bits of each state machine; and keeps a copy of state ``copy_at``."""

    def __init__(self, copy_at: int = -1) -> None:
        self.notes: dict[int, Notes] = {}
        self.copy: dict[str, NDArray[np.float32]] = {}
        self.dropped = 0.0
        """The share of units that the last step dropped."""
        self._copy_at = copy_at

    def watch(self, parts: Parts) -> Witness:
        self._parts = parts
        return self

    def stepped(self, stats: StepStats, state: State) -> None:
        parts, step = self._parts, stats.step
        c, B = parts.model.config, parts.batches.batch_size
        work = parts.model.passes(B, c.max_seq_len)
        sites = ["embed", *(f"block.{i}.{x}.out" for i in range(c.n_layer) for x in ("attn", "ffn"))]
        masks = np.stack([work.arrays[site] == 0 for site in sites])  # what dropout has left of each
        self.dropped = float(masks.mean())
        self.notes[step] = {
            "parameters": digest(state.params.flat),
            "optimizer": f"{digest(state.m.flat, state.v.flat)} t={parts.optimizer.updates}",
            "scheduler": f"{parts.scheduler.step_count - 1} {stats.lr.hex()}",
            "data_position": f"{parts.batches.position(step)} {xxhash.xxh3_128_hexdigest(work.tokens.tobytes())}",
            "training_control": xxhash.xxh3_128_hexdigest(np.packbits(masks).tobytes()),
        }
        if state.step == self._copy_at:
            self.copy = {kind: t.flat.copy() for kind, t in (("p", state.params), ("m", state.m), ("v", state.v))}

    def position(self, step: int) -> dict[str, int]:
        """Where the run that was watched starts to read at ``step``."""
        return self._parts.batches.position(step)


def check(job: Job) -> None:
    """Raises ConfigError where there would be nothing to check."""
    if not job.config.model.dropout:
        raise ConfigError(
            "model.dropout: expected more than 0, so that the training-control stream is drawn from, got 0"
        )
    if job.config.scheduler.total_steps < 2:
        raise ConfigError("scheduler.total_steps: expected at least 2, to stop between them, got 1")


def make(job: Job) -> Finding:
    """Run through, stop, reload, resume; a folder with the first run's files, and the verdicts in results and page."""
    config, T = job.config, job.config.scheduler.total_steps
    K = min(T * 2 // 5 + 3, T - 1)  # as a rule within an epoch and between validations
    through, before, after = Witness(copy_at=K), Witness(), Witness()
    whole = job.run(config, watchers=[through.watch])
    results = finite_or_none(whole.results)
    if whole.metrics.ended != "complete":
        return Finding(f"The run ended at step {whole.metrics.steps}, not finite: nothing was checked", results, True)
    job.run(config, SECOND, watchers=[before.watch], halt=lambda: len(before.notes) == K)
    checkpoint = job.inner(SECOND).checkpoint
    reloaded = reload(config, checkpoint, through, K)
    resumed = job.run(config, SECOND, watchers=[after.watch])
    machines = {
        name: {
            "reload": {"assertion": texts[0].format(K=K, T=T), "passed": reloaded[name]},
            "resume": {
                "assertion": texts[1].format(K=K, T=T),
                "passed": all(after.notes.get(t, {}).get(name) == through.notes[t][name] for t in range(K, T)),
            },
        }
        for name, texts in ASSERTIONS.items()
    }
    results |= {
        "stopped_at": K,
        "steps_compared": T - K,
        "state_machines": machines,
        "passed": all(half["passed"] for machine in machines.values() for half in machine.values()),
        "digest": {"uninterrupted": whole.digest, "resumed": resumed.digest},
        "different_masks": len({through.notes[t]["training_control"] for t in range(K, T)}),
        "dropped_share": through.dropped,
        "bytes": _sizes(job.folder),
    }
    headline, about = _headline(machines), job.folder.read_manifest()
    write_atomic(job.folder.readme, page(job.title, headline, None, _told(job, about, results)))
    return Finding(headline, results, not results["passed"])


def reload(config: Config, checkpoint: Path, through: Witness, K: int) -> dict[str, bool]:
    """Whether the file, read into parts that know nothing of the run, gives state K and what step K draws from it."""
    parts = assemble(config, prepare_data(config))
    state, witness = parts.state(), Witness()
    for tensors in (state.params, state.m, state.v):
        tensors.flat.fill(np.nan)
    about = load_checkpoint(checkpoint, state.params, state.m, state.v)
    parts.go_to(about["step"])

    def same(kind: str, array: NDArray[np.float32]) -> bool:
        return bool((canonical_bits(array) == canonical_bits(through.copy[kind])).all())

    elements = {kind: same(kind, t.flat) for kind, t in (("p", state.params), ("m", state.m), ("v", state.v))}
    stands, t = parts.scheduler.step_count, parts.optimizer.updates
    witness.watch(parts).stepped(
        train_step(parts.model, parts.optimizer, parts.scheduler, parts.batches.batch_at(about["step"])), parts.state()
    )
    drawn, expected = witness.notes.get(K, {}), through.notes[K]
    training, streams = config.training, about["streams"]
    order = {"seed": training.data_seed, "purpose": "SHUFFLE", **through.position(K)}
    control = {"seed": training.rng_seed, "purpose": "DROPOUT", "step": K}
    agrees = {name: drawn.get(name) == expected[name] for name in ASSERTIONS}
    return {
        "parameters": elements["p"],
        "optimizer": elements["m"] and elements["v"] and t == K,
        "scheduler": agrees["scheduler"] and stands == K,
        "data_position": agrees["data_position"] and streams["data"] == order,
        "training_control": agrees["training_control"] and streams["training_control"] == control,
    }


def _sizes(folder: RunFolder) -> dict[str, int]:
    """Bytes of the files that a run leaves, by name."""
    files = [folder.checkpoint, *folder.models.iterdir(), folder.log, folder.manifest, folder.config, folder.tokenizer]
    return {str(path.relative_to(folder.path)): path.stat().st_size for path in files}


def _headline(machines: Mapping[str, Any]) -> str:
    failed = [name for name, halves in machines.items() if not all(half["passed"] for half in halves.values())]
    text = f"{len(machines) - len(failed)} of {len(machines)} state machines come back to the bit"
    return f"{text}; not {listed(failed)}" if failed else text


def _table(machines: Mapping[str, Any]) -> str:
    def cell(half: Mapping[str, Any]) -> str:
        return f"{'pass' if half['passed'] else '**FAIL**'}: {half['assertion']}"

    rows = [f"| {name.replace('_', ' ')} | {cell(m['reload'])} | {cell(m['resume'])} |" for name, m in machines.items()]
    return "\n".join(["| state machine | reloaded | resumed |", "|---|---|---|", *rows])


def _told(job: Job, about: Mapping[str, Any], r: Mapping[str, Any]) -> dict[str, str]:
    """The sections of the page."""
    K, T, P, files = r["stopped_at"], r["steps"], about["parameters"], r["bytes"]
    rows = [f"| {name} | {size:,} |" for name, size in files.items()]
    return {
        "Result": (
            f"A run of {count(T, 'step')} with dropout {job.config.model.dropout:g} went through. A second one, the "
            f"same, was stopped at step {K}; its checkpoint was read into buffers full of NaN and held against state "
            f"{K} of the first (reloaded). Then it was resumed, with all its parts built anew, and each of its last "
            f"{count(T - K, 'step')} held against the same step of the first (resumed). The digest of the last state "
            f"is `{r['digest']['uninterrupted']}` without and `{r['digest']['resumed']}` with the stop.\n\n"
            f"{_table(r['state_machines'])}"
        ),
        "What was compared": (
            "Floats as their bits, tokens as the engine read them, masks as the zeros that dropout left in the "
            f"embedding and in every block: {r['different_masks']} different ones in {count(T - K, 'step')}, the last "
            f"with {100 * r['dropped_share']:.1f} % dropped."
        ),
        "Files": (
            "\n".join(["| file | bytes |", "|---|---|", *rows])
            + f"\n\nThe checkpoint holds parameters, m and v, three times {P:,} floats of 4 bytes. Scheduler, data "
            "position and both streams take a line of its metadata: each is a pure function of seed and step."
        ),
        "Cost": (
            f"The first run took {number(r['wall_clock_s'])} s; the process held at most "
            f"{number(r['peak_rss_mb'], 0)} MB of memory ({machine_name(about)})."
        ),
        "Again": f"{job.again()}results.json holds the verdicts, runs/{SECOND}/ the run that was stopped and resumed.",
    }
