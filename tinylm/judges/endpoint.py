"""The judge behind an address: any server that speaks OpenAI's chat completions.

It compares two answers (pairwise.py), or gives each a mark from 1 to 10 (rubric). What it says is
kept in the run directory, training/judgements.jsonl, as soon as it has said it: nothing is asked
twice, not even after a kill. The key is read from the environment and goes nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from tinylm.chat import turn
from tinylm.errors import InputError
from tinylm.judges import Group, Judge
from tinylm.judges.pairwise import agreement, compare, request

KEY = "TINYLM_JUDGE_KEY"
JSON = {"Content-Type": "application/json"}
ATTEMPTS = 4  # to reach it, with a pause that doubles
LONGEST_PAUSE = 60.0  # seconds
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses after which it may go better
OF_A_QUESTION = {400, 413, 422}  # if others were answered: too long, or refused by a filter
RUBRIC = """Here is a request, and an answer to it.

Request:
{request}

Answer:
{answer}

How good is the answer? Reply with one whole number, from 1 for useless to 10 for perfect."""


LETTER = re.compile(
    r"\W*(?:answer\W+)?(a|b|t|tie)(?:\W*|[.:)\n].*|\W+is (?:the )?(?:better|best|correct)\b.*)",
    re.IGNORECASE | re.DOTALL,
)


def letter(reply: str) -> float:
    """1 for A, −1 for B, 0 for a tie, of a reply that is or begins with such a letter, or says "A
    is better". Raises ValueError for any other."""
    found = LETTER.fullmatch(reply)
    if not found:
        raise ValueError(f"Expected one letter, A, B or T, but the reply was {reply!r:.80}.")
    return {"a": 1.0, "b": -1.0}.get(found[1].lower(), 0.0)


def mark(reply: str) -> float:
    """A mark of 1 to 10, as −1 to 1. Raises ValueError for any other reply."""
    found = re.fullmatch(r"\W*(?<![-−.])(10|[1-9])(?:\s*/\s*10)?\W*", reply)
    if not found:
        raise ValueError(f"Expected a whole number from 1 to 10, but the reply was {reply!r:.80}.")
    return (int(found[1]) - 5.5) / 4.5


MODES = {"pairwise": letter, "rubric": mark}  # what reads a reply


class Unreachable(Exception):
    """No usable reply could be had."""


