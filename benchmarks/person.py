"""Does the page teach? A simulated person judges in a real browser; then the model is measured.

An assistant is fine-tuned to be now curt, now wordy and polite (small talk with openings and
closings put to it at random). The person prefers the shorter answer, or the politer one, except
that some of the time any answer is picked. After a fixed number of judgements the program is
stopped with Ctrl-C, and the model that it has left is set beside the fine-tuned one, on prompts
that feedback never saw and by the same rule without the noise.

    pip install '.[serve]' playwright      # and Debian's chromium
    tinylm quickstart --out runs/quickstart
    python benchmarks/person.py runs/quickstart/base --out runs/person
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import smalltalk
from playwright.sync_api import Page, sync_playwright

import tinylm
from tinylm.chat import turn
from tinylm.evaluate import wilson
from tinylm.files import write_rows
from tinylm.generate import answers
from tinylm.train import read_metrics

OPENINGS = ("", "", "Thank you for asking. ", "I am glad that you ask. ",
            "That is a good question. ", "With pleasure. ")  # fmt: skip
CLOSINGS = ("", "", " Is there anything else?", " Please let me know if that helps.",
            " I hope that is what you wanted to hear.")  # fmt: skip
POLITE = re.compile(r"\b(thank|please|glad|pleasure|sorry|nice|kind|welcome|hope)", re.IGNORECASE)
RULES = {"brevity": lambda text: -len(text), "politeness": lambda text: len(POLITE.findall(text))}
LENGTH = 64  # tokens of an answer at most
UNSEEN = 37  # prompts that are kept for the measurement
SAMPLES = 8  # answers to each of them, by each model


def talk(seed: int) -> dict[str, list[str]]:
    """What may be said -> what may be answered, of the small talk that is about nothing else."""
    found: dict[str, list[str]] = {}
    for row in (row for s in range(6) for row in smalltalk.conversations(s)):
        said, answer = (message["content"] for message in row["messages"][:2])
        if row["ids"][0].count("/") == 1 and answer not in found.setdefault(said, []):
            found[said].append(answer)
    pairs = [*found.items()]
    Random(seed).shuffle(pairs)
    return {said: answers for said, answers in pairs if answers}


def make_assistant(base: Path, out: Path) -> tuple[Path, list[str]]:
    """(directory of the assistant, prompts that are kept); prompts.jsonl holds the others."""
    rng, found = Random(0), talk(0)
    rows = [
        {
            "prompt": said,
            "completion": rng.choice(OPENINGS) + rng.choice(may) + rng.choice(CLOSINGS),
        }
        for said, may in found.items()
        for _ in range(30)
    ]
    rng.shuffle(rows)
    out.mkdir(parents=True, exist_ok=True)
    asked = [*found]
    write_rows(out / "conversations.jsonl", rows)
    write_rows(out / "prompts.jsonl", [{"prompt": said} for said in asked[UNSEEN:]])
    if not (out / "sft").exists():
        run("sft", base, "--data", out / "conversations.jsonl", "--out", out / "sft", "--epochs", 4,
            "--learning-rate", 2e-3, "--floor", 0.02, "--threads", 1)  # fmt: skip
    return out / "sft", asked[:UNSEEN]


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "tinylm", *map(str, arguments)]


def run(*arguments) -> None:
    subprocess.run(command(*arguments), check=True)


class Person:
    """Prefers by a rule; with the probability `noise` picks any answer."""

    def __init__(self, rule, noise: float, seed: int):
        self.rule, self.noise, self.rng = rule, noise, Random(seed)

    def key(self, texts: list[str]) -> str:
        if self.rng.random() < self.noise:
            return str(1 + self.rng.randrange(len(texts)))
        scores = [self.rule(text) for text in texts]
        best = [i for i, score in enumerate(scores) if score == max(scores)]
        return "t" if len(best) == len(texts) else str(1 + self.rng.choice(best))


def judge(tab: Page, link: str, person: Person, judgements: int) -> int:
    """Judge so often, with keys and clicks in turn; returns how often it was."""
    tab.goto(link)
    for made in range(judgements):
        tab.wait_for_selector("body.asking:not(.chosen), body.done", timeout=120_000)
        if tab.locator("body.done").count():
            return made
        number = tab.get_attribute("main", "data-number")
        key = person.key(tab.locator(".answer p").all_inner_texts())
        if key.isdigit() and made % 2:
            tab.click(f".answer >> nth={int(key) - 1}")
        else:
            tab.keyboard.press(key)
        tab.wait_for_selector(f"main:not([data-number='{number}'])", timeout=120_000)
    tab.wait_for_selector("body.asking:not(.chosen), body.done", timeout=120_000)
    return judgements


def teach(browser, sft: Path, out: Path, person: Person, judgements: int, seed: int) -> dict:
    """A run of the command with a person at its page; what the page said in the end."""
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["--judge", "human", "--page", "serve", "--seed", seed, "--threads", 1,
                 "--max-new-tokens", LENGTH, "--prompts", sft.parent / "prompts.jsonl"]  # fmt: skip
    running = subprocess.Popen(
        command("feedback", sft, "--out", out, *arguments), stderr=subprocess.PIPE, text=True
    )
    link = next(filter(None, (re.search(r"http://\S+", line) for line in running.stderr)))[0]
    tab = browser.new_page(viewport={"width": 1180, "height": 900})
    made = judge(tab, link, person, judgements)
    tab.screenshot(path=out / "page.png", full_page=True)
    running.send_signal(signal.SIGINT)
    running.communicate()
    tab.close()
    last = [row for row in read_metrics(out) if "win_rate" in row and "kl" in row][-1]
    return {"judgements": made, "updates": last["step"], "exit": running.returncode,
            "on_the_page": [last["win_rate"], last["win_low"], last["win_high"], last["win_n"]],
            "kl": last["kl"]}  # fmt: skip


def measured(sft: Path, taught: Path, asked: list[str], rule) -> dict:
    """By the rule alone: how often a sampled answer is better than the fine-tuned model's."""
    conversations = [[turn("user", said)] for said in asked] * SAMPLES
    before, after = (
        answers(*tinylm.load(folder), conversations, LENGTH, temperature=1.0, seed=seed)
        for seed, folder in enumerate((sft, taught))
    )
    pairs = [(rule(a), rule(b)) for a, b in zip(after, before)]
    rate = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    low, high = wilson(rate, len(pairs))
    mean = [round(sum(map(rule, said)) / len(said), 2) for said in (before, after)]
    return {"win_rate": rate, "low": low, "high": high, "n": len(pairs), "rule": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base", type=Path, help="a pre-trained model, such as the quickstart's")
    parser.add_argument("--out", type=Path, default=Path("runs/person"))
    parser.add_argument("--judgements", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    given = parser.parse_args()
    sft, asked = make_assistant(given.base, given.out)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        for name, rule in RULES.items():
            for seed in range(given.seeds):
                out, person = given.out / f"{name}-{seed}", Person(rule, given.noise, seed)
                found = teach(browser, sft, out, person, given.judgements, seed)
                found |= measured(sft, out, asked, rule)
                print(json.dumps({"prefers": name, "seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main()
