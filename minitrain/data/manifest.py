"""``MANIFEST.json``: what stands beside generated data, and the hash by which a run names its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitrain.errors import DataError

MANIFEST_NAME = "MANIFEST.json"


def build_manifest(
    generator: Mapping[str, Any], contents: Mapping[str, bytes], counts: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of generated files, given the bytes and the counts of each by its name."""
    manifest: dict[str, Any] = {
        "generator": dict(generator),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        "counts": dict(counts),
    }
    manifest["data_manifest_hash"] = manifest_hash(manifest)
    return manifest


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON (sorted keys, no spaces) of all but the hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "data_manifest_hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def data_hash(train_path: Path, val_path: Path | None, expected: Mapping[str, Any]) -> str:
    """The hash of a run's data, after its files were held against the manifest beside them.

    For generated data it is the manifest's ``data_manifest_hash``, for any other sha256 over the files'
    sha256. ``expected`` are the entries of ``generator`` that the run counts on. Raises DataError where a
    file is not what the manifest says, or the manifest not what the run expects.
    """
    paths = [train_path] if val_path is None else [train_path, val_path]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    manifests = [_manifest_of(path) for path in paths]
    for path, found, manifest in zip(paths, hashes, manifests, strict=True):
        if manifest is not None and manifest["files"][path.name] != found:
            raise DataError(
                f"{path}: expected sha256 {manifest['files'][path.name]}, as {MANIFEST_NAME} beside it says, "
                f"got {found}; delete the file to generate it anew, or {MANIFEST_NAME} if the change is meant"
            )
    manifest = manifests[0]
    if manifest is None or val_path is None or manifest != manifests[1]:
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    for name, value in expected.items():
        if manifest["generator"].get(name) != value:
            raise DataError(
                f"{train_path.parent / MANIFEST_NAME}, field generator.{name}: expected {value!r}, got "
                f"{manifest['generator'].get(name)!r}; delete {train_path.name}, {val_path.name} and "
                f"{MANIFEST_NAME} to generate the corpus anew, or set data.heldout_policy to the data's"
            )
    return str(manifest["data_manifest_hash"])


def _manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest beside ``path``, or None if there is none or it does not speak of ``path``."""
    beside = path.parent / MANIFEST_NAME
    if not beside.exists():
        return None
    try:
        manifest = json.loads(beside.read_bytes())
        listed = path.name in manifest["files"]
        whole = manifest["data_manifest_hash"] == manifest_hash(manifest) and "generator" in manifest
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        listed = whole = False
    if not whole:
        raise DataError(
            f"{beside}: expected the manifest that was written with the data, got one that is damaged or "
            "edited (its data_manifest_hash does not fit); delete it to use the files as they are"
        )
    return manifest if listed else None
