"""The Transformer, in two shapes: Llama-like and GPT-2-like.

Both are a stack of pre-norm residual blocks, x + attention(norm(x)) and then x + mlp(norm(x)); they
differ in the norm, the MLP, how positions come in, and how the parts are called in a file.
A reward model is either of them with a head for scores in place of words. Sampling and the KV cache
are in generate.py; the layers in nn.py.
"""

from __future__ import annotations

import numpy

from tinylm import backend, nn, ops
from tinylm.config import ModelConfig
from tinylm.errors import InputError
from tinylm.tensor import Array, Tensor

__all__ = ["ModelConfig", "Transformer"]

# How each part is called in model.safetensors: the vocabulary of transformers' two classes.
FILE_NAMES = {
    "llama": {
        "embedding": "model.embed_tokens", "blocks": "model.layers",
        "norm_1": "input_layernorm", "attention": "self_attn",
        "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj",
        "norm_2": "post_attention_layernorm",
        "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
        "norm": "model.norm", "head": "lm_head",
    },
    "gpt2": {
        "embedding": "transformer.wte", "positions": "transformer.wpe", "blocks": "transformer.h",
        "norm_1": "ln_1", "attention": "attn", "qkv": "c_attn", "out": "c_proj",
        "norm_2": "ln_2", "up": "c_fc", "down": "c_proj",
        "norm": "transformer.ln_f", "head": "lm_head",
    },
}  # fmt: skip


class Attention(nn.Module):
    """Causal self-attention with H query heads sharing G key/value heads."""

    def __init__(self, config: ModelConfig, rng, out_std: float):
        C, H, G, D = config.n_embd, config.n_head, config.n_kv_head, config.head_size
        if config.is_llama:
            self.q = nn.Linear(rng, C, H * D)
            self.k = nn.Linear(rng, C, G * D)
            self.v = nn.Linear(rng, C, G * D)
            self.out = nn.Linear(rng, H * D, C, out_std)
        else:
            self.qkv = nn.Linear(rng, C, 3 * C, bias=True, transposed=True)
            self.out = nn.Linear(rng, C, C, out_std, bias=True, transposed=True)
        self._config = config

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> q (B, H, T, D), k and v (B, G, T, D), all views."""
        if self._config.is_llama:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            q, k, v = ops.split(self.qkv(x), 3)
        H, G = self._config.n_head, self._config.n_kv_head
        return ops.split_heads(q, H), ops.split_heads(k, G), ops.split_heads(v, G)

    def __call__(self, x: Tensor, places: Places, cache=None) -> Tensor:
        q, k, v = self.project(x)
        if self._config.is_llama:
            q = ops.rope(q, places.cos, places.sin, places.positions)
            k = ops.rope(k, places.cos, places.sin, places.positions)
        if cache is None:
            mixed = ops.attention(q, k, v, places.start, places.gap)
        else:
            mixed = cache.attention(q, k, v, places.start)
        return self.out(ops.merge_heads(mixed))


class SwiGLU(nn.Module):
    """Llama's MLP: down(silu(gate(x)) · up(x)).  arXiv 2002.05202"""

    def __init__(self, config: ModelConfig, rng, out_std: float):
        C, F = config.n_embd, config.n_inner
        self.gate = nn.Linear(rng, C, F)
        self.up = nn.Linear(rng, C, F)
        self.down = nn.Linear(rng, F, C, out_std)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x), self.up(x)))


