"""MiniGPT in PyTorch: the model of minitrain/model.py, in three styles.

``best`` is written for speed in eager mode, ``plain`` as one would write it first, ``compile`` for torch.compile. The
peer of the benchmarks in all three, the oracle of tests/test_torch_twin.py in the first. Nothing of minitrain is
imported: the weights and the sizes come out of the safetensors file that `minitrain.checkpoint.save_model` writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

LAYERNORM_EPS = 1e-5
ROPE_BASE = 10000.0
NOT_COUNTED = -100
"""The target of a position that no loss counts."""

Sizes = Mapping[str, Any]
Style = Literal["plain", "best", "compile"]


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs of columns (2i, 2i + 1) of x (B, T, ..., D) by their position.

    A pair is a complex number, whose product eager mode does in one go. torch.compile has no code for complex
    numbers, but makes one loop of the same in real ones.
    """
    if turns.is_complex():
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)
    cosine, signed_sine = turns
    return x * cosine + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * signed_sine


def fused_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    T = q.shape[-2]
    if seen is None:
        seen = torch.ones(T, T, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Causal attention; one matrix product for query, key and value together."""

    def __init__(self, c: Sizes, style: Style) -> None:
        super().__init__()
        width = c["d_model"]
        self.attend = plain_attention if style == "plain" else fused_attention
        self.heads = c["n_head"]
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor, seen: Tensor | None) -> Tensor:
        B, T, C = x.shape
        qk, v = self.qkv(x).split([2 * C, C], dim=-1)
        qk = rotate(qk.view(B, T, 2, self.heads, -1), turns[..., :T, :, :, :])
        q, k = qk.permute(2, 0, 3, 1, 4)
        y = self.attend(q, k, v.view(B, T, self.heads, -1).transpose(1, 2), seen)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, c: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(c["d_model"], c["d_ff"])
        self.down = nn.Linear(c["d_ff"], c["d_model"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c: Sizes, style: Style) -> None:
        super().__init__()
        self.ln1, self.ln2 = (nn.LayerNorm(c["d_model"], eps=LAYERNORM_EPS) for _ in range(2))
        self.attn, self.ffn = Attention(c, style), FeedForward(c)

    def forward(self, x: Tensor, turns: Tensor, seen: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln1(x), turns, seen)
        return x + self.ffn(self.ln2(x))


class TorchMiniGPT(nn.Module):
    """``c`` is minitrain's ``model`` section. Raises ValueError for dropout: its masks would differ."""

    turns: Tensor

    def __init__(self, c: Sizes, style: Style = "best") -> None:
        super().__init__()
        if c["dropout"]:
            raise ValueError(f"dropout: expected 0, got {c['dropout']}")
        self.embed = nn.Embedding(c["vocab_size"], c["d_model"])
        self.block = nn.ModuleList(Block(c, style) for _ in range(c["n_layer"]))
        self.ln_f = nn.LayerNorm(c["d_model"], eps=LAYERNORM_EPS)
        self.lm_head = nn.Linear(c["d_model"], c["vocab_size"])
        if c["tie_weights"]:
            self.lm_head.weight = self.embed.weight
        turns = _turns(c["max_seq_len"], c["d_model"] // c["n_head"])
        self.register_buffer("turns", _real(turns) if style == "compile" else turns, persistent=False)

    def forward(self, tokens: Tensor, attn_pad_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T).

        Without a mask attention is only causal, which is faster and gives the same loss and gradients when padding
        stands at the end of the rows: no token that counts sees it.
        """
        seen = None
        if attn_pad_mask is not None:
            T = tokens.shape[1]
            seen = attn_pad_mask[:, None, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
        x = self.embed(tokens)
        for block in self.block:
            x = block(x, self.turns, seen)
        return self.lm_head(self.ln_f(x))

    def loss(self, tokens: Tensor, targets: Tensor, attn_pad_mask: Tensor | None = None) -> Tensor:
        """Mean cross entropy over the targets that are not NOT_COUNTED."""
        logits = self(tokens, attn_pad_mask)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_COUNTED)

    def named(self) -> dict[str, Tensor]:
        """The parameters under minitrain's names, as detached views: query, key and value apart."""
        return _apart((name, p.detach()) for name, p in self.named_parameters())

    def named_gradients(self) -> dict[str, Tensor]:
        """The gradients of the last backward pass, likewise."""
        return _apart((name, p.grad) for name, p in self.named_parameters() if p.grad is not None)


def _apart(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    views = {}
    for name, tensor in tensors:
        if name.endswith("attn.qkv.weight"):
            views.update(zip((name.replace("qkv", letter) for letter in "qkv"), tensor.chunk(3), strict=True))
        else:
            views[name] = tensor
    return views


def load_model(path: Path, style: Style = "best") -> TorchMiniGPT:
    """The model of a file of `minitrain.checkpoint.save_model`. Raises ValueError if its tensors do not fit."""
    with safe_open(path, framework="pt") as file:
        model = TorchMiniGPT(json.loads(file.metadata()["minitrain"])["model"], style)
        mine = model.named()
        if sorted(mine) != sorted(file.keys()):
            raise ValueError(f"{path}: expected the tensors {sorted(mine)}, got {sorted(file.keys())}")
        for name, tensor in mine.items():
            tensor.copy_(file.get_tensor(name))
    return model


def adamw(model: nn.Module, c: Sizes, fused: bool = True) -> torch.optim.AdamW:
    """Decoupled decay on matrices only; ``c`` is minitrain's ``optimizer`` section. Every step sets the rate."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": c["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    # None leaves the choice to PyTorch.
    return torch.optim.AdamW(groups, lr=0.0, betas=(c["beta1"], c["beta2"]), eps=c["eps"], fused=fused or None)


def _turns(T: int, width: int) -> Tensor:
    """exp(i * position * base^(-2i/width)), (T, 1, 1, width/2): computed in double, kept in single precision."""
    frequency = ROPE_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None, None]


def _real(turns: Tensor) -> Tensor:
    """The same as cosines and signed sines for every column, (2, T, 1, 1, width)."""
    cosine, sine = turns.real, turns.imag
    return torch.stack([torch.stack([cosine, cosine], -1), torch.stack([-sine, sine], -1)]).flatten(-2)
