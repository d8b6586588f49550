"""Conversations: messages, the chat template, and which of their tokens are learned.

A conversation is a list of messages `{"role": "system" | "user" | "assistant", "content": "…"}`: a
system message at most, in front, then user and assistant in turn. A template, in the Jinja language
and the place (tokenizer_config.json) that `transformers` reads, writes it as one text. This text
here becomes ids, and what a message says never becomes a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tinylm.errors import InputError
from tinylm.files import read_rows
from tinylm.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
CHAT_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

# `generation` marks what the assistant says, for those who train with `transformers`
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# ---- messages in files -------------------------------------------------------------------------


@dataclass
class Row:
    """One conversation of a file: its place, its messages, and all else that stands there."""

    place: str  # "line 3", or of an array "row 3"
    messages: list[dict]
    content: dict


def read_conversations(path: str | Path) -> Iterator[Row]:
    """Conversations to learn from: every one has an answer, and none is empty.

    The file holds JSON lines or one JSON array, plain or .gz, of rows of any of these kinds:
    `messages`; `instruction`, `input`, `output` (Alpaca); `prompt`, `completion`. Raises InputError
    with file and place for a row that is something else, or a conversation that is not one.
    """
    for place, content in read_rows(Path(path)):
        where = f"{path}, {place}: "
        messages = as_messages(content, where)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if not answers:
            raise InputError(where + "no assistant turn, so there is nothing to learn")
        if not all(answer.strip() for answer in answers):
            raise InputError(where + "an assistant turn is empty")
        yield Row(place, messages, content)


def read_prompts(path: str | Path) -> Iterator[Row]:
    """Conversations to be answered: up to the last user turn; what follows it is dropped."""
    for place, content in read_rows(Path(path)):
        where = f"{path}, {place}: "
        messages = as_prompt(as_messages(content, where))
        if not messages:
            raise InputError(where + "no user turn, so there is nothing to answer")
        yield Row(place, messages, content)


def as_messages(row: dict, where: str = "") -> list[dict]:
    """The messages of a row of any kind. Raises InputError, which begins with where."""
    if "messages" in row:
        messages = row["messages"]
    elif "instruction" in row:
        parts = [row["instruction"], row.get("input") or ""]
        wrong = [part for part in parts if not isinstance(part, str)]
        messages = [turn("user", wrong[0] if wrong else "\n\n".join(filter(None, parts)))]
        messages += [turn("assistant", row["output"])] if "output" in row else []
    elif "prompt" in row:
        messages = as_turns("user", row["prompt"])
        messages += as_turns("assistant", row["completion"]) if "completion" in row else []
    else:
        raise InputError(
            where + 'expected "messages", or "instruction" and "output", or "prompt" and '
            f'"completion"; found {", ".join(map(repr, row)) or "an empty object"}'
        )
    check_messages(messages, where)
    return messages


def as_prompt(messages: list[dict]) -> list[dict]:
    """Up to the last user turn, which is to be answered."""
    while messages and messages[-1]["role"] != "user":
        messages = messages[:-1]
    return messages


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


def as_turns(role: str, content) -> list[dict]:
    """A prompt or completion is a text, or a list of messages."""
    return [*content] if isinstance(content, list) else [turn(role, content)]


def check_messages(messages, where: str) -> None:
    """Raise InputError where messages are not a conversation."""
    if not isinstance(messages, list) or not messages:
        raise InputError(where + "expected a list of messages with at least one in it")
    before = None
    for number, message in enumerate(messages, 1):
        at = f"{where}message {number}: "
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(at + 'expected an object with "role" and "content"')
        role = message["role"]
        if role not in ROLES:
            raise InputError(f"{at}unknown role {role!r}; expected system, user or assistant")
        if not isinstance(message["content"], str):
            raise InputError(f'{at}"content" must be a text, got {message["content"]!r:.60}')
        if role == before:
            raise InputError(f"{at}two {role} turns in a row; join them into one")
        if role == "system" and before:
            raise InputError(at + "a system message can only be the first one")
        if role == "assistant" and before != "user":
            raise InputError(at + "the assistant answers before the user has said anything")
        before = role


# ---- messages to ids ---------------------------------------------------------------------------


class Generation(Extension):
    """The tag `{% generation %} … {% endgeneration %}` of `transformers`: here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's interface)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message: str):
    raise TemplateError(message)


