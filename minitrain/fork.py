"""A run that begins with a state of another: the same settings but for those that are changed.

All that a step reads besides the state is a function of its number and the configuration, so a fork goes on at step N
as its parent did, and with nothing changed it is the parent, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minitrain.config import Config, differing_keys
from minitrain.errors import ConfigError
from minitrain.inject import load
from minitrain.record.recorded import open_run
from minitrain.replay.origin import parent_of, recorded_state, require_state
from minitrain.trainer import Origin

MAY_CHANGE = "model.dropout"
"""Of the model. All else is the shape of a state, or what its numbers mean."""


def fork(
    path: Path, step: int, settings_file: Path | str | None = None, overrides: Sequence[str] = ()
) -> tuple[Config, Origin]:
    """State ``step`` of the recorded run at ``path``, and its settings under those of the file and the overrides.

    Raises ConfigError for settings with which this state cannot go on, and RunError where it cannot be had.
    """
    parent = open_run(path)
    require_state(parent, step)
    config = load(settings_file, overrides, below=(parent.config, str(parent.folder.manifest)))
    changed = differing_keys(parent.config, config)
    if wrong := [line for line in changed if line.startswith("model.") and not line.startswith(MAY_CHANGE)]:
        raise ConfigError(
            f"--from {path}: expected the model of state {step}, got another: {'; '.join(wrong)}; leave these settings "
            "out, or train a new run with them"
        )
    if config.scheduler.total_steps <= step:
        raise ConfigError(
            f"scheduler.total_steps: expected more than {step}, since the run begins with state {step} of {path}, got "
            f"{config.scheduler.total_steps}; raise it, as in --set scheduler.total_steps={2 * step}"
        )
    state = recorded_state(parent, step)
    same_text = parent.config.data == config.data
    told = parent.manifest
    origin = Origin(
        state=state,
        parent=parent_of(parent, state) | {"settings": changed},
        tokenizer_hash=told["tokenizer_hash"],
        data_manifest_hash=told["data_manifest_hash"] if same_text else None,
    )
    return config, origin
