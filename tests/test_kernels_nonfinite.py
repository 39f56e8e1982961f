"""NaN and Inf come out of every kernel: what depends on a bad number is a bad number, on every instruction set.

Which outputs depend on an input element is asked of the twin in double precision: those that change when the element
does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain._ext.plan import ReferenceBackend
from minitrain._ext.signatures import SIGNATURES

DOUBLE = ReferenceBackend(np.float64)
INF = np.inf
Place = tuple[int, ...]

# Where infinity may rightly vanish. The twin must say so as well: these are no excuses for the engine alone.
VANISHES = {
    # e^-Inf = 0, exactly.
    ("exp", "x", -INF),
    # An infinite key makes a score of +Inf (then its row is NaN) or, for queries that point away from it, of -Inf:
    # a probability of 0, as for any key that is infinitely unlike the query.
    ("attention_forward", "k", INF),
    ("attention_forward", "k", -INF),
    # The purpose of a clamp. The norm, taken before it, has seen the infinity (AdamW.clip: `before`).
    ("clamp", "g", INF),
    ("clamp", "g", -INF),
    # No limit: nothing is clamped.
    ("clamp", "limit[0]", INF),
    # The mean over infinitely many tokens: every share is 1/Inf = 0. The count comes from mean_loss and is finite.
    ("cross_entropy_backward", "result[2]", INF),
    ("cross_entropy_backward", "result[2]", -INF),
    # hyper[3] is eps: a step divided by infinity is no step. The other hyperparameters do come out.
    *((kernel, "hyper[3]", x) for kernel in ("adamw", "adamw_copying") for x in (INF, -INF)),
    # A moment that is divided by an infinite correction vanishes; in adamw itself the same infinite beta is in it.
    *(("adamw_theta", f"hyper[{i}]", x) for i in (1, 2, 3) for x in (INF, -INF)),
    # A step divided by an infinite second moment; adamw itself writes that moment out.
    ("adamw_theta", "v", INF),
}


def inputs(kernel: str) -> list[str]:
    """The floating-point arrays that a kernel reads."""
    in_place = {"rope": ["x"], "scale": ["g"], "clamp": ["g"], "adamw_theta": ["theta"]}
    in_place |= dict.fromkeys(("adamw", "adamw_copying"), ["theta", "m", "v"])
    accumulated = {"linear_backward_input": ["dx"], "embedding_backward": ["dweight"]}
    read = [a.name for a in SIGNATURES[kernel].arrays if not a.output and a.dtype.kind == "f"]
    return in_place.get(kernel, []) + accumulated.get(kernel, []) + read


PAIRS = [(kernel, name) for kernel in SIGNATURES for name in inputs(kernel)]


def plausible(kernel: str, kernels: Any, data: st.DataObject, seed: int, argument: str) -> tuple[list[Any], int]:
    """Arguments of a drawn shape in which ``argument`` is read, and its position."""
    signature = SIGNATURES[kernel]
    position = [a.name for a in signature.arrays].index(argument)
    sizes = kernels.sizes(kernel, lambda low, high: data.draw(st.integers(low, high)))
    for attempt in range(64):  # optional arrays and `accumulate` are drawn by coin
        arguments = kernels.arguments(kernel, sizes, np.random.default_rng([seed, attempt]))
        if position in kernels.read(kernel, arguments):
            return arguments, position
    raise AssertionError(f"{kernel} never reads {argument}")


def with_value(arguments: list[Any], position: int, place: Place, value: float) -> list[Any]:
    changed = list(arguments)
    changed[position] = arguments[position].copy()
    changed[position][place] = value
    return changed


def with_nan(arguments: list[Any], position: int, place: Place, rng: np.random.Generator) -> list[Any]:
    """A NaN of any payload, quiet or signalling, of either sign: what a flipped bit may make of a number."""
    changed = with_value(arguments, position, place, np.nan)
    if changed[position].dtype == np.float32:
        payload = int(
            rng.choice([0x7F800001, 0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800000 + int(rng.integers(1, 2**23))])
        )
        changed[position].view(np.uint32)[place] = payload | int(rng.integers(2)) << 31
    return changed


def dependents(kernel: str, kernels: Any, arguments: list[Any], position: int, place: Place) -> dict[str, Any]:
    """For each output, which elements change with one input element: by a little or by much."""
    before = kernels.run(DOUBLE, kernel, arguments)
    x = float(arguments[position][place])
    changed = {name: np.zeros(y.shape, bool) for name, y in before.items()}
    for other in (x + 0.25, -3 * x - 8):
        after = kernels.run(DOUBLE, kernel, with_value(arguments, position, place, other))
        for name, y in before.items():
            changed[name] |= (y != after[name]) & ~(np.isnan(y) & np.isnan(after[name]))
    return changed


def draw_place(kernel: str, argument: str, array: np.ndarray, rng: np.random.Generator) -> Place:
    place = [int(rng.integers(n)) for n in array.shape]
    if (kernel, argument) == ("attention_backward", "p"):  # zeros above the diagonal by contract, and not read there
        place[3] = min(place[2:])
    if (
        kernel.startswith("adamw") and argument == "hyper"
    ):  # not hyper[5]: t is a whole number that travels among doubles
        place[0] %= 5
    return tuple(place)


@pytest.mark.parametrize(("kernel", "argument"), PAIRS)
@settings(deadline=None, max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_what_is_not_finite_comes_out(kernel, argument, kernels, backends, data, seed):
    """Every output element that depends on a NaN is NaN. Of those that depend on an infinity at least one is not
    finite (but for the exceptions above), and all are for which the twin says so."""
    arguments, position = plausible(kernel, kernels, data, seed, argument)
    rng = np.random.default_rng(seed)
    place = draw_place(kernel, argument, arguments[position], rng)
    depends = dependents(kernel, kernels, arguments, position, place)
    label = f"{argument}[{place[0]}]" if arguments[position].dtype == np.float64 else argument
    for value in (np.nan, INF, -INF):
        if np.isnan(value):
            changed = with_nan(arguments, position, place, rng)
        else:
            changed = with_value(arguments, position, place, value)
        expected = kernels.run(DOUBLE, kernel, changed)
        for (isa, threads), backend in backends.items():
            if threads != 1:
                continue
            actual = kernels.run(backend, kernel, changed)
            for name, where in depends.items():
                if actual[name].dtype.kind == "u":
                    continue
                if np.isnan(value):
                    lost = np.argwhere(where & ~np.isnan(actual[name]))
                else:
                    lost = np.argwhere(where & ~np.isfinite(expected[name]) & np.isfinite(actual[name]))
                got = actual[name][tuple(lost[0])] if len(lost) else None
                assert not len(lost), f"{isa}: {argument}[{place}] = {value}, yet {name}{lost[0]} = {got}"
            if any(where.any() for where in depends.values()) and (kernel, label, value) not in VANISHES:
                came_out = any((where & ~np.isfinite(actual[name])).any() for name, where in depends.items())
                assert came_out, f"{isa}: {argument}[{place}] = {value} is lost"


def test_every_exception_names_an_argument():
    """The list of exceptions names arguments that exist."""
    assert {(kernel, argument.partition("[")[0]) for kernel, argument, _ in VANISHES} <= set(PAIRS)


# What is rightly left out, stated on its own


def test_a_token_outside_the_loss_mask_is_ignored(kernels, isa_backend):
    """Whatever its logits are, the loss is that of the other tokens; but its own softmax shows them."""
    rng = np.random.default_rng(1)
    sizes = {"B": 1, "T": 3, "V": 5}
    arguments = kernels.arguments("cross_entropy_forward", sizes, rng)
    arguments[5][:] = [[1, 0, 1]]
    clean = kernels.run(isa_backend, "cross_entropy_forward", arguments)
    arguments[3][0, 1] = np.nan
    bad = kernels.run(isa_backend, "cross_entropy_forward", arguments)
    assert np.array_equal(bad["losses"], clean["losses"])
    assert np.isnan(bad["softmax"][0, 1]).all()
    assert np.array_equal(bad["softmax"][0, [0, 2]], clean["softmax"][0, [0, 2]])
    losses = np.array([[1, np.nan, 3]], np.float32)
    total = kernels.run(isa_backend, "mean_loss", [np.zeros(3), losses, arguments[5]])
    assert total["result"].tolist() == [2, 4, 2]


def test_the_mean_of_no_token_is_nan(kernels, isa_backend):
    """0 / 0: an empty mask has no mean, and is not silently a loss of 0; its gradient is 0."""
    losses, mask = np.ones((1, 3), np.float32), np.zeros((1, 3), np.uint8)
    assert np.isnan(kernels.run(isa_backend, "mean_loss", [np.zeros(3), losses, mask])["result"][0])
    softmax, targets = np.full((1, 3, 4), 0.25, np.float32), np.zeros((1, 3), np.int32)
    result = np.array([np.nan, 0, 0])
    arguments = [np.empty_like(softmax), softmax, targets, mask, result]
    assert not kernels.run(isa_backend, "cross_entropy_backward", arguments)["dlogits"].any()


def test_a_logit_of_minus_infinity_is_an_impossible_token(kernels, isa_backend):
    """Probability 0, an infinite loss only if it is the target; all -Inf, or one +Inf, is NaN."""
    logits = np.array([[[0, -INF, 0], [0, -INF, 0], [-INF] * 3, [INF, 0, 0]]], np.float32)
    targets, mask = np.array([[0, 1, 0, 0]], np.int32), np.ones((1, 4), np.uint8)
    outputs = [np.empty((1, 4), np.float32), np.empty_like(logits), np.empty_like(logits)]
    out = kernels.run(isa_backend, "cross_entropy_forward", [*outputs, logits, targets, mask])
    assert out["softmax"][0, :2].tolist() == [[0.5, 0, 0.5]] * 2
    assert out["losses"][0, 0] == pytest.approx(np.log(2), rel=1e-6)
    assert out["losses"][0, 1] == INF
    assert np.isnan(out["losses"][0, 2:]).all()
    assert np.isnan(out["softmax"][0, 2:]).all()


def test_a_masked_key_is_ignored(kernels, isa_backend):
    """A NaN score of a key outside the mask changes nothing; a query that sees no key attends to nothing."""
    rng = np.random.default_rng(2)
    arguments = kernels.arguments("attention_forward", {"B": 1, "T": 20, "C": 6, "H": 2}, rng)
    arguments[5][:] = 1
    arguments[5][0, :2] = arguments[5][0, 17] = 0
    clean = kernels.run(isa_backend, "attention_forward", arguments)
    arguments[3][0, 17] = np.nan
    bad = kernels.run(isa_backend, "attention_forward", arguments)
    assert all(np.array_equal(bad[name], clean[name]) for name in ("o", "p"))
    assert not clean["p"][0, :, :2].any()
    assert not clean["o"][0, :2].any()


def test_nan_passes_a_dropped_element(kernels, isa_backend):
    """Dropout multiplies by 0, it does not replace: no NaN is hidden by the mask, forward or backward."""
    x = np.full((2, 5, 7), np.nan, np.float32)
    out = kernels.run(isa_backend, "dropout", [np.zeros_like(x), x, np.arange(3, dtype=np.uint32), 3, 0.9])
    assert np.isnan(out["y"]).all()


@pytest.mark.parametrize("value", [np.nan, INF])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 4096, 4097])
def test_the_last_element_counts(length, value, kernels, isa_backend):
    """Tails: a bad number in the very last element reaches the norm, the clamp, the scale and the update."""
    g = np.zeros(length, np.float32)
    g[-1] = value
    sums = kernels.run(isa_backend, "square_sums", [np.zeros(-(-length // 4096)), g])["sums"]
    assert not np.isfinite(kernels.run(isa_backend, "norm", [np.zeros(1), sums])["result"][0])
    assert not np.isfinite(kernels.run(isa_backend, "scale", [g, np.array([0.5])])["g"][-1])
    assert np.isnan(kernels.run(isa_backend, "clamp", [g, np.array([0.5])])["g"][-1]) == np.isnan(value)
    theta, offsets, decays = np.ones_like(g), np.array([0, length]), np.ones(1, np.uint8)
    hyper = np.array([1e-3, 0.9, 0.95, 1e-8, 0.1, 1])
    out = kernels.run(isa_backend, "adamw", [theta, 0 * theta, 0 * theta, g, offsets, decays, hyper])
    assert not np.isfinite(out["m"][-1])
    assert not np.isfinite(out["v"][-1])
    assert np.isnan(out["theta"][-1])  # Inf / sqrt(Inf) as well
