"""Opens a model in the format of llama2.c (version 0: `model.bin` and `tokenizer.bin`).

The weights lie one after the other without names. llama2.c rotates neighbouring pairs of a head,
transformers and tinylm pairs half a head apart: the rows of q and k are reordered for that.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy

from tinylm._tokenizer_json import BYTE_TOKENS, add_special, make_spec
from tinylm.checkpoint import set_weights
from tinylm.errors import InputError
from tinylm.model import ModelConfig, Transformer
from tinylm.tokenizer import CONFIG, Tokenizer

HEADER = 7  # int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
BOS, EOS = 1, 2  # llama2.c ends a text at either
LAYOUT = {  # of text in its tokenizer.json: "▁" for every space, and one in front
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}


def load_llama2c(model_path: str | Path, tokenizer_path: str | Path):
    """-> (model, tokenizer). Raises InputError where a file does not hold what its header says."""
    path = Path(model_path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    header = numpy.fromfile(path, numpy.int32, HEADER)
    if len(header) < HEADER or (header[:5] <= 0).any() or header[2] > 10_000:
        raise InputError(f"{path}: not a model of llama2.c (version 0)")
    dim, hidden, n_layer, n_head, n_kv_head, vocab_size, block_size = map(int, header)
    config = ModelConfig(
        abs(vocab_size), n_layer, n_head, n_kv_head, dim, hidden, block_size,
        tie_embeddings=vocab_size > 0, bos_token_id=BOS, eos_token_id=[BOS, EOS],
    )  # fmt: skip
    weights = named(numpy.fromfile(path, numpy.float32, offset=4 * HEADER), config, path)
    model = Transformer(config)  # now that the file holds what its header says
    set_weights(model, weights, path)
    return model, load_tokenizer(tokenizer_path, config.vocab_size)


def named(floats: numpy.ndarray, c: ModelConfig, path: Path) -> dict[str, numpy.ndarray]:
    """The weights under the names of model.safetensors."""
    L, C, F, V, D = c.n_layer, c.n_embd, c.n_inner, c.vocab_size, c.head_size
    heads, groups = c.n_head * D, c.n_kv_head * D
    order = [
        ("model.embed_tokens", (V, C)),
        ("input_layernorm", (L, C)),
        ("self_attn.q_proj", (L, heads, C)),
        ("self_attn.k_proj", (L, groups, C)),
        ("self_attn.v_proj", (L, groups, C)),
        ("self_attn.o_proj", (L, C, heads)),
        ("post_attention_layernorm", (L, C)),
        ("mlp.gate_proj", (L, F, C)),
        ("mlp.down_proj", (L, C, F)),
        ("mlp.up_proj", (L, F, C)),
        ("model.norm", (C,)),
        ("rotary angles", (2, c.block_size, D // 2)),
    ]
    if not c.tie_embeddings:
        order.append(("lm_head", (V, C)))
    sizes = [math.prod(shape) for _, shape in order]
    if len(floats) != sum(sizes):
        raise InputError(f"{path}: {len(floats)} numbers, but its header asks for {sum(sizes)}")
    weights = {}
    for (name, shape), values in zip(order, numpy.split(floats, numpy.cumsum(sizes)[:-1])):
        values = values.reshape(shape)
        if name.startswith("model.") or name == "lm_head":
            weights[f"{name}.weight"] = values
        elif name != "rotary angles":
            for i, layer in enumerate(values):
                turned = name.endswith(("q_proj", "k_proj"))
                weights[f"model.layers.{i}.{name}.weight"] = unweave(layer, D) if turned else layer
    return weights


def unweave(weight: numpy.ndarray, D: int) -> numpy.ndarray:
    """Rows of each head from 0 1 2 3 ... to 0 2 4 ... 1 3 5 ..."""
    heads = weight.reshape(-1, D // 2, 2, weight.shape[-1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Read llama2.c's tokenizer.bin as a tokenizer of the Llama 2 kind.

    The file: int32 longest token, then for each token float32 score, int32 length, its bytes. Ids
    0, 1, 2 are unknown, begin and end, the next 256 the bytes. llama2.c knows no merges but joins
    the neighbours whose union has the best score: so every way to cut a token in two is a merge,
    ranked by the token's score. vocab_size: how many tokens to read, by default all.
    """
    names = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    scores = {}
    for score, piece in read_tokens(Path(path), vocab_size)[len(names) :]:
        names.append(piece.replace(" ", "▁"))
        scores[names[-1]] = score
    best_first = sorted(scores, key=scores.__getitem__, reverse=True)
    merges = [
        (token[:cut], token[cut:])
        for token in best_first
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    spec = make_spec(names, merges) | LAYOUT
    spec["model"] |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    texts = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(add_special(spec, names[:3]), CONFIG | texts | {"add_bos_token": True})


def read_tokens(file: Path, vocab_size: int | None) -> list[tuple[float, str]]:
    try:
        data = file.read_bytes()
        tokens, at = [], 4
        while at < len(data) if vocab_size is None else len(tokens) < vocab_size:
            score, length = struct.unpack_from("<fi", data, at)
            (text,) = struct.unpack_from(f"{length}s", data, at + 8)
            tokens.append((score, text.decode()))
            at += 8 + length
    except (OSError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a tokenizer.bin of llama2.c: {error}") from None
    return tokens
