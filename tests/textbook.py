"""The model as a textbook has it, on a tape in double precision: what the engine's gradients are held against.

Imported by tests/test_model.py.
"""

from __future__ import annotations

import math

import numpy as np

# A tape: values in double precision that know how to pass a gradient on


class Var:
    """A value and what it was made of. Gradients follow from a dozen primitive operations and the chain rule; none of
    the formulas of the engine's backward kernels stands here."""

    def __init__(self, value, parents=()):
        self.value, self.parents, self.grad = np.asarray(value, np.float64), parents, 0.0

    def __add__(self, other):
        other = other if isinstance(other, Var) else Var(other)
        return Var(self.value + other.value, ((self, lambda g: g), (other, lambda g: g)))

    def __mul__(self, other):
        other = other if isinstance(other, Var) else Var(other)
        a, b = self.value, other.value
        return Var(a * b, ((self, lambda g: g * b), (other, lambda g: g * a)))

    def __sub__(self, other):
        return self + other * -1.0

    def __matmul__(self, other):
        a, b = self.value, other.value
        return Var(a @ b, ((self, lambda g: g @ b.swapaxes(-1, -2)), (other, lambda g: a.swapaxes(-1, -2) @ g)))

    def map(self, value, slope):
        """An elementwise function, given by its values and its derivatives here."""
        return Var(value, ((self, lambda g: g * slope),))

    def power(self, n):
        return self.map(self.value**n, n * self.value ** (n - 1))

    def exp(self):
        return self.map(np.exp(self.value), np.exp(self.value))

    def log(self):
        return self.map(np.log(self.value), 1 / self.value)

    def tanh(self):
        return self.map(np.tanh(self.value), 1 - np.tanh(self.value) ** 2)

    def sum(self, axis=-1):
        shape = self.value.shape
        return Var(self.value.sum(axis, keepdims=True), ((self, lambda g: np.broadcast_to(g, shape)),))

    def mean(self):
        return self.sum() * (1 / self.value.shape[-1])

    def reshape(self, *shape):
        old = self.value.shape
        return Var(self.value.reshape(shape), ((self, lambda g: g.reshape(old)),))

    def transpose(self, *axes):
        return Var(self.value.transpose(axes), ((self, lambda g: g.transpose(np.argsort(axes))),))

    def __getitem__(self, index):
        def scatter(g):
            whole = np.zeros_like(self.value)
            if index[0] is ...:
                whole[index] = g
            else:
                np.add.at(whole, index, g)
            return whole

        return Var(self.value[index], ((self, scatter),))

    def backward(self):
        order, seen = [], set()

        def visit(node):
            if id(node) not in seen:
                seen.add(id(node))
                for parent, _ in node.parents:
                    visit(parent)
                order.append(node)

        visit(self)
        self.grad = np.ones_like(self.value)
        for node in reversed(order):
            for parent, pass_on in node.parents:
                g = pass_on(node.grad)
                extra = tuple(range(g.ndim - parent.value.ndim))
                g = g.sum(extra) if extra else g
                widened = tuple(i for i, n in enumerate(parent.value.shape) if n == 1 and g.shape[i] != 1)
                parent.grad = parent.grad + (g.sum(widened, keepdims=True) if widened else g)


def norm(x, weight, bias):
    centred = x - x.mean()
    return centred * ((centred * centred).mean() + 1e-5).power(-0.5) * weight + bias


def rotate(x):
    """Pairs (2i, 2i+1) of the last axis as complex numbers, times e^(i angle)."""
    T, D = x.value.shape[-2:]
    angle = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(D // 2) / D)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle))
    places = np.zeros((2, D // 2, D))
    places[0, np.arange(D // 2), np.arange(0, D, 2)] = places[1, np.arange(D // 2), np.arange(1, D, 2)] = 1
    return turned[0] @ Var(places[0]) + turned[1] @ Var(places[1])


def textbook(c, params, batch, masks=None):
    """The mean loss as a Var, and the parameters as Vars: z = x + Attn(LN(x)); y = z + FFN(LN(z)), in float64."""
    inputs, targets, attn_pad_mask, loss_mask = batch
    (B, T), H, D = inputs.shape, c.n_head, c.d_model // c.n_head
    p = {name: Var(value) for name, value in params.items()}
    masks = masks or [1.0] * (2 * c.n_layer + 1)
    seen = np.tril(np.ones((T, T), bool)) & attn_pad_mask[:, None, None, :]

    def heads(x):
        return x.reshape(B, T, H, D).transpose(0, 2, 1, 3)

    def linear(x, name):
        y = x @ p[f"{name}.weight"].transpose(1, 0)
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    x = p["embed.weight"][inputs,] * masks[0]
    for i in range(c.n_layer):
        b = f"block.{i}"
        h = norm(x, p[f"{b}.ln1.weight"], p[f"{b}.ln1.bias"])
        q, k, v = (heads(linear(h, f"{b}.attn.{n}")) for n in "qkv")
        score = (rotate(q) @ rotate(k).transpose(0, 1, 3, 2)) * D**-0.5
        e = (score - np.where(seen, score.value, -np.inf).max(-1, keepdims=True)).exp() * seen
        o = (e * e.sum().power(-1) @ v).transpose(0, 2, 1, 3).reshape(B, T, c.d_model)
        x = x + linear(o, f"{b}.attn.out") * masks[2 * i + 1]
        h = linear(norm(x, p[f"{b}.ln2.weight"], p[f"{b}.ln2.bias"]), f"{b}.ffn.up")
        gelu = h * 0.5 * (((h + h.power(3) * 0.044715) * math.sqrt(2 / math.pi)).tanh() + 1.0)
        x = x + linear(gelu, f"{b}.ffn.down") * masks[2 * i + 2]
    x = norm(x, p["ln_f.weight"], p["ln_f.bias"])
    head = p["embed.weight"] if c.tie_weights else p["lm_head.weight"]
    logits = x @ head.transpose(1, 0) + p["lm_head.bias"]
    shifted = logits - logits.value.max(-1, keepdims=True)
    picked = (shifted - shifted.exp().sum().log())[np.arange(B)[:, None], np.arange(T), targets]
    loss = (picked * loss_mask).reshape(1, -1).sum() * (-1 / loss_mask.sum())
    return loss, p, logits
