"""The run folder: who may write into it, what stands in it, and how it is read back.

====================  ============================================================================================
manifest.json         seed, versions, config, git_sha, data_manifest_hash, hardware ...; written before step 0
config.yaml           the resolved configuration
train_log.jsonl       one object a line: every step, and the validations
checkpoint.safetensors the latest state that `--resume` goes on from
tokenizer.json        what turned the text into tokens
models/               the final parameters
results.json          perplexities against the baseline, time, memory
loss_curve.png        train and validation loss, the n-gram baseline dashed
README.md             the run told in words
journal.msgpack       what every step read and left, a frame a step; stands behind all the rest of the record
record.zarr/          the same and the moments of every step as arrays, and whole states now and then (FORMAT.md)
incidents/            whole states at the moment when something was found to be wrong
metrics.zarr/         what was measured on the way: activations, gradients, spectral norms ... (docs/metrics.md)
dashboard.html        seven panels that show it
COMPLETE              written last
====================  ============================================================================================
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitrain.config import NOT_HASHED, Config, config_from, config_hash, differing_keys
from minitrain.errors import RunError
from minitrain.files import write_atomic

SCHEMA_VERSION = 1
PARENT = ("run", "step", "config_hash", "digest", "chain", "settings")
"""What the manifest of a forked run has under ``parent``: where that stands, the state that it begins with, how far the
parent's journal went until then, and what was changed."""
LOCK = ".lock"
BEFORE_MANIFEST = (LOCK, "config.yaml", "tokenizer.json", "checkpoint.safetensors")
"""What a process that was killed before its manifest may leave: a run may begin there all the same."""


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "manifest.json"
        self.config = path / "config.yaml"
        self.log = path / "train_log.jsonl"
        self.checkpoint = path / "checkpoint.safetensors"
        self.tokenizer = path / "tokenizer.json"
        self.models = path / "models"
        self.results = path / "results.json"
        self.curve = path / "loss_curve.png"
        self.readme = path / "README.md"
        self.complete = path / "COMPLETE"
        self.journal = path / "journal.msgpack"
        self.record = path / "record.zarr"
        self.incidents = path / "incidents"
        self.metrics = path / "metrics.zarr"
        self.dashboard = path / "dashboard.html"

    @contextmanager
    def hold(self, *, new: bool) -> Iterator[None]:
        """Be the only process that writes here, in a folder made now if ``new``. The lock goes with the process.

        Raises RunError if another process is at work, if a new folder is not free, or if it cannot be written.
        """
        where = f"--out-dir {self.path}"
        try:
            if new:
                self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"{where}: expected a folder that can be written, got: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{where}: another process is at work there; choose another or wait for it") from error
            if new:
                self.require_free(self.path)  # again: another process may have been here meanwhile
            for torn in self.path.glob(".*.partial"):  # of a process that was killed while it wrote
                torn.unlink()
            yield
        finally:
            os.close(lock)

    def at_work(self) -> bool:
        """Whether a process holds this folder."""
        try:
            lock = os.open(self.path / LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    @staticmethod
    def require_free(path: Path) -> None:
        """Raises RunError if a run cannot begin at ``path``; writes nothing."""
        if path.exists() and not path.is_dir():
            raise RunError(f"--out-dir {path}: expected a folder or a new path, got a file; choose another")
        if path.is_dir() and any(p for p in path.iterdir() if p.name not in BEFORE_MANIFEST and p.suffix != ".partial"):
            if not (path / "manifest.json").exists():
                raise RunError(f"--out-dir {path}: expected an empty folder, got one with other files; choose another")
            state = "complete" if (path / "COMPLETE").exists() else "unfinished; --resume goes on with it"
            raise RunError(f"--out-dir {path}: expected an empty folder, got another run ({state}); choose another")
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise RunError(
                f"--out-dir {path}: expected a folder that can be written, got {nearest}, which cannot; choose another"
            )

    def require_run(self) -> None:
        """Raises RunError unless a run stands here."""
        if not self.manifest.exists():
            there = "a file" if self.path.exists() else "no such folder"
            what = "no manifest.json in it" if self.path.is_dir() else there
            raise RunError(f"{self.path}: expected a run folder, got {what}; name the --out-dir of an earlier run")

    def require_model(self) -> Path:
        """The model file. Raises RunError where there is none, or more than one."""
        self.require_run()
        found = sorted(self.models.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise RunError(f"{self.models}: expected one model, got {names}; name the file instead of the run")
        if self.complete.exists():
            raise RunError(
                f"{self.path}: expected a model in models/, got a complete run without one; "
                f"minitrain train --config {self.config} --out-dir NEW makes it again, to the same bits"
            )
        outcome = self.read_manifest().get("outcome", {})
        if outcome.get("ended") == "nonfinite":
            raise RunError(
                f"{self.path}: expected a finished run, got one that stopped at step "
                f"{outcome['first_nonfinite_step']}, whose numbers are not finite; name another run"
            )
        raise RunError(
            f"{self.path}: expected a finished run, got one without a model; "
            f"minitrain train --resume --out-dir {self.path} goes on with it"
        )

    def incident(self, step: int) -> Path:
        """The file of what stood in memory at ``step``."""
        return self.incidents / f"{step:08d}.safetensors"

    def incident_files(self, start: int = 0) -> list[Path]:
        """Those of the steps from ``start`` on, in order."""
        return [path for path in sorted(self.incidents.glob("*.safetensors")) if int(path.stem) >= start]

    def read_manifest(self) -> dict[str, Any]:
        """Raises RunError if it is damaged or of another schema."""
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            version = manifest["schema_version"]
            if (parent := manifest.get("parent")) is not None:
                manifest["parent"] = {key: parent[key] for key in PARENT}
                start_of(manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.manifest}: expected the manifest of a run, got {type(error).__name__}: {error}"
            ) from error
        if version != SCHEMA_VERSION:
            raise RunError(
                f"{self.manifest}: expected schema_version {SCHEMA_VERSION}, got {version!r}; "
                "use the minitrain version that the manifest names"
            )
        return dict(manifest)

    def begin_again(self) -> str:
        """What can be done where neither checkpoint nor record lead on: the end of a message."""
        parent = self.read_manifest().get("parent")
        if parent is None:
            return f"delete {self.checkpoint} to start again from step 0"
        origin = f"--from {shlex.quote(parent['run'])} --step {parent['step']}"
        return f"fork it again: minitrain train {origin} --config {shlex.quote(str(self.config))} --out-dir NEW"

    def stored_config(self) -> Config:
        return config_from(self.read_manifest()["config"], str(self.manifest))

    def require_config(self, config: Config) -> None:
        """Raises RunError unless this run was made by ``config``, up to the keys that move no bit."""
        stored = self.stored_config()
        if config_hash(stored) != config_hash(config):
            changed = [line for line in differing_keys(stored, config) if not line.startswith(NOT_HASHED)]
            raise RunError(
                f"--resume {self.path}: expected the configuration that made the run, got another: "
                f"{'; '.join(changed)}; resume without these settings, or start a new run"
            )

    def log_lines(self) -> Iterator[dict[str, Any]]:
        """The lines of train_log.jsonl, none where there is no log. Raises RunError naming a damaged one."""
        return (parsed for _, parsed in _whole_lines(self.log))


def start_of(manifest: Mapping[str, Any]) -> int:
    """The first state of the run that a manifest tells of: 0, but in one that was forked from another."""
    return int((manifest.get("parent") or {"step": 0})["step"])


def new_path(name: str, parent: Path = Path("runs")) -> Path:
    """``runs/<name>``, or with the first free number behind it."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


class LogWriter:
    """train_log.jsonl: strict JSON throughout. A number that is not finite is null, and ``nonfinite`` names it."""

    def __init__(self, path: Path, keep_before: int) -> None:
        """Go on after the lines of the steps before ``keep_before``."""
        kept = [line for line, parsed in _whole_lines(path) if parsed["step"] < keep_before]
        write_atomic(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115 - closed by close()
        self._since = time.perf_counter()

    def step(self, step: int, loss: float, lr: float, grad_norm: float, grad_norm_clipped: float, tokens: int) -> None:
        now = time.perf_counter()
        rate, self._since = tokens / max(now - self._since, 1e-9), now
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._file.write(  # json.dumps would take 1 % of a step
                f'{{"step": {step}, "loss": {loss!r}, "lr": {lr!r}, "grad_norm": {grad_norm!r}, '
                f'"grad_norm_clipped": {grad_norm_clipped!r}, "tokens_per_s": {rate:.0f}}}\n'
            )
            return
        self._write(
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "grad_norm_clipped": grad_norm_clipped,
                "tokens_per_s": round(rate),
            }
        )

    def validation(self, step: int, loss: float, perplexity: float, metrics: Mapping[str, float] | None = None) -> None:
        """``metrics`` is the summary of what was measured since the validation before, where anything was."""
        more = {"metrics": dict(metrics)} if metrics else {}
        self._write({"step": step, "val_loss": loss, "val_ppl": perplexity, **more})

    def _write(self, line: dict[str, Any]) -> None:
        bad = [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            line = {**line, **dict.fromkeys(bad), "nonfinite": {key: str(line[key]) for key in bad}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def skip_time(self) -> None:
        """What has passed since the last step was no training."""
        self._since = time.perf_counter()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line and what it says, without a last one that a crash tore. Raises RunError for a damaged line."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            parsed = json.loads(line)
            int(parsed["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path}:{number}: expected a JSON object with a step, got {line[:60]!r}") from error
        yield line, parsed
