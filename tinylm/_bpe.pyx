# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Byte-pair encoding, compiled: the fast twin of _bpe_python.py, which explains what it does.

The same names, the same ids. What makes it fast, on 50 MB of Python and documentation, 32,768
tokens, one Zen 4 core:

1. Scanner finds PATTERN's matches in UTF-8, and WordTable, a hash table keyed by their bytes,
   counts them or knows their ids: no str per piece, no `Counter`, no dict of ids. Splitting and
   counting 1.77 -> 0.68 s, encoding 29 -> 54 MB/s into a list, 37 -> 88 into an array.
2. PairTable, an open-addressing table keyed by two ids in 64 bits, holds counts and ranks. The heap
   of pairs is lazy: an entry that is out of date is put right when it comes up.
3. A merge visits words all over the memory, so each is fetched while earlier ones are worked on:
   the merge loop 0.83 -> 0.46 s (86 % of it was waiting for two loads a word).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.unicode cimport PyUnicode_DecodeUTF8
from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from libcpp.queue cimport priority_queue
from libcpp.utility cimport pair as tuple2
from libcpp.vector cimport vector

cdef extern from *:
    void prefetch "__builtin_prefetch"(const void* address) noexcept nogil

import functools
import os

import numpy as np
import regex

from tinylm._bpe_python import CACHE_SIZE, LONGEST_CACHED

cdef uint32_t NONE = 0xFFFFFFFF  # no rank: this pair does not merge
cdef uint32_t GONE = 0xFFFFFFFF  # no right neighbour: this symbol is no longer in the list
cdef uint64_t FREE = 0xFFFFFFFFFFFFFFFF  # no pair: this slot is empty
cdef uint32_t LONGEST = LONGEST_CACHED  # bytes
cdef enum: PARTS = 16  # into which a list of texts is cut; threads share them out
cdef int PROCESS = os.getpid()  # a child of fork has none of its parent's threads


# ---- hash tables -------------------------------------------------------------------------------


cdef inline uint64_t mixed(uint64_t x) noexcept nogil:
    """A multiplication moves every bit upwards, the shift brings them down to where slots count."""
    x *= <uint64_t>0x9E3779B97F4A7C15
    return x ^ (x >> 32)


cdef inline uint64_t hash_of(const char* word, uint32_t n) noexcept nogil:
    """One to one, for a given n, if n <= 8."""
    cdef uint64_t hashed = n, part
    while n > 8:
        memcpy(&part, word, 8)
        hashed = mixed(hashed ^ part)
        word += 8
        n -= 8
    part = 0
    memcpy(&part, word, n)
    return mixed(hashed ^ part)


cdef struct Word:
    uint64_t hashed
    uint32_t start, length  # of its bytes in WordTable.letters; a free slot has length 0
    uint64_t value


cdef cppclass WordTable:
    # A number for each word. A pointer into it is good until the next `find` of a new word.
    vector[Word] slots
    vector[char] letters
    size_t size

    __init__():
        this.size = 0

    uint64_t* find(const char* word, uint32_t n) noexcept nogil:
        """The value of a word, which is 0 if it was not in the table before."""
        if 2 * this.size >= this.slots.size():
            this.grow()
        cdef uint64_t hashed = hash_of(word, n)
        cdef size_t mask = this.slots.size() - 1, i = hashed & mask
        while this.slots[i].length:
            if this.slots[i].hashed == hashed and this.slots[i].length == n:
                if n <= 8 or memcmp(this.letters.data() + this.slots[i].start, word, n) == 0:
                    return &this.slots[i].value
            i = (i + 1) & mask
        this.slots[i] = Word(hashed, this.letters.size(), n, 0)
        this.letters.insert(this.letters.end(), word, word + n)
        this.size += 1
        return &this.slots[i].value

    void grow() noexcept nogil:
        cdef vector[Word] old
        cdef size_t i, mask
        cdef Word word
        old.swap(this.slots)
        this.slots.resize(max(<size_t>1024, 2 * old.size()))
        mask = this.slots.size() - 1
        for word in old:
            if word.length:
                i = word.hashed & mask
                while this.slots[i].length:
                    i = (i + 1) & mask
                this.slots[i] = word

    void clear() noexcept nogil:
        this.slots.clear()
        this.letters.clear()
        this.size = 0


cdef inline uint64_t key_of(uint32_t left, uint32_t right) noexcept nogil:
    return (<uint64_t>left << 32) | right


cdef struct Pair:
    uint64_t key
    int64_t value  # in learning its count, in encoding its rank
    uint32_t number  # in learning only: of its places


