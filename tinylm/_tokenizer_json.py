"""What tinylm understands of tokenizer.json, the file format of Hugging Face `tokenizers`.

Three families are read: byte-level BPE split by regular expressions (ours, GPT-2, Llama 3, SmolLM),
SentencePiece-like BPE that writes "▁" for a space (Llama 2, TinyLlama), and BPE over characters.
Whatever else a file asks for is an InputError that names it: a tokenizer that is nearly right
would quietly feed the model the wrong ids.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import regex

from tinylm._bpe_python import PATTERN
from tinylm.errors import InputError

try:
    from tinylm import _bpe as bpe
except ImportError:  # not compiled
    from tinylm import _bpe_python as bpe

Splitter = Callable[[str], Iterable[str]]
LLAMA3_PATTERN = (  # another way to write PATTERN: the same pieces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UNALIKE = regex.compile(  # what means one thing to oniguruma, another one to `regex`
    r"\{(?:\d+,?\d*|,\d+)\}\+"  # a{1,3}+ repeats or is possessive
    r"|\{\d+\}\?"  # a{3}? may be nothing, or is lazy
    r"|\\[bBGhKmNwWXZ]|\\[pP](?!\{)|\\[pP]\{\^?(?i:word)\}|\(\?[a-z]*m"
    r"|\[:\^?(?:alnum|digit|punct|word):"
    r"|\[[^]]*(?:&&|\[(?!:))"  # a set within a set, or two that must both hold
)
LONE_SURROGATE = regex.compile("[\ud800-\udc7f\udd00-\udfff]")


def byte_characters() -> list[str]:
    """How GPT-2's format writes each byte, with a printable character: a space, say, as "Ġ"."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


BYTE_CHARACTERS = byte_characters()
BYTE_OF_CHARACTER = {character: b for b, character in enumerate(BYTE_CHARACTERS)}
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]  # how SentencePiece writes each byte

BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
}  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}


def make_spec(tokens: list[str], merges: list[tuple[str, str]]) -> dict:
    """A tokenizer.json in which text is one piece and tokens[i] has id i."""
    # Merges are written "a b", as all versions of `tokenizers` read them; no token has a space.
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [f"{left} {right}" for left, right in merges],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": model,
    }  # fmt: skip


def add_special(spec: dict, names: Iterable[str]) -> dict:
    """Make `names` special tokens: with the id they have, or after all others."""
    vocab = spec["model"]["vocab"]
    spec["added_tokens"] = spec.get("added_tokens") or []
    for name in names:
        new = 1 + max([*vocab.values(), *(token["id"] for token in spec["added_tokens"])])
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        token = {"id": vocab.get(name, new), "content": name, **flags, "special": True}
        spec["added_tokens"].append(token)
    return spec


@dataclass
class Layout:
    """How text becomes pieces, and how tokens are written in the file."""

    splitters: list[Splitter] = field(default_factory=list)  # each splits what the last one left
    byte_level: bool = False  # tokens are written in BYTE_CHARACTERS
    byte_tokens: bool = False  # the token "<0x0A>" is the byte 10
    spaces: bool = False  # tokens are written with "▁" for a space
    # a "▁" goes before a text: "always", where it is "missing", or so and it comes "first"
    prefix: str = ""

    @classmethod
    def read(cls, spec: dict) -> "Layout":
        check(spec)
        layout = cls(byte_tokens=bool(spec["model"].get("byte_fallback")))
        for step in steps_of(spec.get("normalizer"), "normalizers"):
            layout.add_normalizer(step)
        steps = steps_of(spec.get("pre_tokenizer"), "pretokenizers")
        for i, step in enumerate(steps):
            layout.add_pre_tokenizer(step, {before["type"] for before in steps[:i]})
        for step in steps_of(spec.get("decoder"), "decoders"):
            layout.check_decoder(step)
        model, vocab = spec["model"], spec["model"]["vocab"]
        other = layout.splitters or layout.byte_level or model.get("ignore_merges")
        if layout.spaces and not other and not any("▁" in t.lstrip("▁") for t in vocab):
            # No token has a "▁" after another character, so a cut there changes no id, and short
            # pieces come again and again: with the encoder's cache, 100 kB/s become megabytes.
            layout.splitters.append(splitter("▁*[^▁]*"))
        return layout

    def add_normalizer(self, step: dict) -> None:
        match step:
            case {"type": "Prepend", "prepend": "▁"} if not self.prefix:
                self.prefix = "always"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                self.spaces = True
            case _:
                raise unsupported("normalizer", step)

    def add_pre_tokenizer(self, step: dict, before: set[str]) -> None:
        match step:
            case _ if self.byte_level:  # it would have to split BYTE_CHARACTERS, not text
                raise unsupported("pre_tokenizer after ByteLevel:", step)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                self.byte_level = True
                if step.get("use_regex", True):
                    self.splitters.append(splitter(GPT2_PATTERN))
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
                self.splitters.append(splitter(pattern))
            case {"type": "Split", "pattern": {"Regex": p}, "behavior": "Removed", "invert": True}:
                self.splitters.append(splitter(p, matches_only=True))
            case {"type": "Digits", "individual_digits": each}:
                self.splitters.append(splitter(r"\p{N}" if each else r"\p{N}+"))
            case {"type": "Metaspace"} if before - {"Digits"}:  # which do not look for spaces
                raise unsupported("pre_tokenizer before", step)
            case {"type": "Metaspace", "prepend_scheme": "always"} if before:  # before each piece
                raise unsupported("pre_tokenizer before", step)
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                self.spaces = True
                schemes = {"never": "", "first": "first"}
                self.prefix = self.prefix or schemes.get(scheme, "missing")
                if step.get("split", True):
                    self.splitters.append(splitter("▁?[^▁]*"))
            case _:
                raise unsupported("pre_tokenizer", step)

    def check_decoder(self, step: dict) -> None:
        """Decoding follows from the rest of the file; the decoder has only to agree with it."""
        match step:
            case {"type": "ByteLevel"} if self.byte_level:
                pass
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "} if self.spaces:
                pass
            case {"type": "ByteFallback" | "Fuse" | "Strip" | "Metaspace"} if not self.byte_level:
                pass
            case _:
                raise unsupported("decoder", step)

    def pieces(self, text: str, begins: bool = True) -> Iterable[str]:
        """What is encoded one by one. begins: no special token stands before the text."""
        text = valid(text)
        if self.spaces:
            text = text.replace(" ", "▁")
        missing = text[:1] != "▁"
        known = {"always": True, "missing": missing, "first": missing and begins}
        if text and known.get(self.prefix):
            text = "▁" + text
        if not self.splitters:
            return [text]
        first, *others = self.splitters
        pieces = first(text)  # as it is: an Encoder is faster with split_words
        for split in others:
            pieces = chain.from_iterable(map(split, pieces))
        return pieces

    def token_bytes(self, token: str) -> bytes:
        if self.byte_level and all(character in BYTE_OF_CHARACTER for character in token):
            return bytes([BYTE_OF_CHARACTER[character] for character in token])
        if self.byte_tokens and regex.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return (token.replace("▁", " ") if self.spaces else token).encode()

    def encoder_arguments(self, spec: dict) -> dict:
        """The arguments of Encoder. A special token is left out of them, so no text becomes one."""
        model = spec["model"]
        vocab = model["vocab"]
        special = {token["content"] for token in spec.get("added_tokens") or []}
        ordinary = {token: i for token, i in vocab.items() if token not in special}
        unk = vocab.get(model.get("unk_token"), -1)
        whole = ordinary if model.get("ignore_merges") else {}
        if self.byte_level:
            byte_ids, characters = [vocab.get(c, unk) for c in BYTE_CHARACTERS], {}
            whole = {
                self.token_bytes(t).decode("utf-8", "surrogateescape"): i for t, i in whole.items()
            }
        else:
            byte_ids = [vocab[token] for token in BYTE_TOKENS] if self.byte_tokens else None
            characters = {t: i for t, i in ordinary.items() if len(t) == 1}
        return {
            "byte_ids": byte_ids,
            "merges": list(read_merges(model)),
            "characters": characters,
            "unk": unk,
            "whole": whole,
        }


