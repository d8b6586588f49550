# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Byte-pair encoding, compiled: the fast twin of _bpe_python.py, which explains what it does.

The same names, the same ids. A hand-written scanner stands in for the regex. A pair of ids is one 64-bit key, `left << 32 | right`, and a heap
holds one number per entry that sorts as it should.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from cython.operator cimport dereference
from libc.string cimport memcpy
from libcpp.queue cimport priority_queue
from libcpp.unordered_map cimport unordered_map
from libcpp.utility cimport pair as tuple2
from libcpp.vector cimport vector

cdef extern from "Python.h":
    int PyUnicode_KIND(str text)
    void* PyUnicode_DATA(str text)
    uint32_t PyUnicode_READ(int kind, void* data, Py_ssize_t index) noexcept
    str PyUnicode_Substring(str text, Py_ssize_t start, Py_ssize_t end)

import functools

import numpy as np
import regex

from tinylm._bpe_python import CACHE_SIZE, LONGEST_CACHED

cdef uint32_t NONE = 0xFFFFFFFF  # no rank: this pair does not merge
cdef uint32_t GONE = 0xFFFFFFFF  # no right neighbour: this symbol is no longer in the list


cdef inline uint64_t key_of(uint32_t left, uint32_t right) noexcept nogil:
    return (<uint64_t>left << 32) | right


cdef enum:  # kinds of characters; what follows the text is of kind END
    END, OTHER, LETTER, NUMBER, SPACE, NEWLINE


@functools.cache
def character_kinds():
    """The kind of every code point, as the regex module sees it: bytes (0x110000,), in 50 ms."""
    kinds = bytearray([OTHER]) * 0x110000
    everything = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    patterns = {LETTER: r"\p{L}+", NUMBER: r"\p{N}+", SPACE: r"\s+", NEWLINE: r"[\r\n]"}
    for kind, pattern in patterns.items():
        for match in regex.finditer(pattern, everything):
            kinds[match.start() : match.end()] = bytes([kind]) * len(match[0])
    return bytes(kinds)


cdef class split_words:
    """Iterates over the matches of PATTERN in a text, without a regex: 5 times as fast."""

    cdef str text
    cdef Py_ssize_t at, n
    cdef int form
    cdef void* characters
    cdef const unsigned char* kinds

    def __init__(self, str text):
        self.text, self.at, self.n = text, 0, len(text)
        self.form, self.characters = PyUnicode_KIND(text), PyUnicode_DATA(text)
        self.kinds = <const unsigned char*>PyBytes_AS_STRING(character_kinds())

    def __iter__(self):
        return self

    def __next__(self):
        cdef Py_ssize_t start = self.at
        if start >= self.n:
            raise StopIteration
        self.at = self.end_of_piece(start)
        return PyUnicode_Substring(self.text, start, self.at)

    cdef inline uint32_t character(self, Py_ssize_t i) noexcept:
        return PyUnicode_READ(self.form, self.characters, i) if i < self.n else 0

    cdef inline int kind(self, Py_ssize_t i) noexcept:
        return self.kinds[self.character(i)] if i < self.n else END

    cdef inline Py_ssize_t run(self, Py_ssize_t i, int kind) noexcept:
        while self.kind(i) == kind:
            i += 1
        return i

    cdef Py_ssize_t end_of_piece(self, Py_ssize_t i) noexcept:
        """Where the piece that starts at i ends: the alternatives of PATTERN, in their order."""
        cdef int kind = self.kind(i)
        cdef Py_ssize_t length = self.contraction(i)
        if length:
            return i + length
        if kind == LETTER:
            return self.run(i + 1, LETTER)
        if kind != NUMBER and kind != NEWLINE and self.kind(i + 1) == LETTER:
            return self.run(i + 2, LETTER)
        if kind == NUMBER:
            if self.kind(i + 1) != NUMBER:
                return i + 1
            return i + 3 if self.kind(i + 2) == NUMBER else i + 2
        if self.character(i) == 32 and self.kind(i + 1) == OTHER:
            return self.run(self.run(i + 2, OTHER), NEWLINE)
        if kind == OTHER:
            return self.run(self.run(i + 1, OTHER), NEWLINE)
        return self.end_of_spaces(i)

    cdef Py_ssize_t end_of_spaces(self, Py_ssize_t i) noexcept:
        """Behind the last newline; without one, before the last space, which goes to the word."""
        cdef Py_ssize_t end = i, newline = 0
        while self.kind(end) >= SPACE:
            end += 1
            if self.kind(end - 1) == NEWLINE:
                newline = end
        if newline:
            return newline
        return end - 1 if end < self.n and end - i > 1 else end

    cdef Py_ssize_t contraction(self, Py_ssize_t i) noexcept:
        """The length of the contraction that starts with an apostrophe at i; 0: there is none."""
        if self.character(i) != 39:
            return 0
        cdef uint32_t first = self.character(i + 1) | 32  # a letter, in lower case
        cdef uint32_t second = self.character(i + 2) | 32
        if first == b"s" or first == b"d" or first == b"m" or first == b"t":
            return 2
        if self.character(i + 1) == 0x17F:  # the long s, an s to (?i:...)
            return 2
        if first == b"l" and second == b"l":
            return 3
        return 3 if (first == b"v" or first == b"r") and second == b"e" else 0


