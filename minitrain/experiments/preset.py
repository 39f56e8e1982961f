"""The presets: an experiment's configuration and what it compares, as YAML files that ship with the package.

``about`` is a line for the list, ``kind`` says which function makes it, ``config`` is a configuration as `train` takes
one, ``variants`` are overrides of it (as ``--set`` spells them) by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minitrain.errors import ConfigError, did_you_mean
from minitrain.yaml_files import parse_yaml

FOLDER = Path(__file__).parent.parent / "presets"


@dataclass(frozen=True)
class Preset:
    """One experiment."""

    name: str
    about: str
    kind: str
    settings: tuple[str, ...]
    """Its ``config`` as overrides."""
    variants: Mapping[str, tuple[str, ...]]
    """What each variant changes."""


def names() -> list[str]:
    """What ships, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def available() -> dict[str, str]:
    """The line about each, by name."""
    return {name: load(name).about for name in names()}


def load(name: str) -> Preset:
    """Raises ConfigError where no preset has this name."""
    if name not in names():
        hint = did_you_mean(name, names()) or f"; known are {', '.join(names())}"
        raise ConfigError(f"experiment {name!r}: expected the name of an experiment{hint}")
    path = FOLDER / f"{name}.yaml"
    content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    settings = [
        f"{s}.{key}={json.dumps(value)}" for s, body in content["config"].items() for key, value in body.items()
    ]
    variants = {variant: tuple(changes) for variant, changes in content.get("variants", {}).items()}
    return Preset(name, content["about"], content["kind"], tuple(settings), variants)
