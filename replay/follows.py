"""Whether a step's moments follow from those before it, for some gradient: AdamW alone, no model.

A step makes m' and v' of the same clipped gradient g. The kernel's m' is monotone in g and its v' in |g|, roundings
included, because every operation in it is. So the gradients that take m to m' are an interval of floating-point
numbers, and the kernel itself says by bisection which; and whether one of them takes v to v'. Nothing is estimated: an
element is accused if, and only if, no gradient at all explains it. A step that was computed has one that does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitrain._ext.plan import Backend, Plan
from minitrain.optim import hyper_row
from minitrain.sections import OptimizerConfig
from minitrain.tensors import canonical_bits

Floats = NDArray[np.float32]
Places = NDArray[np.int64]
"""Floating-point numbers by their place on a line without gaps: -0.0 at -1, 0.0 at 0, every NaN behind Inf."""

CHUNK = 8192
"""Elements at a time, so that what is computed of them stays in the cache."""


class Excess(NamedTuple):
    """Elements that no gradient explains, n of them."""

    elements: NDArray[np.int64]
    """(n,) places in the flat buffer."""
    of_m: NDArray[np.bool_]
    """(n,) whether no gradient takes m to m'; else none of those that do takes v to v'."""
    nearest: Floats
    """(n,) the nearest m' or v' that one leads to."""
    ulps: NDArray[np.int64]
    """(n,) how far that is away, counted in floating-point numbers."""


def places(x: Floats) -> Places:
    """Where each number stands on the line of all of them."""
    bits = canonical_bits(x).astype(np.int64)
    return np.where(bits >= 1 << 31, (1 << 31) - 1 - bits, bits)


def numbers(at: Places) -> Floats:
    """The number at each place: the inverse of `places`."""
    return np.where(at < 0, (1 << 31) - 1 - at, at).astype(np.uint32).view(np.float32)


class Follows:
    """``Follows(config, backend)(m, v, m', v')`` is the `Excess` of a step; all arrays (P,)."""

    def __init__(self, config: OptimizerConfig, backend: Backend) -> None:
        self._kernel = _Kernel(config, backend)
        _, beta1, beta2, *_ = hyper_row(config, 0, 1)
        self._factors = [np.float64(np.float32(x)) for x in (beta1, 1 - beta1, beta2, 1 - beta2)]

    def __call__(self, m: Floats, v: Floats, m_after: Floats, v_after: Floats) -> Excess:
        step = _Step(m, v, m_after, v_after)
        found = [self._search(elements, step.at(elements)) for elements in _parts(self._unexplained(step))] or [_NONE]
        return Excess(
            np.concatenate([part.elements for part in found]),
            np.concatenate([part.of_m for part in found]),
            np.concatenate([part.nearest for part in found]),
            np.concatenate([part.ulps for part in found]),
        )

    def _unexplained(self, step: _Step) -> NDArray[np.int64]:
        """The elements that neither their likely gradient explains nor one of its neighbours."""
        left, guesses = [], []
        for start in range(0, len(step.m), CHUNK):
            part = step.at(slice(start, start + CHUNK))
            guess = self._likely(part)
            other = self._other(guess, part)
            left.append(start + other)
            guesses.append(places(guess[other]))
        elements, likely = np.concatenate(left), np.concatenate(guesses)
        for away in (1, -1, 2, -2):
            still = [
                part[self._other(numbers(likely[part] + away), step.at(elements[part]))]
                for part in _parts(np.arange(len(elements)))
            ]
            keep = np.concatenate([elements[:0], *still])
            elements, likely = elements[keep], likely[keep]
        return elements

    def _other(self, g: Floats, step: _Step) -> NDArray[np.int64]:
        """The elements that these gradients do not explain, at most CHUNK of them."""
        m, v = self._kernel(g, step.m, step.v)
        (other,) = np.nonzero((_bits(m) != _bits(step.m_after)) | (_bits(v) != _bits(step.v_after)))
        return other

    def _likely(self, step: _Step) -> Floats:
        """The middle of the gradients that would explain m' and v' if all but their last rounding were exact.

        What it leaves out moves it to a neighbour at most, as a rule.
        """
        b1, r1, b2, r2 = self._factors
        with np.errstate(all="ignore"):
            told = ((step.m_after - b1 * step.m) * (1 / r1)).astype(np.float32)
            square = ((step.v_after - b2 * step.v) * (1 / r2)).astype(np.float32)
            half, slack = _half_ulp(step.m_after, 1 / r1), _half_ulp(step.v_after, 1 / r2)
            size = np.abs(told)
            low = np.maximum(size - half, np.sqrt(np.maximum(square - slack, 0)))
            high = np.minimum(size + half, np.sqrt(np.maximum(square + slack, 0)))
            likely: Floats = np.copysign((low + high) * np.float32(0.5), told)
        return likely

    def _search(self, elements: NDArray[np.int64], step: _Step) -> Excess:
        """Decide each of these elements by bisection over all gradients."""

        def moved(g: Places, which: int) -> Places:
            return places(self._kernel(numbers(g), step.m, step.v)[which])

        settled = np.zeros(len(elements), np.bool_)  # by a gradient that is no finite number
        for g in (np.nan, np.inf, -np.inf):
            to_m, to_v = self._kernel(np.full(len(elements), g, np.float32), step.m, step.v)
            settled |= _same(to_m, step.m_after) & _same(to_v, step.v_after)
        wanted_m, wanted_v = places(step.m_after), places(step.v_after)
        last = np.full(len(elements), places(np.array([np.finfo(np.float32).max]))[0])
        low = _first(lambda g: moved(g, 0) >= wanted_m, -1 - last, last)
        high = _first(lambda g: moved(g, 0) > wanted_m, -1 - last, last) - 1
        of_m = low > high
        m_less, m_more = moved(high, 0), moved(np.minimum(low, last), 0)
        # |g| runs over the magnitudes of that interval; both zeros are one
        ends = np.abs(numbers(low)), np.abs(numbers(high))
        smallest = np.where((low <= 0) & (high >= -1), 0, places(np.minimum(*ends)))
        largest = places(np.maximum(*ends))
        at = _first(lambda g: moved(g, 1) >= wanted_v, smallest, largest)
        v_less, v_more = moved(np.maximum(at - 1, smallest), 1), moved(np.minimum(at, largest), 1)
        wanted = np.where(of_m, wanted_m, wanted_v)
        less, more = np.where(of_m, m_less, v_less), np.where(of_m, m_more, v_more)
        nearest = np.where(np.abs(wanted - less) <= np.abs(wanted - more), less, more)
        wrong = (nearest != wanted) & ~settled
        return Excess(elements[wrong], of_m[wrong], numbers(nearest[wrong]), np.abs(wanted - nearest)[wrong])


class _Step(NamedTuple):
    """The moments of some elements, before and after."""

    m: Floats
    v: Floats
    m_after: Floats
    v_after: Floats

    def at(self, elements: NDArray[np.int64] | slice) -> _Step:
        return _Step(*(x[elements] for x in self))


class _Kernel:
    """The moments of one AdamW update of up to CHUNK elements, by the engine's own kernel."""

    def __init__(self, config: OptimizerConfig, backend: Backend) -> None:
        self._m, self._v, self._g = (np.zeros(CHUNK, np.float32) for _ in range(3))
        self._plan = Plan(backend)
        offsets, decays = np.array([0, CHUNK]), np.zeros(1, np.uint8)
        hyper = np.array(hyper_row(config, 0.0, 1))  # rate and number of the update move parameters only
        self._plan.add("adamw", np.zeros(CHUNK, np.float32), self._m, self._v, self._g, offsets, decays, hyper)

    def __call__(self, g: Floats, m: Floats, v: Floats) -> tuple[Floats, Floats]:
        """m' and v', in buffers that the next call overwrites."""
        n = len(g)
        self._g[:n], self._m[:n], self._v[:n] = g, m, v
        self._plan.run()
        return self._m[:n], self._v[:n]


