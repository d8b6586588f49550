"""Pre-training compresses: a model foretells text of its kind better than xz, and holds facts.

Expected  Held-out tellings of what was read take fewer bits per byte than xz, given the same text
          first, needs for them; a larger model holds more facts, until it holds all of them.
Varied    the width of the model; the text and the steps are equal.
Measured  bits per byte of held-out text beside xz(text + held-out) − xz(text); facts with which the
          model ends a sentence rightly; these, less what chance would give, per 1,000 parameters.
          (The model has its weights to write into, whose number is told; xz looks back 64 MiB.)
"""

from __future__ import annotations

from random import Random

from tinylm import checkpoint
from tinylm.lab import extraction
from tinylm.lab.workshop import Measure, Workshop, chance, recalled, results_of, share

TITLE = "Pre-training compresses what was read"
SAYS = "Held-out text beside xz at equal terms, and the facts that models of three sizes hold."
WIDTHS = (16, 32, extraction.WIDTH)


def measure(workshop: Workshop) -> list[Measure]:
    almanac = extraction.world_of(workshop.seed)
    read = [e for e in almanac.entities if e.part != "withheld"]
    facts = almanac.about(read, Random(workshop.seed))
    guess, found = chance(almanac, facts), []
    for width in WIDTHS:
        folder = extraction.base(workshop, "shuffled", width)
        results = results_of(folder)
        thousands = checkpoint.load(folder)[0].n_parameters() / 1000
        known = share(f"{width} wide: facts known", recalled(folder, facts), guess, facts)
        found += [
            Measure(f"{width} wide: thousand parameters", thousands),
            Measure(f"{width} wide: bits per byte", results["bits_per_byte"]),
            known,
            Measure(
                f"{width} wide: facts per 1,000 parameters",
                (known.value - guess) * known.n / thousands,
            ),
        ]
    return [*found, Measure("xz: bits per byte", results["xz_bits_per_byte"])]


def holds(value: dict[str, float]) -> bool:
    known = [value[f"{width} wide: facts known"] for width in WIDTHS]
    best = value[f"{WIDTHS[-1]} wide: bits per byte"]
    return best < value["xz: bits per byte"] and known == sorted(known)
