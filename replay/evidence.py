"""Where a replay first differs from the record, down to the element and its bits where those are recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitrain.record.digests import groups
from minitrain.replay.source import Source
from minitrain.replay.verifier import Difference
from minitrain.state import State
from minitrain.tensors import KINDS, canonical_bits, parameter_of

NUMBERS = ("batch.rows", "rng.training_control", "rng.data", "tokens")
"""Sites that stand for whole numbers."""
SCALARS = ("loss", "grad_norm", "grad_norm_clipped", "lr")


class Divergence(NamedTuple):
    """The first place where a replay differs. ``recorded`` and ``replayed`` are hexadecimal.

    Where ``index`` is a place in the tensor they are the bits of that element; for a scalar, its own; else digests of
    the whole, because nothing more was recorded.
    """

    step: int
    phase: str
    site: str
    tensor: str | None
    """The parameter that the site is about, if it is about one."""
    index: tuple[int, ...] | None  # type: ignore[assignment]  # hides tuple's method
    recorded: str
    replayed: str
    ulps: int | None
    """Between the two in units of the last place, where both are numbers."""
    differing: int | None
    """Elements of the tensor that differ, of ``elements``."""
    elements: int | None


def locate(source: Source, first: Difference, state: State) -> Divergence:
    """The evidence for the first difference of a step that has left ``state``."""
    name = parameter_of(first.site)
    place = (first.step, first.phase, first.site, name)
    if first.kind in SCALARS:
        ulps = distance(np.array(first.recorded, np.uint64), np.array(first.replayed, np.uint64))
        return Divergence(*place, None, _hex(first.recorded, 16), _hex(first.replayed, 16), ulps, None, None)
    if name is not None and first.kind in KINDS:
        then = source.left(first.step, first.kind, name)
        if then is not None:
            return _first_element(place, then, groups(state)[KINDS.index(first.kind)][name])
    return Divergence(*place, None, _hex(first.recorded, 16), _hex(first.replayed, 16), None, None, None)


def _first_element(
    place: tuple[int, str, str, str | None], recorded: NDArray[np.float32], replayed: NDArray[np.float32]
) -> Divergence:
    then, now = canonical_bits(recorded), canonical_bits(replayed)
    elements = np.argwhere(then != now)
    at = tuple(int(i) for i in elements[0])
    a, b = then[at], now[at]
    return Divergence(*place, at, _hex(int(a), 8), _hex(int(b), 8), distance(a, b), len(elements), then.size)


def _hex(bits: int, digits: int) -> str:
    return f"0x{bits & (1 << 4 * digits) - 1:0{digits}x}"


def distance(a: NDArray[Any], b: NDArray[Any]) -> int | None:
    """How many floating-point numbers lie from a to b, given their bits; None where one is no number."""
    width = a.dtype.itemsize
    real = f"f{width}"
    if not (np.isfinite(a.view(real)) and np.isfinite(b.view(real))):
        return None
    sign = 1 << (8 * width - 1)

    def line(bits: int) -> int:
        """The place of a number on a line without gaps, -0.0 just below 0.0."""
        return -1 - (bits - sign) if bits >= sign else bits

    return abs(line(int(a)) - line(int(b)))


def number(bits: str) -> float:
    """The value of hexadecimal bits, 8 digits for a float and 16 for a double."""
    width = (len(bits) - 2) // 2
    return float(np.array(int(bits, 16), f"u{width}").view(f"f{width}"))


def tell(found: Divergence, changes: Iterable[str]) -> str:
    """A divergence in words."""
    at = f", element {list(found.index)}" if found.index is not None else ""
    lines = [f"divergence at step {found.step}, {found.site} ({found.phase}){at}"]
    if found.index is not None or found.site in SCALARS:
        values = (f"{bits} ({number(bits):.9g})" for bits in (found.recorded, found.replayed))
        line = "recorded {}, replayed {}".format(*values)
        line += f": {found.ulps} ulp" if found.ulps is not None else ""
        line += f"; {found.differing} of {found.elements} elements differ" if found.elements is not None else ""
    else:
        what = " (digests)" if found.site not in NUMBERS else ""
        line = f"recorded {found.recorded}, replayed {found.replayed}{what}"
    lines.append(f"  {line}")
    if different := "; ".join(changes):
        lines.append(f"  environments differ: {different}")
    return "\n".join(lines)
