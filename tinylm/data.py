"""Text files -> token shards on disk -> batches.

    read_texts        files and folders -> pieces of documents, in one streaming pass
    prepare           pieces -> token shards (memory-mapped uint16 or uint32), duplicates dropped,
                      a part held out; memory does not grow with the corpus
    Windows, Packed   shards, or examples -> shuffled rows, from any position

On disk every document is `<|begin|> tokens <|end|>`. As no text can make a special token, a begin
token in a row is always the start of a document: attention does not look across it.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy

from tinylm.errors import InputError
from tinylm.tokenizer import Tokenizer

BLOCK = 1 << 20  # bytes read at a time
SHARD = 1 << 26  # most tokens in one shard
TEXT_ENDINGS = (".txt", ".text", ".md", ".jsonl", ".ndjson")
MANY = 100  # documents: from here on whole documents are held out, below it the end of each

# ---- reading -----------------------------------------------------------------------------------


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files named, and the text files in the folders named, sorted.

    Raises InputError for a path that does not exist or a folder without text.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file() and is_text(p)]
            if not found:
                raise InputError(f"{path}: no text files here ({', '.join(TEXT_ENDINGS)}, or .gz)")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    if not files:
        raise InputError("no text was named")
    return files


def is_text(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts if part not in (".", ".."))
    return not hidden and path.name.removesuffix(".gz").endswith(TEXT_ENDINGS)


def read_texts(
    files: Iterable[Path], separator: str = "", seen: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[str, bool]]:
    """Pieces of text, and whether a document ends with this piece.

    A plain file is one document, split further at the separator; of JSON lines, each `text` is one.
    Bytes that are not UTF-8 come as U+DC80..U+DCFF. seen(n) is told of every n bytes read.
    """
    for path in files:
        opener = gzip.open if path.name.endswith(".gz") else open
        try:
            with opener(path, "rb") as file:
                if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
                    yield from json_pieces(file, path, seen)
                else:
                    yield from plain_pieces(file, separator, seen)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error


def json_pieces(file, path: Path, seen) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, 1):
        seen(len(line))
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{path}, line {number}: expected an object with a "text" string')
        yield text, True


def plain_pieces(file, separator: str, seen) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    buffer = ""
    while block := file.read(BLOCK):
        seen(len(block))
        buffer += decoder.decode(block)
        if separator:
            *whole, buffer = buffer.split(separator)
            yield from ((text, True) for text in whole)
        cut = safe_cut(buffer, len(buffer) - len(separator))
        if cut:
            yield buffer[:cut], False
            buffer = buffer[cut:]
    yield buffer + decoder.decode(b"", True), True


def safe_cut(text: str, limit: int) -> int:
    """A place shortly before limit that no token spans, whatever the split pattern, or 0.

    Such a place is before a space that follows a word, or after a newline that precedes one. A text
    of 2 BLOCKs without one is not language, and is cut anywhere.
    """
    match = CUTS.search(text, max(0, limit - 4096), max(0, limit))
    return match.end() if match else limit if len(text) > 2 * BLOCK else 0


CUTS = re.compile(r"\S(?= )|\n(?=\S)")
INVALID = re.compile("[\udc80-\udcff]")


def as_documents(pieces: Iterable[tuple[str, bool]]) -> Iterator[Iterator[str]]:
    """Group pieces into documents, each an iterator to be exhausted before the next one."""
    pieces = iter(pieces)

    def rest(text, ends):
        yield text
        while not ends:
            text, ends = next(pieces)
            yield text

    for text, ends in pieces:
        yield rest(text, ends)


# ---- token shards ------------------------------------------------------------------------------


@dataclass
class Corpus:
    """What prepare made, and data.json holds once it is whole: counts of a folder of shards."""

    dtype: str
    train_shards: int
    heldout_shards: int
    train_tokens: int
    heldout_tokens: int
    train_bytes: int
    heldout_bytes: int
    documents: int
    duplicates: int
    invalid_bytes: int
    source: list  # [[file name, bytes], ...]: what it was made from
    xz_bits_per_byte: float | None = None  # of the held-out text, the training text known

    def save(self, folder: Path) -> None:
        (folder / "data.json.partial").write_text(json.dumps(asdict(self), indent=2))
        (folder / "data.json.partial").replace(folder / "data.json")

    @classmethod
    def load(cls, folder: Path) -> Corpus | None:
        path = folder / "data.json"
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def shards(self, folder: Path, split: str) -> list[numpy.ndarray]:
        """The memory-mapped shards of "train" or "heldout"."""
        count = self.train_shards if split == "train" else self.heldout_shards
        return [numpy.memmap(folder / f"{split}-{i:05}.bin", self.dtype, "r") for i in range(count)]


def source_of(files: list[Path]) -> list:
    return [[path.name, path.stat().st_size] for path in files]


def prepare(
    files: list[Path],
    tokenizer: Tokenizer,
    folder: Path,
    separator: str = "",
    held_out: float = 0.1,
    seen: Callable[[int], None] = lambda n: None,
) -> Corpus:
    """Tokenize files into shards under folder, and split off the held-out part.

    Exact duplicates of a document are dropped. Of many documents (100 or more), every so-many-th is
    held out whole; of few, the last held_out share of each one. Raises InputError if nothing is
    left to train on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = numpy.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    counts = {"documents": 0, "duplicates": 0, "invalid_bytes": 0}
    whole, index = folder / "all.partial", folder / "index.partial"
    (folder / "seen.partial").unlink(missing_ok=True)
    hashes = sqlite3.connect(folder / "seen.partial")  # on disk: memory must not grow
    hashes.executescript("pragma journal_mode = off; pragma synchronous = off;")
    hashes.execute("create table seen (digest blob primary key) without rowid")
    with open(whole, "wb") as tokens, open(index, "wb") as ends:
        for document in as_documents(read_texts(files, separator, seen)):
            place = tokens.tell()
            digest = write_document(document, tokenizer, dtype, tokens, counts, bool(separator))
            if digest is None:  # empty
                continue
            fresh = hashes.execute("insert or ignore into seen values (?)", [digest]).rowcount
            counts["documents" if fresh else "duplicates"] += 1
            if fresh:
                ends.write(numpy.int64(tokens.tell() // dtype.itemsize).tobytes())
            else:
                tokens.seek(place)
                tokens.truncate()
    hashes.close()
    if not counts["documents"]:
        raise InputError(f"{files[0]}: there is no text in it" if len(files) == 1 else "no text")
    corpus = split_shards(folder, tokenizer, dtype, held_out, counts, source_of(files))
    for partial in folder.glob("*.partial"):
        partial.unlink()
    return corpus


def write_document(pieces, tokenizer, dtype, file, counts, strip: bool) -> bytes | None:
    """Append `<|begin|> tokens <|end|>`; returns the hash of the text, or None if it was empty.

    strip: leave out the newlines around it, which belong to the separator's line.
    """
    begin, end = (tokenizer.special[name] for name in ("<|begin|>", "<|end|>"))
    hasher, place, empty = hashlib.blake2b(digest_size=16), file.tell(), True
    file.write(numpy.array([begin], dtype).tobytes())
    kept = ""  # newlines that stay only if text follows
    for piece in pieces:
        text = kept + piece
        if strip:
            text = text.lstrip("\n") if empty else text
            kept = text[len(text.rstrip("\n")) :]
            text = text.removesuffix(kept)
        if not text:
            continue
        empty = False
        raw = text.encode("utf-8", "surrogatepass")
        hasher.update(raw)
        if not text.isascii():
            counts["invalid_bytes"] += len(INVALID.findall(text))
        file.write(tokenizer.encode_array(text).astype(dtype).tobytes())
    if empty:
        file.seek(place)
        file.truncate()
        return None
    file.write(numpy.array([end], dtype).tobytes())
    return hasher.digest()


class ShardWriter:
    """Appends tokens to split-00000.bin, split-00001.bin, ..., and counts tokens and bytes."""

    def __init__(self, folder: Path, split: str, byte_lengths: numpy.ndarray):
        self.folder, self.split, self.byte_lengths = folder, split, byte_lengths
        self.shards, self.tokens, self.bytes, self.room = 0, 0, 0, 0

    def write(self, tokens: numpy.ndarray) -> None:
        while len(tokens):
            if not self.room:
                self.close()
                self.file = open(self.folder / f"{self.split}-{self.shards:05}.bin", "wb")
                self.shards, self.room = self.shards + 1, SHARD
            part = tokens[: min(self.room, BLOCK)]  # a memory map: only so much of it is in memory
            self.file.write(part.tobytes())
            self.tokens += len(part)
            self.bytes += int(self.byte_lengths[part].sum())
            self.room, tokens = self.room - len(part), tokens[len(part) :]

    def close(self) -> None:
        if self.shards:
            self.file.close()


def split_shards(folder, tokenizer, dtype, held_out, counts, source) -> Corpus:
    """Copy all.partial into train and held-out shards."""
    ends = numpy.memmap(folder / "index.partial", "int64", "r")
    tokens = numpy.memmap(folder / "all.partial", dtype, "r")
    lengths = byte_lengths(tokenizer)
    train, heldout = (ShardWriter(folder, name, lengths) for name in ("train", "heldout"))
    many, begin = len(ends) >= MANY, 0
    for i, end in enumerate(ends):
        if many:  # spread evenly: where i · share passes a whole number
            cut = begin if int((i + 1) * held_out) > int(i * held_out) else end
        else:  # the begin token is not counted: of 10 characters with 0.1, the last is held out
            cut = begin + 1 + int((end - begin - 2) * (1 - held_out)) if held_out else end
        train.write(tokens[begin:cut])
        heldout.write(tokens[cut:end])
        begin = int(end)
    train.close()
    heldout.close()
    return Corpus(
        dtype.name, train.shards, heldout.shards, train.tokens, heldout.tokens,
        train.bytes, heldout.bytes, **counts, source=source,
    )  # fmt: skip


def byte_lengths(tokenizer: Tokenizer) -> numpy.ndarray:
    """How many bytes of text each token stands for, (V,); special tokens stand for none."""
    special = set(tokenizer.special.values())
    ids = range(tokenizer.vocab_size)
    return numpy.array([0 if i in special else len(tokenizer.token_bytes(i)) for i in ids])


# ---- batches -----------------------------------------------------------------------------------


@dataclass
class Batch:
    """Rows for one forward: tokens, targets (−1: nothing to learn), and where documents start."""

    tokens: numpy.ndarray  # (B, T)
    targets: numpy.ndarray  # (B, T)
    start: numpy.ndarray | None  # (B, T), or None: every row is one document
    notes: dict = field(default_factory=dict)  # numbers for the log
    harm: str = field(default="", kw_only=True)  # why nothing must be learned from it

    def trained_tokens(self) -> int:
        return int((self.targets >= 0).sum())

    def denominator(self) -> int:
        """What the summed loss is divided by, itself summed over the whole optimizer step."""
        return self.trained_tokens()

    def learns(self) -> bool:
        """Whether there is anything in it that could move a weight."""
        return self.trained_tokens() > 0


def next_token_batch(rows: numpy.ndarray, begin: int) -> Batch:
    """rows (B, T + 1) -> what predicts the next token; none is learned across documents."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    targets = numpy.where(targets == begin, -1, targets)
    at = numpy.where(tokens == begin, numpy.arange(tokens.shape[1], dtype=numpy.int32), 0)
    start = numpy.maximum.accumulate(at, 1, dtype=numpy.int32)
    return Batch(tokens, targets, start if start.any() else None)


class Windows:
    """Rows of T + 1 tokens drawn from shards: each epoch all of them, in an order of its own.

    Epoch e cuts every shard into windows from a random offset, and visits them in a pseudo-random
    permutation that is computed, not stored. `drawn` is the whole position: setting it resumes.
    """

    def __init__(self, shards: list[numpy.ndarray], block_size: int, seed: int):
        self.shards = [shard for shard in shards if len(shard) > block_size]
        if not self.shards:
            longest = max([0, *map(len, shards)])
            raise InputError(
                f"the training text has {longest} tokens, fewer than one context of {block_size} "
                f"and the token after it: use a smaller --block-size or more text"
            )
        self.block_size, self.seed, self.drawn = block_size, seed, 0
        # one window fewer than would fit, so that the offset has room to move
        self.counts = [max(1, (len(s) - 1) // block_size - 1) for s in self.shards]
        self.per_epoch = sum(self.counts)

    def draw(self, n: int) -> numpy.ndarray:
        """The next n rows, (n, T + 1) of int64."""
        rows = [self.row(i) for i in range(self.drawn, self.drawn + n)]
        self.drawn += n
        return numpy.stack(rows).astype(numpy.int64)

    def row(self, i: int) -> numpy.ndarray:
        epoch, i = i // self.per_epoch, shuffled(i, self.per_epoch, self.seed)
        for shard, count in zip(self.shards, self.counts):
            if i < count:
                slack = len(shard) - 1 - count * self.block_size
                offset = mix(epoch, self.seed + len(shard)) % (slack + 1)
                begin = offset + i * self.block_size
                return shard[begin : begin + self.block_size + 1]
            i -= count
        raise AssertionError("a window number beyond the epoch")


def mix(x: int, key: int) -> int:
    """A 32-bit hash (the finalizer of MurmurHash3) of x under a key."""
    x = (x ^ key * 0x9E3779B9) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def permuted(i: int, n: int, key: int) -> int:
    """Where a pseudo-random permutation of range(n) sends i: a Feistel network, walked until the
    result falls below n."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for turn in range(4):
            left, right = right, left ^ mix(right, key * 4 + turn) & ((1 << half) - 1)
        i = left << half | right
        if i < n:
            return i


def shuffled(i: int, n: int, seed: int) -> int:
    """Of n things, which is the i-th of an endless stream: each epoch has an order of its own."""
    epoch, i = divmod(i, n)
    return permuted(i, n, seed * 1_000_003 + epoch)


Example = tuple[list[int], list[bool]]  # ids, and which of them are learned


def packed_batch(rows: list[list[Example]], padding: int) -> Batch:
    """Rows of examples, one after another, as documents that do not see each other.

    As wide as the longest row; the rest of a row is padding, from which nothing is learned.
    """
    width = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    tokens = numpy.full((len(rows), width), padding)
    targets, start = numpy.full_like(tokens, -1), numpy.zeros(tokens.shape, numpy.int32)
    for r, row in enumerate(rows):
        at = 0
        for ids, learned in row:
            end = at + len(ids) - 1
            tokens[r, at:end] = ids[:-1]
            targets[r, at:end] = numpy.where(learned[1:], ids[1:], -1)
            start[r, at:end] = at
            at = end
        start[r, at:] = at
    return Batch(tokens, targets, start)


def first_fit(sizes: list[int], width: int) -> list[list[int]]:
    """Which of the things of these sizes lie in each row: each in the first with room for it."""
    room = numpy.full(len(sizes), width)
    rows: list[list[int]] = []
    first = 0  # rows before it are full to within 2 tokens
    for i, size in enumerate(sizes):
        at = first + int((room[first : len(rows) + 1] >= size).argmax())
        if at == len(rows):
            rows.append([])
        rows[at].append(i)
        room[at] -= size
        while first < len(rows) and room[first] <= 2:
            first += 1
    return rows


class Packed:
    """Examples, as many to a row of T tokens as fit: each epoch all of them, packed anew.

    Every example fits: it has at most T + 1 tokens. `epoch` and `row` are the whole position.
    """

    def __init__(self, examples: list[Example], block_size: int, seed: int, padding: int):
        self.examples, self.block_size, self.seed = examples, block_size, seed
        self.padding = padding
        self.seek(0, 0)

    def seek(self, epoch: int, row: int) -> None:
        self.epoch, self.row, self.rows = epoch, row, self.pack(epoch)

    def draw(self, n: int) -> Batch:
        """The next n rows."""
        drawn = []
        while len(drawn) < n:
            if self.row == len(self.rows):
                self.seek(self.epoch + 1, 0)
            drawn.append([self.examples[i] for i in self.rows[self.row]])
            self.row += 1
        return packed_batch(drawn, self.padding)

    def pack(self, epoch: int) -> list[list[int]]:
        """The examples in rows, packed in a random order; the rows shuffled."""
        rng = numpy.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.examples)).tolist()
        rows = first_fit([len(self.examples[i][0]) - 1 for i in order], self.block_size)
        return [[order[i] for i in rows[r]] for r in rng.permutation(len(rows))]


def in_order(shards: list[numpy.ndarray], block_size: int) -> Iterator[numpy.ndarray]:
    """Rows of up to T + 1 tokens that cover the shards from front to back, each target once."""
    for shard in shards:
        for begin in range(0, len(shard) - 1, block_size):
            yield shard[begin : begin + block_size + 1].astype(numpy.int64)
