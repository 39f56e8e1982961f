"""Where an experiment is written, and what to do about what stands there. Nothing is ever lost: at most put aside."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from minitrain.config import Config, config_hash, differing_keys
from minitrain.errors import RunError
from minitrain.run_folder import RunFolder, new_path


def clear(
    folder: RunFolder, name: str, config: Config, *, force: bool, resumes: bool, tell: Callable[[str], None]
) -> None:
    """Make sure that the experiment may begin at ``folder``, or go on there if it ``resumes``.

    ``force`` puts aside what another run or experiment has left. Raises RunError, saying what stands there and what
    to do, with nothing changed.
    """
    if not folder.manifest.exists():
        RunFolder.require_free(folder.path)
        return
    if force:
        aside = new_path(f"{folder.path.name}-old", folder.path.parent)
        with folder.hold(new=False):
            folder.path.rename(aside)
        tell(f"{folder.path} is now {aside}")
        return
    found = _what_stands(folder, name, config)
    if found is None and resumes:
        tell(f"going on with {folder.path}, which was not finished")
        return
    found = found or "this experiment, not finished, which cannot be gone on with"
    raise RunError(
        f"{folder.path}: expected a free place, got {found}; "
        "--force puts it aside and begins anew, --out-dir names another place"
    )


def _what_stands(folder: RunFolder, name: str, config: Config) -> str | None:
    """None where it is this experiment with these settings, not finished."""
    manifest = folder.read_manifest()
    if manifest.get("experiment") != name:
        return f"experiment {manifest['experiment']}" if manifest.get("experiment") else "another run"
    if finished(folder) is not None:
        digest = manifest.get("outcome", {}).get("digest")
        ending = f", digest {digest}" if digest else ""
        return f"this experiment, finished (started {manifest['started_at']}{ending})"
    stored = folder.stored_config()
    if config_hash(stored) == config_hash(config):
        return None
    return f"this experiment with other settings ({'; '.join(differing_keys(stored, config))}), not finished"


def finished(folder: RunFolder) -> dict[str, Any] | None:
    """results.json of a finished experiment: it names the experiment, and is written last."""
    try:
        results = json.loads(folder.results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(results) if isinstance(results, dict) and "experiment" in results else None
