"""Pre-training: raw text becomes a base model by predicting the next word, or a missing one.

next     every token from those before it
missing  a blank of one or a few words from what stands around it (fill in the middle,
         arXiv 2207.14255); loss on the blank only
mixed    half the rows of each kind, loss on everything
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy

from tinylm import backend, evaluate
from tinylm.checkpoint import Checkpoint
from tinylm.corpus import Corpus, list_files, make_corpus, read_texts
from tinylm.data import Batch, Example, Windows, next_token_batch, packed_batch, source_of
from tinylm.errors import InputError
from tinylm.generate import generate
from tinylm.model import ModelConfig, Transformer
from tinylm.progress import Progress
from tinylm.settings import Plan, TrainConfig, claim, setting
from tinylm.stage import Stage
from tinylm.tokenizer import Tokenizer, train_bpe, train_characters
from tinylm.train import train

OBJECTIVES = ("next", "missing", "mixed")
BLANKED = ("<|prefix|>", "<|suffix|>", "<|middle|>", "<|end|>", "<|begin|>")
TOKENIZER_SAMPLE = 100_000_000  # characters of text from which a vocabulary is learned


@dataclass
class PretrainConfig(TrainConfig):
    """Pre-training: the text, the tokenizer, the model's shape, and how to train it."""

    objective: str = setting("next", "What to predict.", False, OBJECTIVES)
    tokenizer: str = setting("bpe", "bpe, characters, or a directory with a tokenizer.json.")
    vocab_size: int = setting(0, "Tokens of a new BPE, special ones too (0: fitted to the text).")
    document_separator: str = setting("", "A string that separates documents within a file.")
    held_out: float = setting(0.1, "Share of the text held out for evaluation.")
    eval_tokens: int = setting(20_000, "Held-out tokens in an evaluation on the way.", True)
    architecture: str = setting("llama", "Shape of the model.", False, ("llama", "gpt2"))
    n_layer: int = setting(4, "Blocks.")
    n_head: int = setting(4, "Query heads.")
    n_kv_head: int = setting(0, "Key/value heads (0: as many as query heads).")
    n_embd: int = setting(192, "Width of the model.")
    n_inner: int = setting(0, "Feed-forward width (0: 4 n_embd; llama 8/3 n_embd).")

    def check(self) -> None:
        super().check()
        self.expect("between 0 and 1", "held_out")
        self.expect("at least 0", "vocab_size", "eval_tokens")
        self.shape(vocab_size=1)

    def shape(self, vocab_size: int, **ids) -> ModelConfig:
        """The model to be made. Raises InputError where these numbers cannot make one."""
        names = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "block_size")
        sizes = {name: getattr(self, name) for name in names}
        return ModelConfig(vocab_size, **sizes, architecture=self.architecture, **ids)


# Named starting points; any flag overrides them.
PRESETS = {
    # about 2.5 million parameters: a first model in ten minutes on two cores
    "small": {"minutes": 10.0},
    # half of that, for a first look
    "tiny": {"minutes": 2.0, "n_embd": 128, "block_size": 128, "batch_size": 16},
    # nanoGPT's published recipe for a CPU: Shakespeare by characters
    "nanogpt-cpu": {
        "architecture": "gpt2", "tokenizer": "characters", "n_layer": 4, "n_head": 4,
        "n_embd": 128, "block_size": 64, "batch_size": 12, "max_steps": 2000, "beta2": 0.99,
        "learning_rate": 1e-3, "warmup": 0.05, "floor": 0.1, "held_out": 0.1,
    },
    # the same text to the same loss in fewer, better steps: docs/recipe.md
    "shakespeare": {
        "tokenizer": "characters", "optimizer": "muon", "n_layer": 2, "n_head": 4, "n_embd": 128,
        "block_size": 64, "batch_size": 12, "max_steps": 360, "learning_rate": 1e-2, "floor": 0.0,
        "beta1": 0.8, "eval_every": 360, "save_every": 360, "held_out": 0.1,
    },
}  # fmt: skip


