"""ModelConfig, and its translation to and from the config.json of `transformers`.

Two shapes exist: `llama` (RMSNorm, rotary positions, SwiGLU, grouped heads) and `gpt2` (LayerNorm,
learned positions, GELU, biases). A field of config.json that would change the arithmetic in a way
not supported here is refused by name: a model either computes what its file says, or does not open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral

from tinylm.errors import InputError


@dataclass
class ModelConfig:
    """The shape of a Transformer.

    vocab_size     V, special tokens included
    n_layer        blocks
    n_head         H, query heads
    n_kv_head      G, key/value heads; divides n_head (0: n_head)
    n_embd         C, model width
    n_inner        F, feed-forward width (0: 4 C, or for llama 8/3 C rounded up to a multiple of 32)
    block_size     the most tokens that attention may look at
    architecture   "llama" or "gpt2"
    head_size      D (0: C / H)
    norm_eps       added under the square root of a norm
    rope_theta     base of the rotary angles (llama)
    tie_embeddings the head is the embedding table itself
    exact_gelu     x Φ(x) instead of its tanh approximation (gpt2)
    scores         a reward model: the head is one row, which scores a conversation
    """

    vocab_size: int
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0
    n_embd: int = 128
    n_inner: int = 0
    block_size: int = 256
    architecture: str = "llama"
    head_size: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    exact_gelu: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    scores: bool = False

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_size and self.n_head > 0 and self.n_embd % self.n_head:
            raise InputError(f"n_head {self.n_head} must divide n_embd {self.n_embd}")
        self.head_size = self.head_size or self.n_embd // max(1, self.n_head)
        if not self.n_inner:
            wide = 4 * self.n_embd
            self.n_inner = -(-wide * 2 // 3 // 32) * 32 if self.is_llama else wide
        self.check()

    @property
    def is_llama(self) -> bool:
        return self.architecture == "llama"

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a text: none, one or several."""
        ids = self.eos_token_id
        return [] if ids is None else ids if isinstance(ids, list) else [ids]

    def check(self) -> None:
        """Raise InputError where the numbers cannot make a model."""
        if self.architecture not in ("llama", "gpt2"):
            raise InputError(f"architecture: expected llama or gpt2, got {self.architecture!r}")
        sizes = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "block_size")
        for name in sizes:
            if not isinstance(getattr(self, name), Integral):
                raise InputError(f"{name}: expected a whole number, got {getattr(self, name)!r}")
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.norm_eps < math.inf:
            raise InputError(f"norm_eps: expected 0 or more, got {self.norm_eps}")
        if not 0 < self.rope_theta < math.inf:
            raise InputError(f"rope_theta: expected more than 0, got {self.rope_theta}")
        if self.n_head % self.n_kv_head:
            raise InputError(f"n_kv_head {self.n_kv_head} must divide n_head {self.n_head}")
        if self.n_kv_head != self.n_head and not self.is_llama:
            raise InputError("n_kv_head: a gpt2 model has as many as n_head")
        if self.head_size * self.n_head != self.n_embd and not self.is_llama:
            raise InputError("head_size: a gpt2 model splits n_embd evenly among its heads")
        if self.head_size < 1 or (self.is_llama and self.head_size % 2):
            raise InputError(
                f"n_embd {self.n_embd}, n_head {self.n_head}: "
                f"rotary positions need an even head size, not {self.head_size}"
            )


def flops_per_token(c: ModelConfig, T: int) -> float:
    """Of a training step, 6 N + 12 L H D T: N weights multiply, full attention is counted."""
    attention = 2 * c.n_embd * (c.n_head + c.n_kv_head) * c.head_size
    mlp = (3 if c.is_llama else 2) * c.n_embd * c.n_inner
    N = c.n_layer * (attention + mlp) + c.vocab_size * c.n_embd
    return 6 * N + 12 * c.n_layer * c.n_head * c.head_size * T


# ---- config.json -------------------------------------------------------------------------------

