"""Whole training steps of the five models, AdamW included: equal losses, then time and memory."""

from __future__ import annotations

from contextlib import ExitStack
from tempfile import TemporaryDirectory

import contestants
from contestants import THEIRS, Contestant, enter, in_turns, times_faster, typical
from rich.box import SIMPLE_HEAD
from rich.table import Table
from shapes import MODELS, Model

from tinylm.model import ModelConfig

WARM_UP = 3  # steps; torch.compile does its work in the first
BLOCK = 1.0  # seconds of steps in a turn
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of each of the first ten losses, relative


def compare(name: str, turns: int, threads: int, say) -> dict:
    """One model: {"steps": a row for each contestant, "ratios": a row for each pair}.

    Raises AssertionError where contestants do not learn the same.
    """
    with TemporaryDirectory() as directory, ExitStack() as stack:
        with contestants.ours(threads)["float32"] as maker:
            maker("save", directory=directory, model=name)

        def prepare(contestant: Contestant) -> None:
            contestant("open", directory=directory, model=name)
            for _ in range(WARM_UP):
                contestant("train", seconds=0)

        ours = enter(stack, contestants.ours(threads), prepare, say)
        steps, ratios = [], []
        for peer in THEIRS:
            with ExitStack() as theirs_stack:
                variants = {
                    way: contestants.theirs(peer, threads, compiled=way == "compiled")
                    for way in ("eager", "compiled")
                }
                theirs = enter(theirs_stack, variants, prepare, say)
                found = in_turns(ours | theirs, turns, "train", seconds=BLOCK)
            check_losses(found, peer)
            steps += [row(name, f"{peer} {way}", found[way]) for way in theirs]
            ratios += [ratio(name, dtype, peer, found, theirs) for dtype in ours if theirs]
        mine = [row(name, f"tinylm {dtype}", found[dtype]) for dtype in ours]
        return {"steps": mine + steps, "ratios": ratios}


def check_losses(found: dict[str, list[dict]], peer: str) -> None:
    """Ten steps from the same weights on the same batches must lose the same."""
    expected = found["float32"][-1]["losses"]
    for who, answers in found.items():
        rounded = "bfloat16" in (who, peer.removeprefix("torch-"))
        tolerance = TOLERANCE["bfloat16" if rounded else "float32"]
        losses = answers[-1]["losses"]
        assert len(losses) == len(expected) == 10, f"{who}: too few steps to compare"
        for step, (loss, wanted) in enumerate(zip(losses, expected)):
            gap = abs(loss - wanted) / wanted
            assert gap <= tolerance, f"{peer}, {who}: loss {loss} at step {step}, tinylm {wanted}"


def flops(model: Model) -> float:
    """Floating-point operations of one step: (6 N + 12 L C T) per token, full attention counted.

    N: weights that multiply something (learned positions do not); L layers, C wide, T tokens.
    """
    c = ModelConfig(**model.shape)
    mlp = (3 if c.is_llama else 2) * c.n_embd * c.n_inner
    N = c.n_layer * (4 * c.n_embd**2 + mlp) + c.vocab_size * c.n_embd
    return (6 * N + 12 * c.n_layer * c.n_embd * model.T) * model.B * model.T


def row(model: str, who: str, answers: list[dict]) -> dict:
    shape, seconds = MODELS[model], typical(answers)
    return {
        "model": model,
        "contestant": who,
        "ms": round(1000 * seconds, 2),
        "tokens_per_second": round(shape.B * shape.T / seconds),
        "gflops": round(flops(shape) / seconds / 1e9, 1),
        "memory_mb": round(max(answer["memory"] for answer in answers)),
    }


def ratio(model: str, dtype: str, peer: str, found: dict, theirs: dict) -> dict:
    """Ours beside the faster of eager and compiled; memory beside the smaller of them."""
    fastest = min(theirs, key=lambda way: typical(found[way]))
    memory = {who: max(answer["memory"] for answer in found[who]) for who in found}
    return {
        "model": model,
        "ours": dtype,
        "theirs": peer,
        **times_faster(found[dtype], found[fastest]),
        "memory": round(memory[dtype] / min(memory[way] for way in theirs), 3),
    }


def table(model: str, found: dict, peak: float) -> Table:
    """What a person reads: a row for each contestant, and how many times as fast tinylm is."""
    shape = MODELS[model]
    title = f"{model}: {shape.about}, batch {shape.B} x {shape.T}; FMA peak {peak:.0f} GFLOP/s"
    made = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    ours = list(dict.fromkeys(r["ours"] for r in found["ratios"]))
    beside = [f"{dtype} of tinylm\nis faster by" for dtype in ours]
    for heading in ("ms/step", "tokens/s", "of peak", "MB", *beside):
        made.add_column(heading, justify="right")
    for step in found["steps"]:
        peer = step["contestant"].split()[0]
        ratios = [r for r in found["ratios"] if r["theirs"] == peer]
        made.add_row(
            step["contestant"],
            f"{step['ms']:,.1f}",
            f"{step['tokens_per_second']:,}",
            f"{step['gflops'] / peak:.0%}",
            f"{step['memory_mb']:,}",
            *(f"{r['speed']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in ratios),
            style="bold" if peer == "tinylm" else "",
        )
    return made