class Pretrain(Stage):
    """The stage: windows of a corpus, and the loss of its objective."""

    name, recordable = "pretrain", True
    found = (
        (
            "bits_per_byte",
            "- {bits_per_byte:.3f} bits per byte of held-out text"
            " (xz, the training text known: {xz_bits_per_byte:.3f})",
        ),
        ("loss", "- held-out loss {loss:.4f} nats per token"),
    )
    about = """A base model made by tinylm

It continues text; it has not been taught to answer."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, corpus: Corpus, folder: Path, config
    ):
        super().__init__(model, tokenizer, config, corpus.source)
        self.corpus, self.folder = corpus, folder
        self.begin = tokenizer.special["<|begin|>"]
        self.windows = Windows(corpus.shards(folder, "train"), config.block_size, config.seed)
        self.heldout = corpus.shards(folder, "heldout")
        self.blanks = Blanks(tokenizer) if config.objective != "next" else None

    def draw(self) -> Batch:
        first = self.windows.drawn
        rows = self.windows.draw(self.config.batch_size)
        if self.blanks is None:
            return next_token_batch(rows, self.begin)
        return self.blanks.batch(rows, self.begin, self.config, first)

    def memory(self) -> tuple[int, int, int]:
        """Besides, there is what xz takes at the first evaluation, which is never a GPU's."""
        size = self.corpus.train_bytes + self.corpus.heldout_bytes
        xz = 0 if backend.name == "cuda" else evaluate.xz_memory(size)
        return self.config.block_size, xz // 4, 0

    def evaluate(self, final: bool) -> dict:
        """Next-word loss on held-out text, whatever the objective; all of it at the end."""
        limit = 0 if final else self.config.eval_tokens
        found = evaluate.evaluate_text(
            self.model, self.tokenizer, self.heldout, self.config.block_size, max_tokens=limit
        )
        prompt = self.tokenizer.decode(self.heldout[0][:9].tolist(), skip_special=True)
        settings = {"max_new_tokens": 200 if final else 60, "temperature": 0.8, "seed": 1}
        sample = prompt + generate(self.model, self.tokenizer, prompt, **settings)
        xz = evaluate.xz_of_corpus(self.tokenizer, self.corpus, self.folder)
        return {**found, "xz_bits_per_byte": xz, "sample": sample}

    def state(self) -> dict:
        return {"drawn": self.windows.drawn}

    def restore(self, state: dict) -> None:
        self.windows.drawn = state["drawn"]

    def facts(self) -> dict[str, str]:
        corpus, c = self.corpus, self.model.config
        text = f"{corpus.train_bytes:,} to train on, {corpus.heldout_bytes:,} held out"
        return {
            **super().facts(),
            "stage": f"pretrain, objective `{self.config.objective}`",
            "shape": f"{c.architecture}, {c.n_layer} layers, {c.n_embd} wide",
            "vocabulary": f"{c.vocab_size} tokens",
            "documents": f"{corpus.documents:,}",
            "bytes of text": text,
        }


