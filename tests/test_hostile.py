"""What the engine must survive: huge numbers, other threads, forks, listeners that misbehave, passes that fail."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from minitrain._ext.plan import CompiledBackend, Plan, ReferenceBackend, call
from minitrain.errors import DataError, HookError
from minitrain.model import MiniGPT
from minitrain.optim import AdamW

f4 = np.float32


def attention(backend, q, k, v, heads, dtype=f4):
    """Outputs and weights of causal attention without a key mask."""
    B, T, _ = q.shape
    o, p = np.full(q.shape, np.nan, dtype), np.zeros((B, heads, T, T), dtype)
    mask = np.ones((B, T), np.uint8)
    call(backend, "attention_forward", o, p, *(x.astype(dtype) for x in (q, k, v)), mask)
    return o, p


@pytest.mark.parametrize("size", [1e2, 3e4, 1e8, 1e15])
def test_attention_with_huge_scores(isa_backend, size):
    """Scores far beyond what exp can take: every row of weights still sums to 1, and nothing is NaN."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((4, 20, 18)).astype(f4) * f4(size if i < 2 else 1) for i in range(3))
    o, p = attention(isa_backend, q, k, v, 3)
    assert np.isfinite(o).all()
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)


def test_attention_over_long_rows(isa_backend):
    """More than 256 keys and a head wider than 256: sums of several blocks agree with the twin in float64."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, 300, 2 * 270)).astype(f4) for _ in range(3))
    o, p = attention(isa_backend, q, k, v, 2)
    expected_o, expected_p = attention(ReferenceBackend(np.float64), q, k, v, 2, np.float64)
    np.testing.assert_allclose(p, expected_p, atol=2e-6)
    np.testing.assert_allclose(o, expected_o, atol=1e-5)


@pytest.mark.parametrize("backend", [CompiledBackend(), ReferenceBackend()], ids=["compiled", "reference"])
def test_layernorm_shows_an_overflow(backend):
    """Finite inputs whose variance is infinite: NaN, not beta as if nothing had been."""
    x, one = np.full((1, 2, 5), 1e20, f4), np.ones(5, f4)
    x[0, :, 2] = -1e20
    y, mean, rstd = np.empty_like(x), np.empty((1, 2), f4), np.empty((1, 2), f4)
    plan = Plan(backend)
    plan.add("layernorm_forward", y, mean, rstd, x, one, one, 1e-5)
    plan.run()
    assert np.isnan(y).all()


def test_gelu_far_out(isa_backend):
    """For every finite x beyond 20 GELU is x or -0, its slope 1 or 0."""
    x = np.array([20, 1e5, 1e13, 1e14, 2e19, 1e30, 3.4e38], f4)
    x = np.concatenate([x, -x]).reshape(1, 1, -1)
    y, slope = np.empty_like(x), np.empty_like(x)
    call(isa_backend, "gelu_forward", y, slope, x)
    assert np.array_equal(y, np.where(x > 0, x, 0))
    assert np.array_equal(slope, np.where(x > 0, 1, 0))


@pytest.mark.parametrize("threads", [1, 2])
def test_one_backend_from_two_python_threads(threads, odd_config, make_batch):
    """Two models that share a backend, each on its own Python thread, compute what they compute alone."""
    batch, backend = make_batch(odd_config, 3), CompiledBackend(threads)
    models = [MiniGPT(odd_config, seed=seed, backend=backend) for seed in (1, 2)]
    expected = [(model.forward(*batch)[1], model.backward().flat.copy()) for model in models]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(100):
            loss = models[i].forward(*batch)[1]
            if loss != expected[i][0] or not np.array_equal(models[i].backward().flat, expected[i][1]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_after_a_fork(run_python):
    """In a forked child one thread goes on, several raise instead of waiting for threads that are not there."""
    program = """
import os, sys
import numpy as np
from minitrain import MiniGPT
tokens, ones = np.zeros((2, 8), np.int32), np.ones((2, 8), bool)
for threads in (1, 2):
    model = MiniGPT(threads=threads)
    loss = model.forward(tokens, tokens, ones, ones)[1]
    child = os.fork()
    if child == 0:
        try:
            same = model.forward(tokens, tokens, ones, ones)[1] == loss
            os._exit(10 + same)
        except RuntimeError as error:
            os._exit(20 if "after a fork make the model anew" in str(error) else 30)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_python(program)
    assert done.stdout.split() == ["11", "20"], done.stderr


def test_backward_after_a_failed_forward(odd_config, make_batch):
    """A pass that was refused leaves nothing to go back through."""
    model, batch = MiniGPT(odd_config), list(make_batch(odd_config, 2))
    model.forward(*batch)
    batch[1] = batch[1].copy()
    batch[1][1, 3] = odd_config.vocab_size
    with pytest.raises(DataError):
        model.forward(*batch)
    with pytest.raises(RuntimeError, match="needs a training forward"):
        model.backward()


def test_a_listener_cannot_run_the_model(odd_config, make_batch):
    """Neither pass may begin inside another: it would change the numbers under it. Afterwards the model works again."""
    model, batch = MiniGPT(odd_config), make_batch(odd_config, 2)
    loss = model.forward(*batch)[1]
    for action in (lambda *_: model.forward(*batch, training=False), lambda *_: model.backward()):
        with model.hooks.listen(action, "block.0.q"), pytest.raises(HookError, match=r"block\.0\.q, .* RuntimeError: "):
            model.forward(*batch)
    with model.hooks.listen(lambda *_: model.forward(*batch), "grad:block.0.q"):
        model.forward(*batch)
        with pytest.raises(HookError, match="RuntimeError: a listener cannot run the model"):
            model.backward()
    assert model.forward(*batch)[1] == loss


def test_operations_of_one_split_and_other_shares():
    """An operation that reads what other threads wrote before waits for them, also where the kind of split is one."""
    plan = Plan(CompiledBackend(8))
    x, y, z = (np.zeros((64, 50, 40), f4) for _ in range(3))
    whole = (1, 64 * 50, 40)
    plan.add("residual_forward", y, x, x)
    plan.add("residual_forward", z.reshape(whole), y.reshape(whole), y.reshape(whole))
    for i in range(50):
        x[:] = i
        plan.run()
        assert (z == 4 * i).all()


def test_gradients_that_are_not_finite_reach_the_listener(odd_config, make_batch):
    """At the site `clip` the gradients are as they came, so that what was first can still be seen."""
    model, batch = MiniGPT(odd_config), make_batch(odd_config, 2)
    optimizer = AdamW(backend=model.backend)
    model.forward(*batch)
    grads = model.backward()
    grads["block.0.attn.q.weight"][1, 2] = np.inf
    before, seen = grads.flat.copy(), []
    with optimizer.hooks.listen(lambda site, tensor: seen.append(tensor.copy()), "clip"):
        optimizer.step(model.params, grads)
    assert np.array_equal(seen[0], before)
