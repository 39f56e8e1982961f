"""The NumPy twin of every kernel: same name, same arguments, the formula as it stands in a textbook.

The twins are the oracle of the tests (in float64) and a second backend (``training.backend: reference``, float32).
Their bits are their own: sums run in NumPy's order and exp and log are NumPy's. They write into the outputs they are
given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.rng import philox

F = NDArray[Any]


def _heads(x: F, heads: int) -> F:
    """(B, T, C) -> (B, H, T, D), a view."""
    B, T, C = x.shape
    return x.reshape(B, T, heads, C // heads).transpose(0, 2, 1, 3)


def _columns(x: F) -> F:
    """(B, H, T, D) -> (B, T, C)."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


# ---------------------------------------------------------------------------------------------- linear


def linear_forward(y: F, x: F, weight: F, bias: F | None) -> None:
    y[:] = x @ weight.T
    if bias is not None:
        y += bias


def linear_backward_input(dx: F, dy: F, weight: F, accumulate: int) -> None:
    dx[:] = dx + dy @ weight if accumulate else dy @ weight


def linear_backward_weight(dweight: F, weight: F | None, dy: F, x: F) -> None:
    dweight[:] = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def bias_backward(dbias: F, dy: F) -> None:
    dbias[:] = dy.sum(1)


def sum_sequences(total: F, partial: F) -> None:
    total[:] = partial.sum(0)


# ---------------------------------------------------------------------------------------------- layers


def embedding_forward(x: F, tokens: F, weight: F) -> None:
    x[:] = weight[tokens]


def embedding_backward(dweight: F, tokens: F, dx: F, accumulate: int) -> None:
    if not accumulate:
        dweight[:] = 0
    np.add.at(dweight, tokens.ravel(), dx.reshape(-1, dx.shape[-1]))


def layernorm_forward(y: F, mean: F, rstd: F, x: F, gamma: F, beta: F, eps: float) -> None:
    mean[:] = x.mean(-1)
    centred = x - mean[..., None]
    rstd[:] = 1 / np.sqrt((centred * centred).mean(-1) + x.dtype.type(eps))
    rstd[rstd == 0] = np.nan  # the variance overflowed: 0 would hide it behind beta
    y[:] = centred * rstd[..., None] * gamma + beta


def layernorm_backward(
    dx: F, dgamma: F, dbeta: F, dy: F, dresidual: F | None, x: F, mean: F, rstd: F, gamma: F
) -> None:
    xhat = (x - mean[..., None]) * rstd[..., None]
    t = dy * gamma
    dgamma[:] = (dy * xhat).sum(1)
    dbeta[:] = dy.sum(1)
    inner = rstd[..., None] * (t - t.mean(-1, keepdims=True) - xhat * (t * xhat).mean(-1, keepdims=True))
    dx[:] = inner if dresidual is None else dresidual + inner


def gelu_forward(y: F, slope: F, x: F) -> None:
    f = x.dtype.type
    root, cubic = f(np.sqrt(2 / np.pi)), f(0.044715)
    t = np.tanh(root * (x + cubic * x * x * x))
    half = f(0.5)
    y[:] = half * x * (1 + t)
    slope[:] = half * (1 + t) + half * x * (1 - t * t) * root * (1 + 3 * cubic * x * x)


def gelu_backward(dx: F, dy: F, slope: F) -> None:
    dx[:] = dy * slope


def residual_forward(y: F, x: F, branch: F) -> None:
    y[:] = x + branch


def rope(x: F, cosine: F, sine: F, direction: float) -> None:
    swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    x[:] = x * cosine + swapped * (x.dtype.type(direction) * sine)


