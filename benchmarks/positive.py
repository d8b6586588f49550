"""A film critic who learns to like films: a reward model judges, and another one checks it.

    python benchmarks/positive.py FOLDER --out runs/positive      rt-polarity.pos and .neg in FOLDER

Sentences about films, of both kinds, are read, and then taught as answers to one request. Two
reward models learn from halves of the sentences that share none: that the positive one is better.
Feedback follows the first; the second, which it never sees, is the gold standard. Rising reward
with falling gold would be over-optimisation (arXiv 2210.10760).
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy

from tinylm import backend, checkpoint, evaluate, files
from tinylm.chat import Row, turn
from tinylm.generate import answers
from tinylm.judges import Group
from tinylm.judges.reward import RewardModel
from tinylm.progress import Progress
from tinylm.quickstart import stage
from tinylm.stages import feedback, preference, pretrain, sft

REQUEST = "Write a sentence about a film."
PRETRAIN = {
    "vocab_size": 2048, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128,
    "batch_size": 16, "optimizer": "muon", "learning_rate": 1e-2, "floor": 0.0, "max_steps": 1500,
    "document_separator": "\n", "eval_every": 500, "save_every": 500,
}  # fmt: skip
SFT = {"epochs": 1.0, "learning_rate": 5e-4, "eval_every": 100, "save_every": 100}
REWARD = {"epochs": 3.0, "learning_rate": 3e-4, "eval_every": 100, "save_every": 100}
FEEDBACK = {
    "judge": "reward-model", "answers": 8, "batch_size": 64, "max_new_tokens": 64, "max_steps": 200,
    "learning_rate": 1e-4, "truncated": -4.0, "kl": 0.05, "held_out": 0,
}  # fmt: skip
SAMPLES = 512


def write_data(source: Path, out: Path) -> None:
    """text.txt, conversations.jsonl, prompts.jsonl, and pairs of two halves: proxy and gold."""
    liked, not_liked = (sentences(source / f"rt-polarity.{kind}") for kind in ("pos", "neg"))
    pairs = [{"prompt": REQUEST, "chosen": p, "rejected": n} for p, n in zip(liked, not_liked)]
    both = [{"prompt": REQUEST, "completion": s} for pair in zip(liked, not_liked) for s in pair]
    middle = len(pairs) // 2
    out.mkdir(parents=True, exist_ok=True)
    (out / "text.txt").write_text("\n".join(row["completion"] for row in both), encoding="utf-8")
    for name, rows in {
        "conversations": both,
        "prompts": [{"prompt": REQUEST}],
        "proxy": pairs[:middle],
        "gold": pairs[middle:],
    }.items():
        files.write_rows(out / f"{name}.jsonl", rows)


def sentences(path: Path) -> list[str]:
    found = [line.strip() for line in path.read_text(encoding="latin-1").split("\n")]
    found = [line for line in found if line]
    random.Random(0).shuffle(found)
    return found


def measured(model: Path, judges: dict[str, RewardModel], seed: int) -> dict:
    """What a model writes at temperature 1: each judge's mean score, and whether it is varied."""
    loaded, tokenizer = checkpoint.load(model)
    asked = [turn("user", REQUEST)]
    said = answers(loaded, tokenizer, [asked] * SAMPLES, 64, temperature=1.0, seed=seed)
    group, found = Group(Row("line 1", asked, {}), said), {}
    for name, judge in judges.items():
        (made,) = judge([group])
        made = numpy.array([score for score in made if score is not None])
        found[name] = float(made.mean())
        found[f"{name} error"] = float(made.std() / len(made) ** 0.5)
        found[f"{name} positive"] = float((made > 0).mean())
    words = float(numpy.mean([len(text.split()) for text in said]))
    return {**found, "words": words, **evaluate.variety(said), "said": said[:6]}


def run(source: Path, out: Path, seed: int, settings: dict) -> dict:
    """All stages, or what is left of them; returns what was measured."""
    progress, data = Progress(), out / "data"
    write_data(source, data)
    config = pretrain.PretrainConfig(seed=seed, **PRETRAIN)
    stage(pretrain.run, [str(data / "text.txt")], out / "base", config, progress)
    config = sft.SFTConfig(seed=seed, **SFT)
    stage(sft.run, out / "base", data / "conversations.jsonl", out / "sft", config, progress)
    for i, name in enumerate(("proxy", "gold")):
        config = preference.RewardConfig(seed=seed + i, **REWARD)
        stage(preference.run, out / "sft", data / f"{name}.jsonl", out / name, config, progress)
    config = feedback.FeedbackConfig(
        seed=seed, reward_model=str(out / "proxy"), **FEEDBACK, **settings
    )
    stage(feedback.run, out / "sft", data / "prompts.jsonl", out / "feedback", config, progress)
    judges = {name: RewardModel(str(out / name)) for name in ("proxy", "gold")}
    names = ("accuracy", "accuracy_low", "accuracy_high", "pairs", "calibration_error")
    trained = {name: checkpoint.Checkpoint(out / name).state()["results"] for name in judges}
    return {
        "reward models": {n: {k: of[k] for k in names} for n, of in trained.items()},
        **{name: measured(out / name, judges, seed) for name in ("sft", "feedback")},
        "settings": asdict(config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/positive"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kl", type=float, default=FEEDBACK.pop("kl"))
    given = parser.parse_args()
    if given.threads:
        backend.set_threads(given.threads)
    found = run(given.source, given.out, given.seed, {"kl": given.kl})
    files.write_json(given.out / "results.json", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
