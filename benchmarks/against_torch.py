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
from contestants import Session
from rich.console import Console
from tasks import MODELS

from tinylm import backend
from tinylm.bench import barrier

PARTS = {  # besides --models: what measures, what draws, what the help says
    "gemm": (kernels.products, kernels.product_table, "products by shape and layout"),
    "attention": (kernels.attention, kernels.attention_table, "forward and backward, by length"),
    "generation": (writing.compare, writing.writing_table, "one stream, and many at once"),
    "tokenizer": (vocabulary.compare, vocabulary.vocabulary_table, "learning one, and encoding"),
    "time_to_quality": (quality.compare, quality.quality_table, "from a text to a model"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--models", nargs="+", choices=MODELS, default=[], help="whole training steps")
    for name, (*_, help) in PARTS.items():
        flag("--" + name.replace("_", "-"), action="store_true", help=help)
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


def main() -> None:
    given, notes = arguments(), Console(stderr=True, highlight=False, markup=False)
    show = (lambda table: None) if given.json else Console().print
    backend.set_threads(given.threads)
    session = Session(given.threads, given.turns, notes.print, given.text, given.shakespeare)
    found = {"barrier_us": round(barrier(given.threads), 3), "ratios": [], "steps": []}
    for name in given.models:
        notes.print(f"training {name}: {MODELS[name].about}")
        session.look_at_the_peak()
        rows = training.compare(name, session)
        found = {**found, **{part: found[part] + rows[part] for part in rows}}
        show(training.training_table(name, rows))
    for name, (measure, table, _) in PARTS.items():
        found[name] = []
        if getattr(given, name):
            notes.print(name.replace("_", " "))
            session.look_at_the_peak()
            found[name] = measure(session)
            if found[name]:
                show(table(found[name]))
    found["peak_gflops"] = round(session.peak, 1)
    notes.print(
        f"multiply-adds {session.peak:.0f} GFLOP/s, barrier {found['barrier_us']:.2f} µs, "
        f"{given.threads} threads, {given.turns} turns"
    )
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
