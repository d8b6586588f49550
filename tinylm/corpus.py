"""Text files -> token shards on disk.

    read_texts    files and folders -> pieces of documents, in one streaming pass
    make_corpus   pieces -> token shards (memory-mapped uint16 or uint32), duplicates dropped, a
                  part held out; memory does not grow with the corpus

On disk every document is `<|begin|> tokens <|end|>`.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

from tinylm.data import is_held_out, source_of
from tinylm.errors import InputError
from tinylm.files import expected
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
            inner = sorted(path.rglob("*"))
            found = [p for p in inner if p.is_file() and is_text(p.relative_to(path))]
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
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name.removesuffix(".gz").endswith(TEXT_ENDINGS)


def read_texts(
    files: Iterable[Path], separator: str = "", seen: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[str, bool]]:
    """Pieces of text, and whether a document ends with this piece.

    A plain file is one document, split further at the separator; of JSON lines, each `text` is one.
    Bytes that are not UTF-8 come as U+DC80..U+DCFF. seen(n) is told of every n bytes read of a
    file, of a .gz of those on the disk.
    """
    for path in files:
        try:
            with open(path, "rb") as disk:
                file = gzip.GzipFile(fileobj=disk) if path.name.endswith(".gz") else disk
                if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
                    pieces = json_pieces(file, path)
                else:
                    refuse_binary(file, path)
                    pieces = plain_pieces(file, separator)
                at = 0
                for piece in pieces:
                    before, at = at, disk.tell()
                    seen(at - before)
                    yield piece
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error


def json_pieces(file, path: Path) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f"{path}, line {number}: not valid JSON ({error})"
            raise InputError(f"{where}: every line is an object of its own") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{path}, line {number}: expected an object with a "text" string')
        yield text, True


def refuse_binary(file, path: Path) -> None:
    """Raise InputError where the file's beginning holds a zero byte: no text in UTF-8 does."""
    if b"\0" in file.read(BLOCK):
        raise InputError(
            f"{path}: not plain text, for it holds zero bytes, as PDF files, pictures and UTF-16 "
            "do: convert it to UTF-8 text first, or leave it out"
        )
    file.seek(0)


def plain_pieces(file, separator: str) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    buffer = ""
    while block := file.read(BLOCK):
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
    return match.end() if match else (limit if len(text) > 2 * BLOCK else 0)


CUTS = re.compile(r"\S(?= )|\n(?=\S)")
INVALID = re.compile("[\udc80-\udcff]")


