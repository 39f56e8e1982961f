"""MiniGPT in NumPy by hand: the model of minitrain/passes.py, forward and backward, on OpenBLAS.

Written as one who knows NumPy would: float32 throughout, one matrix product for query, key and value, products and
elementwise work into arrays that are there already, gradients and moments in one flat buffer each, which the
optimizer walks in pieces that fit into the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYERNORM_EPS = 1e-5
ROPE_BASE = 10000.0
GELU_SLOPE, GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
CHUNK = 1 << 15
"""Elements of the flat buffers that the optimizer treats at a time: four arrays of it fit into a second-level cache."""

Array = NDArray[Any]
Sizes = Mapping[str, Any]


def parameter_shapes(c: Sizes) -> dict[str, tuple[int, ...]]:
    """minitrain's table with query, key and value as one matrix, which they are in memory."""
    C, F, V = c["d_model"], c["d_ff"], c["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (V, C)}
    for i in range(c["n_layer"]):
        block: dict[str, tuple[int, ...]] = {
            "ln1.weight": (C,),
            "ln1.bias": (C,),
            "attn.qkv.weight": (3 * C, C),
            "attn.out.weight": (C, C),
            "ln2.weight": (C,),
            "ln2.bias": (C,),
            "ffn.up.weight": (F, C),
            "ffn.up.bias": (F,),
            "ffn.down.weight": (C, F),
            "ffn.down.bias": (C,),
        }
        shapes |= {f"block.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,), "lm_head.bias": (V,)}


class NumpyMiniGPT:
    """``c`` is minitrain's ``model`` section (tied head, no dropout), ``weights`` its tensors by name.

    ``p`` and ``g`` are the parameters and gradients by name, views of ``flat`` and ``grads`` (P,).
    """

    def __init__(self, c: Sizes, weights: Mapping[str, Array]) -> None:
        if c["dropout"] or not c["tie_weights"]:
            raise ValueError("expected a tied head and no dropout")
        self.c, self.shapes = c, parameter_shapes(c)
        self.flat = np.concatenate([_whole(weights, name).ravel() for name in self.shapes])
        self.grads = np.zeros_like(self.flat)
        self.p, self.g = self.views(self.flat), self.views(self.grads)
        self.turns = _turns(c["max_seq_len"], c["d_model"] // c["n_head"])
        self.hidden = np.triu(np.full((c["max_seq_len"],) * 2, -np.inf, np.float32), 1)

    def views(self, flat: Array) -> dict[str, Array]:
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        parts = np.split(flat, ends[:-1])
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def loss_and_gradients(self, tokens: Array, targets: Array, counted: Array) -> float:
        """Mean cross entropy over the ``counted`` (B, T) targets; its gradients are then in ``g``."""
        p, g = self.p, self.g
        rows = tokens.reshape(-1)
        x, saved = p["embed.weight"][rows], []
        for i in range(self.c["n_layer"]):
            x, attention = self._attention(x, f"block.{i}.", tokens.shape)
            x, feed_forward = self._feed_forward(x, f"block.{i}.")
            saved.append((attention, feed_forward))
        z, norm = _layernorm(x, p["ln_f.weight"], p["ln_f.bias"])
        logits = z @ p["embed.weight"].T
        logits += p["lm_head.bias"]

        logits -= logits.max(axis=1, keepdims=True)
        wanted, places, weight = targets.reshape(-1), np.arange(len(rows)), counted.reshape(-1)
        count = np.float32(weight.sum())
        picked = logits[places, wanted]
        probs = np.exp(logits, out=logits)
        total = probs.sum(axis=1, keepdims=True)
        loss = float(((np.log(total[:, 0]) - picked) * weight).sum() / count)

        dlogits = np.divide(probs, total, out=probs)
        dlogits[places, wanted] -= 1
        dlogits *= (weight / count).astype(np.float32)[:, None]
        np.matmul(dlogits.T, z, out=g["embed.weight"])
        dlogits.sum(axis=0, out=g["lm_head.bias"])
        dx = self._layernorm_backward(dlogits @ p["embed.weight"], norm, "ln_f")
        for i in reversed(range(self.c["n_layer"])):
            attention, feed_forward = saved[i]
            dx += self._feed_forward_backward(dx, f"block.{i}.", feed_forward)
            dx += self._attention_backward(dx, f"block.{i}.", tokens.shape, attention)
        np.add.at(g["embed.weight"], rows, dx)
        return loss

    def _attention(self, x: Array, b: str, shape: tuple[int, ...]) -> tuple[Array, tuple[Array, ...]]:
        (B, T), C, H = shape, self.c["d_model"], self.c["n_head"]
        a, norm = _layernorm(x, self.p[b + "ln1.weight"], self.p[b + "ln1.bias"])
        qkv = (a @ self.p[b + "attn.qkv.weight"].T).reshape(B, T, 3, H, C // H)
        _pairs(qkv[:, :, :2])[...] *= self.turns[:T]
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (B, H, T, D) each
        scores = q @ k.swapaxes(2, 3)
        scores *= np.float32((C // H) ** -0.5)
        scores += self.hidden[:T, :T]
        scores -= scores.max(axis=3, keepdims=True)
        probs = np.exp(scores, out=scores)
        probs /= probs.sum(axis=3, keepdims=True)
        heads = (probs @ v).swapaxes(1, 2).reshape(-1, C)
        y = heads @ self.p[b + "attn.out.weight"].T
        y += x
        return y, (a, *norm, q, k, v, probs, heads)

    def _attention_backward(self, dy: Array, b: str, shape: tuple[int, ...], saved: tuple[Array, ...]) -> Array:
        (B, T), C, H = shape, self.c["d_model"], self.c["n_head"]
        a, normed, rstd, q, k, v, probs, heads = saved
        np.matmul(dy.T, heads, out=self.g[b + "attn.out.weight"])
        dheads = (dy @ self.p[b + "attn.out.weight"]).reshape(B, T, H, -1).swapaxes(1, 2)
        dqkv = np.empty((B, T, 3, H, C // H), np.float32)
        dq, dk, dv = dqkv.transpose(2, 0, 3, 1, 4)
        np.matmul(probs.swapaxes(2, 3), dheads, out=dv)
        dscores = dheads @ v.swapaxes(2, 3)
        dscores -= np.einsum("bhts,bhts->bht", dscores, probs)[..., None]
        dscores *= probs
        dscores *= np.float32((C // H) ** -0.5)
        np.matmul(dscores, k, out=dq)
        np.matmul(dscores.swapaxes(2, 3), q, out=dk)
        _pairs(dqkv[:, :, :2])[...] *= self.turns[:T].conj()
        flat = dqkv.reshape(-1, 3 * C)
        np.matmul(flat.T, a, out=self.g[b + "attn.qkv.weight"])
        return self._layernorm_backward(flat @ self.p[b + "attn.qkv.weight"], (normed, rstd), b + "ln1")

    def _feed_forward(self, x: Array, b: str) -> tuple[Array, tuple[Array, ...]]:
        """GELU in its tanh form, u/2 (1 + tanh z), as u * sigmoid(2z)."""
        a, norm = _layernorm(x, self.p[b + "ln2.weight"], self.p[b + "ln2.bias"])
        u = a @ self.p[b + "ffn.up.weight"].T
        u += self.p[b + "ffn.up.bias"]
        gate = u * u
        gate *= np.float32(-GELU_SLOPE * GELU_CUBE)
        gate -= np.float32(GELU_SLOPE)
        gate *= u
        with np.errstate(over="ignore"):
            np.exp(gate, out=gate)
        gate += 1
        np.reciprocal(gate, out=gate)
        gelu = u * gate
        y = gelu @ self.p[b + "ffn.down.weight"].T
        y += self.p[b + "ffn.down.bias"]
        y += x
        return y, (a, *norm, u, gate, gelu)

    def _feed_forward_backward(self, dy: Array, b: str, saved: tuple[Array, ...]) -> Array:
        a, normed, rstd, u, gate, gelu = saved
        np.matmul(dy.T, gelu, out=self.g[b + "ffn.down.weight"])
        dy.sum(axis=0, out=self.g[b + "ffn.down.bias"])
        # d gelu/du = gate + u gate (1 - gate) d(2z)/du, where d(2z)/du = slope (1 + 3 cube u^2)
        slope = u * u
        slope *= np.float32(3 * GELU_SLOPE * GELU_CUBE)
        slope += np.float32(GELU_SLOPE)
        slope *= gelu
        slope *= 1 - gate
        slope += gate
        du = dy @ self.p[b + "ffn.down.weight"]
        du *= slope
        np.matmul(du.T, a, out=self.g[b + "ffn.up.weight"])
        du.sum(axis=0, out=self.g[b + "ffn.up.bias"])
        return self._layernorm_backward(du @ self.p[b + "ffn.up.weight"], (normed, rstd), b + "ln2")

    def _layernorm_backward(self, dy: Array, saved: tuple[Array, ...], name: str) -> Array:
        normed, rstd = saved
        np.einsum("nc,nc->c", dy, normed, out=self.g[name + ".weight"])
        dy.sum(axis=0, out=self.g[name + ".bias"])
        dy *= self.p[name + ".weight"]
        along = np.einsum("nc,nc->n", dy, normed)[:, None] / np.float32(dy.shape[1])
        dy -= dy.mean(axis=1, keepdims=True)
        dy -= normed * along
        dy *= rstd
        return dy


class AdamW:
    """Global clipping, then AdamW with decay on matrices only; ``c`` is minitrain's ``optimizer`` section."""

    def __init__(self, model: NumpyMiniGPT, c: Sizes) -> None:
        self.model, self.c, self.updates = model, c, 0
        self.m, self.v = np.zeros_like(model.flat), np.zeros_like(model.flat)
        decays = np.concatenate([np.full(math.prod(s), len(s) == 2) for s in model.shapes.values()])
        self.decay = decays * np.float32(c["weight_decay"])

    def step(self, lr: float) -> float:
        """Update in place; the gradient norm before clipping."""
        c, grads = self.c, self.model.grads
        parts = [slice(start, start + CHUNK) for start in range(0, len(grads), CHUNK)]
        norm = math.sqrt(sum(float(np.dot(grads[part], grads[part])) for part in parts))
        factor = np.float32(min(1.0, c["clip"] / (norm + 1e-12)))
        self.updates += 1
        beta1, beta2 = np.float32(c["beta1"]), np.float32(c["beta2"])
        rate = np.float32(lr / (1 - c["beta1"] ** self.updates))
        correction = np.float32(1 / math.sqrt(1 - c["beta2"] ** self.updates))
        for part in parts:
            p, g, m, v = self.model.flat[part], grads[part], self.m[part], self.v[part]
            g *= factor
            m *= beta1
            m += (1 - beta1) * g
            np.multiply(g, g, out=g)
            g *= 1 - beta2
            v *= beta2
            v += g
            size = np.sqrt(v, out=g)
            size *= correction
            size += np.float32(c["eps"])
            np.divide(m, size, out=size)
            size *= rate
            p -= p * (np.float32(lr) * self.decay[part])
            p -= size
        return norm


def _layernorm(x: Array, weight: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    normed = x - x.mean(axis=1, keepdims=True)
    rstd = np.einsum("nc,nc->n", normed, normed)[:, None] / np.float32(x.shape[1])
    rstd += np.float32(LAYERNORM_EPS)
    np.sqrt(rstd, out=rstd)
    np.reciprocal(rstd, out=rstd)
    normed *= rstd
    y = normed * weight
    y += bias
    return y, (normed, rstd)


def _pairs(x: Array) -> Array:
    """(..., D) as (..., D/2) complex numbers, a view: a rotary position turns a pair of columns."""
    return x.view(np.complex64)


def _turns(T: int, D: int) -> Array:
    """exp(i * position * base^(-2i/D)), (T, 1, 1, D/2): computed in double, kept in single precision."""
    frequency = ROPE_BASE ** (-np.arange(0, D, 2) / D)
    return np.exp(1j * np.arange(T)[:, None] * frequency).astype(np.complex64)[:, None, None]


def _whole(weights: Mapping[str, Array], name: str) -> Array:
    if name.endswith("attn.qkv.weight"):
        return np.concatenate([weights[name.replace("qkv", letter)] for letter in "qkv"])
    return weights[name]
