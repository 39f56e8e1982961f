"""A minitrain model in plain PyTorch: ``python docs/load_in_pytorch.py runs/a/models/*.safetensors``."""

import json
import sys

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention


def rotate(x):  # (B, H, T, D): the columns 2i and 2i + 1 of a head turn by position * 10000^(-2i/D)
    T, D = x.shape[-2:]
    angle = torch.arange(T).double().outer(10000 ** (-torch.arange(0, D, 2).double() / D))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * angle).cfloat()
    return torch.view_as_real(turned).flatten(-2)


class MiniGPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, F, V, self.heads = c["d_model"], c["d_ff"], c["vocab_size"], c["n_head"]
        self.embed, self.block = nn.Embedding(V, C), nn.ModuleList()
        for _ in range(c["n_layer"]):
            attn = nn.ModuleDict({name: nn.Linear(C, C, bias=False) for name in ("q", "k", "v", "out")})
            ffn = nn.ModuleDict({"up": nn.Linear(C, F), "down": nn.Linear(F, C)})
            layers = {"ln1": nn.LayerNorm(C), "attn": attn, "ln2": nn.LayerNorm(C), "ffn": ffn}
            self.block.append(nn.ModuleDict(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(C), nn.Linear(C, V)

    def forward(self, tokens):  # (B, T) -> logits (B, T, V)
        x = self.embed(tokens)
        for ln1, attn, ln2, ffn in (b.values() for b in self.block):
            q, k, v = (attn[name](ln1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
            y = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + attn["out"](y.transpose(1, 2).flatten(-2))
            x = x + ffn["down"](gelu(ffn["up"](ln2(x)), approximate="tanh"))
        return self.lm_head(self.ln_f(x))


def load(path):
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        model = MiniGPT(json.loads(file.metadata()["minitrain"])["model"])
    model.load_state_dict({"lm_head.weight": weights["embed.weight"], **weights})  # tied, unless the file unties them
    return model


if __name__ == "__main__":
    print(load(sys.argv[1])(torch.tensor([[1]]))[0, -1])  # the logits of what comes first, behind <bos>
