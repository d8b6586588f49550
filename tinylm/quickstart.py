"""`tinylm quickstart`: from raw text to an assistant, and to a better one, in minutes.

The three stages run on the almanac exactly as the commands would run them; then the same questions
are asked of the three models. Everything lies in one directory:

    almanac/        text, conversations, prompts and questions, as JSON lines
    base/ sft/ feedback/    the run directories
    results.json    what the test found, and a few of its questions
    report.html     all of it, to be looked at
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from textwrap import shorten

from rich.table import Table
from rich.text import Text

from tinylm import backend, checkpoint, evaluate, report
from tinylm.almanac import Almanac
from tinylm.checkpoint import Checkpoint
from tinylm.files import write_json
from tinylm.progress import Progress, table
from tinylm.settings import Plan, TrainConfig
from tinylm.stages import feedback, pretrain, sft

KINDS = ("country", "element", "state", "animal")
FACTS = 4  # of each kind
PASSES = 20  # descriptions of every entity in the text
TOGETHER = (1, 2, 4)  # of them in a document
PRETRAIN = {
    "vocab_size": 2048, "n_layer": 3, "n_head": 3, "n_embd": 96, "block_size": 256,
    "batch_size": 8, "optimizer": "muon", "learning_rate": 1e-2, "floor": 0.0, "max_steps": 2600,
    "held_out": 0.02, "eval_every": 650, "save_every": 400,
}  # fmt: skip
SFT = {"epochs": 4.0, "learning_rate": 3e-4, "eval_every": 100, "save_every": 100}
FEEDBACK = {
    "answers": 4, "batch_size": 128, "learning_rate": 2e-4, "max_steps": 280, "eval_every": 70,
}  # fmt: skip
STAGES = ("base", "sft", "feedback")
PARTS = {
    "known": "known things, never asked about",
    "reworded": "the same, in a wording never used",
    "withheld": "real things, never read about",
    "invented": "things that do not exist",
}


def run(out: Path, progress: Progress, seed: int = 0) -> dict:
    """Make the three models in directory out, or go on making them; returns the comparison."""
    began = time.monotonic() - seconds_so_far(out)
    progress.say(f"tinylm quickstart in {out}, on {backend.describe()}", "bold")
    almanac, world = out / "almanac", Almanac(seed, KINDS, FACTS)
    if not Checkpoint(out / "base").exists():
        world.write(almanac, PASSES, TOGETHER)
    progress.heading(
        "1 of 4  Pre-training: predict the next word of prose about "
        f"{sum(e.part != 'withheld' for e in world.entities)} things"
    )
    text, config = str(almanac / "text.jsonl"), pretrain.PretrainConfig(seed=seed, **PRETRAIN)
    stage(pretrain.run, [[text]], out / "base", config, progress)
    progress.heading("2 of 4  Fine-tuning: questions and answers about more than half of them")
    conversations, config = almanac / "conversations.jsonl", sft.SFTConfig(seed=seed, **SFT)
    stage(sft.run, [out / "base", conversations], out / "sft", config, progress)
    progress.heading("3 of 4  Feedback: +1 right, −1 wrong, 0 for “I don't know”")
    prompts, config = almanac / "prompts.jsonl", feedback.FeedbackConfig(seed=seed, **FEEDBACK)
    stage(feedback.run, [out / "sft", prompts], out / "feedback", config, progress)
    progress.heading("4 of 4  The test: questions about things that no training asked about")
    results, tables = compare(out, world)
    results = {"seconds": round(time.monotonic() - began, 1), **results}
    write_json(out / "results.json", results)
    report.attempt([out], progress)
    for each in tables:
        progress.console.print(each)
    chats = "".join(f"\n  tinylm chat {shlex.quote(str(out / name))}" for name in STAGES)
    progress.say(
        f"{results['seconds']:.0f} seconds. Look at {out}/report.html, and talk with each "
        f"of them:{chats}"
    )
    return results


def stage(run, inputs: list, folder: Path, config: TrainConfig, progress: Progress) -> None:
    """Run one stage, or what is left of it."""
    run(*inputs, Plan(folder, config, progress, folder.exists(), {"seed"}))
    report.attempt([folder], progress)


def seconds_so_far(out: Path) -> float:
    """What earlier, interrupted runs have spent on training."""
    begun = [Checkpoint(out / name) for name in STAGES]
    return sum(checkpoint.state()["seconds"] for checkpoint in begun if checkpoint.exists())


def compare(out: Path, world: Almanac) -> tuple[dict, list]:
    """Ask the test's questions of the three models: (JSON content, tables to print)."""
    tests = world.questions()
    asked = [(name, q) for name, questions in tests.items() for q in questions]
    stages, said = {}, {}
    for name in STAGES:
        model, tokenizer = checkpoint.load(out / name)
        said[name] = evaluate.ask(model, tokenizer, [q.text for _, q in asked])
        stages[name] = {"directory": str(out / name)}
        for part in tests:
            stages[name][part] = evaluate.verdict_shares(
                [(a, q.accepted, q.thing) for (of, q), a in zip(asked, said[name]) if of == part]
            )
    samples = table("What they say", "", "question", *said, words=2 + len(said), show_lines=True)
    picked = []
    for i in (i for name in ("known", "withheld", "invented") for i in evenly(asked, name, 2)):
        part, q = asked[i]
        right = next(iter(q.accepted), None)
        picked.append({"set": PARTS[part], "question": q.text, "answer": right})
        cells = (shorten(texts[i], 70, placeholder=" …") for texts in said.values())
        samples.add_row(part, q.text, *map(Text, cells))
    results = {"sets": PARTS, "stages": stages, "asked": picked}
    return results, [samples, verdicts(stages)]


def evenly(asked: list, name: str, n: int) -> list[int]:
    """n places of the questions of one set, evenly spread: samples that nobody chose."""
    places = [i for i, (of, _) in enumerate(asked) if of == name]
    return [places[(2 * k + 1) * len(places) // (2 * n)] for k in range(n)]


def verdicts(stages: dict[str, dict]) -> Table:
    """The share of right, wrong and "I don't know" by kind of question and stage, in percent."""
    headings = ("questions about", "stage", "n", "right", "wrong", "don't know")
    caption = "right: equal to an accepted answer after normalisation"
    made = table("The same questions asked of each stage", *headings, words=2, caption=caption)
    for part, about in PARTS.items():
        for i, (stage, found) in enumerate(stages.items()):
            shares = [
                f"[{colour}]{100 * found[part][verdict]:.1f} %[/]"
                for verdict, colour in (("right", "green"), ("wrong", "red"), ("idk", "yellow"))
            ]
            made.add_row("" if i else about, stage, str(found[part]["n"]), *shares)
        made.add_section()
    return made
