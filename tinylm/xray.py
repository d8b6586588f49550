"""How sure a model is of each token: of its own answers, and of text that it has never seen."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy

from tinylm import backend
from tinylm.chat import ChatFormat, template_of
from tinylm.data import Batch, next_token_batch, packed_batch
from tinylm.generate import complete, encode_prompt
from tinylm.model import Transformer
from tinylm.tensor import no_grad
from tinylm.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A token, or the few that make up one character, and the probability that it was given."""

    text: str
    probability: float
    special: bool = False


def answering(
    model: Transformer, tokenizer: Tokenizer, conversations: list[list[dict]], longest: int = 32
) -> list[list[Piece]]:
    """The greedy answer to each conversation; a base model goes on writing the last message."""
    longest = min(longest, model.config.block_size // 2)
    room = model.config.block_size - longest
    if template_of(tokenizer):
        form = ChatFormat(tokenizer)
        prompts = [form.ids(messages, answer_next=True)[-room:] for messages in conversations]
    else:
        texts = [messages[-1]["content"] for messages in conversations]
        prompts = [encode_prompt(model, tokenizer, text)[-room:] for text in texts]
    said = complete(model, prompts, longest, numpy.random.default_rng(0), temperature=0)
    rows = [
        [([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))]
        for prompt, ids in zip(prompts, said)
    ]
    batch = packed_batch(rows, padding=0)
    sure, learned = probabilities(model, batch), batch.targets >= 0
    return [[*pieces(tokenizer, ids, p[of])] for ids, p, of in zip(said, sure, learned)]


def reading(model: Transformer, tokenizer: Tokenizer, text: numpy.ndarray) -> list[Piece]:
    """Each token of a text (T,) but the first, by those before it."""
    batch = next_token_batch(text[None], tokenizer.special.get("<|begin|>", -1))
    return [*pieces(tokenizer, text[1:].tolist(), probabilities(model, batch)[0])]


def probabilities(model: Transformer, batch: Batch) -> numpy.ndarray:
    """Of each target, (B, T); 1 where there is none."""
    with no_grad():
        nll = model.loss(batch.tokens, batch.targets, batch.start).data
    return numpy.exp(-backend.to_numpy(nll).astype("float64"))


def pieces(tokenizer: Tokenizer, ids: Iterable[int], p: Iterable[float]) -> Iterator[Piece]:
    """Tokens as text; those that end within a character wait for its rest."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    special, text, sure = set(tokenizer.special.values()), "", 1.0
    for i, probability in zip(ids, p):
        text, sure = text + decoder.decode(tokenizer.tokens[i]), sure * float(probability)
        inside, _ = decoder.getstate()  # bytes of a character that is not whole
        if not inside:
            yield Piece(text, sure, i in special)
            text, sure = "", 1.0
    if text := text + decoder.decode(b"", final=True):
        yield Piece(text, sure)
