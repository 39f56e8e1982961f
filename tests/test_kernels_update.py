"""The update that leaves a copy, and makes sure of what it is made of before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SPECIAL = [(), (-0.0, 1e-40, -1e-45, 1e15, -1e18), (np.nan, np.inf, -np.inf, 3e38)]


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
    values=st.sampled_from(SPECIAL),
)
def test_what_an_update_copies(kernels, isa_backend, data, seed, values):
    """An update that copies leaves the bits of one that does not and their copies, and says whether any number is not
    finite."""
    sizes = kernels.sizes("adamw_copying", lambda low, high: data.draw(st.integers(low, high)))
    rng = np.random.default_rng(seed)
    arguments = kernels.arguments("adamw_copying", sizes, rng)
    for i in (0, 1, 2, 8) if values else ():
        arguments[i][rng.random(len(arguments[i])) < 0.01] = rng.choice(values)
    out = kernels.run(isa_backend, "adamw_copying", arguments)
    plain = kernels.run(isa_backend, "adamw", [*arguments[:3], *arguments[8:]])
    state = [out[name] for name in ("theta", "m", "v")]
    assert [x.tobytes() for x in state] == [plain[name].tobytes() for name in ("theta", "m", "v")]
    assert [x.tobytes() for x in state] == [out[f"{name}_copy"].tobytes() for name in ("theta", "m", "v")]
    assert not out["todo"].any()
    if not all(np.isfinite(x).all() for x in state):
        assert out["sums"][:, 3].any()
    elif max(np.abs(x).max() for x in state) < 1e38:
        assert not out["sums"][:, 3].any()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_an_update_leaves_what_has_changed(kernels, backends, data, seed):
    """Any one number that changes, in any bits, keeps its block of 4096 from being updated where that is asked for, and
    no other one; then the block follows, and all is as if nobody had looked. On every processor and thread count."""
    n = data.draw(st.integers(1, 13000))
    rng = np.random.default_rng(seed)
    arguments = kernels.arguments("adamw_copying", {"P": n, "G": -(-n // 4096), "E": 3, "S": 2, "R": 6, "L": 4}, rng)
    backend = backends[data.draw(st.sampled_from(sorted(backends)))]
    first = list(kernels.run(backend, "adamw_copying", arguments).values())
    which, place = rng.integers(3), rng.integers(n)
    first[which].view(np.uint32)[place] ^= np.uint32(rng.integers(1, 2**32))
    watched, as_it_is = (np.full(-(-n // 4096), way, np.uint8) for way in (2, 1))
    expected = kernels.run(backend, "adamw_copying", [*first[:7], as_it_is, *arguments[8:]])
    out = kernels.run(backend, "adamw_copying", [*first[:7], watched, *arguments[8:]])
    assert np.flatnonzero(out["todo"]).tolist() == [place // 4096]
    waits = slice(place // 4096 * 4096, (place // 4096 + 1) * 4096)
    for now, before in zip(out.values(), first[:6], strict=False):
        assert now[waits].tobytes() == before[waits].tobytes()
    out["todo"] //= 2
    out = kernels.run(backend, "adamw_copying", [*out.values(), *arguments[8:]])
    assert all(out[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("change", ["a sign each", "all signs", "two change places", "one is another"])
def test_an_update_sees_several_changes(kernels, isa_backend, change):
    """Changes whose products by the weights would cancel: signs are the highest bits, of which a product keeps one."""
    rng = np.random.default_rng(0)
    sizes = {"P": 4096, "G": 1, "E": 3, "S": 2, "R": 6, "L": 4}
    arguments = kernels.arguments("adamw_copying", sizes, rng)
    arguments[0][[7, 7 + 2048]] = 1.0, 0.5
    arguments[11][0] = 0  # the rate: theta stays as it is
    first = list(kernels.run(isa_backend, "adamw_copying", arguments).values())
    theta = first[0]
    match change:
        case "a sign each":
            theta[[5, 900]] *= -1
        case "all signs":
            theta *= -1
        case "two change places":
            theta[[7, 7 + 2048]] = theta[[7 + 2048, 7]]
        case "one is another":
            theta[7] = theta[8]
    out = kernels.run(isa_backend, "adamw_copying", [*first[:7], np.full(1, 2, np.uint8), *arguments[8:]])
    assert out["todo"].tolist() == [2]
    assert out["theta"].tobytes() == theta.tobytes()
