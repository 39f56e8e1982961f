"""Numbers in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(x: float, digits: int = 2) -> str:
    """As a person writes it: ``9.50``, ``12,345.68``, ``1.2e+09``, ``infinite``; NaN is ``not finite``."""
    if not math.isfinite(x):
        return "not finite" if math.isnan(x) else "infinite"
    small = x != 0 and abs(x) < 10**-digits
    return f"{x:.{digits}g}" if small or abs(x) >= 1e6 else f"{x:,.{digits}f}"


def count(n: float, what: str) -> str:
    """``1 step``, ``2,000 steps``."""
    return f"{int(n):,} {what}{'' if n == 1 else 's'}"


def not_finite(line: Mapping[str, Any]) -> str:
    """Which numbers of a logged step were not finite: ``loss nan, grad_norm nan``."""
    return ", ".join(f"{key} {line['nonfinite'][key]}" for key in ("loss", "grad_norm") if key in line["nonfinite"])
