"""What the tests of the bisect share."""

from __future__ import annotations

from typing import Any

import numpy as np
from click.testing import CliRunner, Result

from minitrain.cli import main
from minitrain.replay.bisect import Bisection

TARGET = "block.0.ffn.up.weight"


def injection(name: str, step: int, **more: Any) -> list[str]:
    return [f"injection.{key}={value}" for key, value in {"name": name, "step": step, **more}.items()]


def flip(tensor: Any, element: Any, bit: int) -> None:
    tensor.view(np.uint32)[element] ^= np.uint32(1 << bit)


def told(found: Bisection) -> tuple[Any, ...]:
    """Verdict, step, phase, site, element."""
    assert found.finding is not None
    place = found.finding.place
    return found.finding.verdict, place.step, place.phase, place.site, place.index


def minitrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
