"""Whether the bits of a run are promised here: what must be the same, and what is merely worth telling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitrain._ext.plan import instruction_set
from minitrain._ext.signatures import NUMERICS_VERSION
from minitrain.config import Config, tree_hash
from minitrain.environment import hardware, versions


def mismatches(manifest: Mapping[str, Any], config: Config, data: Mapping[str, str]) -> list[str]:
    """What differs here so that the same bits are not promised, a line each; nothing as a rule.

    ``data`` is what the manifest's hashes of data and tokenizer are held against. The compiled kernels have the same
    bits on every processor and under every version of Python and NumPy. The NumPy twins of ``backend: reference`` have
    not: their sums are NumPy's, whose order may follow its version and the processor.
    """
    here: dict[str, Any] = {"numerics_version": NUMERICS_VERSION, "config_hash": tree_hash(manifest["config"]), **data}
    there = {name: manifest.get(name) for name in here}
    if config.training.backend == "reference":
        here |= {"versions.numpy": versions()["numpy"], "hardware.cpu": hardware()["cpu"]}
        there |= {
            "versions.numpy": (manifest.get("versions") or {}).get("numpy"),
            "hardware.cpu": (manifest.get("hardware") or {}).get("cpu"),
        }
    return [f"{name}: {_short(there[name])} -> {_short(here[name])}" for name in here if there[name] != here[name]]


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def changes(manifest: Mapping[str, Any]) -> list[str]:
    """What else is different here; no bit should depend on it, which is why it is told where one does."""
    return environment(
        manifest, {"versions": versions(), "hardware": {**hardware(), "instruction_set": instruction_set()}}
    )


def environment(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Versions and processor in two manifests, where they differ."""
    keys = [("minitrain", "versions", "minitrain"), ("Python", "versions", "python"), ("NumPy", "versions", "numpy")]
    keys += [("processor", "hardware", "cpu"), ("instruction set", "hardware", "instruction_set")]
    pairs = [(name, *((told.get(part) or {}).get(key) for told in (there, here))) for name, part, key in keys]
    return [f"{name} {a} -> {b}" for name, a, b in pairs if a != b]