def check(spec: dict) -> None:
    """Refuse what would change the ids and is not supported."""
    model = spec["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)  # GPT-2's own file has no type
    if kind != "BPE":
        raise InputError(f"unsupported model {kind!r}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise InputError(f"unsupported {name} {model[name]!r}")
    if model.get("byte_fallback"):
        missing = [token for token in BYTE_TOKENS if token not in model["vocab"]]
        if missing:
            raise InputError(f"unsupported byte_fallback without the token {missing[0]}")
    elif model.get("fuse_unk"):
        raise InputError("unsupported fuse_unk")
    for token in spec.get("added_tokens") or []:
        if not token.get("special"):
            raise InputError(f"unsupported added token {token['content']!r}: it is not special")


def read_merges(model: dict) -> Iterator[tuple[int, int, int]]:
    """(left, right, merged) ids; a merge is written "a b" or, in newer files, ["a", "b"]."""
    vocab = model["vocab"]
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not (left in vocab and right in vocab and left + right in vocab):
            raise InputError(f"merge {merge!r} needs a token that the vocabulary lacks")
        yield vocab[left], vocab[right], vocab[left + right]


def steps_of(node: dict | None, key: str) -> list[dict]:
    """A component as the list of its steps, a Sequence within a Sequence too."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [step for inner in node[key] for step in steps_of(inner, key)]
    return [node]


def splitter(pattern: str, matches_only: bool = False) -> Splitter:
    """What cuts a text into the matches of `pattern` and what lies between them, or drops that."""
    if pattern in (PATTERN, LLAMA3_PATTERN):
        return bpe.split_words
    if found := UNALIKE.search(regex.sub(r"\\\W", "-", pattern)):  # \[ and \\ mean themselves
        raise InputError(
            f"unsupported Split pattern {pattern!r}: Hugging Face reads {found[0]} in another way"
        )
    try:
        compiled = regex.compile(f"({pattern})", regex.MULTILINE)  # ^ and $ as in oniguruma
    except regex.error as error:
        raise InputError(f"unsupported Split pattern {pattern!r}: {error}") from None
    if compiled.groups > 1:
        raise InputError(f"unsupported Split pattern {pattern!r}: it has groups of its own")
    cut = compiled.findall if matches_only else compiled.splititer
    return lambda text: filter(None, cut(text))


def valid(text: str) -> str:
    """The text without lone surrogates, but for those that stand for raw bytes."""
    try:
        text.encode()  # ten times as fast as a search
    except UnicodeEncodeError:
        return LONE_SURROGATE.sub("\ufffd", text)
    return text


def unsupported(component: str, step: dict) -> InputError:
    details = {k: v for k, v in step.items() if k != "type" and isinstance(v, bool | str | dict)}
    return InputError(f"unsupported {component} '{step['type']}' {details or ''}".rstrip())
