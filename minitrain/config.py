"""The configuration of a run, read from a YAML file and checked: seven sections and a list (sections.py).

`load_config` reads a file, lays ``section.key=value`` overrides over it and checks the result. Whatever is
wrong is told at once, a line for each mistake: the key, what was expected, what came, and where it stands.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from pydantic import ValidationError

from minitrain.errors import ConfigError, did_you_mean, shown
from minitrain.sections import Config as Config
from minitrain.sections import Injection, Section
from minitrain.shorthand import OPTIONS, SHORT, spelt_out
from minitrain.yaml_files import parse_yaml, read_sections, yaml

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

NOT_HASHED = (
    "training.threads",
    "training.log_every",
    "training.checkpoint_every",
    "record.enabled",
    "record.moments",
    "record.keyframe_every",
    "record.sites",
    "record.on_error",
    "metrics.enabled",
    "metrics.every",
    "metrics.slow_every",
    "metrics.probe",
)
"""Keys outside the config hash, because no bit of a run depends on them: threads never touch the order of a
sum, and the console, the checkpoints, the recorder and the metrics only look. Every other key may move a bit."""


_KEYS = {
    name: cast(type[Section], field.annotation).model_fields
    for name, field in Config.model_fields.items()
    if name != "injections"
}
"""The fields of each section, by key."""


def load_config(
    path: Path | str | None, overrides: Sequence[str] = (), below: tuple[Config, str] | None = None
) -> Config:
    """The defaults, under the YAML file at ``path`` (if any), under ``section.key=value`` overrides.

    ``below`` is a configuration that takes the place of the defaults, and its name in messages.
    An override's value is YAML too: ``optimizer.clip=null``, ``optimizer.lr_max=3e-4``; the last of two wins.
    Raises ConfigError: one line if the file cannot be read as a mapping, else a line for every mistake.
    """
    return read_config(path, overrides, below)[0]


def read_config(
    path: Path | str | None, overrides: Sequence[str] = (), below: tuple[Config, str] | None = None
) -> tuple[Config, Mapping[str, str]]:
    """As `load_config`, and where each key stands."""
    tree, places = ({}, {}) if path is None else read_sections(Path(path))
    if {"kind", "config"} <= tree.keys():
        name = Path(str(path)).stem
        hint = f"`minitrain experiment {name}` makes it, and what stands under its 'config' is a configuration"
        raise ConfigError(f"{path}: expected sections such as 'model:', got the preset of an experiment; {hint}")
    if below:
        tree, places = _over(below[0].model_dump(), below[1], tree, places)
    mistakes = []
    for text in overrides:
        try:
            _override(text, tree, places)
        except ConfigError as error:
            mistakes.append(str(error))
    if below and places.get("injections") == below[1] and any(name in tree for name in SHORT):
        del tree["injections"]  # what is said in short takes their place
    return _checked(tree, places, mistakes), places


def config_from(tree: dict[str, Any], source: str) -> Config:
    """A Config from nested mappings, such as a manifest's ``config``; ``source`` names them in the messages.

    Raises ConfigError with a line for every mistake.
    """
    return _checked(tree, dict.fromkeys([*tree, *_flat(tree)], source), [])


def to_yaml(config: Config) -> str:
    """Every key as YAML, in the order of this file; `load_config` reads back an equal config."""
    stream = io.StringIO()
    yaml().dump(config.model_dump(), stream)
    return stream.getvalue()


def config_hash(config: Config) -> str:
    """sha256, in hex, of the keys that can move a bit (all but `NOT_HASHED`), as sorted JSON."""
    return tree_hash(config.model_dump())


def tree_hash(tree: Mapping[str, Any]) -> str:
    """`config_hash` of a config in nested mappings: as it stands in a manifest, without the keys of later versions."""
    moving = {key: value for key, value in _flat(tree).items() if key not in NOT_HASHED}
    return hashlib.sha256(json.dumps(moving, sort_keys=True).encode()).hexdigest()


def differing_keys(a: Config, b: Config) -> list[str]:
    """Lines such as ``training.batch_size: 8 -> 16``, one for each key whose value differs from a to b."""
    before, after = ({"injections": [], **_flat(config.model_dump())} for config in (a, b))
    changed = [key for key in before if before[key] != after[key]]
    return [f"{key}: {_spelt(before[key])} -> {_spelt(after[key])}" for key in changed]


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{section: {key: value}} -> {"section.key": value}, and the list of injections, if there are any."""
    sections = {name: body for name, body in tree.items() if isinstance(body, Mapping)}
    flat = {f"{name}.{key}": value for name, body in sections.items() for key, value in body.items()}
    return flat | ({"injections": tree["injections"]} if tree.get("injections") else {})


# Reading: values by section and key, and beside them the places where they stand (yaml_files.py).

