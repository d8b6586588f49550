"""How far judges agree with each other and with themselves, from what a store holds.

The unit is a pair of answers to one prompt. A judge who scores two of them differently prefers one;
one who scores all answers of an item alike calls every pair of it a tie; two answers of which
neither was picked, while a third was, are not compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import combinations

from rich.table import Table
from rich.text import Text

from tinylm.evaluate import wilson
from tinylm.progress import table
from tinylm.store import Judgement, Store

Pairs = dict[tuple[int, int], int]  # answers' numbers i < j -> 1: i is better, −1: j, 0: a tie


def outcomes(scores: list[float | None]) -> Pairs:
    """What the scores of one item say of its pairs."""
    judged = [(i, score) for i, score in enumerate(scores) if score is not None]
    tie = len({score for _, score in judged}) == 1
    return {
        (i, j): (a > b) - (a < b) for (i, a), (j, b) in combinations(judged, 2) if tie or a != b
    }


def kappa(pairs: Iterable[tuple]) -> dict[str, float | int | None]:
    """Cohen's κ of (one's label, the other's label), its 95 % interval, and the plain agreement.

    κ = (p_o − p_e) / (1 − p_e): agreement beyond what two judges who label at random, each as often
    as they do, would have (Cohen 1960). Its variance is that of Fleiss, Cohen and Everitt (1969).
    None where it is not defined: nothing judged, or both always say the same one thing.
    """
    seen = Counter(pairs)
    n = sum(seen.values())
    if not n:
        return {"kappa": None, "low": None, "high": None, "agreement": None, "n": 0}
    p = {pair: count / n for pair, count in seen.items()}
    labels = {label for pair in p for label in pair}
    row = {a: sum(p.get((a, b), 0.0) for b in labels) for a in labels}
    column = {b: sum(p.get((a, b), 0.0) for a in labels) for b in labels}
    agreed = sum(p.get((a, a), 0.0) for a in labels)
    chance = sum(row[a] * column[a] for a in labels)
    if chance == 1:
        return {"kappa": None, "low": None, "high": None, "agreement": agreed, "n": n}
    k = (agreed - chance) / (1 - chance)
    on = sum(p.get((a, a), 0.0) * (1 - (row[a] + column[a]) * (1 - k)) ** 2 for a in labels)
    off = sum(share * (column[a] + row[b]) ** 2 for (a, b), share in p.items() if a != b)
    variance = on + (1 - k) ** 2 * off - (k - chance * (1 - k)) ** 2
    width = 1.96 * math.sqrt(max(0.0, variance) / n) / (1 - chance)
    low, high = max(-1.0, k - width), min(1.0, k + width)
    return {"kappa": k, "low": low, "high": high, "agreement": agreed, "n": n}


def statistics(store: Store) -> dict:
    """Counts, by judge and of pairs of judges, as one JSON object."""
    items = store.items()
    by_judge: dict[str, dict[int, list[Judgement]]] = {}
    for judgement in store.judgements():
        by_judge.setdefault(judgement.judge, {}).setdefault(judgement.item, []).append(judgement)
    last = {
        judge: {item: outcomes(of[-1].scores) for item, of in items.items()}
        for judge, items in by_judge.items()
    }
    return {
        "items": len(items),
        "kinds": dict(Counter(item.kind for item in items)),
        "judges": {judge: of_judge(found) for judge, found in by_judge.items()},
        "agreement": [
            {"judges": [a, b], **kappa(shared(last[a], last[b]))} for a, b in combinations(last, 2)
        ],
    }


def shared(one: dict[int, Pairs], other: dict[int, Pairs]) -> list[tuple[int, int]]:
    """What two judges said of every pair that both compared."""
    return [
        (said, other[item][pair])
        for item, pairs in one.items()
        for pair, said in pairs.items()
        if pair in other.get(item, {})
    ]


def of_judge(judged: dict[int, list[Judgement]]) -> dict:
    """How often one judge preferred, tied or skipped, and whether the order shown mattered."""
    last = [of[-1] for of in judged.values()]
    said = [outcomes(judgement.scores) for judgement in last]
    ties = sum(bool(pairs) and not any(pairs.values()) for pairs in said)
    skipped = sum(not pairs for pairs in said)
    first = [j.scores[j.shown[0]] == max(j.scores) for j in last if prefers(j)]
    twice = [pair for of in judged.values() for pair in both_orders(of)]
    return {
        "judgements": sum(map(len, judged.values())),
        "preferred": len(last) - ties - skipped, "tied": ties, "skipped": skipped,
        "first_shown": share(first), "position_consistency": share(twice),
    }  # fmt: skip


def prefers(judgement: Judgement) -> bool:
    """Whether it prefers some answer, where all were scored and their order is known."""
    known = None not in judgement.scores and judgement.shown
    return bool(known) and len(set(judgement.scores)) > 1


def both_orders(judgements: list[Judgement]) -> Iterable[bool]:
    """Of one item that was shown in two orders: whether each pair was judged alike in both."""
    for a, b in combinations(judgements, 2):
        if a.shown and b.shown and a.shown != b.shown:
            one, other = outcomes(a.scores), outcomes(b.scores)
            yield from (said == other[pair] for pair, said in one.items() if pair in other)


def share(found: list[bool]) -> dict | None:
    """The share of what is true, and its 95 % interval."""
    if not found:
        return None
    value = sum(found) / len(found)
    low, high = wilson(value, len(found))
    return {"share": value, "low": low, "high": high, "n": len(found)}


# ---- told --------------------------------------------------------------------------------------


def tables(found: dict) -> list[Table]:
    """The statistics as tables to print."""
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in found["kinds"].items())
    title = f"{found['items']:,} prompts with answers ({kinds or 'none'})"
    counts = ("judgements", "preferred", "tied", "skipped")
    judges = table(title, "judge", *counts, "first shown preferred", "same in both orders")
    for judge, row in found["judges"].items():
        numbers = [f"{row[name]:,}" for name in counts]
        shares = [told(row[name]) for name in ("first_shown", "position_consistency")]
        judges.add_row(Text(judge), *numbers, *shares)
    headings = ("judges", "pairs", "agree", "Cohen's κ", "95 %")
    agreed = table("Agreement, pair by pair of answers", *headings)
    forms = {"n": "{n:,}", "agreement": "{agreement:.0%}", "kappa": "{kappa:.2f}",
             "low": "{low:.2f} – {high:.2f}"}  # fmt: skip
    for row in found["agreement"]:
        cells = ["-" if row[name] is None else form.format(**row) for name, form in forms.items()]
        agreed.add_row(Text(" and ".join(row["judges"])), *cells)
    return [judges, *([agreed] if found["agreement"] else [])]


def told(found: dict | None) -> str:
    return "{share:.0%} ({low:.0%} – {high:.0%})".format(**found) if found else "-"
