"""Decoding: the KV cache, sampling, and filling a blank.

One loop serves all: prompts of any lengths are padded on the left to one batch, the first forward
reads them whole, and each later one only the newest token of every row. Equal prompts, as of
several answers to one question, are read and remembered once. When the context is full, its older
half is dropped and the rest is read anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import numpy

from tinylm import backend, ops
from tinylm.chat import ChatFormat, template_of, turn
from tinylm.errors import InputError
from tinylm.model import Transformer
from tinylm.tensor import Array, Tensor, no_grad
from tinylm.tokenizer import Tokenizer

BLANK = "___"
LONGEST = 200  # tokens of a text or an answer, where nothing else is asked for
RUN = 64  # tokens of the vocabulary that `draw` first looks at as one
APART = 256  # tokens of padding that are as slow as another pass over a small model's layers
STILL_WRITING = 0.75  # share of the rows: if no more are, those that have ended are left behind


class LayerCache:
    """Keys and values of one layer: those of P prompts, (P, G, S, D), and of what each of B rows
    has written since, (B, G, room, D); row b goes on from prompt `prompt[b]`.
    """

    def __init__(self):
        self.prompts = self.written = None
        self.length = 0  # tokens so far, of a prompt and what followed it

    def attention(self, q: Tensor, k: Tensor, v: Tensor, start: Array | None) -> Tensor:
        """ops.attention over all tokens so far and these, whose keys and values are kept."""
        self.length += k.shape[2]
        if self.written is None:
            self.prompts = [Tensor(backend.copy(x.data)) for x in (k, v)]
            return ops.attention(q, *self.prompts, start)
        end = self.length - self.prompts[0].shape[2]
        for kept, new in zip(self.written, (k, v)):
            kept[:, :, end - new.shape[2] : end] = new.data
        k, v = (Tensor(kept[:, :, :end]) for kept in self.written)
        return ops.prefix_attention(q, k, v, *self.prompts, self.prompt, start)

    def join(self, shorter: list[LayerCache]) -> None:
        """Put the prompts that others have read before these, padded on the left."""
        for i, longest in enumerate(self.prompts):
            read = [*(part.prompts[i].data for part in shorter), longest.data]
            P, (_, G, S, D) = sum(map(len, read)), longest.shape
            joined, at = backend.empty((P, G, S, D), longest.dtype), 0
            for x in read:
                rows, padding = joined[at : at + len(x)], S - x.shape[2]
                rows[:, :, :padding], rows[:, :, padding:] = 0, x
                at += len(x)
            self.prompts[i] = Tensor(joined)

    def go_on(self, prompt: Array, room: int) -> None:
        _, G, _, D = self.prompts[0].shape
        shape = len(prompt), G, room, D
        self.prompt = prompt
        self.written = [backend.empty(shape, x.dtype) for x in self.prompts]

    def take(self, rows: Array) -> None:
        end, old = self.length - self.prompts[0].shape[2], self.written
        self.go_on(self.prompt[rows], room=old[0].shape[2])
        for new, x in zip(self.written, old):
            new[:, :, :end] = x[rows, :, :end]


class KVCache:
    """What the layers of a model remember of the tokens that they have read."""

    def __init__(self, model: Transformer):
        self.layers = [LayerCache() for _ in range(model.config.n_layer)]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def join(self, shorter: list[KVCache]) -> None:
        """Put the prompts of others, none of which is longer, before these."""
        if shorter:
            for layer, *others in zip(self.layers, *(part.layers for part in shorter)):
                layer.join(others)

    def go_on(self, prompt: Sequence[int], room: int) -> None:
        """Once the prompts are read: row b continues prompt[b], by up to `room` tokens."""
        for layer in self.layers:
            layer.go_on(backend.asarray(prompt, "int32"), room)

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch."""
        for layer in self.layers:
            layer.take(backend.asarray(rows))


