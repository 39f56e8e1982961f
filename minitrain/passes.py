"""The passes of the model, each written as the list of kernels that it runs.

z = x + Attn(LN(x)); y = z + FFN(LN(z)); a final LN; the head tied to the embedding. Rotary positions on queries and
keys, GELU in the tanh form, cross entropy as the mean over the tokens in the loss mask.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain import elementary
from minitrain._ext.engine import Inputs
from minitrain._ext.plan import Backend, Plan
from minitrain.sections import ModelConfig
from minitrain.tensors import Tensors, activation_table, gradient_table, zeros

LAYERNORM_EPS = 1e-5
ROPE_BASE = 10000.0

Array = NDArray[Any]


def rope_tables(T: int, C: int, H: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and signed sines (T, C) of position * base^(-2i/D) for the pair i of each head; computed in double."""
    D = C // H
    cosine, sine = np.empty((T, D)), np.empty((T, D))
    for i in range(D // 2):
        frequency = elementary.exp(-2 * i / D * elementary.log(ROPE_BASE))
        for t in range(T):
            cosine[t, 2 * i : 2 * i + 2] = elementary.cos(t * frequency)
            sine[t, 2 * i + 1] = elementary.sin(t * frequency)
            sine[t, 2 * i] = -sine[t, 2 * i + 1]
    tables = zeros(2, T, C)
    tables[:] = np.tile(cosine, H), np.tile(sine, H)
    return tables[0], tables[1]


class Passes:
    """The memory and the plans of one batch shape: forward (training and evaluation) and backward."""

    def __init__(
        self, c: ModelConfig, backend: Backend, params: Tensors, grads: Tensors, key: Array, B: int, T: int
    ) -> None:
        self.tokens, self.targets = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
        self.attn_pad_mask, self.loss_mask = np.ones((B, T), np.uint8), np.ones((B, T), np.uint8)
        self.inputs = Inputs(self.tokens, self.targets, self.attn_pad_mask, self.loss_mask, c.vocab_size)
        self.loss = np.zeros(3)  # mean, sum, number of tokens
        self.arrays: dict[str, Array] = {a.name: zeros(*a.shape) for a in activation_table(c, B, T)}
        self._c, self._backend, self._key, self._shape = c, backend, key, (B, T)
        self._params, self._grads = params, grads
        self._rope = rope_tables(T, c.d_model, c.n_head)
        self.evaluation = self._forward(Plan(backend), rate=0.0)
        self.training = self._forward(Plan(backend), rate=c.dropout) if c.dropout else self.evaluation

    @cached_property
    def backward(self) -> Plan:
        """Made at the first backward pass: shapes that are only evaluated need no gradients."""
        for a in gradient_table(self._c, *self._shape):
            self.arrays[a.name] = zeros(*a.shape)
        return self._backward(Plan(self._backend), rate=self._c.dropout)

    def _block_input(self, i: int) -> str:
        return f"block.{i - 1}.out" if i else "embed"

    @property
    def _head(self) -> str:
        return "embed.weight" if self._c.tie_weights else "lm_head.weight"

    def _forward(self, plan: Plan, rate: float) -> Plan:
        c, a, p = self._c, self.arrays, self._params
        add = plan.add

        def site(name: str) -> None:
            plan.site(name, a[name])

        def norm(y: str, x: str) -> None:
            add(
                "layernorm_forward",
                a[y],
                a[f"{y}.mean"],
                a[f"{y}.rstd"],
                a[x],
                p[f"{y}.weight"],
                p[f"{y}.bias"],
                LAYERNORM_EPS,
            )
            site(y)

        def drop(x: str, number: int) -> None:
            if rate:
                add("dropout", a[x], a[x], self._key, number, rate)
            site(x)

        add("embedding_forward", a["embed"], self.tokens, p["embed.weight"])
        drop("embed", 0)
        for i in range(c.n_layer):
            b, x = f"block.{i}", self._block_input(i)
            norm(f"{b}.ln1", x)
            for n in "qkv":
                add("linear_forward", a[f"{b}.{n}"], a[f"{b}.ln1"], p[f"{b}.attn.{n}.weight"], None)
                if n != "v":
                    add("rope", a[f"{b}.{n}"], *self._rope, 1)
                site(f"{b}.{n}")
            heads, probs = a[f"{b}.attn.heads"], a[f"{b}.attn.probs"]
            add("attention_forward", heads, probs, a[f"{b}.q"], a[f"{b}.k"], a[f"{b}.v"], self.attn_pad_mask)
            site(f"{b}.attn.probs")
            add("linear_forward", a[f"{b}.attn.out"], heads, p[f"{b}.attn.out.weight"], None)
            drop(f"{b}.attn.out", 2 * i + 1)
            add("residual_forward", a[f"{b}.mid"], a[x], a[f"{b}.attn.out"])
            norm(f"{b}.ln2", f"{b}.mid")
            add("linear_forward", a[f"{b}.ffn.pre"], a[f"{b}.ln2"], p[f"{b}.ffn.up.weight"], p[f"{b}.ffn.up.bias"])
            site(f"{b}.ffn.pre")
            add("gelu_forward", a[f"{b}.ffn.gelu"], a[f"{b}.ffn.slope"], a[f"{b}.ffn.pre"])
            site(f"{b}.ffn.gelu")
            add(
                "linear_forward",
                a[f"{b}.ffn.out"],
                a[f"{b}.ffn.gelu"],
                p[f"{b}.ffn.down.weight"],
                p[f"{b}.ffn.down.bias"],
            )
            drop(f"{b}.ffn.out", 2 * i + 2)
            add("residual_forward", a[f"{b}.out"], a[f"{b}.mid"], a[f"{b}.ffn.out"])
        norm("ln_f", self._block_input(c.n_layer))
        add("linear_forward", a["logits"], a["ln_f"], p[self._head], p["lm_head.bias"])
        site("logits")
        add(
            "cross_entropy_forward",
            a["losses"],
            a["softmax"],
            a["log_softmax"],
            a["logits"],
            self.targets,
            self.loss_mask,
        )
        site("softmax")
        site("log_softmax")
        add("mean_loss", self.loss, a["losses"], self.loss_mask)
        plan.site("loss", self.loss[:1])
        return plan

    def _backward(self, plan: Plan, rate: float) -> Plan:
        """The forward list upside down.

        A parameter's gradient is a sum over all sequences, so it is queued until they have all been through the block;
        then the block's parameters follow in the order of the table.
        """
        c, a, p = self._c, self.arrays, self._params
        add, queue = plan.add, _Queue(plan, self._grads)

        def site(name: str, tensor: str | None = None) -> None:
            plan.site(f"grad:{name}", a[f"grad:{tensor or name}"])

        def linear(weight: str, bias: str | None, dy: str, x: str) -> None:
            if bias:
                partial = self._partial(bias)
                add("bias_backward", partial, a[dy])
                queue.put(bias, "sum_sequences", partial)
            own = p[weight] if p[weight].flags.writeable else None  # that of a frozen model nobody updates
            queue.put(weight, "linear_backward_weight", own, a[dy], a[x])

        def norm(y: str, x: str, dx: str, dresidual: str | None) -> None:
            dgamma, dbeta = self._partial(f"{y}.weight"), self._partial(f"{y}.bias")
            residual = a[dresidual] if dresidual else None
            statistics = a[f"{y}.mean"], a[f"{y}.rstd"]
            add(
                "layernorm_backward",
                a[dx],
                dgamma,
                dbeta,
                a[f"grad:{y}"],
                residual,
                a[x],
                *statistics,
                p[f"{y}.weight"],
            )
            queue.put(f"{y}.weight", "sum_sequences", dgamma)
            queue.put(f"{y}.bias", "sum_sequences", dbeta)

        def undrop(dy: str, kept: str, number: int) -> str:
            """The gradient before the dropout mask: dy itself where nothing is dropped."""
            if not rate:
                return dy
            add("dropout", a[kept], a[dy], self._key, number, rate)
            return kept

        last = self._block_input(c.n_layer)
        add("cross_entropy_backward", a["grad:logits"], a["softmax"], self.targets, self.loss_mask, self.loss)
        site("logits")
        add("linear_backward_input", a["grad:ln_f"], a["grad:logits"], p[self._head], 0)
        site("ln_f")
        norm("ln_f", last, f"grad:{last}", None)
        linear(self._head, "lm_head.bias", "grad:logits", "ln_f")
        top, queue = queue, _Queue(plan, self._grads)
        for i in reversed(range(c.n_layer)):
            b, x = f"block.{i}", self._block_input(i)
            dout, dmid = f"grad:{b}.out", f"grad:{b}.mid"
            site(f"{b}.ffn.out", f"{b}.out")
            dy = undrop(dout, f"grad:{b}.ffn.kept", 2 * i + 2)
            linear(f"{b}.ffn.down.weight", f"{b}.ffn.down.bias", dy, f"{b}.ffn.gelu")
            add("linear_backward_input", a[f"grad:{b}.ffn.gelu"], a[dy], p[f"{b}.ffn.down.weight"], 0)
            site(f"{b}.ffn.gelu")
            add("gelu_backward", a[f"grad:{b}.ffn.pre"], a[f"grad:{b}.ffn.gelu"], a[f"{b}.ffn.slope"])
            site(f"{b}.ffn.pre")
            linear(f"{b}.ffn.up.weight", f"{b}.ffn.up.bias", f"grad:{b}.ffn.pre", f"{b}.ln2")
            add("linear_backward_input", a[f"grad:{b}.ln2"], a[f"grad:{b}.ffn.pre"], p[f"{b}.ffn.up.weight"], 0)
            site(f"{b}.ln2")
            norm(f"{b}.ln2", f"{b}.mid", dmid, dout)
            site(f"{b}.attn.out", f"{b}.mid")
            dy = undrop(dmid, f"grad:{b}.attn.kept", 2 * i + 1)
            linear(f"{b}.attn.out.weight", None, dy, f"{b}.attn.heads")
            add("linear_backward_input", a[f"grad:{b}.attn.heads"], a[dy], p[f"{b}.attn.out.weight"], 0)
            dq, dk, dv = (a[f"grad:{b}.{n}"] for n in "qkv")
            q, k, v, probs = (a[f"{b}.{n}"] for n in ("q", "k", "v", "attn.probs"))
            add("attention_backward", dq, dk, dv, a[f"grad:{b}.attn.probs"], a[f"grad:{b}.attn.heads"], probs, q, k, v)
            for n in ("attn.probs", "v", "k", "q"):
                site(f"{b}.{n}")
            add("rope", dk, *self._rope, -1)
            add("rope", dq, *self._rope, -1)
            for n in "qkv":
                linear(f"{b}.attn.{n}.weight", None, f"grad:{b}.{n}", f"{b}.ln1")
                weight = p[f"{b}.attn.{n}.weight"]
                add("linear_backward_input", a[f"grad:{b}.ln1"], a[f"grad:{b}.{n}"], weight, int(n != "q"))
            site(f"{b}.ln1")
            norm(f"{b}.ln1", x, f"grad:{x}", dmid)
            queue.add_all()
        site("embed")
        dembed = undrop("grad:embed", "grad:embed.kept", 0)
        top.put("embed.weight", "embedding_backward", self.tokens, a[dembed], int(c.tie_weights))
        top.add_all()
        return plan

    def _partial(self, name: str) -> Array:
        """Sums of a bias or a gain, one row a sequence."""
        return zeros(self._shape[0], *self._params[name].shape)


class _Queue:
    """Gradients of parameters that wait until every sequence has been through a block."""

    def __init__(self, plan: Plan, grads: Tensors) -> None:
        self._plan, self._grads = plan, grads
        self._waiting: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}

    def put(self, parameter: str, kernel: str, *arguments: Any) -> None:
        self._waiting.setdefault(parameter, []).append((kernel, arguments))

    def add_all(self) -> None:
        """In the order of the table; the embedding comes last, because the input gradient does."""
        names = [name for name in self._grads if name in self._waiting]
        for name in sorted(names, key=lambda n: n == "embed.weight"):
            for kernel, arguments in self._waiting[name]:
                self._plan.add(kernel, self._grads[name], *arguments, place=self._grads.place(name))
            self._plan.site(f"grad.{name}", self._grads[name])
        self._waiting.clear()
