"""The learning rate, and the elementary functions under it."""

from __future__ import annotations

import ast
import math
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minitrain import elementary
from minitrain.config import Config, load_config
from minitrain.elementary import ANGLE_LIMIT, PI, cos, exp, log, power_int, sin
from minitrain.errors import ConfigError, RunError
from minitrain.schedule import Scheduler, lr_at
from minitrain.sections import OptimizerConfig, SchedulerConfig

HALF_PI = Decimal("1.5707963267948966192313216916397514420985846996875529104874722961539082031431045")

# Elementary functions, against 60 digits of decimal arithmetic


def ulps(value: float, exact: Decimal) -> float:
    """The distance from the exact value, in units of its last binary place."""
    return float(abs(Decimal(value) - exact) / Decimal(math.ulp(float(exact))))


def exact_sin(x: float, quarter_turns: int = 0) -> Decimal:
    """sin(x + quarter_turns * pi/2), by the Taylor series of the reduced angle."""
    turns = (Decimal(x) / HALF_PI).to_integral_value()
    r = Decimal(x) - turns * HALF_PI
    power = (int(turns) + quarter_turns) % 4
    term, n = (Decimal(1), 0) if power % 2 else (r, 1)
    total = Decimal(0)
    while abs(term) > Decimal(10) ** -60 * abs(total):
        total += term
        term *= -r * r / ((n + 1) * (n + 2))
        n += 2
    return -total if power >= 2 else total


@pytest.fixture(autouse=True, scope="module")
def _sixty_digits():
    with localcontext() as context:
        context.prec = 60
        yield


@given(st.floats(-745, 709.78))
@example(-527.1329590052604)
@settings(max_examples=300)
def test_exp(x):
    """Within 1.25 ulp over its whole range, denormal results included."""
    assert ulps(exp(x), Decimal(x).exp()) < 1.25


@given(st.floats(0, exclude_min=True, allow_infinity=False) | st.floats(0.5, 2))
@example(5e-324)
@example(1.2835487111826411)
@settings(max_examples=300)
def test_log(x):
    """Within 1.25 ulp for normal and denormal numbers, also near 1."""
    assert ulps(log(x), Decimal(x).ln()) < 1.25


near_zeros = st.integers(0, 636_000).map(lambda n: float(n * HALF_PI))
angles = st.floats(-ANGLE_LIMIT, ANGLE_LIMIT) | st.floats(-4, 4) | near_zeros


@given(angles)
@example(451362.542466603)
@example(-1.0638319795776585)
@example(ANGLE_LIMIT)
@settings(max_examples=300)
def test_sin_and_cos(x):
    """Within 2 ulp up to the limit, also at the doubles nearest to their zeros."""
    assert ulps(sin(x), exact_sin(x)) < 2
    assert ulps(cos(x), exact_sin(x, quarter_turns=1)) < 2


@given(angles)
def test_symmetry(x):
    """cos is even and sin odd, to the bit."""
    assert cos(-x) == cos(x)
    assert math.copysign(1, sin(-x)) == -math.copysign(1, sin(x))
    assert sin(-x) == -sin(x)


@given(st.floats(0, 1), st.integers(0, 10_000))
def test_power_int(base, exponent):
    """Relative error below exponent * 2**-53, where the result is a normal number."""
    exact = Decimal(base) ** exponent if exponent else Decimal(1)
    if exact > Decimal(2) ** -1022:
        assert abs(Decimal(power_int(base, exponent)) - exact) <= exact * exponent / 2**53


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (exp, math.inf, math.inf),
        (exp, -math.inf, 0.0),
        (exp, math.nan, math.nan),
        (exp, 0.0, 1.0),
        (exp, 709.782712893384, math.exp(709.782712893384)),
        (exp, 709.7827128933841, math.inf),
        (exp, 1e300, math.inf),
        (exp, -745.14, 0.0),
        (exp, -1e300, 0.0),
        (log, math.inf, math.inf),
        (log, -math.inf, math.nan),
        (log, math.nan, math.nan),
        (log, 0.0, -math.inf),
        (log, -0.0, -math.inf),
        (log, -1.0, math.nan),
        (log, 1.0, 0.0),
        (sin, math.inf, math.nan),
        (sin, -math.inf, math.nan),
        (sin, math.nan, math.nan),
        (sin, 0.0, 0.0),
        (sin, -0.0, -0.0),
        (sin, 5e-324, 5e-324),
        (cos, math.inf, math.nan),
        (cos, math.nan, math.nan),
        (cos, 0.0, 1.0),
        (cos, PI, -1.0),
    ],
)
def test_special_values(function, x, expected):
    """What IEEE 754 says, without exceptions; compared by their spelling, since NaN != NaN and 0 == -0."""
    assert repr(function(x)) == repr(expected)


def test_special_powers():
    """x**0 is 1 even for NaN; overflow is an infinity."""
    assert power_int(math.nan, 0) == 1.0
    assert math.isnan(power_int(math.nan, 1))
    assert power_int(-2.0, 3) == -8.0
    assert power_int(10.0, 400) == math.inf


@pytest.mark.parametrize("function", [sin, cos])
def test_an_angle_too_large_is_refused(function):
    """Rather an error than digits that mean nothing."""
    with pytest.raises(ValueError, match="expected an angle of at most 1e\\+06 radians, got 1000001.0"):
        function(1_000_001.0)