# our field: its name in a config.json of llama, and of gpt2
FIELDS = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "n_layer": ("num_hidden_layers", "n_layer"),
    "n_head": ("num_attention_heads", "n_head"),
    "n_kv_head": ("num_key_value_heads", None),
    "n_embd": ("hidden_size", "n_embd"),
    "n_inner": ("intermediate_size", "n_inner"),
    "block_size": ("max_position_embeddings", "n_positions"),
    "head_size": ("head_dim", None),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon"),
    "rope_theta": ("rope_theta", None),
    "tie_embeddings": ("tie_word_embeddings", "tie_word_embeddings"),
    "bos_token_id": ("bos_token_id", "bos_token_id"),
    "eos_token_id": ("eos_token_id", "eos_token_id"),
}

# what transformers assumes where config.json is silent
DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    "gpt2": {"layer_norm_epsilon": 1e-5, "n_positions": 1024, "tie_word_embeddings": True},
}

# the only values of each field, where it has one, that the arithmetic here covers
ONLY = {
    "llama": {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "sliding_window": (),
        "partial_rotary_factor": (1.0,),
        "factor": (1.0,),
        "quantization_config": (),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (),
    },
}

CLASSIFIER = "ForSequenceClassification"  # with one label: what a reward model is to transformers


def names_in(architecture: str) -> dict[str, str]:
    """Our fields, and what they are called in its config.json."""
    column = ("llama", "gpt2").index(architecture)
    return {ours: theirs[column] for ours, theirs in FIELDS.items() if theirs[column]}


def to_json(config: ModelConfig) -> dict:
    """The content of config.json."""
    if config.is_llama:
        fixed = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
        }
    else:
        fixed = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu" if config.exact_gelu else "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    names = names_in(config.architecture)
    values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    if config.scores:
        kind = "Llama" if config.is_llama else "GPT2"
        fixed |= {"architectures": [kind + CLASSIFIER], "id2label": {"0": "reward"}}
    return {**fixed, **values, "torch_dtype": "float32"}


def from_json(content: dict) -> ModelConfig:
    """Read config.json. Raises InputError naming the field that is missing or not supported."""
    kind = content.get("model_type")
    if kind not in ("llama", "gpt2"):
        raise InputError(f"model_type {kind!r} is not supported: expected llama or gpt2")
    if kind == "llama":
        content = plain_rope(content)
    content = DEFAULTS[kind] | {name: value for name, value in content.items() if value is not None}
    for name, allowed in ONLY[kind].items():
        if name in content and content[name] not in allowed:
            raise InputError(f"{name} = {content[name]!r} is not supported")
    table = names_in(kind)
    values = {ours: content[theirs] for ours, theirs in table.items() if theirs in content}
    missing = [table[n] for n in ("vocab_size", "n_layer", "n_head", "n_embd") if n not in values]
    if missing:
        raise InputError(f"the field {missing[0]} is missing")
    exact = content.get("activation_function") == "gelu"
    scores = any(name.endswith(CLASSIFIER) for name in content.get("architectures", ()))
    if scores and len(content.get("id2label", "01")) != 1:  # two are transformers' default
        raise InputError("a classifier of several labels; a reward model has one")
    known = {field.name: field.type for field in fields(ModelConfig)}
    for name, value in values.items():
        if known[name] == "int" and not isinstance(value, int):
            raise InputError(f"{table[name]}: expected a whole number, got {value!r}")
        if known[name] == "float" and not isinstance(value, (int, float)):
            raise InputError(f"{table[name]}: expected a number, got {value!r}")
    for name in ("bos_token_id", "eos_token_id"):
        ids = values.get(name, 0)
        each = ids if isinstance(ids, list) and name == "eos_token_id" else [ids]
        if not all(isinstance(i, int) for i in each):
            raise InputError(f"{name}: expected a token's id, got {ids!r}")
    if values.get("bos_token_id") not in range(values["vocab_size"]):
        # not GPT-2's 50256, which transformers writes for any vocabulary
        values.pop("bos_token_id", None)
    return ModelConfig(**values, architecture=kind, exact_gelu=exact, scores=scores)


def plain_rope(content: dict) -> dict:
    """With the fields of rope_parameters, or rope_scaling, where transformers wrote them before."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = content.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(f"{name}: rope_type = {kind!r} is not supported")
        content = content | rope
    return content