class Blanks:
    """Turns rows of text into rows of `<|prefix|> … <|suffix|> … <|middle|> … <|end|>`.

    A row is cut into pieces of random length (so that short texts are practised as well as long
    ones), and each piece becomes a document of its own with one blank of one or a few whole words.

    Of each token: `bare`, it begins with a character of a word, `spaced`, with a space and such a
    one; `space`, it is a space; `breaks`, it ends in other white space, after which words are bare.
    """

    def __init__(self, tokenizer: Tokenizer):
        ids = [tokenizer.special[name] for name in BLANKED]
        self.prefix, self.suffix, self.middle, self.end, self.begin = ids
        texts = tokenizer.texts()
        self.bare = numpy.array([is_word(t[:1]) for t in texts])
        self.spaced = numpy.array([t[:1] == b" " and is_word(t[1:2]) for t in texts])
        self.space = numpy.array([t == b" " for t in texts])
        self.breaks = numpy.array([t[-1:].isspace() and t != b" " for t in texts])

    def batch(self, rows: numpy.ndarray, begin: int, config, first: int) -> Batch:
        """rows (B, T + 1); `first` numbers them within the run, which seeds each one's blanks."""
        plain = next_token_batch(rows, begin)
        tokens, targets = plain.tokens.copy(), plain.targets.copy()
        start = numpy.zeros(tokens.shape, numpy.int32) if plain.start is None else plain.start
        blank_only = config.objective == "missing"
        for i, row in enumerate(rows):
            rng = numpy.random.default_rng((config.seed, first + i))
            if blank_only or rng.random() < 0.5:
                tokens[i], targets[i], start[i] = self.row(row, rng, blank_only)
        return Batch(tokens, targets, start if start.any() else None)

    def row(self, row: numpy.ndarray, rng, blank_only: bool):
        """(T + 1) tokens -> tokens, targets, start, (T,) each; what does not fit is left out."""
        T = len(row) - 1
        examples = [self.example(piece, rng, blank_only) for piece in self.pieces(row, rng)]
        rest = [self.end] * (T + 1), [False] * (T + 1)
        batch = packed_batch([[*examples, rest]], self.end)
        return batch.tokens[0, :T], batch.targets[0, :T], batch.start[0, :T]

    def pieces(self, row: numpy.ndarray, rng):
        """The documents of a row, cut into pieces of 12 to T tokens, their logarithm uniform."""
        edges = [0, *numpy.flatnonzero(row == self.begin).tolist(), len(row)]
        room = len(row) - 1
        for begin, end in zip(edges, edges[1:]):
            document = row[begin:end]
            document = document[(document != self.begin) & (document != self.end)].tolist()
            while len(document) >= 3 and room > 8:
                n = int(12 * (max(room, 13) / 12) ** rng.random())
                n = min(n, max(room - 4, 3), len(document))  # 4: the special tokens of a piece
                yield document[:n]
                document, room = document[n:], room - n - 4

    def example(self, piece: list[int], rng, blank_only: bool) -> Example:
        """One blank in a piece; the whole of it is learned, or what fills the blank only."""
        begin, end = self.blank(piece, rng)
        given = [self.prefix, *piece[:begin], self.suffix, *piece[end:], self.middle]
        filled = [*piece[begin:end], self.end]
        learned = [not blank_only] * len(given) + [True] * len(filled)
        return [*given, *filled, self.end], [*learned, False]  # a row holds all but the last one

    def blank(self, piece: list[int], rng) -> tuple[int, int]:
        """Where the blank lies: whole words, with the space before them; one word half the time."""
        begins = [i for i in range(len(piece)) if self.word_begins(piece, i)]
        if not begins:  # no word begins here: any token will do
            i = int(rng.integers(len(piece)))
            return i, i + 1
        begin = begins[int(rng.integers(len(begins)))]
        words = int(rng.geometric(0.5))
        end = self.word_end(piece, begin)
        while words > 1 and end < len(piece) and self.word_begins(piece, end):
            end, words = self.word_end(piece, end), words - 1
        return begin, end

    def word_begins(self, piece: list[int], i: int) -> bool:
        if self.spaced[piece[i]]:
            return True
        if self.space[piece[i]]:
            return i + 1 < len(piece) and bool(self.bare[piece[i + 1]])
        return bool(self.bare[piece[i]] and (i == 0 or self.breaks[piece[i - 1]]))

    def word_end(self, piece: list[int], i: int) -> int:
        i += 2 if self.space[piece[i]] else 1
        while i < len(piece) and self.bare[piece[i]]:
            i += 1
        return i


def is_word(byte: bytes) -> bool:
    """Letters, digits, apostrophes, and every byte of a character beyond ASCII."""
    return byte.isalnum() or byte == b"'" or byte >= b"\x80"


# ---- from a command to a run -------------------------------------------------------------------


