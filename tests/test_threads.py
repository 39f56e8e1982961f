"""Pools of threads: how many, that they come and go, and that whatever they share out is done once."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain._ext import engine
from minitrain._ext.plan import CompiledBackend, Plan, call

f4 = np.float32


@pytest.mark.parametrize("threads", [-1, 0, 65])
def test_threads_out_of_range(threads):
    """1 to 64, told with the number that came."""
    with pytest.raises(ValueError, match=rf"threads: expected 1 to 64, got {threads}"):
        engine.Pool(threads)


def test_pools_come_and_go():
    """A pool ends its threads with itself, whether it ever ran or not; 64 threads work where there are fewer cores."""
    threads = Path("/proc/self/task")
    before = len(list(threads.iterdir())) if threads.exists() else 0
    for n in (1, 2, 5, 64) * 2:
        pool = engine.Pool(n)
        assert pool.threads == n
        del pool
    x = np.arange(100_000, dtype=f4)
    backend = CompiledBackend(64)
    call(backend, "scale", x, np.array([2.0]))
    assert np.array_equal(x, 2 * np.arange(100_000))
    del backend
    assert not before or len(list(threads.iterdir())) == before


@settings(deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=5),
    threads=st.integers(2, 7),
    seed=st.integers(0, 2**32 - 1),
)
def test_threads_share_a_layer(shapes, threads, seed):
    """Whatever a layer is made of, each row of each gradient is made, with the bits that it has on one thread; the
    parameters, whose cache lines change hands meanwhile, keep theirs."""
    rng = np.random.default_rng(seed)
    sizes = [n * k + n for n, k in shapes]
    inputs = [rng.standard_normal((2, 5, n + k)).astype(f4) for n, k in shapes]
    made = []
    for n in (1, threads):
        plan, before, arrays = Plan(CompiledBackend(n)), 0, []
        for (rows, columns), x in zip(shapes, inputs, strict=True):
            dy, into = np.ascontiguousarray(x[..., :rows]), np.ascontiguousarray(x[..., rows:])
            weight = rng.integers(2**32, size=(rows, columns), dtype=np.uint32).view(f4)  # any bits: NaN of any payload
            kept, gradient, bias = weight.copy(), np.full_like(weight, np.nan), np.full(rows, np.nan, f4)
            plan.add("linear_backward_weight", gradient, weight, dy, into, place=(before, sum(sizes)))
            plan.add("sum_sequences", bias, dy[:, 0].copy(), place=(before + weight.size, sum(sizes)))
            before += weight.size + rows
            arrays += [(gradient, bias, weight, kept)]
        plan.run()
        assert all(np.array_equal(w.view(np.uint32), k.view(np.uint32)) for *_, w, k in arrays)
        made.append([a.view(np.uint32) for gradient, bias, *_ in arrays for a in (gradient, bias)])
    assert all(np.array_equal(one, many) for one, many in zip(*made, strict=True))


@pytest.mark.skipif(platform.system() != "Linux", reason="limits address space as Linux does")
def test_threads_that_cannot_start(run_python):
    """Where the system refuses a thread, the error says what to do, and those that did start are ended once."""
    code = """
import resource
from minitrain._ext.engine import Pool
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 100 * 2**20, -1))
for _ in range(3):
    try:
        Pool(64)
    except OSError as error:
        print(error)
print(Pool(2).threads)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not start 64 threads; lower training.threads") == 3
    assert done.stdout.endswith("2\n")


def test_program_bounds():
    """Only operations that exist can be run."""
    program = engine.Program(engine.Pool(1))
    for first, last in ((0, 1), (-1, 0), (1, 0)):
        with pytest.raises(IndexError):
            program.run(first, last)