class Endpoint(Judge):
    """A judge that may fail; `trouble` says why there was no judgement lately."""

    def __init__(self, url: str, name: str, mode: str, concurrency: int, timeout: float):
        if not url or not name:
            raise InputError("--judge endpoint: say where and who, --judge-url and --judge-name")
        if mode not in MODES:
            raise InputError(f"--judge-mode {mode}: an endpoint judges {' or '.join(MODES)}")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.name, self.mode, self.concurrency = name, mode, concurrency
        self.parse = MODES[mode]
        self.key = os.environ.get(KEY, "")
        self.client = open_client(url, timeout, self.key)
        self.pause, self.down = 0.5, False
        self.known: dict[str, float | None] = {}
        self.file, self.lock = None, Lock()
        self.counts, self.agreed = Counter(), []

    @contextmanager
    def attending(self, stage, folder: Path, progress):
        """Inside, judgements are kept in the folder, and those made before are known."""
        path = folder / "training" / "judgements.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as self.file:
            self.file.seek(0)
            text = self.file.read()
            self.known = dict(filter(None, map(kept, text.splitlines())))
            self.file.write("\n" if text and not text.endswith("\n") else "")  # a kill cut it
            with self.client:
                yield

    def __call__(self, groups: list[Group]) -> list[list[float | None]]:
        self.down = False
        if self.mode == "pairwise":
            scores, agreed = compare(groups, self.judgements)
            self.agreed += agreed
            return scores
        asked = dict.fromkeys(rubric(group, answer) for group in groups for answer in group.answers)
        found = dict(zip(asked, self.judgements([*asked])))
        return [[found[rubric(group, answer)] for answer in group.answers] for group in groups]

    def notes(self) -> dict[str, float]:
        """Since the last call: questions asked and known, replies not understood, none had."""
        counts, agreed = self.counts, self.agreed
        self.counts, self.agreed = Counter(), []
        names = ("asked", "cached", "junk", "unreachable")
        return {f"judge_{name}": float(counts[name]) for name in names} | agreement(agreed)

    def judgements(self, questions: list[str]) -> list[float | None]:
        """What it says to each question, several at a time."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self.judgement, questions))

    def judgement(self, question: str) -> float | None:
        """A reply that cannot be read gets one more chance, and is shown why."""
        asked = f"{self.name}\n{question}".encode("utf-8", "backslashreplace")
        key = hashlib.blake2b(asked, digest_size=16).hexdigest()
        if key in self.known:
            self.count("cached")
            return self.known[key]
        messages, found = [turn("user", question)], None
        try:
            for _ in range(2):
                reply = self.reply(messages)
                try:
                    found = self.parse(reply)
                    break
                except ValueError as error:
                    messages += [turn("assistant", reply), turn("user", str(error))]
                    self.trouble = f"it talks junk: {reply!r:.80}"
            else:
                self.count("junk")
        except Unreachable as error:
            self.trouble = str(error)
            self.count("unreachable")
            return None
        self.keep(key, found, question, reply)
        return found

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def keep(self, key: str, found: float | None, question: str, reply: str) -> None:
        line = {"key": key, "judgement": found, "question": question, "reply": reply}
        with self.lock:
            self.known[key] = found
            if self.file:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()

    def reply(self, messages: list[dict]) -> str:
        """Raises Unreachable after all attempts; once that has happened, others make one each.

        Raises InputError where trying again cannot help: a wrong key, address or name.
        """
        content = {"model": self.name, "messages": messages, "temperature": 0, "max_tokens": 16}
        self.count("asked")
        for attempt in range(ATTEMPTS):
            said, why, wanted = self.post(content)
            if said is not None:
                self.down = False
                return said
            if self.down or attempt == ATTEMPTS - 1:
                break
            time.sleep(min(max(self.pause * 2**attempt, wanted), LONGEST_PAUSE))
        self.down = True
        raise Unreachable(f"{self.url}: {why}")

    def post(self, content: dict) -> tuple[str | None, str, float]:
        """(reply, "", 0), or (None, what went wrong, seconds that it asks us to wait)."""
        import httpx

        try:
            answer = self.client.post(self.url, content=json.dumps(content))  # all in ASCII
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # of where it sends us
            return None, f"{type(error).__name__} {error}".strip(), 0.0
        body = answer.content.decode(errors="replace")  # JSON is UTF-8, whatever it says it is
        body = body.replace(self.key, "…") if self.key else body
        if answer.status_code in AGAIN:
            wait = answer.headers.get("retry-after", "")
            return None, f"status {answer.status_code}", float(wait) if wait.isdecimal() else 0.0
        if answer.status_code != 200:
            hint = f" (the key is read from {KEY})" if answer.status_code in (401, 403) else ""
            told = f"{self.url}: status {answer.status_code}{hint}: {body:.200}"
            if answer.status_code in OF_A_QUESTION and self.known:  # it has answered others
                raise Unreachable(told)
            raise InputError(told)
        try:
            return "" + (answer.json()["choices"][0]["message"]["content"] or ""), "", 0.0
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return None, f"not a chat completion: {body!r:.80}", 0.0


def rubric(group: Group, answer: str) -> str:
    return RUBRIC.format(request=request(group.row.messages), answer=answer)


def open_client(url: str, timeout: float, key: str):
    try:
        import httpx
    except ImportError:
        raise InputError("--judge endpoint needs httpx: pip install 'tinylm[judge]'") from None
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL("")
    if parts.scheme not in ("http", "https") or not parts.host:
        raise InputError(f"--judge-url {url}: expected http://… or https://…")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise InputError(f"{KEY} has characters in it that no key has; spaces or a line end?")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.Client(timeout=timeout, headers={**JSON, **headers})
    except ValueError as error:  # of a proxy in the environment
        raise InputError(f"--judge endpoint: {error}") from None


def kept(line: str) -> tuple[str, float | None] | None:
    """(key, judgement) of a line, or None where a kill has cut it short."""
    try:
        content = json.loads(line)
        return content["key"], content["judgement"]
    except (ValueError, KeyError, TypeError):
        return None
