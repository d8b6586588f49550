"""Text to token ids and back: byte-pair encoding in the tokenizer.json format of Hugging Face.

A Tokenizer is a reading of one tokenizer.json, be it made here (`train_bpe`, `train_characters`)
or elsewhere (GPT-2, Llama 2 and 3, SmolLM ...). One design serves them all:

1. the text is rewritten (Llama 2 writes "▁" for a space and puts one in front),
2. regular expressions split it into pieces (GPT-2 and its heirs),
3. each piece becomes ids by byte-pair encoding: _bpe_python.py, or _bpe.pyx, its fast twin.

Steps 1 and 2 are read by _tokenizer_json.py. Tokens are bytes, so decoding strings them together.
Left out on purpose: the chat template (chat.py), and special tokens found in text, because a text
is data and never a command.
"""

import codecs
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np

from tinylm._tokenizer_json import (
    BYTE_CHARACTERS,
    BYTE_LEVEL,
    SPLIT,
    Layout,
    add_special,
    bpe,
    make_spec,
    steps_of,
    valid,
)
from tinylm.errors import InputError
from tinylm.files import read_json, write_json

# Begin of a document; end of a document, a turn or a filled blank; who speaks; fill in the middle.
SPECIAL_TOKENS = (
    "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|prefix|>", "<|suffix|>", "<|middle|>",
)  # fmt: skip

CONFIG = {  # tokenizer_config.json of every tokenizer made here
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
    "pad_token": "<|end|>",
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
}
MOST_PIECES = 2_000_000  # distinct pieces kept while counting, about 300 MB
BATCH = 1 << 24  # characters counted at a time


