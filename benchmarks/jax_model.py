"""MiniGPT in JAX: the model of minitrain/passes.py as one jitted step that is given its state and gives it back.

Parameters are a dictionary under minitrain's names, query, key and value as one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYERNORM_EPS = 1e-5
ROPE_BASE = 10000.0

Sizes = Mapping[str, Any]
Params = dict[str, jax.Array]
State = tuple[Params, Params, Params]
"""Parameters, m and v."""


def load_state(weights: Mapping[str, np.ndarray[Any, Any]]) -> State:
    """State 0 of minitrain's tensors by name."""
    named = dict(weights)
    for name in [n for n in named if n.endswith("attn.q.weight")]:
        parts = [named.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        named[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
    zeros = {name: np.zeros_like(array) for name, array in named.items()}
    return tuple({name: jnp.array(a) for name, a in tree.items()} for tree in (named, zeros, zeros))


def loss_of(p: Params, c: Sizes, tokens: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
    """Mean cross entropy over the ``counted`` (B, T) targets."""
    H = c["n_head"]
    B, T = tokens.shape
    cosine, sine = _rotation(T, c["d_model"] // H)
    causal = np.tril(np.ones((T, T), np.bool_))

    def norm(x: jax.Array, name: str) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        rstd = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + LAYERNORM_EPS)
        return centred * rstd * p[f"{name}.weight"] + p[f"{name}.bias"]

    def rotate(x: jax.Array) -> jax.Array:
        even, odd = x[..., ::2], x[..., 1::2]
        return jnp.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).reshape(x.shape)

    def attention(x: jax.Array, b: str) -> jax.Array:
        q, k, v = (x @ p[f"{b}.attn.qkv.weight"].T).reshape(B, T, 3, H, -1).transpose(2, 0, 3, 1, 4)
        scores = rotate(q) @ rotate(k).swapaxes(2, 3) * q.shape[-1] ** -0.5
        heads = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v
        return heads.swapaxes(1, 2).reshape(B, T, -1) @ p[f"{b}.attn.out.weight"].T

    def feed_forward(x: jax.Array, b: str) -> jax.Array:
        inner = jax.nn.gelu(x @ p[f"{b}.ffn.up.weight"].T + p[f"{b}.ffn.up.bias"], approximate=True)
        return inner @ p[f"{b}.ffn.down.weight"].T + p[f"{b}.ffn.down.bias"]

    x = p["embed.weight"][tokens]
    for i in range(c["n_layer"]):
        b = f"block.{i}"
        x = x + attention(norm(x, f"{b}.ln1"), b)
        x = x + feed_forward(norm(x, f"{b}.ln2"), b)
    logits = norm(x, "ln_f") @ p["embed.weight"].T + p["lm_head.bias"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.where(counted, losses, 0.0).sum() / counted.sum()


def train_step(c: Sizes, o: Sizes) -> Callable[..., tuple[State, jax.Array, jax.Array]]:
    """(state, lr, t, tokens, targets, counted) -> state, loss, gradient norm before clipping; t counts from 1.

    ``c`` and ``o`` are minitrain's ``model`` and ``optimizer`` sections. The state that is given is used up.
    """

    def step(
        state: State, lr: jax.Array, t: jax.Array, tokens: jax.Array, targets: jax.Array, counted: jax.Array
    ) -> tuple[State, jax.Array, jax.Array]:
        p, m, v = state
        loss, grads = jax.value_and_grad(loss_of)(p, c, tokens, targets, counted)
        norm = jnp.sqrt(sum((g * g).sum() for g in grads.values()))
        factor = jnp.minimum(1.0, o["clip"] / (norm + 1e-12))
        first, second = 1 - o["beta1"] ** t, 1 - o["beta2"] ** t

        def update(name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
            g = grads[name] * factor
            m1 = o["beta1"] * m[name] + (1 - o["beta1"]) * g
            v1 = o["beta2"] * v[name] + (1 - o["beta2"]) * g * g
            decay = o["weight_decay"] if g.ndim == 2 else 0.0
            moved = lr / first * m1 / (jnp.sqrt(v1 / second) + o["eps"])
            return p[name] * (1 - lr * decay) - moved, m1, v1

        new = {name: update(name) for name in p}
        return tuple({name: new[name][k] for name in new} for k in range(3)), loss, norm

    return jax.jit(step, donate_argnums=0)


def _rotation(T: int, D: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Cosines and sines (T, D/2) of position * base^(-2i/D): computed in double, kept in single precision."""
    angle = np.arange(T)[:, None] * ROPE_BASE ** (-np.arange(0, D, 2) / D)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