def sample(
    logits: numpy.ndarray,
    rng: numpy.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> numpy.ndarray:
    """Draw one token for each row of logits (B, V) -> (B,) of int.

    temperature 0 takes the most likely token. top_k keeps the k most likely (0: all), top_p the
    smallest set that holds that share of the probability (arXiv 1904.09751), in this order.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if not temperature > 0:
        raise InputError(f"temperature: expected 0 or more, got {temperature}")
    x = numpy.subtract(logits, logits.max(-1, keepdims=True), dtype=numpy.float64)
    if temperature != 1:
        x /= max(temperature, 1e-100)  # a quotient by next to nothing would be infinite
    if 0 < top_k < x.shape[-1]:
        kth = numpy.partition(x, -top_k, -1)[:, -top_k, None]
        x[x < kth] = -numpy.inf
    weights = numpy.exp(x, out=x)  # in its place: new memory costs page faults
    if top_p < 1:
        weights = nucleus(weights, top_p)
    return draw(weights, rng.random(len(weights)))


def nucleus(weights: numpy.ndarray, top_p: float) -> numpy.ndarray:
    """Zero all but the largest weights that together hold top_p of each row's sum."""
    order = numpy.argsort(-weights, -1, kind="stable")
    ranked = numpy.take_along_axis(weights, order, -1)
    larger = numpy.cumsum(ranked, -1) - ranked  # the sum of the weights before this one
    enough = max(top_p, 1e-9) * weights.sum(-1, keepdims=True)  # the likeliest one is always kept
    numpy.put_along_axis(weights, order, numpy.where(larger < enough, ranked, 0), -1)
    return weights


def draw(weights: numpy.ndarray, share: numpy.ndarray) -> numpy.ndarray:
    """A place in each row of weights (B, V), as likely as its weight is large -> (B,) of int.

    share (B,): how much of the row's sum lies before the point drawn. First a run of places is
    found, then one within it: in a running sum over all of V each addition waits for the last one.
    """
    rows, V = numpy.arange(len(weights)), weights.shape[-1]
    sums = numpy.add.reduceat(weights, numpy.arange(0, V, RUN), -1)
    ends = numpy.cumsum(sums, -1)
    point = share * ends[:, -1]
    run = first_above(ends, point)
    point = numpy.maximum(point - (ends[rows, run] - sums[rows, run]), 0)
    places = numpy.minimum(run[:, None] * RUN + numpy.arange(RUN), V - 1)
    ends = numpy.cumsum(weights[rows[:, None], places], -1)
    return places[rows, first_above(ends, point)]


def first_above(ends: numpy.ndarray, point: numpy.ndarray) -> numpy.ndarray:
    """Which of each row's running sums (B, n) is the first above its point (B,); rounding may carry
    a point to the end, but not beyond."""
    point = numpy.minimum(point, numpy.nextafter(ends[:, -1], 0))
    return (ends > point[:, None]).argmax(-1)


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rng: numpy.random.Generator,
    stop_ids: Sequence[int] = (),
    **settings,
) -> Iterator[numpy.ndarray]:
    """Continue every prompt by one token per turn; yields (B,) of int, −1 in rows that have ended.

    The last token yielded for a row that ends by itself is one of stop_ids. Settings: temperature,
    top_k, top_p as in `sample`.
    """
    limit = model.config.block_size
    rows = [list(prompt[-limit:]) for prompt in prompts]
    place = numpy.arange(len(rows))  # of each row among the prompts
    alive = numpy.ones(len(rows), bool)
    cache = tokens = None
    weights = backend.packed_weights(len(rows))
    for made in range(max_new_tokens):
        if cache is not None and cache.length == limit:
            cache, rows = None, [row[-(limit - limit // 2) :] for row in rows]
        with weights:
            if cache is None:
                logits, padding, cache = read(model, rows, max_new_tokens - made)
            else:
                logits = last_logits(model, tokens, padding, cache)
        new = sample(logits, rng, **settings)
        drawn = numpy.full(len(prompts), -1)
        drawn[place[alive]] = new[alive]
        yield drawn
        alive &= ~numpy.isin(new, stop_ids)
        if not alive.any():
            return
        for row, token in zip(rows, new):
            row.append(int(token))
        if alive.mean() <= STILL_WRITING:
            (kept,) = alive.nonzero()
            cache.take(kept)
            rows = [rows[i] for i in kept]
            place, new, padding, alive = (x[kept] for x in (place, new, padding, alive))
        tokens = new[:, None]


def read(
    model: Transformer, rows: list[list[int]], more: int
) -> tuple[numpy.ndarray, numpy.ndarray, KVCache]:
    """Logits (B, V) of what follows each row, the rows' padding (B, 1), and a cache with room for
    more tokens.
    """
    unique = sorted(dict.fromkeys(map(tuple, rows)), key=len)
    caches, logits = [], []
    for group in alike(unique):
        caches.append(KVCache(model))
        logits.append(last_logits(model, *pad_left(group), caches[-1]))
    *shorter, cache = caches
    cache.join(shorter)
    place = {row: i for i, row in enumerate(unique)}
    prompt = [place[tuple(row)] for row in rows]
    padding = numpy.array([[cache.length - len(row)] for row in rows], numpy.int32)
    cache.go_on(prompt, min(model.config.block_size - cache.length, more))
    return numpy.concatenate(logits)[prompt], padding, cache


def alike(rows: list) -> list[list]:
    """Rows, the shortest first, in groups that are each padded to its longest: not many tokens are
    lost so, and not many groups are made."""
    n, longest = len(rows), len(rows[-1])
    padded = [len(rows[i - 1]) * i + longest * (n - i) for i in range(1, n + 1)]
    split = min(range(1, n + 1), key=lambda i: padded[i - 1])
    if padded[split - 1] + APART >= padded[-1]:
        return [rows]
    return [*alike(rows[:split]), *alike(rows[split:])]


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Rows of unequal length as one array (B, T), and how much padding each has, (B, 1)."""
    width = max(map(len, rows))
    padding = numpy.array([[width - len(row)] for row in rows], numpy.int32)
    return numpy.array([[0] * (width - len(row)) + list(row) for row in rows]), padding


def last_logits(model, tokens, padding=None, cache=None) -> numpy.ndarray:
    """Logits of the token after the last column, (B, V)."""
    padded = padding is not None and padding.any()
    start = numpy.repeat(padding, tokens.shape[1], 1) if padded else None
    with no_grad():
        hidden = model.hidden(tokens, start, cache)
        last = Tensor(backend.xp.ascontiguousarray(hidden.data[:, -1]))
        return backend.to_numpy(ops.linear(last, model.head_weight).data)[:, : model.n_tokens]


def encode_prompt(model: Transformer, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids; the begin token stands before them if the tokenizer asks for it, and alone
    where there is nothing to continue."""
    ids = tokenizer.encode(prompt)
    begin = model.config.bos_token_id
    if begin is not None and (tokenizer.add_bos or not ids):
        ids = [begin, *ids]
    if not ids:
        raise InputError("the prompt is empty, and this model has no token to begin with")
    return ids


def stream_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = LONGEST, **settings
) -> Iterator[str]:
    """Continue a prompt, piece by piece, as soon as whole characters are known.

    Settings: temperature, top_k, top_p as in `sample`, and seed.
    """
    ids = encode_prompt(model, tokenizer, prompt)
    return stream_ids(model, tokenizer, ids, max_new_tokens, **settings)


def stream_answer(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: list[dict],
    max_new_tokens: int = LONGEST,
    **settings,
) -> Iterator[str]:
    """What the assistant says next in a conversation, piece by piece; settings as above.

    Raises InputError if 8 tokens of answer, or max_new_tokens where these are fewer, do not fit the
    context after the conversation.
    """
    ids = ChatFormat(tokenizer).ids(messages, answer_next=True)
    room = model.config.block_size - len(ids)
    if room < min(8, max_new_tokens):
        raise InputError(
            f"the conversation has {len(ids)} tokens, too many for a context of "
            f"{model.config.block_size} and an answer: shorten it"
        )
    return stream_ids(model, tokenizer, ids, min(max_new_tokens, room), **settings)


def stream_ids(model, tokenizer, ids, max_new_tokens, seed=None, **settings) -> Iterator[str]:
    rng, stop_ids = numpy.random.default_rng(seed), model.config.stop_ids
    steps = stream(model, [ids], max_new_tokens, rng, stop_ids, **settings)
    new = takewhile(lambda token: token not in stop_ids, (int(token) for (token,) in steps))
    begins = ids[-1] in tokenizer.special.values()  # a text begins after a special token
    return tokenizer.decode_stream(new, continues=not begins)


def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, **settings) -> str:
    """Continue a prompt; returns the continuation only.

    Settings: max_new_tokens (200), temperature (1.0; 0 is greedy), top_k (0: all), top_p (1.0),
    seed (None: a new one each time). Ends early at the model's end token.
    """
    return "".join(stream_text(model, tokenizer, prompt, **settings))


class Conversation:
    """A talk with a model: what was said so far, of which the last that fits the context is read.

    The longest answer must fit too, or one of half the context: else, late in a talk, answers would
    end in the middle of a word.

    A base model, which has no chat template, just continues what it is told.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, system: str, settings: dict):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.system = [turn("system", system)] if system else []
        self.can_answer = template_of(tokenizer) is not None
        self.messages: list[dict] = []
        self.forgotten = 0  # messages at the front that the last answer did not see

    def ask(self, said: str) -> Iterator[str]:
        """The answer, piece by piece. KeyboardInterrupt ends it; what was said until then stays.

        Raises InputError if what is said does not fit the context by itself.
        """
        self.messages.append(turn("user", said))
        try:
            pieces = self.pieces()
        except InputError:
            self.messages.pop()
            raise
        return self.recorded(pieces)

    def pieces(self) -> Iterator[str]:
        if not self.can_answer:
            said = self.messages[-1]["content"]
            return stream_text(self.model, self.tokenizer, said, **self.settings)
        form, size = ChatFormat(self.tokenizer), self.model.config.block_size
        room = min(self.settings.get("max_new_tokens", LONGEST), size // 2)
        for forgotten in range(0, len(self.messages), 2):  # a question and its answer
            self.forgotten = forgotten
            if len(form.ids(self.seen(), answer_next=True)) + room <= size:
                break
        return stream_answer(self.model, self.tokenizer, self.seen(), **self.settings)

    def seen(self) -> list[dict]:
        return [*self.system, *self.messages[self.forgotten :]]

    def recorded(self, pieces: Iterator[str]) -> Iterator[str]:
        text = ""
        try:
            for piece in pieces:
                text += piece
                yield piece
        except KeyboardInterrupt:
            yield " …"
        finally:  # also where whoever reads this has stopped
            self.messages.append(turn("assistant", text))


def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rng: numpy.random.Generator,
    heard: Callable[[int, int], None] | None = None,
    **settings,
) -> list[list[int]]:
    """The continuation of every prompt as ids, up to its stop token, which is included.

    heard(row, token) is told of every token as soon as it is drawn; settings as above.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, rng, model.config.stop_ids, **settings):
        for i, token in enumerate(new.tolist()):
            if token >= 0:
                rows[i].append(token)
                if heard:
                    heard(i, token)
    return rows


