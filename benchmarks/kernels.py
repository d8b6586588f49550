"""Single kernels: products by shape and layout, attention by length."""

from __future__ import annotations

from contextlib import ExitStack

import contestants
from contestants import THEIRS, enter, in_turns, times_faster, typical
from rich.table import Table
from tables import percent, spread, table
from tasks import ATTENTION, LAYOUTS, PRODUCTS


def everyone(stack: ExitStack, threads: int, task: str, arguments: dict, say) -> tuple[dict, dict]:
    """Ours by dtype and theirs by name, warmed up by one task."""
    ready = lambda contestant: contestant(task, **arguments)
    theirs = {name: contestants.theirs(name, threads) for name in THEIRS}
    return enter(stack, contestants.ours(threads), ready, say), enter(stack, theirs, ready, say)


def peers_of(dtype: str, theirs: dict) -> list[str]:
    """Those that compute in the same dtype."""
    return [name for name in theirs if (name == "torch-bfloat16") == (dtype == "bfloat16")]


def products(turns: int, threads: int, peak: float, say) -> list[dict]:
    """A row for each shape, layout and dtype: shares of the float32 multiply-add peak.

    `theirs` is the better of stock and mkl512, or PyTorch's bfloat16; `stock` is stock.
    """
    rows = []
    with ExitStack() as stack:
        first = dict(layout="NN", M=64, K=64, N=64)
        ours, theirs = everyone(stack, threads, "product", first, say)
        for M, K, N in PRODUCTS:
            for layout in LAYOUTS:
                shape = dict(layout=layout, M=M, K=K, N=N)
                found = in_turns(ours | theirs, turns, "product", **shape)
                share = {
                    who: round(2 * M * K * N / typical(answers) / 1e9 / peak, 3)
                    for who, answers in found.items()
                }
                for dtype in ours:
                    peers = [share[name] for name in peers_of(dtype, theirs)]
                    row = {"m": M, "k": K, "n": N, "layout": layout, "dtype": dtype}
                    row |= {"share_of_peak": share[dtype], "theirs": max(peers, default=None)}
                    rows.append(row | {"stock": share.get("torch-stock")})
    return rows


def attention(turns: int, threads: int, say) -> list[dict]:
    """A row for each length and pair: causal attention, forward and backward."""
    rows = []
    with ExitStack() as stack:
        first = dict(B=1, H=1, T=64, D=64)
        ours, theirs = everyone(stack, threads, "attention", first, say)
        ours = {"float32": ours["float32"]}  # which products are rounded is of no matter here
        for B, H, T, D in ATTENTION:
            found = in_turns(ours | theirs, turns, "attention", B=B, H=H, T=T, D=D)
            for peer in theirs:
                row = {"length": T, "batch": B, "heads": H, "ours": "float32", "theirs": peer}
                row |= {"ms": round(1000 * typical(found["float32"]), 3)}
                row |= {"theirs_ms": round(1000 * typical(found[peer]), 3)}
                rows.append(row | times_faster(found["float32"], found[peer]))
    return rows


def product_table(rows: list[dict], peak: float) -> Table:
    """Layouts side by side: ours / theirs."""
    title = f"Products, share of {peak:.0f} GFLOP/s (float32 multiply-adds): tinylm / PyTorch"
    made = table(title, "M, K, N", "dtype", *LAYOUTS, words=2)
    lines: dict[tuple, list] = {}
    for row in rows:
        cells = lines.setdefault((f"{row['m']}, {row['k']}, {row['n']}", row["dtype"]), [])
        cells.append(f"{percent(row['share_of_peak'])} / {percent(row['theirs'])}")
    for names, cells in lines.items():
        made.add_row(*names, *cells)
    return made


def attention_table(rows: list[dict]) -> Table:
    """A line for each length."""
    peers = list(dict.fromkeys(row["theirs"] for row in rows))
    title = "Causal attention, 64 wide heads, forward and backward: how many times as fast as"
    made = table(title, "batch x heads x tokens", "ms", *peers)
    for first in rows[:: len(peers)]:
        same = [row for row in rows if row["length"] == first["length"]]
        shape = f"{first['batch']} x {first['heads']} x {first['length']}"
        made.add_row(shape, f"{first['ms']:.2f}", *map(spread, same))
    return made