def _parts(elements: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """At most CHUNK at a time."""
    return [elements[start : start + CHUNK] for start in range(0, len(elements), CHUNK)]


def _half_ulp(x: Floats, factor: float) -> Floats:
    """Half a unit in the last place of x, times ``factor``."""
    power: Floats = (x.view(np.uint32) & 0x7F800000).view(np.float32)
    return power * np.float32(factor * 2.0**-24) + np.float32(factor * 2.0**-149)


_NONE = Excess(np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0, np.float32), np.zeros(0, np.int64))


def _bits(x: Floats) -> NDArray[np.uint32]:
    """As they are, NaNs too: what is none the less the same is settled by the search."""
    return x.view(np.uint32)


def _same(a: Floats, b: Floats) -> NDArray[np.bool_]:
    return np.asarray(canonical_bits(a) == canonical_bits(b))


def _first(holds: Callable[[Places], NDArray[np.bool_]], low: Places, high: Places) -> Places:
    """The first place from low to high at which it holds, which it then does on; high + 1 where it never does."""
    low, high = low.copy(), high + 1
    while (low < high).any():
        middle, searched = (low + high) >> 1, low < high
        there = holds(middle)
        high = np.where(searched & there, middle, high)
        low = np.where(searched & ~there, middle + 1, low)
    return low
