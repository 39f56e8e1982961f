"""Spikes and the way back: what the definitions say, over series made by hand and at random."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitrain.stability import PATIENCE, SPIKE, WINDOW, recovery, spikes, usual

WAVE = [1.0, 3.0] * 150
"""Mean 2, population deviation 1."""


def test_usual_is_the_window_before():
    """Mean and population deviation of the 100 numbers before, not of the step itself; NaN and Inf do not count."""
    assert usual(WAVE, 120) == (2.0, 1.0)
    assert usual([9.0, *WAVE[:99], 77.0], WINDOW) == (np.mean([9.0, *WAVE[:99]]), np.std([9.0, *WAVE[:99]]))
    assert usual([*WAVE[:100], math.nan, math.inf, *WAVE[2:100], 5.0], 200) == (2.0, 1.0)
    assert all(math.isnan(x) for x in usual([math.nan] * 150, 120))
    assert usual(WAVE, 120).sigmas(4.5) == 2.5
    assert math.isnan(usual([1.0] * 120, 110).sigmas(1.0))


@pytest.mark.parametrize("height", [5.0, 5.001, 50.0])
def test_a_spike_is_more_than_three_sigmas(height: float):
    """At 2 + 3 it is none, above it is one, with its height in deviations."""
    series = [*WAVE[:150], height, *WAVE[:50]]
    found = spikes(series)
    assert [s.step for s in found] == ([150] if height > 5 else [])
    assert all(s.sigmas == height - 2 for s in found)


@pytest.mark.parametrize(("behind", "steps"), [([2.5], 1), ([2.6, 9.0, 2.4], 3), ([9.0] * 49 + [2.0], 50)])
def test_recovery_is_the_first_step_back(behind: list[float], steps: int):
    """At most half a deviation above the mean that was frozen before the spike, within 50 steps."""
    series = [*WAVE[:150], 99.0, *behind, *[99.0] * 60]
    assert recovery(series, 150, usual(series, 150)) == steps
    assert spikes(series)[0].recovery == steps


def test_no_recovery():
    """Not in 50 steps, at the end of the series, or never."""
    late = [*WAVE[:150], 99.0, *[9.0] * PATIENCE, 2.0]
    assert recovery(late, 150, usual(late, 150)) is None
    assert spikes([*WAVE[:150], 99.0])[0].recovery is None
    assert spikes([*WAVE[:150], math.nan, math.inf])[0].step == 151


@given(st.lists(st.integers(0, 50), min_size=0, max_size=260), st.integers(-20, 20))
def test_spikes_say_what_the_rule_says(numbers: list[int], power: int):
    """Every flagged step obeys the rule and no other does; a change of unit by a power of two changes nothing."""
    series = [float(x) for x in numbers]
    flagged = {s.step for s in spikes(series)}
    for t in range(len(series)):
        before = np.array(series[max(t - WINDOW, 0) : t])
        assert (t in flagged) == (t > WINDOW and series[t] > before.mean() + SPIKE * before.std())
    assert spikes([x * 2.0**power for x in series]) == spikes(series)
