"""Single kernels: products by shape and layout, attention by length."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product

import contestants
from contestants import Session, enter, in_turns, peers, times_faster, typical
from rich.table import Table
from tables import percent, spread
from tasks import ATTENTION, LAYOUTS, PRODUCTS

from tinylm.progress import table


def everyone(stack: ExitStack, session: Session, task: str, **arguments) -> tuple[dict, dict]:
    """Ours by dtype and theirs by name, warmed up by a task."""
    prepare = lambda contestant: contestant(task, **arguments)
    ours = enter(stack, contestants.ours(session.threads), prepare, session.say)
    theirs = {name: contestants.theirs(name, session.threads) for name in peers(ours)}
    return ours, enter(stack, theirs, prepare, session.say)


def products(session: Session) -> list[dict]:
    """A row for each shape, layout and dtype: shares of the float32 multiply-add peak.

    `theirs` is the better of stock and mkl512, or PyTorch's bfloat16; `stock` is stock.
    """
    rows = []
    with ExitStack() as stack:
        ours, theirs = everyone(stack, session, "product", layout="NN", M=64, K=64, N=64)
        for (M, K, N), layout in product(PRODUCTS, LAYOUTS):
            shape = dict(layout=layout, M=M, K=K, N=N)
            found = in_turns(ours | theirs, session.turns, "product", **shape)
            share = {
                who: round(2 * M * K * N / typical(answers) / 1e9 / session.peak, 3)
                for who, answers in found.items()
            }
            for dtype in ours:
                row = {"m": M, "k": K, "n": N, "layout": layout, "dtype": dtype}
                rows.append(row | {"share_of_peak": share[dtype], **shares_of_peers(dtype, share)})
    return rows


def shares_of_peers(dtype: str, share: dict[str, float]) -> dict:
    """The best of those that compute in the same dtype, and stock."""
    names = ("torch-bfloat16",) if dtype == "bfloat16" else ("torch-stock", "torch-mkl512")
    best = max((share[name] for name in names if name in share), default=None)
    return {"theirs": best, "stock": share.get("torch-stock")}


def attention(session: Session) -> list[dict]:
    """A row for each length and pair: causal attention, forward and backward."""
    rows = []
    with ExitStack() as stack:
        ours, theirs = everyone(stack, session, "attention", B=1, H=1, T=64, D=64)
        for B, H, T, D in ATTENTION:
            found = in_turns(ours | theirs, session.turns, "attention", B=B, H=H, T=T, D=D)
            ms = {who: round(1000 * typical(answers), 3) for who, answers in found.items()}
            for dtype, peer in product(ours, theirs):
                row = {"length": T, "batch": B, "heads": H, "ours": dtype, "theirs": peer}
                row |= {"ms": ms[dtype], "theirs_ms": ms[peer]}
                rows.append(row | times_faster(found[dtype], found[peer]))
    return rows


def product_table(rows: list[dict]) -> Table:
    """Layouts side by side: ours / theirs."""
    title = "Products, share of the float32 multiply-add peak: tinylm / PyTorch at its best"
    made = table(title, "M, K, N", "dtype", *LAYOUTS, words=2)
    lines: dict[tuple, list] = {}
    for row in rows:
        cells = lines.setdefault((f"{row['m']}, {row['k']}, {row['n']}", row["dtype"]), [])
        cells.append(f"{percent(row['share_of_peak'])} / {percent(row['theirs'])}")
    for names, cells in lines.items():
        made.add_row(*names, *cells)
    return made


def attention_table(rows: list[dict]) -> Table:
    """A line for each length and dtype of ours."""
    peers = list(dict.fromkeys(row["theirs"] for row in rows))
    title = "Causal attention, 64 wide heads, forward and backward: how many times as fast as"
    made = table(title, "batch x heads x tokens", "ms", *peers)
    for i in range(0, len(rows), len(peers)):
        first = rows[i]
        shape = f"{first['batch']} x {first['heads']} x {first['length']} {first['ours']}"
        made.add_row(shape, f"{first['ms']:.2f}", *map(spread, rows[i : i + len(peers)]))
    return made
