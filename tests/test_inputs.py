"""The arrays of a batch at the border of the engine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain._ext.engine import Inputs

UNFIT = -2


@pytest.mark.parametrize("wrong", ["nothing", "token", "target", "shape", "dtype", "strides", "list"])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_batch_is_taken_whole_or_not_at_all(wrong, seed):
    """`Inputs.load` copies all four arrays or none: it tells the first token out of range, and arrays that it does not
    take."""
    rng = np.random.default_rng(seed)
    B, T, limit, which = (int(n) for n in rng.integers(1, [9, 9, 65, 4]))
    mine = [np.full((B, T), 77, kind) for kind in (np.int32, np.int32, np.uint8, np.uint8)]
    batch = [rng.integers(limit, size=(B, T), dtype=np.int32) for _ in range(2)]
    batch += [rng.random((B, T)) < 0.5 for _ in range(2)]
    expected = -1 if wrong == "nothing" else UNFIT
    if wrong in ("token", "target"):
        place = int(rng.integers(B * T))
        batch[wrong == "target"].flat[place:] = rng.choice([-1, limit, 2**31 - 1])
        expected = place + B * T * (wrong == "target")
    elif wrong == "shape":
        batch[which] = np.zeros((B, T + 1), batch[which].dtype)
    elif wrong == "dtype":
        batch[which] = batch[which].astype(rng.choice(["i8", "u4", ">i4", "u1", "f4"]))
    elif wrong == "strides":
        batch[which] = np.zeros((B + 1, 2 * T), batch[which].dtype)[1:, ::2]
        expected = UNFIT if B * T > 1 else -1  # one number alone has no layout
    elif wrong == "list":
        batch[which] = batch[which].tolist()
    assert Inputs(*mine, limit).load(*batch) == expected
    for to, source in zip(mine, batch, strict=True):
        assert np.array_equal(to, source) if expected == -1 else (to == 77).all()