class GELU(nn.Module):
    """GPT-2's MLP: down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig, rng, out_std: float):
        C, F = config.n_embd, config.n_inner
        self.up = nn.Linear(rng, C, F, bias=True, transposed=True)
        self.down = nn.Linear(rng, F, C, out_std, bias=True, transposed=True)
        self._approximate = not config.exact_gelu

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(x), self._approximate))


class Block(nn.Module):
    """One layer: attention mixes the tokens, the MLP works on each of them."""

    def __init__(self, config: ModelConfig, rng):
        out_std = 0.02 / (2 * config.n_layer) ** 0.5  # 2 n_layer additions into one residual stream
        norm, mlp = (nn.RMSNorm, SwiGLU) if config.is_llama else (nn.LayerNorm, GELU)
        self.norm_1 = norm(config.n_embd, config.norm_eps)
        self.attention = Attention(config, rng, out_std)
        self.norm_2 = norm(config.n_embd, config.norm_eps)
        self.mlp = mlp(config, rng, out_std)

    def __call__(self, x: Tensor, places: Places, cache=None) -> Tensor:
        x = x + self.attention(self.norm_1(x), places, cache)
        return x + self.mlp(self.norm_2(x))


class Places:
    """Where each token stands: what every layer needs to know besides the tokens.

    positions (B, T)    counted over what the token sees: from `start`, without the gap
    start     (B, T)    the first key that the token may see, or None: all up to itself
    gap       (B, T, 2) from where to where it sees none after all, or None
    cos, sin  (P, D/2)  rotary angles by position (llama)
    """

    def __init__(
        self, tokens: Array, start: Array | None, gap: Array | None, past: int,
        cos: Array, sin: Array,
    ):  # fmt: skip
        xp, (B, T) = backend.xp, tokens.shape
        positions = xp.broadcast_to(xp.arange(past, past + T, dtype="int32"), (B, T))
        self.start = None if start is None else backend.asarray(start, "int32")
        self.gap = None if gap is None else backend.asarray(gap, "int32")
        if start is not None:
            positions = xp.maximum(positions - self.start, 0)
        if gap is not None:
            positions = positions - (self.gap[..., 1] - self.gap[..., 0])
        self.positions = xp.ascontiguousarray(positions)
        self.cos, self.sin = cos, sin


class Transformer(nn.Module):
    """A causal language model.

    rng draws the initial weights: N(0, 0.02²), residual projections scaled by 1/√(2 n_layer), norms
    one, biases zero (the GPT-2 recipe).

    recompute   keep nothing of a block but its input; backward computes the rest once more
    n_tokens    of its tokenizer, where that is known: a longer table's last rows are never written
    """

    recompute, n_tokens = False, None

    def __init__(self, config: ModelConfig, rng: numpy.random.Generator | int = 0):
        rng = numpy.random.default_rng(rng)
        self.config = config
        self.embedding = nn.Embedding(rng, config.vocab_size, config.n_embd)
        if config.is_llama:
            angles = rotary_angles(config)
        else:
            self.positions = nn.Embedding(rng, config.block_size, config.n_embd)
            angles = numpy.zeros((0, 0))
        self._cos_sin, self._cos_sin_on = (numpy.cos(angles), numpy.sin(angles)), {}
        self.blocks = [Block(config, rng) for _ in range(config.n_layer)]
        norm = nn.RMSNorm if config.is_llama else nn.LayerNorm
        self.norm = norm(config.n_embd, config.norm_eps)
        if config.scores:
            self.score = nn.Linear(rng, config.n_embd, 1, std=0.0)
        elif not config.tie_embeddings:
            self.head = nn.Linear(rng, config.n_embd, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the embedding table itself where the two are tied."""
        if self.config.scores:
            raise InputError("this is a reward model: it scores answers and writes none")
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def parameters(self) -> dict[str, Tensor]:
        """Name -> Tensor, as in model.safetensors; a tied weight appears once."""
        words = FILE_NAMES[self.config.architecture]
        return {
            ".".join(words.get(part, part) for part in path.split(".")): tensor
            for path, tensor in self.named_tensors()
        }

    def block_matrices(self) -> set[str]:
        """Names of the weights that multiply within the blocks: what Muon moves."""
        blocks = FILE_NAMES[self.config.architecture]["blocks"] + "."
        named = self.parameters().items()
        return {name for name, p in named if name.startswith(blocks) and p.ndim == 2}

    def grow_vocabulary(self, size: int) -> None:
        """Make room for tokens up to `size`; each new one begins as the mean of all others. In a
        longer table they take the place of rows that were no tokens."""
        for table in {self.embedding, getattr(self, "head", self.embedding)}:
            rows = backend.to_numpy(table.weight.data)
            known = rows[: self.n_tokens]
            mean = numpy.repeat(known.mean(0, keepdims=True), max(0, size - len(known)), 0)
            rest = rows[len(known) + len(mean) :]
            table.weight = nn.parameter(numpy.concatenate([known, mean, rest]))
        self.config.vocab_size, self.n_tokens = max(size, self.config.vocab_size), size

    def hidden(
        self, tokens: Array, start: Array | None = None, cache=None, gap: Array | None = None
    ) -> Tensor:
        """tokens (B, T) of int -> (B, T, C): what the head reads.

        start (B, T): index of the first token of each token's document; attention does not look
        before it, and positions count from it. gap (B, T, 2), of training: attention does not look
        at the tokens gap[..., 0] .. gap[..., 1] − 1 either, and positions do not count them.
        cache: a KVCache holding what came before. Raises ValueError beyond the context.
        """
        tokens = rows_of("tokens", tokens)
        past = 0 if cache is None else cache.length
        if past + tokens.shape[1] > self.config.block_size:
            raise ValueError(
                f"{past + tokens.shape[1]} tokens do not fit a context of {self.config.block_size}"
            )
        places = Places(tokens, start, gap, past, *self.cos_sin())
        x = self.embedding(tokens)
        if not self.config.is_llama:
            x = x + self.positions(places.positions)
        for i, block in enumerate(self.blocks):
            rest = places, (None if cache is None else cache.layers[i])
            x = ops.recomputed(block, x, *rest) if self.recompute else block(x, *rest)
        return self.norm(x)

    def cos_sin(self) -> tuple[Array, Array]:
        """Of the rotary angles, (P, D/2) each, on the backend in use; brought there once."""
        key = backend.name, str(self.embedding.weight.dtype)
        if key not in self._cos_sin_on:
            self._cos_sin_on[key] = tuple(backend.asarray(x, key[1]) for x in self._cos_sin)
        return self._cos_sin_on[key]

    def __call__(self, tokens: Array, start: Array | None = None, cache=None) -> Tensor:
        """tokens (B, T) of int -> logits (B, T, V)."""
        return ops.linear(self.hidden(tokens, start, cache), self.head_weight)

    def loss(
        self, tokens: Array, targets: Array, start: Array | None = None, even: bool = True,
        gap: Array | None = None,
    ) -> Tensor:  # fmt: skip
        """Loss per token in nats, (B, T); 0 where the target is −1.

        even=False where the tokens' losses will be weighted each in its own way: otherwise a CPU
        makes gradients twice, and a device refuses (ops.linear_cross_entropy).
        """
        tokens, targets = rows_of("tokens", tokens), rows_of("targets", targets)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: expected (B, T) = {tokens.shape}, got {targets.shape}")
        hidden = self.hidden(tokens, start, gap=gap)
        return ops.linear_cross_entropy(hidden, self.head_weight, targets, even)

    def scores(
        self, tokens: Array, ends: Array, start: Array | None = None, gap: Array | None = None
    ) -> Tensor:
        """What a reward model makes of answers, read at their last tokens: (answers,).

        tokens (B, T) of int; ends (answers,): where each ends, counted over all rows, which are
        picked as an embedding picks its own.
        """
        if not self.config.scores:
            raise InputError("this is no reward model: it writes text and scores none")
        hidden = self.hidden(tokens, start, gap=gap)
        last = ops.embedding(backend.asarray(ends)[None], hidden.reshape(-1, hidden.shape[-1]))
        return ops.linear(last, self.score.weight).reshape(len(ends))

    def n_parameters(self) -> int:
        return sum(tensor.size for tensor in self.parameters().values())


def rows_of(name: str, ids) -> Array:
    """An array of int (B, T), of rows or of one row. Raises ValueError or TypeError by name."""
    try:
        rows = backend.xp.atleast_2d(backend.asarray(ids))
    except ValueError:
        raise ValueError(f"{name}: the rows are not all of one length: fill them up") from None
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name}: expected (B, T) with something in it, got {rows.shape}")
    if rows.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected whole numbers, got {rows.dtype}")
    return rows


def rotary_angles(config: ModelConfig) -> numpy.ndarray:
    """position · θ^(−2 d / D) for each position and pair d, (block_size, D/2).  arXiv 2104.09864"""
    D = config.head_size
    frequency = config.rope_theta ** (-numpy.arange(0, D, 2) / D)
    return numpy.arange(config.block_size)[:, None] * frequency
