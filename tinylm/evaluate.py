"""How good a model is: bits per byte of held-out text, beside what xz needs for it; right answers.

Bits per byte compares models whatever their tokens. xz is given the training text first, so that
both have seen the same; the model also had its weights to write it into, whose size is stated.
"""

from __future__ import annotations

import lzma
import math
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import numpy

from tinylm.chat import template_of, turn
from tinylm.corpus import Corpus, as_documents, byte_lengths, list_files, read_texts
from tinylm.data import Batch, in_order, next_token_batch
from tinylm.errors import InputError
from tinylm.generate import answers, complete_in_parts, encode_prompt
from tinylm.judges.verifier import verdict
from tinylm.model import Transformer
from tinylm.tensor import no_grad
from tinylm.tokenizer import Tokenizer

XZ_WINDOW = 1 << 26  # bytes of training text that xz -9 can look back on


def evaluate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    shards: list[numpy.ndarray],
    block_size: int = 0,
    batch_size: int = 16,
    max_tokens: int = 0,
) -> dict[str, float]:
    """Next-word loss over shards, in windows of block_size (0: the model's), each token once.

    Returns loss (nats per token), perplexity, bits_per_byte, tokens and bytes. The first token of a
    window that starts inside a document is context only. max_tokens (0: all) cuts it short.
    """
    lengths = byte_lengths(tokenizer)
    nats, tokens, n_bytes = 0.0, 0, 0
    rows = in_order(shards, block_size or model.config.block_size)
    begin = tokenizer.special.get("<|begin|>", tokenizer.bos_id)
    if begin in (None, tokenizer.eos_id):  # GPT-2 ends a text with the token that begins the next
        begin = -1
    for batch in in_batches(rows, batch_size, begin):
        with no_grad():
            loss = model.loss(batch.tokens, batch.targets, batch.start).data
        known = batch.targets >= 0
        nats += float(loss.sum(dtype="float64"))
        tokens += int(known.sum())
        n_bytes += int(lengths[batch.targets[known]].sum())
        if max_tokens and tokens >= max_tokens:
            break
    if not tokens or not n_bytes:
        return {"loss": math.nan, "perplexity": math.nan, "bits_per_byte": math.nan, "tokens": 0}
    mean = nats / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "tokens": tokens,
        "bytes": n_bytes,
    }


def in_batches(rows: Iterable[numpy.ndarray], size: int, begin: int) -> Iterator[Batch]:
    """Rows of T + 1 or fewer tokens as batches; short ones are filled up with nothing to learn."""
    rows = iter(rows)
    while held := [*islice(rows, min(size, sys.maxsize))]:
        width = max(map(len, held))
        padded = numpy.full((len(held), width), max(begin, 0), numpy.int64)
        for row, tokens in zip(padded, held):
            row[: len(tokens)] = tokens
        batch = next_token_batch(padded, begin)
        for targets, tokens in zip(batch.targets, held):
            targets[len(tokens) - 1 :] = -1
        yield batch


def xz_bits_per_byte(train: list[bytes], heldout: list[bytes]) -> float:
    """8 · (size of xz(train + held-out) − size of xz(train)) / bytes of held-out, with xz -9."""
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        both, alone = pool.map(xz_size, (train + heldout, train))
    return 8 * (both - alone) / max(1, sum(map(len, heldout)))


def xz_memory(size: int) -> int:
    """Bytes that xz_bits_per_byte takes beside `size` bytes of text: two compressors at once, each
    with a table, and 9 bytes for every one that it can look back on."""
    return 2 * ((64 << 20) + 9 * min(size, XZ_WINDOW))


def xz_size(chunks: Iterable[bytes]) -> int:
    compressor = lzma.LZMACompressor(preset=9)
    return sum(len(compressor.compress(chunk)) for chunk in chunks) + len(compressor.flush())


def shard_bytes(tokenizer: Tokenizer, shards: list[numpy.ndarray], last: int = 0) -> list[bytes]:
    """The text of shards in chunks, without special tokens; only about the last bytes if asked."""
    chunks, size = [], 0
    for shard in reversed(shards):
        for end in range(len(shard), 0, -(1 << 20)):
            tokens = shard[max(0, end - (1 << 20)) : end].tolist()
            chunks.append(tokenizer.decode_bytes(tokens, skip_special=True))
            size += len(chunks[-1])
            if last and size >= last:
                return chunks[::-1]
    return chunks[::-1]


def xz_of_corpus(tokenizer: Tokenizer, corpus: Corpus, folder: Path) -> float:
    """xz_bits_per_byte of a corpus; of a large one, xz sees what its window can hold.

    Found when it is first asked for, and kept: xz -9 takes longer than the first steps of a run.
    """
    if corpus.xz_bits_per_byte is None:
        shards = (corpus.shards(folder, split) for split in ("train", "heldout"))
        texts = (shard_bytes(tokenizer, some, XZ_WINDOW) for some in shards)
        corpus.xz_bits_per_byte = xz_bits_per_byte(*texts)
        corpus.save(folder)
    return corpus.xz_bits_per_byte


def ask(
    model: Transformer, tokenizer: Tokenizer, questions: list[str], max_new_tokens: int = 32
) -> list[str]:
    """The greedy answer to each question; a base model just continues its text."""
    if template_of(tokenizer):
        asked = [[turn("user", question)] for question in questions]
        return answers(model, tokenizer, asked, max_new_tokens)
    return continuations(model, tokenizer, questions, max_new_tokens)