_Tree = dict[str, Any]
_Places = dict[str, str]


def _over(low: _Tree, name: str, tree: _Tree, places: _Places) -> tuple[_Tree, _Places]:
    """One tree laid over a lower one, which has all sections."""
    both = {
        section: {**low.get(section, {}), **body} if isinstance(body, dict) else body for section, body in tree.items()
    }
    return low | both, dict.fromkeys([*low, *_flat(low)], name) | places


def _override(text: str, tree: _Tree, places: _Places) -> None:
    """Lay one ``section.key=value`` over the tree. Raises ConfigError if it has another form."""
    name, equals, value = text.partition("=")
    option, name = OPTIONS.get(name.strip(), ("--set", name.strip()))
    section, dot, key = name.partition(".")
    if not (equals and dot and key):
        example = f"section.key=value, as in model.n_layer=4{_belongs(section)}"
        raise ConfigError(f"--set {text}: expected {example}")
    if not value.strip():
        raise ConfigError(f"--set {text}: expected a value after '=' (null for none)")
    parsed = parse_yaml(value, f"--set {section}.{key}")
    body = tree.get(section, {})
    if section == "injection" and isinstance(body, str):
        body = {"name": body}
    if isinstance(body, dict):  # else the section itself is the mistake, told with the others
        tree[section] = body | {key: parsed}
    places.setdefault(section, option)
    places[f"{section}.{key}"] = option


# Checking: pydantic finds every mistake; the words are ours.


def _checked(tree: _Tree, places: _Places, mistakes: list[str]) -> Config:
    try:
        tree = spelt_out(tree, places)
    except ConfigError as error:
        mistakes = [*mistakes, str(error)]
        tree = {name: body for name, body in tree.items() if name not in SHORT}
    try:
        # Every section is given, if only empty: its default would build the section's schema a second time.
        config = Config.model_validate({name: {} for name in _KEYS} | tree)
    except ValidationError as error:
        mistakes = mistakes + [_explain(detail, places) for detail in error.errors(include_url=False)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def _explain(error: ErrorDetails, places: _Places) -> str:
    """One line about one mistake: the key, what was expected, what came, where."""
    section, *rest = (str(part) for part in error["loc"])
    if section == "injections":
        return _explain_injection(error, rest, places)
    if error["type"] == "conflict":
        keys = [key for key in error["ctx"] if key in _KEYS[section]]
        where = ", ".join(f"{key}: {places.get(f'{section}.{key}', 'default')}" for key in keys)
        return f"{error['msg']} ({where})"
    name = ".".join([section, *rest])
    where = places.get(name) or places.get(section, "default")
    if error["type"] in ("extra_forbidden", "invalid_key"):
        unknown = _unknown("key", rest[0], _KEYS[section]) if rest else _unknown("section", section, _KEYS)
        return f"{name}: {unknown} ({where})"
    if not rest:
        return f"{name}: expected a mapping of keys to values, got {shown(error['input'])} ({where})"
    return f"{name}: expected {_expected(_KEYS[section][rest[0]], error['input'])} ({where})"


def _explain_injection(error: ErrorDetails, rest: list[str], places: _Places) -> str:
    """One line about a mistake in the list of injections, under the name by which it was written there."""
    number, key = (*rest, "", "")[:2]
    at = ".".join(["injections", *rest[:2]])
    where = places.get(at) or places.get(f"injections.{number}") or places.get("injections", "default")
    name = f"injections[{number}]" if number else "injections"
    if "injection" in places:
        name = "injection"
    fields = Injection.model_fields
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return f"{name}.{key}: {_unknown('key', key, fields)} ({where})"
    if error["type"] == "missing":
        return f"{name}.{key}: expected {fields[key].description}, got none ({where})"
    if key:
        return f"{name}.{key}: expected {_expected(fields[key], error['input'])} ({where})"
    kind = "a mapping such as {name: scale, step: 500}" if number else "a list of injections"
    return f"{name}: expected {kind}, got {shown(error['input'])} ({where})"


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    hint = _belongs(name) or did_you_mean(name, known) or f"; known are {', '.join(known)}"
    return f"unknown {kind}{hint}"


def _belongs(key: str) -> str:
    owners = [section for section, keys in _KEYS.items() if key in keys]
    return f"; {key!r} belongs to {' and '.join(owners)}" if owners else ""


def _expected(field: FieldInfo, value: object) -> str:
    """``<what was expected>, got <what came>``; only a field of fixed choices has no description."""
    choices = () if field.description else get_args(field.annotation)
    near = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"{field.description or ' or '.join(choices)}, got {shown(value)}{near}"


def _spelt(value: object) -> str:
    if isinstance(value, list):  # of injections
        return ", ".join(f"{one['name']} at step {one['step']}" for one in value) or "none"
    return json.dumps(value, ensure_ascii=False)