def run(paths: list[str], plan: Plan) -> dict:
    """Pre-train on files and folders of text; returns the results. See the command line's help."""
    tokens = plan.out / "training" / "tokens"
    inside = plan.out.resolve()
    files = [file for file in list_files(paths) if inside not in file.resolve().parents]
    if not files:
        raise InputError(f"{plan.out} holds all of this text: choose another --out")
    plan.open(Pretrain.name)
    claim(plan.out)
    config, corpus = plan.config, Corpus.load(tokens) if Checkpoint(plan.out).exists() else None
    if corpus is None:
        tokenizer, corpus = prepare(files, tokens, config, plan.progress)
    elif corpus.source != source_of(files):
        raise InputError(
            f"{plan.out} was begun with other text: name the same files, in this order"
        )
    else:
        tokenizer = Tokenizer.load(tokens)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model = Transformer(config.shape(tokenizer.vocab_size, **ids), config.seed)
    stage = Pretrain(model, tokenizer, corpus, tokens, config)
    plan.progress.say(describe(model, tokenizer, corpus))
    return train(stage, plan, parameters=model.n_parameters())


def prepare(
    files: list[Path], tokens: Path, config: PretrainConfig, progress: Progress
) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and token shards, with bars, in the directory tokens."""
    size = sum(path.stat().st_size for path in files)
    if not size:
        raise InputError(f"{files[0]}: the file is empty")
    tokenizer = make_tokenizer(files, size, config, progress)
    tokenizer.save(tokens)
    with progress.counting("tokens", size) as seen:
        corpus = make_corpus(
            files, tokenizer, tokens, config.document_separator, config.held_out, seen
        )
    if corpus.invalid_bytes:
        progress.say(f"{corpus.invalid_bytes} bytes are not UTF-8: taken as bytes", "yellow")
    if corpus.duplicates:
        progress.say(f"{corpus.duplicates} exact duplicates of documents dropped", "yellow")
    corpus.save(tokens)  # last: its being there says that all of it is
    return tokenizer, corpus


def make_tokenizer(files, size: int, config: PretrainConfig, progress: Progress) -> Tokenizer:
    if config.tokenizer not in ("bpe", "characters"):
        return foreign_tokenizer(config.tokenizer, config.objective)
    with progress.counting("vocabulary", size) as seen:
        texts = (t for t, _ in read_texts(files, config.document_separator, seen))
        texts = first_characters(texts, TOKENIZER_SAMPLE)
        if config.tokenizer == "characters":
            return train_characters(texts)
        fitted = not config.vocab_size
        return train_bpe(texts, config.vocab_size or fitted_vocabulary(size), at_most=fitted)


def foreign_tokenizer(path: str, objective: str) -> Tokenizer:
    if not Path(path).exists():
        raise InputError(f"--tokenizer {path}: expected bpe, characters, or a directory")
    tokenizer = Tokenizer.load(path)
    needed = BLANKED if objective != "next" else ("<|begin|>", "<|end|>")
    missing = [name for name in needed if name not in tokenizer.special]
    if missing:
        raise InputError(
            f"--tokenizer {path}: it has no {missing[0]} token, which --objective {objective} needs"
        )
    return tokenizer


def first_characters(texts, limit: int):
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def fitted_vocabulary(size: int) -> int:
    """One token for every 2,000 bytes of text, as a power of two from 512 to 8,192."""
    return 2 ** min(13, max(9, round(numpy.log2(max(1, size / 2000)))))


def describe(model: Transformer, tokenizer: Tokenizer, corpus: Corpus) -> str:
    c = model.config
    return (
        f"{c.architecture} model, {model.n_parameters():,} parameters: {c.n_layer} layers, "
        f"{c.n_head} heads, {c.n_embd} wide, context {c.block_size}, "
        f"{tokenizer.vocab_size:,} tokens in the vocabulary\n"
        f"{corpus.documents:,} documents: {corpus.train_tokens:,} tokens to train on, "
        f"{corpus.heldout_tokens:,} held out"
    )