cdef cppclass PairTable:
    # What is known of each pair. A pointer into it is good until the next `add`.
    vector[Pair] slots
    size_t size

    __init__():
        this.size = 0
        this.slots.assign(1024, Pair(FREE, 0, 0))

    inline Pair* find(uint64_t key) noexcept nogil:
        """The slot of a pair; if there is none, a free one, whose value is 0."""
        cdef size_t mask = this.slots.size() - 1, i = mixed(key) & mask
        while this.slots[i].key != key and this.slots[i].key != FREE:
            i = (i + 1) & mask
        return &this.slots[i]

    Pair* add(uint64_t key) noexcept nogil:
        cdef vector[Pair] old
        cdef Pair pair
        if 2 * this.size >= this.slots.size():
            old.swap(this.slots)
            this.slots.assign(2 * old.size(), Pair(FREE, 0, 0))
            for pair in old:
                if pair.key != FREE:
                    this.find(pair.key)[0] = pair
        this.size += 1
        this.find(key).key = key
        return this.find(key)


# ---- splitting ---------------------------------------------------------------------------------

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


cdef cppclass Scanner:
    # Finds the matches of PATTERN in UTF-8, lone surrogates allowed, n bytes and a 0 behind them.
    const unsigned char* text
    const unsigned char* kinds
    size_t n

    inline int kind(size_t i, size_t* end) noexcept nogil:
        """The kind of the character at i, and where that character ends."""
        cdef const unsigned char* c = this.text + i
        if c[0] < 0x80:
            end[0] = i + 1
            return this.kinds[c[0]] if i < this.n else END
        if c[0] < 0xE0:
            end[0] = i + 2
            return this.kinds[(c[0] & 31) << 6 | c[1] & 63]
        if c[0] < 0xF0:
            end[0] = i + 3
            return this.kinds[(c[0] & 15) << 12 | (c[1] & 63) << 6 | c[2] & 63]
        end[0] = i + 4
        return this.kinds[(c[0] & 7) << 18 | (c[1] & 63) << 12 | (c[2] & 63) << 6 | c[3] & 63]

    inline size_t run(size_t i, int kind) noexcept nogil:
        cdef size_t end
        while this.kind(i, &end) == kind:
            i = end
        return i

    size_t end_of_piece(size_t i) noexcept nogil:
        """Where the piece that starts at i ends: the alternatives of PATTERN, in their order."""
        cdef size_t second, third  # where these characters begin
        cdef int kind = this.kind(i, &second), next = this.kind(second, &third)
        cdef size_t length = this.contraction(i)
        if length:
            return i + length
        if kind == LETTER:
            return this.run(second, LETTER)
        if kind != NUMBER and kind != NEWLINE and next == LETTER:
            return this.run(third, LETTER)
        if kind == NUMBER:
            if next != NUMBER:
                return second
            return second if this.kind(third, &second) == NUMBER else third
        if this.text[i] == 32 and next == OTHER:
            return this.run(this.run(third, OTHER), NEWLINE)
        if kind == OTHER:
            return this.run(this.run(second, OTHER), NEWLINE)
        return this.end_of_spaces(i)

    size_t end_of_spaces(size_t i) noexcept nogil:
        """Behind the last newline; without one, before the last space, which goes to the word."""
        cdef size_t end = i, last = i, next, newline = 0
        cdef int kind = this.kind(i, &next)
        while kind >= SPACE:
            last, end = end, next
            if kind == NEWLINE:
                newline = end
            kind = this.kind(end, &next)
        if newline:
            return newline
        return last if end < this.n and last > i else end

    inline size_t contraction(size_t i) noexcept nogil:
        """The length of the contraction that starts with an apostrophe at i; 0: there is none."""
        cdef const unsigned char* c = this.text + i
        if c[0] != 39 or i + 1 == this.n:
            return 0
        cdef unsigned char first = c[1] | 32, second = c[2] | 32  # letters, in lower case
        if first == b"s" or first == b"d" or first == b"m" or first == b"t":
            return 2
        if c[1] == 0xC5 and c[2] == 0xBF:  # the long s, an s to (?i:...)
            return 3
        if first == b"l" and second == b"l":
            return 3
        return 3 if (first == b"v" or first == b"r") and second == b"e" else 0


cdef Scanner scanner_of(bytes text):
    cdef Scanner scanner
    scanner.text, scanner.n = <const unsigned char*>PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text)
    scanner.kinds = <const unsigned char*>PyBytes_AS_STRING(character_kinds())
    return scanner


cdef class split_words:
    """Iterates over the matches of PATTERN in a text, without a regex: 5 times as fast."""

    cdef bytes text
    cdef Scanner scanner
    cdef size_t at

    def __init__(self, str text):
        self.text = text.encode("utf-8", "surrogatepass")
        self.scanner, self.at = scanner_of(self.text), 0

    def __iter__(self):
        return self

    def __next__(self):
        cdef size_t start = self.at
        if start >= self.scanner.n:
            raise StopIteration
        self.at = self.scanner.end_of_piece(start)
        return decoded(<const char*>self.scanner.text + start, self.at - start)


