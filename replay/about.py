"""What stands in a run folder, read without the data and without running anything: `minitrain info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitrain.checkpoint import checkpoint_step
from minitrain.errors import RunError
from minitrain.record.recorded import Run, open_run
from minitrain.run_folder import RunFolder


def about(path: Path) -> dict[str, Any]:
    """The stable keys of ``info --json``; None where there is nothing to tell. Raises RunError where no run stands."""
    folder = RunFolder(path)
    folder.require_run()
    manifest, config = folder.read_manifest(), folder.stored_config()
    run, problem = None, None
    if config.record.enabled:
        try:
            run = open_run(path)
        except RunError as error:
            problem = str(error)
    saved = checkpoint_step(folder.checkpoint, folder.begin_again()) if folder.checkpoint.exists() else None
    steps = run.end if run else (manifest.get("outcome") or {}).get("steps", saved or 0)
    state = _state(folder, manifest, steps, saved)
    parts = sizes(folder)
    record = sum(parts[name] for name in ("journal", "moments", "keyframes", "arrays"))
    per_step = (manifest["parameters"] or 0) * (len(run.steps) if run else 0)
    unfinished = state in ("interrupted", "crashed")
    return {
        "run": str(path),
        "state": state,
        "steps": steps,
        "total_steps": config.scheduler.total_steps,
        "parent": manifest.get("parent"),
        "parameters": manifest["parameters"],
        "record": config.record.model_dump(exclude={"on_error"}) if config.record.enabled else None,
        "keyframes": run.keyframes if run else [],
        "sizes_mb": {name: round(size / 1e6, 3) for name, size in parts.items()},
        "bytes_per_parameter_and_step": round(record / per_step, 3) if per_step else None,
        "events": run.events if run else [],
        "incidents": [int(file.stem) for file in folder.incident_files()],
        "checkpoint_step": saved,
        "resume": f"minitrain train --resume --out-dir {path}" if unfinished else None,
        "replay": f"minitrain replay {path} --step {_interesting(run)}" if run and run.steps else None,
        "problem": problem,
    }


def _state(folder: RunFolder, manifest: dict[str, Any], steps: int, saved: int | None) -> str:
    """``complete``, ``nonfinite``, ``at work``; or unfinished: ``interrupted`` with all saved, or else ``crashed``."""
    if folder.complete.exists():
        return "complete"
    if folder.at_work():
        return "at work"
    if (manifest.get("outcome") or {}).get("ended") == "nonfinite":
        return "nonfinite"
    return "interrupted" if saved == steps else "crashed"


def _interesting(run: Run) -> int:
    """The step of the first event, or the last."""
    return next((e["step"] for e in run.events if e["step"] in run.steps), run.end - 1)


PARTS = ("journal", "moments", "keyframes", "arrays", "incidents", "checkpoint", "models", "metrics", "dashboard")


def sizes(folder: RunFolder) -> dict[str, int]:
    """Bytes of each part of the folder."""
    found = dict.fromkeys(PARTS, 0)

    def weigh(part: str, *paths: Path) -> None:
        found[part] += sum(p.stat().st_size for p in paths if p.is_file())

    weigh("journal", folder.journal)
    weigh("metrics", *folder.metrics.rglob("*"))
    weigh("dashboard", folder.dashboard)
    for array in folder.record.iterdir() if folder.record.is_dir() else ():
        part = "moments" if array.name in ("m", "v") else "arrays"
        weigh("keyframes" if array.name.startswith("keyframe_") else part, array, *array.rglob("*"))
    weigh("incidents", *folder.incident_files())
    weigh("checkpoint", folder.checkpoint)
    weigh("models", *folder.models.glob("*"))
    return found
