"""The judge that is a person: asked on a page or in the terminal, remembered in a store.

A round is the answers of one batch. Each prompt's answers are shown in a shuffled order, equal ones
as one; the picked one scores 1, the others 0, a tie ½ each, and nothing where it was skipped. Then
the person judges blind, beside each other, an answer of the model as it is now and one of the
fine-tuned model: that is the win rate, and nothing is learned from it.

What is asked is stored before it is asked and every judgement when it is made. A run that is
continued finds both there, so it asks nothing twice and learns what it would have learned.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy

from tinylm.errors import Waiting, asked_to_stop
from tinylm.evaluate import wilson
from tinylm.generate import answers, complete
from tinylm.judges import Group, Judge
from tinylm.store import Item, Store, place_in

WHO = "person"
DEFAULTS = {"answers": 4, "max_new_tokens": 64, "batch_size": 16, "learning_rate": 3e-4,
            "max_steps": 40, "held_out": 8, "save_every": 1, "eval_every": 10}  # fmt: skip
FIXED = 6  # prompts that are shown before and after
WINDOW = 20  # comparisons that make the win rate
FRAME = 0.03  # seconds between two pictures of an answer that is being written
TIE, SKIP, UNDO = "tie", "skip", "undo"


class Person(Judge):
    """Judges groups by asking; `asker` is what it is asked on (Terminal, Nobody or a Page)."""

    def __init__(self, asker):
        self.asker, self.state, self.written, self.painted = asker, {"answers": []}, [], 0.0
        self.round = 0
        self.kl: dict[int, float] = {}  # by round
        self.won: dict[tuple[int, int], float | None] = {}  # 1, ½ or 0, by round and place

    @contextmanager
    def attending(self, stage, folder: Path, progress):
        """Inside, the person can be asked; the stage's models are there to be compared."""
        self.stage, self.config, self.folder = stage, stage.config, folder
        self.fixed = (stage.heldout or stage.prompts)[:FIXED]
        self.before, self.after, self.last = [], [], []
        place_in(folder).parent.mkdir(parents=True, exist_ok=True)
        self.store = Store(place_in(folder))
        names = ("seed", "answers", "batch_size", "max_new_tokens")
        identity = json.dumps([stage.source, *(getattr(self.config, name) for name in names)])
        self.run = self.store.run(hashlib.blake2b(identity.encode(), digest_size=16).hexdigest())
        for item in self.store.items(run=self.run):
            self.remember(item)
        self.asker.open(progress)
        ended = "stopped"
        try:
            yield
            ended = "done"
            self.look()
        finally:
            self.show(phase=ended, question=None, **self.learned())
            self.asker.close()
            self.store.close()

    # ---- what the stage calls ------------------------------------------------------------------

    def begin(self, place: int, rows: list) -> list[list[int]] | None:
        """A round begins at this place of the stream of prompts; its answers, if stored."""
        self.round = place // len(rows) + 1
        self.written = [[] for _ in range(self.config.answers)]
        self.order = self.shuffled("train", place, self.config.answers)
        self.look()
        self.show(
            phase="writing", question=None, messages=rows[0].messages, round=self.round,
            rounds=self.config.max_steps * self.config.accumulate // self.config.updates or "?",
            answers=[""] * len(self.order), **self.learned(),
        )  # fmt: skip
        found = [self.store.find(self.run, "train", place + i) for i in range(len(rows))]
        return None if None in found else [ids for item in found for ids in item.ids]

    def hear(self, row: int, token: int) -> None:
        """The model has written a token; the answers to the round's first prompt are shown."""
        if row >= len(self.written):
            return
        self.written[row].append(token)
        if time.monotonic() - self.painted > FRAME:
            self.painted = time.monotonic()
            self.show(answers=[self.stage.text(self.written[i]) for i in self.order])

    def __call__(self, groups: list[Group]) -> list[list[float | None]]:
        """The person's scores; None for answers that are not part of the training."""
        if any(group.place is None for group in groups):
            return [[None] * len(group.answers) for group in groups]
        items = [self.stored(group) for group in groups]
        blind = self.config.comparisons if self.round > 1 else 0
        compared = [self.compared(i) for i in range(blind)]
        self.ask_all(items + compared)
        for item in items + compared:
            self.remember(item)
        self.show(phase="learning", question=None, **self.learned())
        return [self.scores(item) for item in items]

    def summary(self) -> dict[str, float]:
        """How many comparisons the model has won lately, and of how many."""
        found = self.win_rate(self.round)
        return {f"win_{name}": value for name, value in found.items()} if found else {}

    notes = summary

    # ---- what is asked -------------------------------------------------------------------------

    def stored(self, group: Group) -> Item:
        """The group's item, which is stored now unless it was before."""
        return self.store.find(self.run, "train", group.place) or self.add(
            "train", group.place, group.row.messages, group.answers, group.ids, group.logp
        )

    def compared(self, number: int) -> Item:
        """A fixed prompt with an answer of the model and one of the fine-tuned model, stored."""
        place = (self.round - 2) * self.config.comparisons + number
        prompts = self.stage.heldout or self.stage.prompts
        messages = prompts[place % len(prompts)].messages
        found = self.store.find(self.run, "compare", place)
        if found:
            return found
        prompt, size = self.stage.form.ids(messages, True), self.config.max_new_tokens
        rng = numpy.random.default_rng((self.config.seed, place, 1))
        models = self.stage.model, self.stage.reference
        ids = [complete(model, [prompt], size, rng)[0] for model in models]
        return self.add("compare", place, messages, [self.stage.text(x) for x in ids], ids)

    def add(self, kind, place, messages, texts, ids, logp=()) -> Item:
        drift = self.stage.drift
        self.store.add_item(self.run, messages, texts, kind, place, self.round, drift, ids, logp)
        return self.store.find(self.run, kind, place)

    def shuffled(self, kind: str, place: int, n: int) -> list[int]:
        return Random(f"{self.config.seed} {kind} {place}").sample(range(n), n)

    def choices(self, item: Item) -> list[int]:
        """The answers to choose from, as they are shown: different texts, and none cut off."""
        order = self.shuffled(item.kind, item.place, len(item.answers))
        order = [i for i in order if not self.cut(item, i)]
        first = {item.answers[i]: i for i in reversed(order)}
        return [i for i in order if first[item.answers[i]] == i]

    def ask_all(self, items: list[Item]) -> None:
        """Ask about every item that leaves a choice, once; the person may go back."""
        asked = [item for item in items if len(self.choices(item)) > 1]
        i = 0
        while i < len(asked):
            item, shown = asked[i], self.choices(asked[i])
            if self.store.judgements(item.id, WHO):
                i += 1
                continue
            self.show(
                phase="asking", question=item.id, messages=item.messages, at=i + 1, of=len(asked),
                answers=[item.answers[k] for k in shown], judged=self.count(), undo=i > 0,
                cut=sum(self.cut(item, k) for k in range(len(item.answers))),
            )  # fmt: skip
            with leaving(self.folder, self.stage):
                choice, comment = self.asker.ask()
            if choice == UNDO:
                i = max(0, i - 1)
                self.store.withdraw(asked[i].id, WHO)
            else:
                scores = marks(item.answers, shown, choice)
                self.store.judge(item.id, WHO, scores, shown, comment)

    def cut(self, item: Item, i: int) -> bool:
        """An answer without an end is not to be preferred; where models are compared, it may be."""
        return item.kind == "train" and item.ids[i][-1] not in self.stage.stop_ids

    def scores(self, item: Item) -> list[float | None]:
        """What the person said; where there was no choice, all are alike."""
        said = self.store.judgements(item.id, WHO)
        return said[-1].scores if said else [0.5] * len(item.answers)

    def remember(self, item: Item) -> None:
        """What an item that has been asked about tells of its round."""
        self.kl[item.round] = item.kl
        asked = len(self.choices(item)) > 1
        if item.kind == "compare" and (not asked or self.store.judgements(item.id, WHO)):
            self.won[item.round, item.place] = self.scores(item)[0]

    # ---- what is shown -------------------------------------------------------------------------

    def show(self, **changed) -> None:
        self.state = {**self.state, **changed}
        self.asker.show(self.state)

    def count(self) -> int:
        return len(self.store.judgements(judge=WHO))

    def look(self) -> None:
        """Read what the model answers to the fixed prompts now, always the likeliest words."""
        asked, most = [row.messages for row in self.fixed], self.config.max_new_tokens
        now = answers(self.stage.model, self.stage.tokenizer, asked, most)
        if not self.before:
            self.before = answers(self.stage.reference, self.stage.tokenizer, asked, most)
        self.last, self.after = self.after or now, now

    def win_rate(self, until: int) -> dict[str, float] | None:
        """Of the last comparisons up to a round: the share won, a tie is half, its interval."""
        found = [self.won[at] for at in sorted(self.won) if at[0] <= until]
        found = [score for score in found if score is not None][-WINDOW:]
        if not found:
            return None
        rate = sum(found) / len(found)
        low, high = wilson(rate, len(found))
        return {"rate": rate, "low": low, "high": high, "n": len(found)}

    def learned(self) -> dict:
        """What the page shows of the model: win rate and drift by round, fixed prompts."""
        rounds = [r for r in sorted(self.kl) if r <= self.round]
        said = zip(self.fixed, self.before, self.after, self.last)
        return {
            "judged": self.count(),
            "history": [{"round": r, "kl": self.kl[r], "win": self.win_rate(r)} for r in rounds],
            "fixed": [
                {"prompt": row.messages[-1]["content"], "before": a, "now": b, "new": b != last}
                for row, a, b, last in said
            ],
        }  # fmt: skip