def test_a_negative_exponent_is_refused():
    """Binary powering counts down to zero."""
    with pytest.raises(ValueError, match="expected an exponent of at least 0, got -1"):
        power_int(2.0, -1)


def test_nothing_of_libm_is_used():
    """From math come exact functions and constants only; no powers of floats, which would call pow."""
    nodes = list(ast.walk(ast.parse(Path(elementary.__file__).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == {"annotations", "factorial", "frexp", "ldexp", "inf", "nan"}
    powers = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    assert {ast.unparse(power.left) for power in powers} == {"-1"}


# The schedule


@st.composite
def schedules(draw):
    """(optimizer, scheduler) with a step in the range of interest."""
    low, high = sorted(draw(st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1))))
    warmup, total = sorted(draw(st.tuples(st.integers(0, 50), st.integers(0, 200))))
    kind = draw(st.sampled_from(["cosine", "linear", "step", "constant"]))
    scheduler = SchedulerConfig(
        type=kind,
        warmup_steps=warmup,
        total_steps=max(total, 1),
        step_size=draw(st.integers(1, 50)),
        gamma=draw(st.floats(0.01, 1)),
    )
    return OptimizerConfig(lr_min=low, lr_max=high), scheduler


@given(schedules())
@settings(deadline=None)
def test_shape_of_every_schedule(pair):
    """Rises in equal steps to lr_max at t = W, never rises after, stays within its bounds, ends at lr_min."""
    optimizer, scheduler = pair
    low, high = optimizer.lr_min, optimizer.lr_max
    warmup, total = scheduler.warmup_steps, scheduler.total_steps
    rates = [lr_at(step, optimizer, scheduler) for step in range(total + 2)]
    assert rates[:warmup] == [high * t / warmup for t in range(1, warmup + 1)]
    decay = rates[warmup:]
    assert all(later <= earlier * (1 + 1e-15) for earlier, later in zip(decay, decay[1:], strict=False))
    assert all(low <= rate <= high * (1 + 1e-15) for rate in decay)
    assert rates[total:] == [low, low]
    if scheduler.type in ("cosine", "linear") and warmup < total:
        assert rates[total - 1] == low


def test_the_default_schedule_in_numbers():
    """The first update moves, the top is at t = W, cosine is half way at half time and lr_min at the end."""
    config = Config()
    rates = [lr_at(step, config.optimizer, config.scheduler) for step in range(2000)]
    assert (rates[0], rates[99], rates[1999]) == (3e-4 / 100, 3e-4, 3e-5)
    assert rates[1049] == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-12)
    libm = [3e-5 + 2.7e-4 * (1 + math.cos(math.pi * (t - 100) / 1900)) / 2 for t in range(101, 2001)]
    assert rates[100:] == pytest.approx(libm, rel=1e-13)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.5, 1.0, 0.775, 0.325, 0.1, 0.1, 0.1]),
        ("linear", [0.5, 1.0, 0.7, 0.4, 0.1, 0.1, 0.1]),
        ("step", [0.5, 1.0, 1.0, 1.0, 0.5, 0.1, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1]),
    ],
)
def test_each_type_in_numbers(kind, expected):
    """Two steps of warm-up, three of decay, then rest; type step drops by gamma after step_size steps."""
    scheduler = Scheduler(lr_max=1.0, lr_min=0.1, warmup_steps=2, total_steps=5, type=kind, step_size=2)
    rates = []
    for _ in expected:
        rates.append(scheduler.lr)
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-12)


def test_the_step_type_stops_at_lr_min():
    """However often it drops."""
    scheduler = Scheduler(lr_max=1.0, lr_min=0.1, warmup_steps=0, total_steps=9, type="step", step_size=1, gamma=0.5)
    scheduler.load_state({"step_count": 8})
    assert scheduler.lr == 0.1


@pytest.mark.parametrize("kind", ["cosine", "linear", "step", "constant"])
def test_scheduler_is_lr_at_with_a_counter(kind):
    """From a config, step by step, and across a saved state: the same bits as the pure function."""
    keys = {"type": kind, "warmup_steps": 3, "total_steps": 12, "step_size": 4}
    config = load_config(None, [f"scheduler.{key}={value}" for key, value in keys.items()])
    scheduler = Scheduler.from_config(config)
    for step in range(14):
        assert scheduler.step_count == step
        assert scheduler.lr == lr_at(step, config.optimizer, config.scheduler)
        resumed = Scheduler.from_config(config)
        resumed.load_state(scheduler.state())
        assert (resumed.lr, resumed.step_count) == (scheduler.lr, step)
        scheduler.step()


def test_an_impossible_scheduler_is_a_config_error():
    """In the words of the config, with the constructor as the place."""
    with pytest.raises(ConfigError) as caught:
        Scheduler(lr_max=1.0, lr_min=2.0, warmup_steps=9, total_steps=5)
    assert [line.partition(" ")[0] for line in str(caught.value).splitlines()] == [
        "optimizer.lr_min",
        "scheduler.warmup_steps",
    ]
    assert "(lr_min: Scheduler(...), lr_max: Scheduler(...))" in str(caught.value)


@pytest.mark.parametrize("state", [{}, {"step_count": -1}, {"step_count": True}, {"step_count": 1.0}])
def test_a_state_that_is_none_is_refused(state):
    """Loading it would train on with a wrong rate."""
    scheduler = Scheduler.from_config(Config())
    with pytest.raises(RunError, match="expected step_count, an integer of at least 0, got"):
        scheduler.load_state(state)
    assert scheduler.step_count == 0
