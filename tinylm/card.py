"""The model card: what a run directory says of itself to people, in its README.md."""

from __future__ import annotations

from collections.abc import Iterable


def model_card(
    about: str, facts: dict[str, str], numbers: list[str], files: Iterable[tuple[str, int]]
) -> str:
    """Markdown. Facts that are empty are left out; files: name and bytes of what was learned from.

    No numbers: the run is not finished yet.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    found = "\n".join(numbers) or "not finished yet"
    data = "\n".join(f"- {name}, {size:,} bytes" for name, size in files)
    return f"""# {about}

| | |
|---|---|
{rows}

## Numbers
{found}

## Data
{data}
"""


def took(results: dict) -> str:
    return f"{results['steps']} steps, {results['seconds']:.0f} seconds"
