"""The same two architectures in plain PyTorch, as a careful user would write them.

Modules are named as in model.safetensors, so that loading is copying. Attention is
F.scaled_dot_product_attention, the loss F.cross_entropy over all logits; no dropout.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


def attend(q, k, v, n_head: int):
    """(B, T, C) each -> (B, T, C)."""
    B, T, C = q.shape
    q, k, v = (x.view(B, T, n_head, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)


class GPT2Attention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.n_head = c["n_head"]
        self.c_attn = nn.Linear(c["n_embd"], 3 * c["n_embd"])
        self.c_proj = nn.Linear(c["n_embd"], c["n_embd"])

    def forward(self, x):
        return self.c_proj(attend(*self.c_attn(x).chunk(3, -1), self.n_head))


class GPT2MLP(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.c_fc = nn.Linear(c["n_embd"], c["n_inner"])
        self.c_proj = nn.Linear(c["n_inner"], c["n_embd"])

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c["n_embd"], c["layer_norm_epsilon"])
        self.attn = GPT2Attention(c)
        self.ln_2 = nn.LayerNorm(c["n_embd"], c["layer_norm_epsilon"])
        self.mlp = GPT2MLP(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        parts = {
            "wte": nn.Embedding(c["vocab_size"], c["n_embd"]),
            "wpe": nn.Embedding(c["n_positions"], c["n_embd"]),
            "h": nn.ModuleList(GPT2Block(c) for _ in range(c["n_layer"])),
            "ln_f": nn.LayerNorm(c["n_embd"], c["layer_norm_epsilon"]),
        }
        self.transformer = nn.ModuleDict(parts)

    def forward(self, tokens, targets):
        """tokens, targets (B, T) -> mean loss."""
        t = self.transformer
        x = t.wte(tokens) + t.wpe.weight[: tokens.shape[1]]
        for block in t.h:
            x = block(x)
        logits = F.linear(t.ln_f(x), t.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class LlamaAttention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        C = c["hidden_size"]
        self.n_head = c["num_attention_heads"]
        self.q_proj, self.k_proj = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        self.v_proj, self.o_proj = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)

    def forward(self, x, cos, sin):
        q, k = self.turn(self.q_proj(x), cos, sin), self.turn(self.k_proj(x), cos, sin)
        return self.o_proj(attend(q, k, self.v_proj(x), self.n_head))

    def turn(self, x, cos, sin):
        """Rotary positions: the halves of each head are the two coordinates that turn."""
        heads = x.unflatten(-1, (self.n_head, -1))
        left, right = heads.chunk(2, -1)
        return (heads * cos + torch.cat((-right, left), -1) * sin).flatten(-2)


class LlamaMLP(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        C, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = (
            nn.Linear(C, inner, bias=False),
            nn.Linear(C, inner, bias=False),
        )
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = LlamaAttention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = LlamaMLP(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        parts = {
            "embed_tokens": nn.Embedding(c["vocab_size"], c["hidden_size"]),
            "layers": nn.ModuleList(LlamaBlock(c) for _ in range(c["num_hidden_layers"])),
            "norm": nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"]),
        }
        self.model = nn.ModuleDict(parts)
        D = c["head_dim"]
        frequency = c["rope_theta"] ** (-torch.arange(0, D, 2) / D)
        angle = torch.outer(torch.arange(c["max_position_embeddings"]), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)  # (P, 1, D)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    def forward(self, tokens, targets):
        """tokens, targets (B, T) -> mean loss."""
        T = tokens.shape[1]
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def load(directory: str | Path) -> nn.Module:
    """The model that tinylm saved in a directory, tensor by tensor."""
    config = json.loads((Path(directory) / "config.json").read_text())
    model = {"gpt2": GPT2, "llama": Llama}[config["model_type"]](config)
    with safe_open(Path(directory) / "model.safetensors", "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = file.get_tensor(name)
            conv1d = name.endswith("weight") and ".c_" in name  # GPT-2 keeps (in, out)
            parameter.copy_(tensor.T if conv1d else tensor)
    return model
