"""tinylm beside PyTorch on this machine, in one run.

    python benchmarks/against_torch.py --models a b d          training steps
    python benchmarks/against_torch.py --all --json            everything, as one JSON object

Needs `pip install ".[bench]"`. Dropout is off, AdamW is included, gradients are not clipped (which
would cost PyTorch another pass). Contestants start from the same weights, see the same batches, and
take turns; PyTorch is represented by the faster of eager and compiled.
"""

from __future__ import annotations

import argparse
import json

import training
from rich.console import Console
from shapes import MODELS

from tinylm import backend
from tinylm.bench import fma_peak


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[], help="training steps")
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument("--turns", type=int, default=7, help="measurements of each (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="of each contestant (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.all:
        given.models = list(MODELS)
    notes = Console(stderr=True, highlight=False)
    backend.set_threads(given.threads)
    peak = fma_peak(given.threads)
    result = {"peak_gflops": round(peak, 1), "steps": [], "ratios": []}
    for model in given.models:
        notes.print(f"training {model}: {MODELS[model].about} ...")
        found = training.compare(model, given.turns, given.threads, notes.print)
        result["steps"] += found["steps"]
        result["ratios"] += found["ratios"]
        if not given.json:
            Console().print(training.table(model, found, peak))
    if given.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
