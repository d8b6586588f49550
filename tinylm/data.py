"""Token shards and examples -> batches.

    Windows    shards -> rows of next words, shuffled, from any position
    Packed     examples, such as conversations -> rows that hold several
    SharedPrompts.of    prompts with several answers each -> rows in which a prompt is read once

As no text can make a special token, a begin token in a row is always the start of a document:
attention does not look across it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from tinylm.errors import InputError


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
    begins = numpy.where(tokens == begin, numpy.arange(tokens.shape[1], dtype=numpy.int32), 0)
    start = numpy.maximum.accumulate(begins, 1, dtype=numpy.int32)  # the last one so far
    return Batch(tokens, targets, start if start.any() else None)


def is_held_out(i: int, share: float) -> bool:
    """Of thing i of many: they are spread evenly, where i · share passes a whole number."""
    return int((i + 1) * share) > int(i * share)


class Windows:
    """Rows of T + 1 tokens drawn from shards: each epoch all of them, in an order of its own.

    Epoch e cuts every shard into windows from a random offset, and visits them in a pseudo-random
    permutation that is computed, not stored. `drawn` is the whole position: setting it resumes.
    """

    def __init__(self, shards: list[numpy.ndarray], block_size: int, seed: int):
        self.shards = [shard for shard in shards if len(shard) > block_size]
        if not self.shards:
            longest = max(map(len, shards), default=0)
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
    x = (x ^ (key * 0x9E3779B9)) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def permuted(i: int, n: int, key: int) -> int:
    """Where a pseudo-random permutation of range(n) sends i.

    A Feistel network permutes all numbers of 2 half bits; walked until the result falls below n, it
    permutes those below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for turn in range(4):
            left, right = right, left ^ (mix(right, key * 4 + turn) & ((1 << half) - 1))
        i = (left << half) | right
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
    first = 0  # rows before it have room for 2 tokens at most: looking there costs more
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


Asked = tuple[list[int], list[list[int]]]  # a prompt and answers to it, as ids
ROW = 128  # tokens to a row of these, if no prompt needs more: little padding, little attention


@dataclass
class SharedPrompts(Batch):
    """Prompts with several answers each; targets are the answers' tokens.

    A prompt is read once. In a row it lies before all answers to it, of which each begins with the
    prompt's last token, from which its first is predicted, and does not see those before it:

        tokens    p p p p a a a p b b p c c c       targets    . . . a a a $ b b $ c c c $
                  prompt ────────┘                             the answers aaa$, bb$, ccc$
    """

    gap: numpy.ndarray = None  # (B, T, 2): the answers between a token and its prompt
    answer: numpy.ndarray = None  # (B, T): whose token a target is, −1 where none is
    ends: numpy.ndarray = None  # (answers,): where each ends, counted over all rows

    @classmethod
    def of(cls, prompts: list[Asked], most: int, padding: int = 0, **rest) -> SharedPrompts:
        """As many answers to a row as fit.

        A row has ROW tokens or what the largest prompt with its answers needs, within `most`, the
        model's context.
        """
        alone = max(len(prompt) - 1 + len(ids) for prompt, answers in prompts for ids in answers)
        whole = max(len(prompt) - 1 + sum(map(len, answers)) for prompt, answers in prompts)
        width = max(min(most, max(ROW, whole)), alone)
        parts = []  # a prompt and answers to it that lie together in a row
        n_answers = 0
        for prompt, answers in prompts:
            room = -1  # an answer may have no tokens
            for ids in answers:
                if len(ids) > room:
                    parts.append((prompt, []))
                    room = width - (len(prompt) - 1)
                parts[-1][1].append((n_answers, ids))
                room -= len(ids)
                n_answers += 1

        sizes = [len(prompt) - 1 + sum(len(ids) for _, ids in said) for prompt, said in parts]
        rows = first_fit(sizes, width)
        shape = len(rows), max(1, *(sum(sizes[i] for i in row) for row in rows))
        tokens, start = numpy.full(shape, padding), numpy.zeros(shape, "int32")
        gap, ends = numpy.zeros((*shape, 2), "int32"), numpy.zeros(n_answers, int)
        targets, answer = numpy.full((2, *shape), -1)
        for r, row in enumerate(rows):
            at = 0
            for prompt, said in (parts[i] for i in row):
                start[r, at:] = at
                end = at + len(prompt) - 1
                tokens[r, at:end] = prompt[:-1]
                at = end
                for number, ids in said:
                    here = r, slice(at, at + len(ids))
                    tokens[here], targets[here] = [prompt[-1], *ids[:-1]], ids
                    gap[here], answer[here] = (end, at), number
                    at += len(ids)
                    ends[number] = r * shape[1] + at - 1
            start[r, at:] = at
        return cls(tokens, targets, start, gap=gap, answer=answer, ends=ends, **rest)


def in_order(shards: list[numpy.ndarray], block_size: int) -> Iterator[numpy.ndarray]:
    """Rows of up to T + 1 tokens that cover the shards from front to back, each target once."""
    for shard in shards:
        for begin in range(0, len(shard) - 1, block_size):
            yield shard[begin : begin + block_size + 1].astype(numpy.int64)


def source_of(files: list[Path]) -> list:
    """Names and bytes, by which a resumed run knows what it learned from."""
    return [[path.name, path.stat().st_size] for path in files]
