"""Byte-pair encoding in plain Python: the readable twin of _bpe.pyx.

Both modules define `split_words`, `count_words`, `Encoder` and `learn_merges`, and give the same
ids, which the tests check. tinylm.tokenizer takes the compiled one where there is one; read this
one first.

Byte-pair encoding (Sennrich et al., arXiv 1508.07909) knows a list of *merges*: pairs of neighbours
that become one token. Learning takes the commonest pair of the training text, again and again;
encoding repeats the merges on a new text in the order in which they were learnt.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, pairwise

import numpy as np
import regex

# GPT-4's pieces: contractions; words, each with the character before it; up to three digits;
# punctuation; line ends; spaces. GPT-4 also has possessive quantifiers, which save time and change
# no piece. They are left out because oniguruma, the engine of Hugging Face, reads them differently.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
CACHE_SIZE = 1 << 18  # pieces remembered by an Encoder
LONGEST_CACHED = 64  # characters; longer pieces hardly ever come twice


def split_words(text: str) -> Iterator[str]:
    """The matches of PATTERN, which leave no character out."""
    return (match[0] for match in regex.finditer(PATTERN, text))


def count_words(texts: list[str]) -> dict[str, int]:
    """How often each piece occurs in the texts."""
    return Counter(chain.from_iterable(map(split_words, texts)))


class Encoder:
    """Turns pieces of text into token ids.

    A piece is cut into symbols: a character in `characters` is one symbol, any other is its UTF-8
    bytes by way of `byte_ids`, and without `byte_ids` it is `unk`. An id of -1 stands for no token
    and is left out. Then `merges` are applied: the list of (left, right, merged) ids, best first.
    A piece in `whole` is that one token and skips all this.
    """

    def __init__(
        self,
        byte_ids: list[int] | None,
        merges: list[tuple[int, int, int]],
        characters: dict[str, int] | None = None,
        unk: int = -1,
        whole: dict[str, int] | None = None,
    ):
        self.byte_ids, self.characters, self.unk = byte_ids, characters or {}, unk
        self.ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merges)}
        self.merged = [merged for _, _, merged in merges]
        self.whole = {piece: [token] for piece, token in (whole or {}).items()}
        self.remembered = lru_cache(CACHE_SIZE)(self.encode_piece)

    def encode(self, pieces: Iterable[str]) -> np.ndarray:
        """The ids of all pieces, one after the other: uint32 (n,)."""
        ids: list[int] = []
        for piece in pieces:
            short = len(piece) <= LONGEST_CACHED
            ids += self.remembered(piece) if short else self.encode_piece(piece)
        return np.array(ids, np.uint32)

    def encode_piece(self, piece: str) -> list[int]:
        return self.whole.get(piece) or self.merge(self.cut(piece))

    def cut(self, piece: str) -> list[int]:
        ids = []
        for character in piece:
            if character in self.characters:
                ids.append(self.characters[character])
            elif self.byte_ids is None:
                ids.append(self.unk)
            else:
                ids += [self.byte_ids[b] for b in character.encode("utf-8", "surrogateescape")]
        return [i for i in ids if i >= 0]

    def merge(self, ids: list[int]) -> list[int]:
        """Merge neighbours, the best rank first, the leftmost first among equals.

        The symbols are a linked list and the pairs wait in a heap, so n symbols take O(n log n).
        A pair in the heap is stale, and skipped, once rank[i] has become another one.
        """
        n = len(ids)
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))
        rank = [self.ranks.get(pair) for pair in pairwise(ids)] + [None]
        heap = [(r, i) for i, r in enumerate(rank) if r is not None]
        heapq.heapify(heap)

        def meet(i: int, k: int) -> None:
            """Symbols i and k are neighbours now: their pair waits too, if it can be merged."""
            rank[i] = self.ranks.get((ids[i], ids[k])) if k < n else None
            if rank[i] is not None:
                heapq.heappush(heap, (rank[i], i))

        while heap:
            best, i = heapq.heappop(heap)
            if rank[i] != best:
                continue
            j = right[i]  # the merged token stands at i; j drops out of the list
            k = right[i] = right[j]
            ids[i], rank[j], right[j] = self.merged[best], None, -1
            meet(i, k)
            if k < n:
                left[k] = i
            if left[i] >= 0:
                meet(left[i], i)
        return [token for token, following in zip(ids, right) if following >= 0]


def learn_merges(
    counts: dict[str, int], n_merges: int, progress: Callable[[int, int], None] | None = None
) -> list[tuple[int, int]]:
    """The first `n_merges` merges of byte-pair encoding, fewer if the text runs out of pairs.

    `counts` says how often each piece of text occurs; merges never cross the edge of a piece. Ids
    0 to 255 are the bytes, merge m makes id 256 + m. The commonest pair comes first; among equally
    common ones the smallest left id, then the smallest right id.
    """
    words = [list(piece.encode("utf-8", "surrogateescape")) for piece in counts]
    weights = list(counts.values())
    pairs: Counter[tuple[int, int]] = Counter()
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += weights[w]
            places[pair].add(w)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and heap[0][0] < 0 and len(merges) < n_merges:  # 0: came and went in one merge
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:  # out of date: it has lost some of its occurrences meanwhile
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        fresh: set[tuple[int, int]] = set()
        for w in places.pop(pair):
            for changed, delta in merge_in_word(words[w], pair, 256 + len(merges)):
                pairs[changed] += delta * weights[w]
                if delta > 0:
                    places[changed].add(w)
                    fresh.add(changed)
        del pairs[pair]
        for new in fresh:  # only pairs with the new token have become more frequent
            heapq.heappush(heap, (-pairs[new], new))
        merges.append(pair)
        if progress:
            progress(len(merges), n_merges)
    return merges


def merge_in_word(word: list[int], pair: tuple[int, int], merged: int):
    """Replace `pair` by `merged` in `word`, in place; the pairs gained (+1) and lost (-1) so."""
    changes = []
    i = 0
    while i + 1 < len(word):
        if (word[i], word[i + 1]) == pair:
            if i > 0:
                changes += [((word[i - 1], pair[0]), -1), ((word[i - 1], merged), 1)]
            if i + 2 < len(word):
                changes += [((pair[1], word[i + 2]), -1), ((merged, word[i + 2]), 1)]
            word[i : i + 2] = [merged]
        i += 1
    return changes