cdef inline str decoded(const char* word, size_t n):
    return PyUnicode_DecodeUTF8(word, n, "surrogatepass")


def count_words(texts):
    """How often each piece occurs in the texts; OpenMP's threads share them out."""
    cdef list encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    cdef vector[Scanner] scanners
    cdef vector[WordTable] tables
    cdef const char* letters
    cdef Word word
    cdef int part
    cdef bint threads = os.getpid() == PROCESS
    for text in encoded:
        scanners.push_back(scanner_of(text))
    tables.resize(PARTS)
    for part in prange(PARTS, nogil=True, schedule="dynamic", use_threads_if=threads):
        count_part(scanners, part, &tables[part])
    for part in range(1, PARTS):
        letters = tables[part].letters.data()
        for word in tables[part].slots:
            if word.length:
                tables[0].find(letters + word.start, word.length)[0] += word.value
    letters = tables[0].letters.data()
    return {
        decoded(letters + word.start, word.length): word.value
        for word in tables[0].slots if word.length
    }


cdef void count_part(const vector[Scanner]& scanners, size_t part, WordTable* table) noexcept nogil:
    """The share of a part depends on nothing but the texts, so neither do the counts."""
    cdef size_t i, start, end
    cdef Scanner scanner
    for i in range(part * scanners.size() // PARTS, (part + 1) * scanners.size() // PARTS):
        scanner, start = scanners[i], 0
        while start < scanner.n:
            end = scanner.end_of_piece(start)
            table.find(<const char*>scanner.text + start, end - start)[0] += 1
            start = end


# ---- encoding ----------------------------------------------------------------------------------


cdef class Encoder:
    """Turns pieces of text into token ids; see the twin for the arguments."""

    cdef dict characters, whole
    cdef vector[int64_t] byte_ids  # empty: there are none
    cdef int64_t unk
    cdef PairTable ranks
    cdef vector[uint32_t] merged
    cdef WordTable cache  # of a piece: where its ids are among cached_ids << 32 | how many
    cdef vector[uint32_t] cached_ids
    # One piece at work: its ids, the linked list over them, the rank of each with its neighbour.
    cdef vector[uint32_t] ids, left, right, rank
    cdef priority_queue[uint64_t] heap  # ~(rank << 32 | position): the largest is the best

    def __init__(self, byte_ids, merges, characters=None, unk=-1, whole=None):
        self.byte_ids, self.characters, self.unk = byte_ids or [], characters or {}, unk
        self.whole = whole or {}
        for rank, (left, right, merged) in enumerate(merges):
            self.ranks.add(key_of(left, right)).value = rank
            self.merged.push_back(merged)

    def encode(self, pieces):
        """The ids of all pieces, one after the other: uint32 (n,)."""
        cdef vector[uint32_t] out
        cdef split_words words
        cdef size_t start, end
        if isinstance(pieces, split_words):  # no need to make a str of each piece
            words = pieces
            while words.at < words.scanner.n:
                start = words.at
                words.at = words.scanner.end_of_piece(start)
                self.encode_piece(<const char*>words.scanner.text + start, words.at - start, out)
        else:
            for piece in pieces:
                encoded = <bytes>piece.encode("utf-8", "surrogatepass")
                self.encode_piece(PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded), out)
        array = np.empty(out.size(), np.uint32)
        cdef uint32_t[::1] view = array
        if out.size():
            memcpy(&view[0], out.data(), 4 * out.size())
        return array

    cdef int encode_piece(self, const char* piece, uint32_t n, vector[uint32_t]& out) except -1:
        """Append the ids of one piece."""
        cdef uint64_t* known = NULL
        cdef uint32_t* ids
        if 0 < n <= LONGEST:
            known = self.cache.find(piece, n)
            if known[0]:
                ids = self.cached_ids.data() + (known[0] >> 32)
                out.insert(out.end(), ids, ids + <uint32_t>known[0])
                return 0
        self.cut(piece, n)
        self.merge()
        out.insert(out.end(), self.ids.begin(), self.ids.end())
        if known:
            known[0] = self.cached_ids.size() << 32 | self.ids.size()
            self.cached_ids.insert(self.cached_ids.end(), self.ids.begin(), self.ids.end())
            if self.cache.size >= CACHE_SIZE:
                self.cache.clear()
                self.cached_ids.clear()
        return 0

    cdef int cut(self, const char* piece, uint32_t n) except -1:
        cdef bytes encoded
        self.ids.clear()
        if self.whole and decoded(piece, n) in self.whole:
            self.ids.push_back(self.whole[decoded(piece, n)])
        elif not self.characters and self.byte_ids.size():
            self.cut_bytes(piece, n)
        else:
            for character in decoded(piece, n):
                token = self.characters.get(character)
                if token is not None:
                    self.ids.push_back(token)
                elif self.byte_ids.size():
                    encoded = character.encode("utf-8", "surrogatepass")
                    self.cut_bytes(PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded))
                elif self.unk >= 0:
                    self.ids.push_back(self.unk)
        return 0

    cdef void cut_bytes(self, const char* piece, uint32_t n) noexcept:
        cdef const unsigned char* c = <const unsigned char*>piece
        cdef const unsigned char* end = c + n
        cdef unsigned char byte
        while c < end:
            byte = c[0]
            if byte == 0xED and c[1] >= 0xA0:  # a lone surrogate stands for a raw byte
                byte = <unsigned char>(c[1] << 6 | c[2] & 63)
                c += 2
            c += 1
            if self.byte_ids[byte] >= 0:
                self.ids.push_back(self.byte_ids[byte])

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
        cdef Pair* pair
        self.rank[i] = NONE
        if k >= self.ids.size():
            return
        pair = self.ranks.find(key_of(self.ids[i], self.ids[k]))
        if pair.key != FREE:
            self.rank[i] = pair.value
            self.heap.push(~((<uint64_t>self.rank[i] << 32) | i))


