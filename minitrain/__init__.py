"""minitrain: train a mini-GPT on the CPU, deterministic to the bit.

Importing the package does nothing; each name below is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitrain.config import Config as Config
    from minitrain.config import load_config as load_config
    from minitrain.data.batches import Batch as Batch
    from minitrain.inspector import Inspector as Inspector
    from minitrain.loop import evaluate as evaluate
    from minitrain.loop import set_seed as set_seed
    from minitrain.loop import train as train
    from minitrain.loop import train_step as train_step
    from minitrain.model import MiniGPT as MiniGPT
    from minitrain.optim import AdamW as AdamW
    from minitrain.optim import global_grad_norm as global_grad_norm
    from minitrain.record.recorded import open_run as open_run
    from minitrain.schedule import Scheduler as Scheduler
    from minitrain.trainer import run as run

_HOME = {
    "AdamW": "optim",
    "Batch": "data.batches",
    "Config": "config",
    "Inspector": "inspector",
    "MiniGPT": "model",
    "Scheduler": "schedule",
    "evaluate": "loop",
    "global_grad_norm": "optim",
    "load_config": "config",
    "open_run": "record.recorded",
    "run": "trainer",
    "set_seed": "loop",
    "train": "loop",
    "train_step": "loop",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minitrain' has no attribute {name!r}")
    return getattr(import_module(f"minitrain.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