def complete_in_parts(model, prompts, max_new_tokens, rng, **settings) -> list[list[int]]:
    """`complete`, 64 prompts at a time."""
    parts = (prompts[i : i + 64] for i in range(0, len(prompts), 64))
    return [row for part in parts for row in complete(model, part, max_new_tokens, rng, **settings)]


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Sequence[list[dict]],
    max_new_tokens: int = LONGEST,
    temperature: float = 0.0,
    seed: int | None = None,
) -> list[str]:
    """What the assistant says next in each conversation."""
    form, rng, stop = ChatFormat(tokenizer), numpy.random.default_rng(seed), model.config.stop_ids
    prompts = [form.ids(messages, answer_next=True) for messages in conversations]
    rows = complete_in_parts(model, prompts, max_new_tokens, rng, temperature=temperature)
    return [tokenizer.decode([t for t in row if t not in stop]).strip() for row in rows]


def blank_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """`<|prefix|>` before `<|suffix|>` after `<|middle|>`, for a text with one blank ___.

    The space before the blank belongs to what fills it (arXiv 2207.14255, in its causal form).
    """
    if text.count(BLANK) != 1:
        raise InputError(f"expected one blank {BLANK} in the text, found {text.count(BLANK)}")
    names = ("<|prefix|>", "<|suffix|>", "<|middle|>")
    missing = [name for name in names if name not in tokenizer.special]
    if missing:
        raise InputError(f"this model's tokenizer has no {missing[0]}: it cannot fill blanks")
    before, after = text.split(BLANK)
    prefix, suffix, middle = (tokenizer.special[name] for name in names)
    before = before.removesuffix(" ")
    return [prefix, *tokenizer.encode(before), suffix, *tokenizer.encode(after), middle]


