"""What a user can be told: what was expected, what came, where, and what to do next.

Every class carries the exit code with which the command line ends. Anything else that reaches the user is a
bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterable


class MinitrainError(Exception):
    """Base of all errors that are the input's, not the program's."""

    exit_code = 2


class ConfigError(MinitrainError):
    """An unknown key, a wrong type or an impossible value in the configuration."""


class DataError(MinitrainError):
    """A data file that is missing, empty, corrupt or breaks a rule of the corpus."""


class RunError(MinitrainError):
    """A run folder that cannot be written, is taken, or is not what the command needs."""


class KernelArgumentError(MinitrainError, ValueError):
    """An array of the wrong dtype, shape or layout at the border of the engine."""


class HookError(MinitrainError):
    """A hook that cannot be set up, or that raised while a step ran."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The end of a message: ``; did you mean 'x'?``, or an empty string when nothing is near."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """A value as YAML spells it, cut short: what came may be a whole document."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
