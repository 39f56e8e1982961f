"""Checkpoints: one safetensors file with the five state machines, and the model alone for the world outside.

A checkpoint holds ``param.<name>``, ``m.<name>`` and ``v.<name>`` (float32), and in its metadata the step, which is
all that the optimizer's t, the scheduler, the data position and both random streams need: each is a pure function of
it and of the configuration. The streams' state is written down all the same, so that a reader need not know that.
A model file holds the parameters under their own names, and in its metadata sizes and tokenizer: it needs no other
file. docs/checkpoint.md tells both formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minitrain.config import config_from
from minitrain.errors import ConfigError, RunError
from minitrain.files import write_atomic
from minitrain.sections import ModelConfig
from minitrain.state import State
from minitrain.tensors import Tensors, digest, parameter_table

FORMAT = "minitrain-checkpoint-1"
MODEL_FORMAT = "minigpt-1"
METADATA_KEY = "minitrain"

_DELETE = "delete the file to start again from step 0"

Refuse = Callable[[str, object], RunError]


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


def load_checkpoint(path: Path, params: Tensors, m: Tensors, v: Tensors, hint: str = _DELETE) -> dict[str, Any]:
    """Fill the three buffers and return what the metadata say: step, digest, config_hash, streams.

    ``hint`` says what to do with a file that is no good. Raises RunError, with the buffers undefined, if it is not a
    checkpoint of this model or its digest is wrong.
    """
    wanted = {f"{k}.{name}": t for k, group in (("param", params), ("m", m), ("v", v)) for name, t in group.items()}
    with _opened(path, FORMAT, "checkpoint", hint) as (file, about, refuse):
        for name, stored in _tensors(file, {name: t.shape for name, t in wanted.items()}, refuse):
            wanted[name][...] = stored
        _require_digest(about, digest(params.flat, m.flat, v.flat), refuse)
    return about


def checkpoint_step(path: Path, hint: str = _DELETE) -> int:
    """The state of a checkpoint, from its metadata alone. Raises RunError, which ends in the ``hint``."""
    with _opened(path, FORMAT, "checkpoint", hint) as (_, about, _):
        return int(about["step"])


def save_model(
    folder: Path, params: Tensors, config: ModelConfig, tokenizer: bytes | None = None, stem: str = "minigpt"
) -> Path:
    """Write the parameters alone, under their own names, as ``<stem>-<start of their digest>.safetensors``.

    ``tokenizer`` is its JSON; without it the file tells what the numbers are, but not what the tokens mean.
    Raises OSError.
    """
    about: dict[str, Any] = {"format": MODEL_FORMAT, "model": config.model_dump(), "digest": digest(params.flat)}
    if tokenizer is not None:
        about["tokenizer"] = json.loads(tokenizer)
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}-{about['digest'][:12]}.safetensors"
    write_atomic(path, save({name: np.ascontiguousarray(t) for name, t in params.items()}, _metadata(about)))
    return path


class StoredModel(NamedTuple):
    """A model file."""

    config: ModelConfig
    params: Tensors
    tokenizer: bytes | None
    """The tokenizer's JSON; None where the file was written without one."""


def load_model(path: Path) -> StoredModel:
    """Read a file of `save_model`. Raises RunError if it is none, is damaged, or its digest is wrong."""
    with _opened(path, MODEL_FORMAT, "model", "name another file, or make it again") as (file, about, refuse):
        try:
            config = config_from({"model": about["model"]}, "metadata").model
        except ConfigError as error:
            raise refuse("the sizes of a model", error) from error
        if config.n_layer > len(list(file.keys())):  # before so many names are made up
            raise refuse(f"tensors of {config.n_layer} blocks", f"{len(list(file.keys()))} tensors")
        table = parameter_table(config)
        tensors = list(_tensors(file, {p.name: p.shape for p in table}, refuse))
        params = Tensors(table)
        for name, stored in tensors:
            params[name][...] = stored
        _require_digest(about, digest(params.flat), refuse)
        tokenizer = about.get("tokenizer")
    return StoredModel(config, params, None if tokenizer is None else json.dumps(tokenizer).encode())


@contextmanager
def _opened(path: Path, form: str, what: str, hint: str) -> Iterator[tuple[Any, dict[str, Any], Refuse]]:
    """The file, its metadata and how to refuse it, which is also how any error of reading it is told."""

    def refuse(expected: str, got: object) -> RunError:
        return RunError(f"{path}: expected {expected}, got {got}; {hint}")

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            if not isinstance(about, dict) or about.get("format") != form:
                found = about.get("format") if isinstance(about, dict) else about
                raise refuse(f"a {what} of format {form}", f"format {found!r}")
            yield file, about, refuse
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise refuse(f"a readable {what}", f"{type(error).__name__}: {error}") from error


def _tensors(
    file: Any, shapes: Mapping[str, tuple[int, ...]], refuse: Refuse
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each tensor in the order of ``shapes``, all of whose names, dtypes and shapes were checked before the first."""
    names = sorted(file.keys())
    if sorted(shapes) != names:
        raise refuse(f"{len(shapes)} tensors of this model", f"{len(names)} with other names")
    for name, shape in shapes.items():
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != shape or stored.get_dtype() != "F32":
            raise refuse(f"{name} as F32 {shape}", f"{stored.get_dtype()} {tuple(stored.get_shape())}")
    for name in shapes:
        yield name, file.get_tensor(name)


def _require_digest(about: Mapping[str, Any], found: str, refuse: Refuse) -> None:
    if "digest" not in about:
        raise refuse("the digest of its tensors in the metadata", "none (written by an older version?)")
    if found != about["digest"]:
        raise refuse(f"tensors with digest {about['digest']}", f"digest {found} (the file has been changed or damaged)")