def marks(texts: list[str], shown: list[int], choice: int | str) -> list[float | None]:
    """Scores of answers of which some were shown and one was picked, or none."""
    if choice == SKIP:
        return [None] * len(texts)
    of_text = {texts[k]: 0.5 if choice == TIE else float(i == choice) for i, k in enumerate(shown)}
    return [of_text.get(text) for text in texts]


@contextmanager
def leaving(folder: Path, stage):
    """While a person is waited for, Ctrl-C and SIGTERM leave at once, as does one that came shortly
    before: all is stored."""

    def leave(number=None, frame=None):
        raise Waiting(f"{folder} waits for a person's judgement: {AGAIN}")

    try:
        with asked_to_stop(leave):
            if stage.stopping:
                leave()
            yield
    except EOFError:
        raise Waiting(f"nobody is here to judge, so {folder} waits: {AGAIN}") from None


AGAIN = "go on with the same command and --resume, in a terminal or with --page serve"


class Nobody:
    """Where there is neither a page nor a terminal: what is to be asked is stored, no more."""

    def open(self, progress) -> None:
        pass

    def show(self, state: dict) -> None:
        pass

    def ask(self) -> tuple[int | str, str]:
        raise EOFError

    def close(self) -> None:
        pass


class Terminal(Nobody):
    """Questions on standard error, replies line by line on standard input."""

    keys = "1 to {n}: the best.  t: a tie.  s: skip.  u: undo.  Words after it are a comment.\n> "

    def open(self, progress) -> None:
        self.progress, progress.live = progress, False  # a moving bar would run over the question

    def show(self, state: dict) -> None:
        if state["phase"] != "asking":
            self.learned(state)
            return
        self.state = state
        where = f"Round {state['round']} of {state['rounds']}, {state['at']} of {state['of']}"
        self.progress.heading(where)
        for message in state["messages"]:
            self.progress.say(message["content"], "bold")
        for i, text in enumerate(state["answers"], 1):
            self.progress.say(f"  {i}  {text or '(nothing)'}")

    def learned(self, state: dict) -> None:
        """After an update: the win rate, the drift, and what it answers otherwise than before."""
        if state["phase"] != "writing" or any(state["answers"]) or not state["history"]:
            return
        last = state["history"][-1]
        told = f"round {last['round']}: KL {last['kl']:.3f}"
        if last["win"]:
            told += " · won {rate:.0%} [{low:.0%} – {high:.0%}] of {n}".format(**last["win"])
        self.progress.say(told, "bold")
        for row in state["fixed"]:
            if row["new"]:
                self.progress.say(f"  {row['prompt']} -> {row['before']} -> {row['now']}", "dim")

    def ask(self) -> tuple[int | str, str]:
        """(number of the answer shown, or a word; comment). Raises EOFError at the end of input."""
        n = len(self.state["answers"])
        while True:
            print(self.keys.format(n=n), end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            key, _, comment = line.strip().partition(" ")
            if len(key) == 1 and "1" <= key <= str(n):  # n is 4 at most
                return int(key) - 1, comment.strip()
            named = [word for word in (TIE, SKIP, UNDO) if key and word.startswith(key.lower())]
            if named:
                return named[0], comment.strip()