def fill(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    n: int = 1,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int | None = None,
    **settings,
) -> list[tuple[str, float | None]]:
    """What may stand in the blank ___ of text: n answers, most likely first, with log-probability.

    With temperature 0 these are the best of a beam search; otherwise n samples, equal ones merged,
    for which top_k and top_p are settings too.
    """
    if n < 1:
        raise InputError(f"n: expected at least 1, got {n}")
    ids, stop = blank_ids(tokenizer, text), model.config.stop_ids
    room = model.config.block_size - len(ids)
    if room < 1:
        raise InputError(f"the text is longer than the context of {model.config.block_size} tokens")
    max_new_tokens = min(max_new_tokens, room)
    if temperature == 0:
        found = beam_search(model, ids, max_new_tokens, max(n, 4), stop)[:n]
    else:
        rng, prompts = numpy.random.default_rng(seed), [ids] * n
        rows = complete(model, prompts, max_new_tokens, rng, temperature=temperature, **settings)
        rows = [tuple(token for token in row if token not in stop) for row in rows]
        found = [(row, None) for row in dict.fromkeys(rows)]
    return [(tokenizer.decode(list(row)), score) for row, score in found]


def beam_search(
    model: Transformer, prompt: list[int], max_new_tokens: int, width: int, stop_ids: list[int]
) -> list[tuple[tuple[int, ...], float]]:
    """The likeliest continuations that reach a stop token: [(ids without it, log-probability)],
    whichever of several stop tokens it is.

    Short answers only: every step reads the whole sequences again.
    """
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    done: dict[tuple[int, ...], float] = {}
    enough = (1 + len(stop_ids)) * width  # each beam may end in so many ways, and width go on
    for _ in range(max_new_tokens):
        x = last_logits(model, numpy.array([[*prompt, *ids] for ids, _ in beams]))
        x = x.astype(numpy.float64)
        logp = x - x.max(-1, keepdims=True)
        logp -= numpy.log(numpy.exp(logp).sum(-1, keepdims=True))
        total = logp + numpy.array([[score] for _, score in beams])
        best = numpy.argsort(-total, axis=None, kind="stable")[:enough]
        candidates = []
        for row, token in zip(*numpy.unravel_index(best, total.shape)):
            ids, score = beams[row][0], float(total[row, token])
            if token in stop_ids:
                done[ids] = float(numpy.logaddexp(done.get(ids, -numpy.inf), score))
            elif len(candidates) < width:
                candidates.append(((*ids, int(token)), score))
        beams = candidates
        done = dict(sorted(done.items(), key=lambda found: -found[1])[:width])
        if len(done) == width and min(done.values()) >= beams[0][1]:
            break
    return [*done.items()] or beams