def continuations(
    model: Transformer, tokenizer: Tokenizer, texts: list[str], max_new_tokens: int
) -> list[str]:
    """How the model greedily goes on with each text."""
    prompts = [encode_prompt(model, tokenizer, text) for text in texts]
    rng = numpy.random.default_rng(0)
    rows = complete_in_parts(model, prompts, max_new_tokens, rng, temperature=0)
    return [tokenizer.decode(row, skip_special=True, continues=True) for row in rows]


def verdict_shares(triples: list[tuple[str, Iterable[str], Hashable]]) -> dict:
    """Shares of right, wrong and "I don't know" in (answer, accepted answers, thing asked about),
    their number n, and for each of them how many independent questions they are worth.
    """
    verdicts = [verdict(answer, accepted) for answer, accepted, _ in triples]
    hits = {name: [v == name for v in verdicts] for name in ("right", "wrong", "idk")}
    things = [thing for _, _, thing in triples]
    return {
        **{name: round(sum(hit) / len(hit), 4) for name, hit in hits.items()},
        "n": len(triples),
        "n_effective": {name: round(effective_n(hit, things), 1) for name, hit in hits.items()},
    }


def effective_n(hits: list[bool], groups: list[Hashable]) -> float:
    """How many independent trials would tell the share of hits as well as these, of which those
    of one group may agree: n over the design effect (Kish 1965), n at most.
    """
    n, share, off = len(hits), sum(hits) / len(hits), Counter()
    for hit, group in zip(hits, groups, strict=True):
        off[group] += hit - share
    if len(off) == 1 or share in (0, 1):
        return n
    variance = sum(x * x for x in off.values()) / n**2 * len(off) / (len(off) - 1)
    return min(n, share * (1 - share) / variance) if variance else n


def wilson(share: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in n trials (Wilson 1927)."""
    centre, width = share + z * z / (2 * n), share * (1 - share) / n + z * z / (4 * n * n)
    low, high = (centre + sign * z * math.sqrt(width) for sign in (-1, 1))
    low, high = (round(bound / (1 + z * z / n), 9) for bound in (low, high))
    return max(0.0, low), min(1.0, high)


def variety(texts: list[str]) -> dict[str, float]:
    """How varied texts are, of which many were asked for.

    distinct_2   different pairs of words among all pairs of words (arXiv 1510.03055)
    repetition   pairs of words that stood in the same text before, mean over the texts
    """
    pairs = [[*pairwise(text.split())] for text in texts]
    every = [pair for of in pairs for pair in of]
    again = [1 - len(set(of)) / len(of) for of in pairs if of]
    return {
        "distinct_2": len(set(every)) / len(every) if every else 0.0,
        "repetition": sum(again) / len(again) if again else 0.0,
    }


def calibration(
    margins: numpy.ndarray, bins: int = 10
) -> tuple[float, list[tuple[float, float, int]]]:
    """Whether σ(|r_w − r_l|) is how often the answer that scores more is the better one.

    Returns the expected calibration error (arXiv 1706.04599), and for each bin of equal width with
    pairs in it: mean probability, share found right, number of pairs.
    """
    p, right = 1 / (1 + numpy.exp(-numpy.abs(margins))), (margins > 0) + 0.5 * (margins == 0)
    which = numpy.minimum((2 * p - 1) * bins, bins - 1).astype(int)
    table = []
    for of in (which == i for i in range(bins)):
        if of.any():
            table.append((float(p[of].mean()), float(right[of].mean()), int(of.sum())))
    return sum(n * abs(said - found) for said, found, n in table) / len(margins), table


def evaluate_directory(
    model: Transformer, tokenizer: Tokenizer, folder: Path, paths: list[str], separator: str,
    **sizes: int,
) -> dict:  # fmt: skip
    """evaluate_text on the named files, or else on the part that the run in folder held out."""
    tokens = folder / "training" / "tokens"
    corpus = Corpus.load(tokens)
    if paths:
        shards = [encode_files(tokenizer, list_files(paths), separator)]
        xz = None
    elif corpus:
        shards, xz = corpus.shards(tokens, "heldout"), xz_of_corpus(tokenizer, corpus, tokens)
    else:
        raise InputError(f"{folder} holds no held-out text: name some with --data FILE")
    found = evaluate_text(model, tokenizer, shards, **sizes)
    if not found["tokens"]:
        raise InputError("the text is too short to be judged")
    return {**found, "xz_bits_per_byte": xz}


def encode_files(tokenizer: Tokenizer, files: list, separator: str) -> numpy.ndarray:
    """All documents of files as one array of tokens, as make_corpus would lay them on disk."""
    begin, end = (tokenizer.special.get(name) for name in ("<|begin|>", "<|end|>"))
    begin, end = (tokenizer.bos_id, tokenizer.eos_id) if begin is None else (begin, end)
    tokens = []
    for document in as_documents(read_texts(files, separator), separator):
        ids = [i for text in document for i in tokenizer.encode(text)]
        if ids:
            tokens += [i for i in (begin, *ids, end) if i is not None]
    return numpy.array(tokens, numpy.int64)