def dropout(y: F, x: F, key: F, site: float, rate: float) -> None:
    counter = np.zeros(((x.size + 3) // 4, 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 2] = int(site)
    counter[:, 3] = key[2]
    words = philox(counter, (int(key[0]), int(key[1]))).ravel()[: x.size].reshape(x.shape)
    kept = words >= np.uint32(rate * 4294967296.0)
    y[:] = x * np.where(kept, x.dtype.type(1 / (1 - rate)), x.dtype.type(0))


# ---------------------------------------------------------------------------------------------- attention


def _seen(key_mask: F, T: int) -> F:
    """(B, 1, T, T): query row i sees key column j."""
    seen: F = np.tril(np.ones((T, T), bool)) & (key_mask[:, None, None, :] != 0)
    return seen


def attention_forward(o: F, p: F, q: F, k: F, v: F, key_mask: F) -> None:
    H, T, D = p.shape[1], q.shape[1], q.shape[2] // p.shape[1]
    seen = _seen(key_mask, T)
    s = _heads(q, H) @ _heads(k, H).transpose(0, 1, 3, 2) * q.dtype.type(1 / np.sqrt(D))
    top = np.where(seen, s, -np.inf).max(-1, keepdims=True)
    e = np.where(seen, np.exp(s - top), s.dtype.type(0))
    total = e.sum(-1, keepdims=True)
    p[:] = e * np.where(total == 0, 0, 1 / total)  # a query that sees no key attends to nothing
    o[:] = _columns(p @ _heads(v, H))


def attention_backward(dq: F, dk: F, dv: F, dp: F, do: F, p: F, q: F, k: F, v: F) -> None:
    H, T, D = p.shape[1], q.shape[1], q.shape[2] // p.shape[1]
    dv[:] = _columns(p.transpose(0, 1, 3, 2) @ _heads(do, H))
    dp[:] = np.where(np.tril(np.ones((T, T), bool)), _heads(do, H) @ _heads(v, H).transpose(0, 1, 3, 2), 0)
    ds = q.dtype.type(1 / np.sqrt(D)) * p * (dp - (dp * p).sum(-1, keepdims=True))
    dq[:] = _columns(ds @ _heads(k, H))
    dk[:] = _columns(ds.transpose(0, 1, 3, 2) @ _heads(q, H))


# ---------------------------------------------------------------------------------------------- loss


def cross_entropy_forward(losses: F, softmax: F, log_softmax: F, logits: F, targets: F, loss_mask: F) -> None:
    shifted = logits - logits.max(-1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(-1, keepdims=True)
    softmax[:] = e / total
    log_softmax[:] = shifted - np.log(total)
    losses[:] = np.where(loss_mask != 0, -np.take_along_axis(log_softmax, targets[..., None], -1)[..., 0], 0)


def mean_loss(result: F, losses: F, loss_mask: F) -> None:
    counted = losses[loss_mask != 0].astype(np.float64)
    result[1] = counted.sum()
    result[2] = len(counted)
    result[0] = result[1] / result[2]


def cross_entropy_backward(dlogits: F, softmax: F, targets: F, loss_mask: F, result: F) -> None:
    onehot = np.zeros_like(softmax)
    np.put_along_axis(onehot, targets[..., None], 1, -1)
    share = softmax.dtype.type(1 / result[2])
    dlogits[:] = np.where((loss_mask != 0)[..., None], (softmax - onehot) * share, 0)


# ---------------------------------------------------------------------------------------------- update


def square_sums(sums: F, g: F) -> None:
    for b in range(len(sums)):
        block = g[b * 4096 : (b + 1) * 4096]
        sums[b] = (block * block).sum()


def norm(result: F, sums: F) -> None:
    result[0] = np.sqrt(sums.sum())


def scale(g: F, factor: F) -> None:
    g *= g.dtype.type(factor[0])


def clamp(g: F, limit: F) -> None:
    g[:] = np.clip(g, -g.dtype.type(limit[0]), g.dtype.type(limit[0]))


def adamw(theta: F, m: F, v: F, g: F, offsets: F, decays: F, hyper: F) -> None:
    _, beta1, beta2, *_ = (float(h) for h in hyper)
    f = theta.dtype.type
    m[:] = f(beta1) * m + f(1 - beta1) * g
    v[:] = f(beta2) * v + f(1 - beta2) * g * g
    adamw_theta(theta, m, v, offsets, decays, hyper)


def adamw_copying(
    theta: F,
    m: F,
    v: F,
    theta_copy: F,
    m_copy: F,
    v_copy: F,
    sums: F,
    todo: F,
    g: F,
    offsets: F,
    decays: F,
    hyper: F,
) -> None:
    state, copies = np.stack([theta, m, v]), (theta_copy, m_copy, v_copy)
    left = state.copy()
    adamw(left[0], left[1], left[2], g, offsets, decays, hyper)
    for b, way in enumerate(todo):
        block = slice(4096 * b, 4096 * b + 4096)
        if way == 1 or (way == 2 and (_checksums(state[:, block]) == sums[b, :3]).all()):
            for into, copy, x in zip((theta, m, v), copies, left, strict=True):
                into[block] = copy[block] = x[block]
            sums[b] = *_checksums(left[:, block]), not np.isfinite(left[:, block]).all()
            todo[b] = 0


def _checksums(x: F) -> F:
    weights = np.arange(1, 2 * x.shape[1], 2, dtype=np.uint32)
    bits = x.astype(np.float32).view(np.uint32)
    sums: F = ((bits ^ bits >> 15) * weights).sum(1, dtype=np.uint32)
    return sums


def adamw_theta(theta: F, m: F, v: F, offsets: F, decays: F, hyper: F) -> None:
    lr, beta1, beta2, eps, decay, t = (float(h) for h in hyper)
    f = theta.dtype.type
    step = m * f(1 / (1 - beta1**t)) / (np.sqrt(v * f(1 / (1 - beta2**t))) + f(eps))
    decaying = np.repeat(decays != 0, np.diff(offsets))
    theta -= f(lr) * (step + np.where(decaying, f(decay), f(0)) * theta)


def exp(y: F, x: F) -> None:
    y[:] = np.exp(x)


def log(y: F, x: F) -> None:
    y[:] = np.log(x)