def as_documents(pieces: Iterable[tuple[str, bool]], separator="") -> Iterator[Iterator[str]]:
    """Group pieces into documents, each an iterator to be exhausted before the next one.

    Where a separator divides them, the newlines around it belong to none.
    """
    pieces = iter(pieces)

    def rest(text, ends):
        yield text
        while not ends:
            text, ends = next(pieces)
            yield text

    for text, ends in pieces:
        yield stripped(rest(text, ends)) if separator else rest(text, ends)


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Those of a document without the newlines around it, which belong to the separator's line.

    These are all in the first and the last piece: safe_cut leaves no newline before another one.
    """
    text = ""
    for piece in pieces:
        if text:
            yield text
        text = piece if text else piece.lstrip("\r\n")
    yield text.rstrip("\r\n")


# ---- token shards ------------------------------------------------------------------------------


@dataclass
class Corpus:
    """What make_corpus made, and data.json holds once it is whole: counts of a folder of shards."""

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
    vocab_size: int = 1 << 32  # every token is below it

    def save(self, folder: Path) -> None:
        (folder / "data.json.partial").write_text(json.dumps(asdict(self), indent=2))
        (folder / "data.json.partial").replace(folder / "data.json")

    @classmethod
    def load(cls, folder: Path) -> Corpus | None:
        """What was saved there, if anything. Raises InputError where it is damaged."""
        path = folder / "data.json"
        if not path.exists():
            return None
        with expected(path, "what tells of its shards"):
            return cls(**json.loads(path.read_text()))

    def shards(self, folder: Path, split: str) -> list[numpy.ndarray]:
        """The memory-mapped shards of "train" or "heldout". Raises InputError for a damaged one."""
        count, tokens = (getattr(self, f"{split}_{of}") for of in ("shards", "tokens"))
        with expected(folder / "data.json", "what its shards hold"):
            names = [folder / f"{split}-{i:05}.bin" for i in range(count)]
            found = [numpy.memmap(name, self.dtype, "r") for name in names]
            if (n := sum(map(len, found))) != tokens:
                raise ValueError(f"{n} {split} tokens, expected {tokens}")
            if (most := max(map(numpy.max, found), default=0)) >= self.vocab_size:
                raise ValueError(f"a {split} token {most}, expected less than {self.vocab_size}")
        return found


def make_corpus(
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
    try:
        dtype, counts = write_documents(files, tokenizer, folder, separator, seen)
        if not counts["documents"]:
            one = len(files) == 1
            raise InputError(f"{files[0]}: there is no text in it" if one else "no text")
        return split_shards(folder, tokenizer, dtype, held_out, counts, source_of(files))
    finally:
        for partial in folder.glob("*.partial"):
            partial.unlink()


def write_documents(files, tokenizer, folder: Path, separator: str, seen) -> tuple:
    """The tokens of all documents in all.partial, and in index.partial where each ends; returns the
    dtype of the tokens, and what was counted."""
    dtype = numpy.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    counts = {"documents": 0, "duplicates": 0, "invalid_bytes": 0}
    whole, index = folder / "all.partial", folder / "index.partial"
    (folder / "hashes.partial").unlink(missing_ok=True)
    hashes = sqlite3.connect(folder / "hashes.partial")  # on disk: memory must not grow
    hashes.executescript("pragma journal_mode = off; pragma synchronous = off;")
    hashes.execute("create table hashes (digest blob primary key) without rowid")
    insert = "insert or ignore into hashes values (?)"
    with open(whole, "wb") as tokens, open(index, "wb") as ends:
        for document in as_documents(read_texts(files, separator, seen), separator):
            place = tokens.tell()
            digest = write_document(document, tokenizer, dtype, tokens, counts)
            fresh = digest and hashes.execute(insert, [digest]).rowcount
            if digest:
                counts["documents" if fresh else "duplicates"] += 1
            if fresh:
                ends.write(numpy.int64(tokens.tell() // dtype.itemsize).tobytes())
            else:
                tokens.seek(place)
                tokens.truncate()
    hashes.close()
    return dtype, counts


def write_document(pieces, tokenizer, dtype, file, counts) -> bytes | None:
    """Append `<|begin|> tokens <|end|>`; returns the hash of the text, or None if it was empty."""
    begin, end = (tokenizer.special[name] for name in ("<|begin|>", "<|end|>"))
    hasher, empty = hashlib.blake2b(digest_size=16), True
    file.write(numpy.array([begin], dtype).tobytes())
    for text in pieces:
        if not text:
            continue
        empty = False
        raw = text.encode("utf-8", "surrogatepass")
        hasher.update(raw)
        if not text.isascii():
            counts["invalid_bytes"] += len(INVALID.findall(text))
        file.write(tokenizer.encode_array(text).astype(dtype).tobytes())
    file.write(numpy.array([end], dtype).tobytes())
    return None if empty else hasher.digest()


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
    many, begin = len(ends) >= MANY and len(ends) * held_out >= 1, 0
    for i, end in enumerate(ends):
        if many:
            cut = begin if is_held_out(i, held_out) else end
        else:  # the begin token is not counted: of 10 characters with 0.1, the last is held out
            cut = begin + 1 + int((end - begin - 2) * (1 - held_out)) if held_out else end
        train.write(tokens[begin:cut])
        heldout.write(tokens[cut:end])
        begin = int(end)
    train.close()
    heldout.close()
    return Corpus(
        dtype.name, train.shards, heldout.shards, train.tokens, heldout.tokens,
        train.bytes, heldout.bytes, **counts, source=source, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip


def byte_lengths(tokenizer: Tokenizer) -> numpy.ndarray:
    """How many bytes of text each token stands for, (V,); special tokens stand for none."""
    return numpy.array([*map(len, tokenizer.texts())])
