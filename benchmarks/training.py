"""Whole training steps of the five models, AdamW included: equal losses, then time and memory."""

from __future__ import annotations

from contextlib import ExitStack
from tempfile import TemporaryDirectory

import contestants
from contestants import Contestant, Session, enter, in_turns, peers, times_faster, typical
from rich.table import Table
from tables import percent, spread
from tasks import MODELS

from tinylm.config import flops_per_token
from tinylm.model import ModelConfig
from tinylm.progress import table

WARM_UP = 3  # steps; torch.compile does its work in the first
BLOCK = 1.0  # seconds of steps in a turn
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of each of the first ten losses, relative


def compare(name: str, session: Session) -> dict:
    """One model: {"steps": a row for each contestant, "ratios": a row for each pair}.

    Raises AssertionError where contestants do not learn the same.
    """
    with TemporaryDirectory() as directory, ExitStack() as stack:
        with contestants.ours(session.threads)["float32"] as maker:
            maker("save", directory=directory, shape=MODELS[name].shape)

        def prepare(contestant: Contestant) -> None:
            contestant("load", directory=directory)
            contestant("learn", model=name)
            for _ in range(WARM_UP):
                contestant("train", seconds=0)

        ours = enter(stack, contestants.ours(session.threads), prepare, session.say)
        steps, ratios = [], []
        for peer in peers(ours):
            with ExitStack() as theirs_stack:
                variants = {
                    way: contestants.theirs(peer, session.threads, compiled=way == "compiled")
                    for way in ("eager", "compiled")
                }
                theirs = enter(theirs_stack, variants, prepare, session.say)
                found = in_turns(ours | theirs, session.turns, "train", seconds=BLOCK)
            check_losses(found, peer)
            steps += [row(name, f"{peer} {way}", found[way], session.peak) for way in theirs]
            ratios += [ratio(name, dtype, peer, found, theirs) for dtype in ours if theirs]
        mine = [row(name, f"tinylm {dtype}", found[dtype], session.peak) for dtype in ours]
        return {"steps": mine + steps, "ratios": ratios}


def check_losses(found: dict[str, list[dict]], peer: str) -> None:
    """Steps from the same weights on the same batches must lose the same."""
    expected = found["float32"][-1]["losses"]
    for who, answers in found.items():
        rounded = "bfloat16" in (who, peer.removeprefix("torch-"))
        tolerance = TOLERANCE["bfloat16" if rounded else "float32"]
        for step, (loss, wanted) in enumerate(zip(answers[-1]["losses"], expected)):
            gap = abs(loss - wanted) / wanted
            assert gap <= tolerance, f"{peer}, {who}: loss {loss} at step {step}, tinylm {wanted}"


def row(name: str, who: str, answers: list[dict], peak: float) -> dict:
    model, seconds = MODELS[name], typical(answers)
    flops = flops_per_token(ModelConfig(**model.shape), model.T) * model.B * model.T
    return {
        "model": name,
        "contestant": who,
        "ms": round(1000 * seconds, 2),
        "tokens_per_second": round(model.B * model.T / seconds),
        "share_of_peak": round(flops / seconds / 1e9 / peak, 3),
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


def training_table(name: str, found: dict) -> Table:
    """A row for each contestant, and how many times as fast tinylm is."""
    model = MODELS[name]
    title = f"{name}: {model.about}, batch {model.B} x {model.T}"
    ours = dict.fromkeys(r["ours"] for r in found["ratios"])
    headings = ("", "ms/step", "tokens/s", "of peak", "MB")
    made = table(title, *headings, *(f"{dtype} of tinylm is\nfaster by" for dtype in ours))
    for step in found["steps"]:
        peer = step["contestant"].split()[0]
        speed = (f"{step['ms']:,.1f}", f"{step['tokens_per_second']:,}")
        rest = (percent(step["share_of_peak"]), f"{step['memory_mb']:,}")
        ratios = [spread(r) for r in found["ratios"] if r["theirs"] == peer]
        style = "bold" if peer == "tinylm" else ""
        made.add_row(step["contestant"], *speed, *rest, *ratios, style=style)
    return made