cdef class Encoder:
    """Turns pieces of text into token ids; see the twin for the arguments."""

    cdef dict characters, whole, cache
    cdef list byte_ids
    cdef int64_t unk
    cdef unordered_map[uint64_t, uint32_t] ranks
    cdef vector[uint32_t] merged
    # One piece at work: its ids, the linked list over them, the rank of each with its neighbour.
    cdef vector[uint32_t] ids, left, right, rank
    cdef priority_queue[uint64_t] heap  # ~(rank << 32 | position): the largest is the best

    def __init__(self, byte_ids, merges, characters=None, unk=-1, whole=None):
        self.byte_ids, self.characters, self.unk = byte_ids, characters or {}, unk
        self.whole = {piece: np.uint32(token).tobytes() for piece, token in (whole or {}).items()}
        self.cache = {}
        self.ranks.reserve(len(merges))
        for rank, (left, right, merged) in enumerate(merges):
            self.ranks[key_of(left, right)] = rank
            self.merged.push_back(merged)

    def encode(self, pieces):
        """The ids of all pieces, one after the other: uint32 (n,)."""
        cdef vector[uint32_t] out
        cdef bytes packed
        cdef const uint32_t* ids
        for piece in pieces:
            packed = self.cache.get(piece)
            if packed is None:
                packed = self.encode_piece(piece)
            ids = <const uint32_t*>PyBytes_AS_STRING(packed)
            out.insert(out.end(), ids, ids + PyBytes_GET_SIZE(packed) // 4)
        array = np.empty(out.size(), np.uint32)
        cdef uint32_t[::1] view = array
        if out.size():
            memcpy(&view[0], out.data(), 4 * out.size())
        return array

    cdef bytes encode_piece(self, str piece):
        """The ids of one piece, packed four bytes each."""
        cdef bytes packed = self.whole.get(piece)
        if packed is None:
            self.cut(piece)
            self.merge()
            packed = PyBytes_FromStringAndSize(<char*>self.ids.data(), 4 * self.ids.size())
        if len(piece) <= LONGEST_CACHED:
            if len(self.cache) >= CACHE_SIZE:
                self.cache.clear()
            self.cache[piece] = packed
        return packed

    cdef void cut(self, str piece):
        self.ids.clear()
        if not self.characters and self.byte_ids is not None:
            self.cut_bytes(piece)
            return
        for character in piece:
            token = self.characters.get(character)
            if token is not None:
                self.ids.push_back(token)
            elif self.byte_ids is not None:
                self.cut_bytes(character)
            elif self.unk >= 0:
                self.ids.push_back(self.unk)

    cdef void cut_bytes(self, str piece):
        cdef int64_t token
        cdef unsigned char byte
        for byte in piece.encode("utf-8", "surrogateescape"):
            token = self.byte_ids[byte]
            if token >= 0:
                self.ids.push_back(token)

    cdef void merge(self) noexcept nogil:
        """Merge neighbours in self.ids, the best rank first, the leftmost first among equals."""
        cdef uint32_t n = self.ids.size(), i, j, k, best, kept = 0
        cdef uint64_t top
        self.left.resize(n)
        self.right.resize(n)
        self.rank.resize(n)
        for i in range(n):
            self.left[i] = i - 1
            self.right[i] = i + 1
            self.meet(i, i + 1)
        while not self.heap.empty():
            top = ~self.heap.top()
            self.heap.pop()
            best = <uint32_t>(top >> 32)
            i = <uint32_t>top
            if self.rank[i] != best:
                continue
            j = self.right[i]
            k = self.right[j]
            self.ids[i] = self.merged[best]
            self.right[i] = k
            self.right[j] = GONE
            self.rank[j] = NONE
            self.meet(i, k)
            if k < n:
                self.left[k] = i
            if i > 0:
                self.meet(self.left[i], i)
        for i in range(n):
            if self.right[i] != GONE:
                self.ids[kept] = self.ids[i]
                kept += 1
        self.ids.resize(kept)

    cdef inline void meet(self, uint32_t i, uint32_t k) noexcept nogil:
        """Symbols i and k are neighbours now: note their rank, and queue them if they merge."""
        self.rank[i] = NONE
        if k >= self.ids.size():
            return
        found = self.ranks.find(key_of(self.ids[i], self.ids[k]))
        if found != self.ranks.end():
            self.rank[i] = dereference(found).second
            self.heap.push(~((<uint64_t>self.rank[i] << 32) | i))


cdef class Words:
    """The training pieces as symbols, and every pair in them: how often it occurs, and where."""

    cdef vector[uint32_t] symbols  # all words, one after the other
    cdef vector[size_t] start
    cdef vector[uint32_t] length
    cdef vector[int64_t] weight
    cdef unordered_map[uint64_t, int64_t] pairs
    cdef unordered_map[uint64_t, vector[uint32_t]] places
    cdef vector[uint64_t] fresh  # pairs that have come into being
    cdef priority_queue[tuple2[int64_t, uint64_t]] heap  # (count, ~key)

    def __init__(self, counts):
        cdef unsigned char byte
        cdef uint32_t w, i
        cdef size_t at
        for piece, count in counts.items():
            self.start.push_back(self.symbols.size())
            self.weight.push_back(count)
            for byte in <bytes>piece.encode("utf-8", "surrogateescape"):
                self.symbols.push_back(byte)
            self.length.push_back(self.symbols.size() - self.start.back())
        for w in range(self.start.size()):
            for i in range(1, self.length[w]):
                at = self.start[w] + i
                self.change(self.symbols[at - 1], self.symbols[at], w, self.weight[w])

    cdef inline void change(self, uint32_t left, uint32_t right, uint32_t w, int64_t delta) noexcept:
        cdef uint64_t key = key_of(left, right)
        cdef vector[uint32_t]* places
        self.pairs[key] += delta
        if delta > 0:
            places = &self.places[key]
            if places.empty():
                self.fresh.push_back(key)
            if places.empty() or places.back() != w:
                places.push_back(w)

    cdef void queue_fresh(self):
        """Only a pair that has come into being can be commoner than the heap believes."""
        for key in self.fresh:
            self.heap.push(tuple2[int64_t, uint64_t](self.pairs[key], ~key))
        self.fresh.clear()

    cdef void merge(self, uint64_t key, uint32_t merged):
        """Make the symbol `merged` of the pair `key` wherever it occurs."""
        cdef vector[uint32_t] places
        cdef uint32_t w
        places.swap(self.places[key])
        for w in places:
            self.merge_in_word(w, key >> 32, key & 0xFFFFFFFF, merged)
        self.places.erase(key)
        self.pairs.erase(key)

    cdef void merge_in_word(self, uint32_t w, uint32_t left, uint32_t right, uint32_t merged):
        cdef uint32_t* word = self.symbols.data() + self.start[w]
        cdef uint32_t n = self.length[w], i = 0, kept = 0
        cdef int64_t weight = self.weight[w]
        while i < n:
            if i + 1 == n or word[i] != left or word[i + 1] != right:
                word[kept] = word[i]
                i += 1
            else:
                if kept > 0:
                    self.change(word[kept - 1], left, w, -weight)
                    self.change(word[kept - 1], merged, w, weight)
                if i + 2 < n:
                    self.change(right, word[i + 2], w, -weight)
                    self.change(merged, word[i + 2], w, weight)
                word[kept] = merged
                i += 2
            kept += 1
        self.length[w] = kept


def learn_merges(counts, n_merges, progress=None):
    """The first `n_merges` merges of byte-pair encoding, fewer if the text runs out of pairs."""
    cdef Words words = Words(counts)
    cdef int64_t count, true_count
    cdef uint64_t key
    merges = []
    words.queue_fresh()
    while len(merges) < n_merges and not words.heap.empty():
        count, key = words.heap.top().first, ~words.heap.top().second
        words.heap.pop()
        true_count = words.pairs[key]
        if true_count != count:
            if true_count > 0:
                words.heap.push(tuple2[int64_t, uint64_t](true_count, ~key))
            continue
        words.merge(key, 256 + len(merges))
        words.queue_fresh()
        merges.append((key >> 32, key & 0xFFFFFFFF))
        PyErr_CheckSignals()
        if progress:
            progress(len(merges), n_merges)
    return merges
