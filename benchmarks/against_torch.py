"""tinylm beside PyTorch and others on this machine, in one run.

    python benchmarks/against_torch.py --models a b d          training steps
    python benchmarks/against_torch.py --all --json            everything, as one JSON object

Needs `pip install ".[bench]"`. Contestants are processes that start from the same weights, see the
same batches and take turns. PyTorch is stock, with its MKL at full vector width, and in bfloat16;
in training it is represented by the faster of eager and compiled. Dropout is off, AdamW is
included, gradients are not clipped (which would cost PyTorch another pass).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import kernels
import quality
import training
import vocabulary
import writing
from rich.console import Console
from tasks import MODELS

from tinylm import backend
from tinylm.bench import barrier, fma_peak

PARTS = ("gemm", "attention", "generation", "tokenizer", "time_to_quality")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--models", nargs="+", choices=MODELS, default=[], help="whole training steps")
    flag("--gemm", action="store_true", help="products by shape and layout")
    flag("--attention", action="store_true", help="forward and backward, by length")
    flag("--generation", action="store_true", help="one stream, and many at once")
    flag("--tokenizer", action="store_true", help="learning a vocabulary, and encoding")
    flag("--time-to-quality", action="store_true", help="from a text to a model, wall time")
    flag("--all", action="store_true", help="every part")
    flag("--shakespeare", type=Path, metavar="FILE", help="the text for --time-to-quality")
    flag("--text", type=Path, metavar="FILE", help="for --tokenizer (default: Python's sources)")
    flag("--turns", type=int, default=7, help="measurements of each contestant (default: 7)")
    flag("--threads", type=int, default=2, help="of each contestant (default: 2)")
    flag("--json", action="store_true", help="print one JSON object instead of tables")
    given = parser.parse_args()
    if given.all:
        given.models = list(MODELS)
        vars(given).update(dict.fromkeys(PARTS, True))
    return given


class Report:
    """Collects the findings of all parts, and shows each as soon as it is there."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.notes = given, Console(stderr=True, highlight=False)
        backend.set_threads(given.threads)
        self.peak, latency = fma_peak(given.threads), barrier(given.threads)
        self.found = {"peak_gflops": round(self.peak, 1), "barrier_us": round(latency, 3)}
        self.found |= {"ratios": [], "steps": []} | {part: [] for part in PARTS}
        self.say(
            f"multiply-adds {self.peak:.0f} GFLOP/s, barrier {latency:.2f} µs, "
            f"{given.threads} threads, {given.turns} turns"
        )

    def say(self, text: str) -> None:
        self.notes.print(text)

    def show(self, table) -> None:
        if not self.given.json:
            Console().print(table)

    def training(self, model: str) -> None:
        self.say(f"training {model}: {MODELS[model].about}")
        found = training.compare(model, self.given.turns, self.given.threads, self.say)
        for part, rows in found.items():
            self.found[part] += rows
        self.show(training.training_table(model, found, self.peak))

    def gemm(self) -> None:
        rows = kernels.products(self.given.turns, self.given.threads, self.peak, self.say)
        self.found["gemm"] = rows
        self.show(kernels.product_table(rows, self.peak))

    def attention(self) -> None:
        rows = kernels.attention(self.given.turns, self.given.threads, self.say)
        self.found["attention"] = rows
        self.show(kernels.attention_table(rows))

    def generation(self) -> None:
        rows = writing.compare(self.given.turns, self.given.threads, self.say)
        self.found["generation"] = rows
        self.show(writing.writing_table(rows))

    def tokenizer(self) -> None:
        rows = vocabulary.compare(self.given.text, self.given.turns, self.given.threads, self.say)
        self.found["tokenizer"] = rows
        self.show(vocabulary.vocabulary_table(rows))

    def time_to_quality(self) -> None:
        self.found["time_to_quality"] = {}
        if self.given.shakespeare is None:
            self.say("time to quality is left out: name its text with --shakespeare FILE")
            return
        found = quality.compare(self.given.shakespeare, self.given.threads, self.say)
        self.found["time_to_quality"] = found
        if found:
            self.show(quality.quality_table(found))


def main() -> None:
    given = arguments()
    report = Report(given)
    for model in given.models:
        report.training(model)
    for part in PARTS:
        if getattr(given, part):
            report.say(part.replace("_", " "))
            getattr(report, part)()
    if given.json:
        print(json.dumps(report.found))


if __name__ == "__main__":
    main()
