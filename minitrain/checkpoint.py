"""Checkpoints: one safetensors file with the five state machines, and the model alone for the world outside.

A checkpoint holds ``param.<name>``, ``m.<name>`` and ``v.<name>`` (float32), and in its metadata the step, which is
all that the optimizer's t, the scheduler, the data position and both random streams need: each is a pure function of
it and of the configuration. The streams' state is written down all the same, so that a reader need not know that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minitrain.config import ModelConfig
from minitrain.errors import RunError
from minitrain.files import write_atomic
from minitrain.state import State
from minitrain.tensors import Tensors, digest

FORMAT = "minitrain-checkpoint-1"
MODEL_FORMAT = "minigpt-1"
METADATA_KEY = "minitrain"


def _metadata(about: dict[str, Any]) -> dict[str, str]:
    """All under one key: safetensors writes several in an order that changes from call to call."""
    return {METADATA_KEY: json.dumps(about, sort_keys=True)}


def save_checkpoint(path: Path, state: State, *, config_hash: str, streams: dict[str, Any]) -> None:
    """Write state t beside ``path``, fsync, rename. Raises OSError; the old checkpoint then still stands."""
    kinds = {"param": state.params, "m": state.m, "v": state.v}
    tensors = {f"{kind}.{name}": np.ascontiguousarray(t) for kind, group in kinds.items() for name, t in group.items()}
    about = {
        "format": FORMAT,
        "step": state.step,
        "digest": state.digest(),
        "config_hash": config_hash,
        "streams": streams,
    }
    write_atomic(path, save(tensors, _metadata(about)))


def load_checkpoint(path: Path, params: Tensors, m: Tensors, v: Tensors) -> dict[str, Any]:
    """Fill the three buffers and return what the metadata say: step, digest, config_hash, streams.

    Raises RunError, with the buffers undefined, if the file is not a checkpoint of this model or its digest is wrong.
    """

    def refuse(expected: str, got: object) -> RunError:
        return RunError(f"{path}: expected {expected}, got {got}; delete the file to start again from step 0")

    try:
        with safe_open(path, framework="numpy") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            if about.get("format") != FORMAT:
                raise refuse(f"a checkpoint of format {FORMAT}", f"format {about.get('format')!r}")
            wanted = {
                f"{k}.{name}": t for k, group in (("param", params), ("m", m), ("v", v)) for name, t in group.items()
            }
            if sorted(wanted) != sorted(file.keys()):
                raise refuse(f"{len(wanted)} tensors of this model", f"{len(list(file.keys()))} with other names")
            for name, tensor in wanted.items():
                stored = file.get_tensor(name)
                if stored.shape != tensor.shape or stored.dtype != np.float32:
                    raise refuse(f"{name} as float32 {tensor.shape}", f"{stored.dtype} {stored.shape}")
                tensor[...] = stored
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise refuse("a readable checkpoint", f"{type(error).__name__}: {error}") from error
    found = digest(params.flat, m.flat, v.flat)
    if found != about["digest"]:
        raise refuse(f"tensors with digest {about['digest']}", f"digest {found} (the file has been changed or damaged)")
    return about


def save_model(folder: Path, params: Tensors, config: ModelConfig) -> Path:
    """Write the parameters alone, under their own names, as ``minigpt-<start of their digest>.safetensors``."""
    about = {"format": MODEL_FORMAT, "model": config.model_dump()}
    folder.mkdir(exist_ok=True)
    path = folder / f"minigpt-{digest(params.flat)[:12]}.safetensors"
    write_atomic(path, save({name: np.ascontiguousarray(t) for name, t in params.items()}, _metadata(about)))
    return path
