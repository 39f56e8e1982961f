"""A minitrain model in plain PyTorch: ``python docs/load_in_pytorch.py runs/a/models/*.safetensors "She has"``."""

import json
import sys

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


def rotate(x):  # (B, H, T, D): the columns 2i and 2i + 1 of a head turn by position * 10000^(-2i/D)
    T, D = x.shape[-2:]
    angle = torch.arange(T).double()[:, None] * 10000.0 ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones_like(angle), angle).cfloat()
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, self.heads = c["d_model"], c["n_head"]
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({name: nn.Linear(C, C, bias=False) for name in ("q", "k", "v", "out")})
        self.ffn = nn.ModuleDict({"up": nn.Linear(C, c["d_ff"]), "down": nn.Linear(c["d_ff"], C)})

    def forward(self, x):  # (B, T, C)
        q, k, v = (self.attn[n](self.ln1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.attn["out"](y.transpose(1, 2).flatten(-2))
        return x + self.ffn["down"](F.gelu(self.ffn["up"](self.ln2(x)), approximate="tanh"))


def load(path):  # tokens (B, T) -> logits (B, T, V); and what the file says about itself
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["minitrain"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    c = about["model"]
    layers = {"embed": nn.Embedding(c["vocab_size"], c["d_model"])}
    layers["block"] = nn.Sequential(*(Block(c) for _ in range(c["n_layer"])))
    layers |= {"ln_f": nn.LayerNorm(c["d_model"]), "lm_head": nn.Linear(c["d_model"], c["vocab_size"])}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.load_state_dict({"lm_head.weight": weights["embed.weight"], **weights})  # tied, unless the file unties them
    return model, about


@torch.no_grad()
def greedy(model, ids, size, limit):  # until <eos> = 2; neither <pad> = 0 nor <bos> = 1 may come
    while ids[-1] != 2 and len(ids) < limit:
        ids = [*ids, 2 + int(model(torch.tensor([ids]))[0, -1, 2:size].argmax())]
    return ids


if __name__ == "__main__":
    from minitrain.data.tokenizer import Tokenizer  # docs/checkpoint.md tells how to do without

    model, about = load(sys.argv[1])
    tokenizer = Tokenizer.from_json(json.dumps(about["tokenizer"]))
    ids = [1, *tokenizer.encode(sys.argv[2])]
    print(model(torch.tensor([ids]))[0, -1])  # the logits of the next token
    print(tokenizer.decode(greedy(model, ids, tokenizer.size, about["model"]["max_seq_len"])))