class ChatFormat:
    """How one tokenizer writes a conversation. Raises InputError where it has no template.

    what: its template is called that where something is wrong with it.
    """

    def __init__(self, tokenizer: Tokenizer, what: str = "the chat template"):
        self.tokenizer, self.what = tokenizer, what
        source = template_of(tokenizer)
        if source is None:
            raise InputError("this model has no chat template: it was not fine-tuned to answer")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        names = ("bos", "eos", "pad", "unk")
        self.names = {f"{name}_token": tokenizer.named(name) or "" for name in names}
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"{what} cannot be read: {error}") from None
        flags, added = ("lstrip", "rstrip", "single_word"), tokenizer.spec.get("added_tokens") or []
        self.fussy = {token["content"] for token in added if any(map(token.get, flags))}
        longest_first = sorted(tokenizer.special, key=len, reverse=True)
        either = "|".join(map(re.escape, longest_first)) or "(?!)"  # of none: matches nothing
        self.special = re.compile(f"({either})")

    def ids(self, messages: list[dict], answer_next: bool = False) -> list[int]:
        """A conversation as ids; with answer_next, up to where the assistant begins to speak.

        The same as `apply_chat_template` of `transformers`, except that no text of a message turns
        into a special token, whichever of its fields a template looks at.
        """
        said = json.dumps(messages, ensure_ascii=False, default=str)
        guard = next(c for c in map(chr, range(0xFDD0, 0x110000)) if c not in said)
        id_of, text_of = self.tokenizer.special, self.tokenizer.tokens

        def defuse(x):  # <|end|> in a message becomes its id between guards
            if isinstance(x, dict):
                return {defuse(key): defuse(value) for key, value in x.items()}
            if isinstance(x, list):
                return [defuse(each) for each in x]
            token = lambda match: f"{guard}{id_of[match[0]]}{guard}"
            return self.special.sub(token, x) if isinstance(x, str) else x

        def mend(text: str) -> str:
            found = f"{guard}([0-9]+){guard}"
            return re.sub(found, lambda match: text_of[int(match[1])].decode(), text)

        safe = [{**defuse(message), "role": message["role"]} for message in messages]
        try:
            text = self.template.render(
                messages=safe, tools=None, documents=None, add_generation_prompt=answer_next,
                **self.names,
            )  # fmt: skip
        except Exception as error:  # whatever an expression in the template can raise
            raise InputError(f"{self.what} refuses this conversation: {error}") from None
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if part in self.fussy:
                raise InputError(f"unsupported flag of {part}: lstrip, rstrip or single_word")
            if i % 2:
                ids.append(id_of[part])
            elif part:
                ids += self.tokenizer.encode(mend(part), begins=not ids)
        if not ids:
            raise InputError(f"{self.what} makes nothing of this conversation")
        return ids

    def example(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """ids, and for each of them whether it is learned: answers, their end of turn included."""
        ids, learned = [], []
        for i, message in enumerate(messages, 1):
            if message["role"] == "assistant":
                ids, begin, end = self.answered(messages[:i], ids[: len(learned)])
                learned += [False] * (begin - len(learned)) + [True] * (end - begin)
        return ids, learned + [False] * (len(ids) - len(learned))

    def answered(self, messages: list[dict], before=()) -> tuple[list[int], int, int]:
        """A conversation that ends with an answer as ids, and where this begins and ends.

        before: the ids it must begin with. Raises InputError where the template changes them.
        """
        asked, ids, eos = self.ids(messages[:-1], True), self.ids(messages), self.tokenizer.eos_id
        if ids[: len(asked)] != asked or asked[: len(before)] != [*before]:
            raise InputError(f"{self.what} rewrites earlier turns: it cannot be used")
        answer = ids[len(asked) :]
        size = answer.index(eos) + 1 if eos in answer else len(answer)
        return ids, len(asked), len(asked) + size

    def asked(self, messages: list[dict], answers: list[str]) -> tuple[list[int], list[list[int]]]:
        """A prompt as ids, and those of answers to it, up to the end of the assistant's turn."""
        said = [self.answered([*messages, turn("assistant", answer)]) for answer in answers]
        return self.ids(messages, True), [ids[begin:end] for ids, begin, end in said]


def template_of(tokenizer: Tokenizer) -> str | None:
    """The chat template's source; of several named ones, the default."""
    found = tokenizer.config.get("chat_template")
    if isinstance(found, list):
        return {t["name"]: t["template"] for t in found}.get("default")
    return found


def with_chat_tokens(tokenizer: Tokenizer) -> tuple[Tokenizer, list[str]]:
    """The tokenizer with TEMPLATE as its chat template, and what special tokens that added to it.

    They come after all others. Its own begin token is kept; its end token becomes `<|end|>`.
    """
    needed = CHAT_TOKENS if tokenizer.bos_id is not None else ("<|begin|>", *CHAT_TOKENS)
    missing = [name for name in needed if name not in tokenizer.special]
    bos = "<|begin|>" if tokenizer.bos_id is None else tokenizer.config["bos_token"]
    names = {"bos_token": bos, "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return tokenizer.with_special(missing, {**names, "chat_template": TEMPLATE}), missing