class Tokenizer:
    """Encodes text, decodes ids.

    spec: the content of tokenizer.json; config: that of tokenizer_config.json.
    special: the ids of the special tokens by their text. tokens: the bytes of every token.
    bos_id, eos_id, pad_id: None where the files name none.
    add_bos: whether the model wants bos_id before a text; encode never adds it by itself.
    """

    def __init__(self, spec: dict, config: dict | None = None):
        self.spec, self.config = spec, config or {}
        self._layout = Layout.read(spec)
        self._encoder = bpe.Encoder(**self._layout.encoder_arguments(spec))
        vocab = spec["model"]["vocab"]
        self.special = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        self._special_ids = set(self.special.values())
        self.vocab_size = 1 + max([*vocab.values(), *self._special_ids])
        self.tokens = [b""] * self.vocab_size
        for token, i in vocab.items():
            self.tokens[i] = self._layout.token_bytes(token)
        for token, i in self.special.items():
            self.tokens[i] = token.encode()
        ids, names = vocab | self.special, ("bos", "eos", "pad")
        self.bos_id, self.eos_id, self.pad_id = (ids.get(self.named(name)) for name in names)
        self.add_bos = self._wants_bos()

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """The ids of `text`. No special token is added, nor made out of the text.

        begins: nothing stands before it, not even a special token; few tokenizers ask.

        Raw bytes may stand in the text as bytes.decode("utf-8", "surrogateescape") leaves them;
        every other lone surrogate counts as U+FFFD.
        """
        return self.encode_array(text, begins).tolist()

    def encode_array(self, text: str, begins: bool = True) -> np.ndarray:
        """`encode` for bulk work: uint32 (n,)."""
        if not isinstance(text, str):
            raise TypeError(f"[encode] text: expected a str, got {type(text).__name__}")
        return self._encoder.encode(self._layout.pieces(text, begins))

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The tokens' bytes, strung together. A special token is its text, or skipped."""
        return b"".join(self._tokens(list(ids), skip_special))

    def decode(
        self, ids: Iterable[int], skip_special: bool = False, continues: bool = False
    ) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Llama 2 puts a space before every text it encodes. Where a text begins, at the start and
        after each special token, that space is taken away again. If `continues`, the ids continue
        a text whose beginning is not among them, and a space at their start is a real one: so
        decode(a + b) == decode(a) + decode(b, continues=True) if `a` ends with a whole character.
        """
        ids = list(ids)
        tokens = self._tokens(ids, skip_special)
        if self._layout.prefix:
            begins = not continues
            for at, i in enumerate(ids):
                if begins and i not in self._special_ids:
                    tokens[at] = tokens[at].removeprefix(b" ")
                begins = i in self._special_ids and self._layout.prefix != "first"
        return b"".join(tokens).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int], continues: bool = True) -> Iterator[str]:
        """`decode`, id by id, by default of ids that continue; a character comes once whole."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            token = self.tokens[i]
            if self._layout.prefix and not continues:
                token = token.removeprefix(b" ")
            continues = True
            yield decoder.decode(token)
        yield decoder.decode(b"", final=True)

    def texts(self) -> list[bytes]:
        """What each token adds to a text, (V,); the special ones add nothing."""
        return self._tokens(list(range(self.vocab_size)), skip_special=True)

    def named(self, name: str) -> str | None:
        """The text of the token that tokenizer_config.json calls bos, eos, pad or unk."""
        token = self.config.get(f"{name}_token")
        return token["content"] if isinstance(token, dict) else token

    def with_special(self, names: Iterable[str], config: dict) -> "Tokenizer":
        """A tokenizer that has these special tokens too, after all others, and this config."""
        spec = add_special(deepcopy(self.spec), names)
        return Tokenizer(spec, self.config | config)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `transformers` opens too."""
        write_json(Path(directory) / "tokenizer.json", self.spec)
        write_json(Path(directory) / "tokenizer_config.json", self.config)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a directory or its tokenizer.json; InputError says what is wrong with it."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        spec, config = read_json(file), {}
        if file.with_name("tokenizer_config.json").exists():
            config = read_json(file.with_name("tokenizer_config.json"))
        template = file.with_name("chat_template.jinja")  # where newer versions keep it
        try:
            if template.exists():
                config["chat_template"] = template.read_text(encoding="utf-8")
            return cls(spec, config)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(f"{file}: not what a tokenizer.json holds: {error!r}") from error

    def _tokens(self, ids: list[int], skip_special: bool) -> list[bytes]:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise InputError(f"[decode] id {wrong} is not in the vocabulary of {self.vocab_size}")
        if skip_special:
            return [b"" if i in self._special_ids else self.tokens[i] for i in ids]
        return [self.tokens[i] for i in ids]

    def _wants_bos(self) -> bool:
        """As tokenizer_config.json says; where it is silent, whether the post-processor adds it."""
        if "add_bos_token" in self.config:
            return bool(self.config["add_bos_token"])
        steps = steps_of(self.spec.get("post_processor"), "processors")
        starts = [step["single"][0] for step in steps if step["type"] == "TemplateProcessing"]
        names = [start["SpecialToken"]["id"] for start in starts if "SpecialToken" in start]
        return self.bos_id is not None and self.bos_id in map(self.special.get, names)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    progress: Callable[[int, int], None] | None = None,
    at_most: bool = False,
) -> Tokenizer:
    """Learn byte-level BPE: 256 bytes, then merges, then SPECIAL_TOKENS: `vocab_size` in all.

    The texts are read once, and never all in memory. The result depends on nothing but the texts,
    and not on their order where they have MOST_PIECES distinct pieces or fewer; learn_merges says
    how ties are broken. `progress` is called with (done, total) merges. A text with too few pairs
    for `vocab_size` is an InputError, or, if `at_most`, gets the vocabulary it allows.
    """
    n_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
    if n_merges < 0:
        raise InputError(f"--vocab-size {vocab_size}: 256 bytes and the special tokens need "
                         f"{256 + len(SPECIAL_TOKENS)} or more")  # fmt: skip
    merges = bpe.learn_merges(count_pieces(texts), n_merges, progress)
    if len(merges) < n_merges and not at_most:
        most = vocab_size - (n_merges - len(merges))
        raise InputError(f"text allows only {most} tokens; use --vocab-size {most} or less")
    tokens = list(BYTE_CHARACTERS)  # ids 0 to 255 are the bytes
    for left, right in merges:  # no two merges make the same token: equal strings merge equally
        tokens.append(tokens[left] + tokens[right])
    spec = make_spec(tokens, [(tokens[left], tokens[right]) for left, right in merges])
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}
    spec["decoder"] = BYTE_LEVEL
    return Tokenizer(add_special(spec, SPECIAL_TOKENS), CONFIG)


def count_pieces(texts: Iterable[str]) -> Counter[str]:
    """How often each piece occurs. When there are too many, the rarest are forgotten."""
    counts: Counter[str] = Counter()
    for batch in batches(map(valid, texts)):
        counts.update(bpe.count_words(batch))
        rare = 0
        while len(counts) > MOST_PIECES:
            rare += 1
            counts = Counter({piece: n for piece, n in counts.items() if n > rare})
    return counts


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, BATCH characters at a time or as many as a text has."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def train_characters(texts: Iterable[str]) -> Tokenizer:
    """One token for every character found, no merges; any other character becomes U+FFFD."""
    found = {"\ufffd"}
    for text in texts:
        found.update(text)
    spec = make_spec(sorted(c for c in found if not "\ud800" <= c <= "\udfff"), [])
    spec["model"]["unk_token"] = "\ufffd"
    spec["decoder"] = {"type": "Fuse"}
    return Tokenizer(add_special(spec, SPECIAL_TOKENS), CONFIG)
