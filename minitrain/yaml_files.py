"""YAML 1.2 read with the places where its keys stand, for messages that name file and line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitrain.errors import ConfigError, shown

if TYPE_CHECKING:
    from ruamel.yaml import YAML


def yaml() -> YAML:
    """YAML 1.2: 3e-4 is a number, a key that stands twice an error, and no tag builds an object."""
    from ruamel.yaml import YAML  # not at import: a replay takes its config from the manifest's JSON

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML 1.2 text says; ``source`` names it in the message. Raises ConfigError where it is no YAML."""
    from ruamel.yaml.error import YAMLError

    try:
        return yaml().load(text)
    except (YAMLError, RecursionError, ValueError, KeyError) as error:  # the last two: 2001-99-99, !!bool x
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{where}: expected YAML, got a syntax error: {problem}") from error


def read_sections(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The sections of a file, and ``file:line`` of each section, key, and key of an item (``list.0.key``).

    Raises ConfigError where it cannot be read as a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable YAML file, got: {error.strerror}") from error
    except UnicodeDecodeError as error:
        byte = f"the byte {error.object[error.start]:#04x} at offset {error.start}"
        raise ConfigError(f"{path}: expected UTF-8 text, got {byte}") from error
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}, {}
    if type(tree) is not dict:  # !!omap is a list in the file, whatever it becomes
        raise ConfigError(f"{path}: expected sections such as 'model:' at the top level, got {shown(tree)}")
    # A section whose keys are all commented out reads as null: it is empty, not wrong.
    sections = {name: {} if body is None else body for name, body in tree.items()}
    return sections, _places(yaml().compose(text), path)


def _places(root: Any, path: Path) -> dict[str, str]:
    """From YAML nodes; a merged key has only its section's."""
    places = {}

    def visit(node: Any, name: str) -> None:
        if node.id == "mapping":
            children = [(key.value, key, value) for key, value in node.value]
        else:
            children = [(number, item, item) for number, item in enumerate(node.value)] if node.id == "sequence" else []
        for key, mark, value in children:
            inner = f"{name}.{key}" if name else f"{key}"
            places[inner] = f"{path}:{mark.start_mark.line + 1}"
            if inner.count(".") < 2:
                visit(value, inner)

    visit(root, "")
    return places
