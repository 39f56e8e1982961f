"""What a configuration may say in short: ``injection`` and ``injection_step`` are a list of one injection."""

from __future__ import annotations

from typing import Any

from minitrain.errors import ConfigError, shown

INJECTION_NAME = "the name of an injection (minitrain train --injection help lists them)"
"""What stands there."""

SHORT = ("injection", "injection_step")
"""Sections that are short for a list of one injection."""
OPTIONS = {"injection": ("--injection", "injection.name"), "injection_step": ("--injection-step", "injection.step")}
"""What they are as overrides: the option of the command line, and the key."""


def spelt_out(tree: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """The tree with ``injections`` alone: `SHORT` spells a list of one, and the name ``none`` an empty one.

    Raises ConfigError where an injection is spelt in both ways, or has no name.
    """
    listed = tree.get("injections") or []
    if not any(name in tree for name in SHORT):
        return tree | {"injections": listed}
    body, step = tree.get("injection"), tree.get("injection_step")
    where = places.get("injection") or places.get("injection_step", "default")
    if not isinstance(body, dict | str | None):
        form = "expected a name or a mapping such as {name: scale, step: 500}"
        raise ConfigError(f"injection: {form}, got {shown(body)} ({where})")
    one = {"name": body} if isinstance(body, str) else dict(body or {})
    if step not in (None, {}):  # an empty section has been read as {}
        if one.get("step", step) != step:
            raise ConfigError(
                f"injection_step: expected one step, got {step} and injection.step {one['step']} ({where})"
            )
        one["step"] = step
    rest = {name: value for name, value in tree.items() if name not in SHORT}
    asked = places.get("injection.name", "").startswith("--")
    if one.get("name") == "none" and (asked or not listed):
        return rest | {"injections": []}
    if listed and one:
        raise ConfigError(
            f"injection: expected either injection or injections, got both ({where}; "
            f"{places.get('injections', 'default')}); put it into the list"
        )
    if one and "name" not in one:
        raise ConfigError(f"injection.name: expected {INJECTION_NAME}, got none ({where})")
    if not one:
        return rest | {"injections": listed}
    places["injections.0"] = places["injection"] = where
    for key in one:
        places[f"injections.0.{key}"] = places.get(f"injection.{key}") or where
    return rest | {"injections": [one]}
