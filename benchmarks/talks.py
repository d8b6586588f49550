"""Does the quickstart's assistant hold over a talk? As `tinylm chat` would, greedily.

    tinylm quickstart --out runs/quickstart
    python benchmarks/talks.py runs/quickstart/sft runs/quickstart/feedback

Talks have ten turns: half of them questions about known things that only the test asks about, a
quarter about real things never read about and things that do not exist, a quarter small talk. What
the model itself has answered is what it sees of the turns before. Printed is the share of right
answers by turn; to what cannot be known, right is "I don't know".
"""

from __future__ import annotations

import argparse
import collections
from pathlib import Path
from random import Random

import tinylm
from tinylm import quickstart
from tinylm.almanac import Almanac
from tinylm.generate import Conversation
from tinylm.judges.verifier import verdict

TURNS = 10
PARTS = {"turn 1": range(1), "2 to 4": range(1, 4), "5 to 7": range(4, 7), "8 to 10": range(7, 10)}
Turn = tuple[str, str, list[str]]  # kind, what is said, what may be answered


def talks(seed: int, n: int) -> list[list[Turn]]:
    almanac, rng = Almanac(seed, quickstart.KINDS, quickstart.FACTS), Random(0)
    tests = almanac.questions()

    def said() -> Turn:
        kind = rng.choice(("known", "known", "unknown", "small talk"))
        if kind == "small talk":
            group = rng.choice(almanac.talk)
            return kind, rng.choice(group["user"]), [group["assistant"]]
        part = kind if kind == "known" else rng.choice(("withheld", "invented"))
        question = rng.choice(tests[part])
        return kind, question.text, list(question.accepted)

    return [[said() for _ in range(TURNS)] for _ in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the quickstart")
    parser.add_argument("--talks", type=int, default=360)
    options = parser.parse_args()
    for folder in options.models:
        model, tokenizer = tinylm.load(folder)
        right: dict[tuple[str, int], list[bool]] = collections.defaultdict(list)
        for turns in talks(options.seed, options.talks):
            talk = Conversation(model, tokenizer, "", {"temperature": 0.0})
            for i, (kind, said, accepted) in enumerate(turns):
                found = verdict("".join(talk.ask(said)), accepted)
                right[kind, i].append(found == ("idk" if kind == "unknown" else "right"))
        print(folder)
        for kind in ("known", "unknown", "small talk"):
            shares = []
            for name, part in PARTS.items():
                hits = [hit for i in part for hit in right[kind, i]]
                shares.append(f"{name} {sum(hits) / max(1, len(hits)):6.1%} of {len(hits)}")
            print(f"  {kind:10}", *shares, sep="   ")


if __name__ == "__main__":
    main()
