"""Whole states: empty, from the seed, from the bytes of a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from minitrain._ext.engine import Environment
from minitrain.config import Config
from minitrain.errors import RunError
from minitrain.model import initialise
from minitrain.record.digests import groups
from minitrain.state import State
from minitrain.tensors import KINDS, Tensors, parameter_table


def empty_state(config: Config, step: int) -> State:
    """State ``step``, zeros all over."""
    table = parameter_table(config.model)
    return State(step, Tensors(table), Tensors(table), Tensors(table))


def initial_state(config: Config) -> State:
    """State 0, from the seed."""
    state = empty_state(config, 0)
    with Environment():
        initialise(state.params, config.model.n_layer, config.training.rng_seed)
    return state


def named_tensors(state: State) -> dict[str, NDArray[np.float32]]:
    """``param.<name>``, ``m.<name>``, ``v.<name>``: views."""
    return {f"{k}.{name}": t for k, g in zip(KINDS, groups(state), strict=True) for name, t in g.items()}


def read_arrays(data: bytes, where: str) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file. Raises RunError."""
    try:
        arrays: dict[str, NDArray[Any]] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{where}: expected safetensors, got {type(error).__name__}: {error}") from error
    return arrays


def require_arrays(
    arrays: Mapping[str, NDArray[Any]], wanted: Mapping[str, tuple[tuple[int, ...], Any]], where: str
) -> None:
    """Raises RunError unless each of ``wanted`` is there, of this shape and dtype."""
    for name, (shape, dtype) in wanted.items():
        there = arrays.get(name)
        if there is None or there.shape != shape or there.dtype != dtype:
            found = "none" if there is None else f"{there.dtype} {there.shape}"
            raise RunError(f"{where}: expected {name} as {np.dtype(dtype)} {shape}, got {found}")


def read_state(arrays: Mapping[str, NDArray[Any]], config: Config, step: int, where: str) -> State:
    """State ``step`` out of named arrays, in buffers of its own. Raises RunError where one is missing or another."""
    stored = sum(name.startswith("param.") for name in arrays)
    if config.model.n_layer > stored:  # before so many names are made up
        raise RunError(f"{where}: expected the parameters of {config.model.n_layer} blocks, got {stored} tensors")
    shapes = {p.name: p.shape for p in parameter_table(config.model)}
    wanted = {f"{kind}.{name}": (shape, np.float32) for kind in KINDS for name, shape in shapes.items()}
    require_arrays(arrays, wanted, where)
    state = empty_state(config, step)
    for name, tensor in named_tensors(state).items():
        tensor[...] = arrays[name]
    return state
