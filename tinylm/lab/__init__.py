"""`tinylm lab`: what is claimed about the three stages, each claim by an experiment of its own.

One file a claim, to be read like an experiment in a paper: what is expected, what is varied, what
is measured. Each has a TITLE and what it SAYS, `measure`, for one seed, and `holds`: whether the
pooled values bear it out. Every seed has its own world and its own models.

    OUT/seed0/ seed1/ …    run directories, which claims share where they need the same one
    OUT/claims.json        what was measured
"""

from __future__ import annotations

import json
from pathlib import Path

from tinylm.errors import InputError
from tinylm.files import expected, write_json
from tinylm.lab import (
    assistant,
    compression,
    cutoff,
    extraction,
    missing,
    newfacts,
    outwitted,
    refusal,
)  # fmt: skip
from tinylm.lab.workshop import Workshop, pooled
from tinylm.progress import Progress, table

CLAIMS = {
    "compression": compression, "assistant": assistant, "extraction": extraction,
    "newfacts": newfacts, "cutoff": cutoff, "refusal": refusal, "outwitted": outwitted,
    "missing": missing,
}  # fmt: skip


def run(name: str, out: Path, progress: Progress, seeds: int = 3, **smaller) -> list[dict]:
    """Measure one claim, or "all"; returns the rows of claims.json, which keeps other claims'.

    smaller: settings that override those of every run, to try it out.
    """
    if name != "all" and name not in CLAIMS:
        raise InputError(f"no claim {name}; there are {', '.join(CLAIMS)} and all")
    known_claims(out / "claims.json")  # what is wrong with it must not show hours later
    workshops = [Workshop(out / f"seed{s}", s, progress, smaller) for s in range(seeds)]
    found = []
    for claim, experiment in CLAIMS.items():
        if name not in ("all", claim):
            continue
        by_seed = [experiment.measure(workshop) for workshop in workshops]
        measures = [pooled(list(same)) for same in zip(*by_seed)]
        holds = bool(experiment.holds({m["name"]: m["value"] for m in measures}))
        row = {"claim": claim, "title": experiment.TITLE, "says": experiment.SAYS, "holds": holds}
        found.append({**row, "measures": measures})
        write_claims(out / "claims.json", found[-1])
        progress.console.print(shown(found[-1]))
    return found


def write_claims(path: Path, row: dict) -> None:
    """Put a claim's row in its place among those of others."""
    rows = known_claims(path) | {row["claim"]: row}
    write_json(path, [rows[name] for name in CLAIMS if name in rows])


def known_claims(path: Path) -> dict[str, dict]:
    """The rows of claims.json by claim. Raises InputError where it holds something else."""
    with expected(path, "a list of claims"):
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return {row["claim"]: row for row in known}


def shown(claim: dict):
    title = claim["title"] + (": it holds" if claim["holds"] else ": it does not hold")
    headings = ("", "value", "from", "to", "n", "chance", "by seed")
    made = table(title, *headings, caption=claim["says"])
    for m in claim["measures"]:
        numbers = [f"{m[key]:.3f}" for key in ("value", "low", "high")]
        chance = "" if m["chance"] is None else f"{m['chance']:.3f}"
        by_seed = " ".join(f"{value:.3f}" for value in m["by_seed"])
        made.add_row(m["name"], *numbers, str(m["n"]), chance, by_seed)
    return made