# ---- learning ----------------------------------------------------------------------------------


cdef struct Span:
    size_t start  # among all symbols
    int64_t weight
    uint32_t length


cdef class Words:
    """The training pieces as symbols, and every pair in them: how often it occurs, and where."""

    cdef vector[uint32_t] symbols  # all words, one after the other
    cdef vector[Span] words
    cdef PairTable pairs
    cdef vector[vector[uint32_t]] places  # by pair: the words in which it occurs, or did
    cdef vector[uint64_t] fresh  # pairs that have come into being
    cdef priority_queue[tuple2[int64_t, uint64_t]] heap  # (count, ~key)

    def __init__(self, counts):
        cdef uint32_t w
        cdef size_t start, i
        for piece, count in counts.items():
            start = self.symbols.size()
            for byte in <bytes>piece.encode("utf-8", "surrogateescape"):
                self.symbols.push_back(byte)
            self.words.push_back(Span(start, count, self.symbols.size() - start))
        for w in range(self.words.size()):
            start = self.words[w].start
            for i in range(start + 1, start + self.words[w].length):
                self.change(self.symbols[i - 1], self.symbols[i], w, self.words[w].weight)

    cdef inline void change(
        self, uint32_t left, uint32_t right, uint32_t w, int64_t delta
    ) noexcept:
        cdef uint64_t key = key_of(left, right)
        cdef Pair* pair = self.pairs.find(key)
        cdef vector[uint32_t]* places
        if pair.key == FREE:
            pair = self.pairs.add(key)
            pair.number = self.places.size()
            self.places.resize(pair.number + 1)
            self.fresh.push_back(key)
        pair.value += delta
        if delta > 0:
            places = &self.places[pair.number]
            if places.empty() or places.back() != w:
                places.push_back(w)

    cdef void queue_fresh(self):
        """Only a pair that has come into being can be commoner than the heap believes."""
        for key in self.fresh:
            self.heap.push(tuple2[int64_t, uint64_t](self.pairs.find(key).value, ~key))
        self.fresh.clear()

    cdef void merge(self, uint64_t key, uint32_t merged):
        """Make the symbol `merged` of the pair `key` wherever it occurs."""
        cdef vector[uint32_t] places
        cdef size_t i, last  # the words 16 and 8 ahead
        places.swap(self.places[self.pairs.find(key).number])
        last = places.size() - 1
        for i in range(places.size()):
            prefetch(&self.words[places[min(i + 16, last)]])
            prefetch(&self.symbols[self.words[places[min(i + 8, last)]].start])
            self.merge_in_word(places[i], key >> 32, key & 0xFFFFFFFF, merged)
        self.pairs.find(key).value = 0

    cdef void merge_in_word(self, uint32_t w, uint32_t left, uint32_t right, uint32_t merged):
        cdef uint32_t* word = self.symbols.data() + self.words[w].start
        cdef uint32_t n = self.words[w].length, i = 0, kept = 0
        cdef int64_t weight = self.words[w].weight
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
        self.words[w].length = kept


def learn_merges(counts, n_merges, progress=None):
    """The first `n_merges` merges of byte-pair encoding, fewer if the text runs out of pairs."""
    cdef Words words = Words(counts)
    cdef int64_t count, true_count
    cdef uint64_t key
    merges = []
    words.queue_fresh()
    while len(merges) < n_merges and not words.heap.empty() and words.heap.top().first > 0:
        count, key = words.heap.top().first, ~words.heap.top().second
        words.heap.pop()
        true_count = words.pairs.find(key).value
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
