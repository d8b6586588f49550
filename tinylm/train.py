"""THE training loop: draw, accumulate, clip, step, log, evaluate, save, resume.

The stages share it, and each brings its model, its batches and its loss (stage.py). Everything
that keeps a long run safe is here: the guard against bad steps, whole checkpoints, metrics that are
cut back on resume, Ctrl-C.

Read `Trainer.update` and `Trainer.backward` first: they are one step. `ask` is the same on a device
that nobody waits for; `tell` logs what came of either.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tinylm import backend, checkpoint, environment, memory
from tinylm.checkpoint import Checkpoint, Tensors
from tinylm.cores import shared_cores
from tinylm.data import Batch
from tinylm.device_step import device_step
from tinylm.errors import InputError, asked_to_stop
from tinylm.files import in_json, write_text
from tinylm.model import Transformer
from tinylm.optim import AdamW, Muon, clip_scale, schedule
from tinylm.progress import Progress
from tinylm.settings import Plan, TrainConfig, claim, products
from tinylm.stage import Stage
from tinylm.tensor import Array

NOTHING = "nothing to learn"  # why an update was skipped without being refused
NOT_FINITE = "loss or gradient not finite"
REMEMBER = 10  # steps between the weights that a cautious stage may go back to
RETURNS = 3  # to the same weights end the run
PATIENCE = 50  # refused updates in a row end it, too


@dataclass
class Guard:
    """Refuses an update that would do harm: a loss or gradient that is not finite, or a spike.

    A spike is a gradient norm of more than 10 times its running mean, once 50 steps have been
    seen. After 50 refusals in a row the run ends: the settings are wrong, not the data.

    Of a cautious stage only:
    rate         what the learning rate is multiplied by: halved whenever there was NaN
    remembered   the step whose weights it would go back to
    returns      how often it has gone back to them
    """

    mean: float = 0.0
    seen: int = 0
    refused: int = 0
    in_a_row: int = 0
    rate: float = 1.0
    remembered: int = 0
    returns: int = 0

    def reason(self, loss: float, norm: float, harm: str = "") -> str | None:
        """Why this update must not be made, or None; remembers what it has seen.

        harm: what the stage itself has against it.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        spike = finite and self.seen >= 50 and norm > 10 * self.mean
        if finite:
            self.seen += 1
            weight = max(1 / self.seen, 0.02)
            self.mean += weight * ((10 * self.mean if spike else norm) - self.mean)
        if finite and not spike and not harm:
            self.in_a_row = 0
            return None
        self.refused += 1
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE:
            raise InputError(
                f"{PATIENCE} updates in a row had to be refused (loss or gradient not finite, or a "
                "spike): lower --learning-rate or raise --warmup; the last checkpoint is intact"
            )
        return harm or (f"gradient norm {norm:.3g} spiked" if spike else NOT_FINITE)


class Metrics:
    """training/metrics.jsonl: one JSON object a line, a `step` in each."""

    def __init__(self, folder: Path, keep_until: int):
        """keep_until: the step to which an earlier run's lines are kept (−1: keep nothing)."""
        path = folder / "training" / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= keep_until]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(path, "a", buffering=1)

    def write(self, **row) -> None:
        self.file.write(json.dumps(in_json(row)) + "\n")


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, up to the first line that is none: a kill cut it short."""
    path = folder / "training" / "metrics.jsonl"
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError):
            break
        rows.append(row)
    return rows


class Trainer:
    """One run of one stage in one directory."""

    def __init__(self, stage: Stage, config: TrainConfig, folder: Path, progress: Progress):
        self.stage, self.config, self.folder, self.progress = stage, config, folder, progress
        stage.model.recompute = config.recompute
        self.optimizer = make_optimizer(stage.model, config)
        self.checkpoint = Checkpoint(folder)
        self.guard = Guard()
        self.step, self.seconds, self.results = 0, 0.0, {}
        self.device = None  # what makes the steps where nobody waits for them
        self.asked: list[Callable[[], dict]] = []  # steps of which nothing is logged yet
        self.good: Tensors = {}  # weights and moments of a cautious stage that were in order
        self.environment = environment.describe()

    def run(self, resume: bool) -> dict:
        """Train to the end, or until Ctrl-C; returns the final evaluation and what it took.

        Raises KeyboardInterrupt after a save if it was interrupted.
        """
        resumed = resume and self.checkpoint.exists()
        if resumed:
            self.restore()
        claim(self.folder)
        if resumed and self.finished() and self.results.get("steps") == self.step:
            self.derive()  # a kill may have come between the checkpoint and these
            self.progress.say(f"{self.folder}: finished at step {self.step}, nothing left to do")
            return self.results
        self.results = {}  # those of an earlier end are no longer true
        metrics = Metrics(self.folder, self.step if resumed else -1)
        if resume:
            metrics.write(step=self.step, event="resume")
            self.progress.say(f"resuming at step {self.step}")
        if not resumed:
            memory.check(self.stage)
            checkpoint.save_description(self.stage.model, self.stage.tokenizer, self.folder)
            self.save()
        self.device = device_step(self)
        with (
            asked_to_stop(self.stop),
            products(self.config.dtype),
            self.progress.training(self),
            shared_cores(self.progress.say) as self.share_cores,
        ):
            ended = self.loop(metrics)
        if not ended:
            raise KeyboardInterrupt
        return self.results

    def stop(self, number, frame) -> None:
        """Asked to stop: after the step in progress, and the second time at once."""
        if self.stage.stopping:
            raise KeyboardInterrupt
        self.stage.stopping = True
        self.progress.say("stopping after this step (again: at once, losing it) ...")

    def loop(self, metrics: Metrics) -> bool:
        """Whether the run has ended; else it was asked to stop, and is saved."""
        began, c, put_off = time.perf_counter() - self.seconds, self.config, False
        while True:
            if not self.asked:
                self.tick = time.perf_counter()
            try:
                if not self.finished():  # else only the evaluation at the end is still to be made
                    self.asked.append(self.ask() if self.device else partial(dict, self.update()))
                self.share_cores()
                self.seconds = time.perf_counter() - began
                final, stopping = self.finished(), self.stage.stopping
                evaluating = final or self.step % c.eval_every == 0
                saving = final or stopping or put_off or self.step % c.save_every == 0
                self.tell(metrics, 1 if self.device and not evaluating and not saving else 0)
                if evaluating:
                    self.evaluate(metrics, final)
            except InputError:  # of a judge, say: what was learned before is kept
                with suppress(InputError):
                    self.tell(metrics, 0)
                if self.guard.in_a_row < PATIENCE:
                    self.save()
                raise
            self.seconds = time.perf_counter() - began
            # a cautious stage has gone back already; elsewhere these weights may be the harm
            put_off = saving and self.guard.in_a_row > 0 and not self.stage.cautious
            if final or (saving and not put_off):
                self.save()
            if final or (stopping and not put_off):
                return final

    def tell(self, metrics: Metrics, keep: int) -> None:
        """Log what came of the steps that were asked for, but for the last `keep` of them."""
        while len(self.asked) > keep:
            row = self.asked.pop(0)()
            now = time.perf_counter()
            row["tokens_per_second"] = round(row.pop("tokens") / (now - self.tick))
            metrics.write(**row, seconds=round(self.seconds, 3))
            self.progress.step(self, row)
            self.tick = now

    def ask(self) -> Callable[[], dict]:
        """One optimizer step by a device; what is returned waits for it, and gives its row."""
        batches = self.draw()
        n, lr = denominator(batches), self.learning_rate()
        told = self.device.ask(batches, n, lr)
        self.step += 1
        step = self.step

        def row() -> dict:
            total, norm, updates = told()
            learned, self.optimizer.steps = any(b.learns() for b in batches), int(updates)
            refusal = self.guard.reason(total, norm) if learned else NOTHING
            return self.row(batches, refusal, step=step, loss=total / n, lr=lr, grad_norm=norm)

        return row

    def update(self) -> dict:
        """One optimizer step on accumulated batches; the mean is over all of them together."""
        batches = self.draw()
        n = denominator(batches)
        total = self.backward(batches, n)
        norm = backend.kernels.global_norm(self.optimizer.gradients())
        harm = next((batch.harm for batch in batches if batch.harm), "")
        empty = not harm and not any(batch.learns() for batch in batches)
        total = float(total)  # not before: on a GPU it waits for all that was asked for
        refusal = NOTHING if empty else self.guard.reason(total, norm, harm)
        lr = self.learning_rate()
        if refusal in (None, NOTHING):
            self.remember()
        if not refusal:
            self.optimizer.step(lr, clip_scale(norm, self.config.clip))
        elif harm or refusal == NOT_FINITE:
            self.go_back(refusal)
        self.optimizer.zero_grad()
        self.step += 1
        return self.row(batches, refusal, step=self.step, loss=total / n, lr=lr, grad_norm=norm)

    def backward(self, batches: list[Batch], n: int) -> Array:
        """Gradients of the loss over n; returns its sum."""
        total = 0.0
        for batch in batches:
            loss = self.stage.loss(batch)
            total = total + loss.data.sum(dtype="float64")
            if batch.learns():
                loss.backward(backend.xp.full(loss.shape, 1 / n, loss.dtype))
        return total

    def learning_rate(self) -> float:
        """Of the step that is being made."""
        c = self.config
        return c.learning_rate * self.guard.rate * schedule(self.share_done(1), c.warmup, c.floor)

    def row(self, batches: list[Batch], refusal: str | None, **numbers) -> dict:
        """A step's line in the log."""
        tokens = sum(batch.trained_tokens() for batch in batches)
        row = {**numbers, "tokens": tokens, **notes_of(batches)}
        if not refusal:
            return row
        if refusal != NOTHING:
            self.progress.say(f"step {row['step']}: update skipped, {refusal}")
        return in_json({**row, "event": "skip", "reason": refusal})

    def draw(self) -> list[Batch]:
        """The batches of one step; if one of them fails, none of them was drawn."""
        n = self.config.accumulate
        place = self.stage.state() if n > 1 else None
        try:
            return [self.stage.draw() for _ in range(n)]
        except Exception:
            if place:
                self.stage.restore(place)
            raise

    def remember(self) -> None:
        """Of a cautious stage: these weights are in order, with a finite loss and no harm done."""
        due = not self.good or self.step >= self.guard.remembered + REMEMBER
        if due and self.stage.cautious:
            for name, x in checkpoint.tensors_of(self.stage.model, self.optimizer).items():
                self.good[name] = x.copy()  # one after another, so that there are never two of all
            self.guard.remembered, self.guard.returns = self.step, 0

    def go_back(self, refusal: str) -> None:
        """Of a cautious stage: to the last weights that were in order, more carefully.

        Raises InputError the third time that these turn out badly.
        """
        if not self.good:
            return
        copies = {name: x.copy() for name, x in self.good.items()}
        checkpoint.put_tensors(self.stage.model, self.optimizer, copies)
        self.guard.rate *= 0.5 if refusal == NOT_FINITE else 1.0
        self.guard.returns += 1
        self.stage.recover(refusal)
        if self.guard.returns >= RETURNS:
            raise InputError(
                f"{refusal}, for the {RETURNS}rd time since the same weights, which were restored "
                f"and saved in {self.folder}: begin anew with a lower --learning-rate or a higher "
                "price of drift, --kl"
            )

    def share_done(self, ahead: int = 0) -> float:
        """How much of the run lies behind after `ahead` more steps, 0 to 1, by steps or by time."""
        c = self.config
        seconds = self.seconds + ahead * self.seconds / max(1, self.step)
        by_steps = (self.step + ahead) / c.max_steps if c.max_steps else 0.0
        by_time = seconds / (60 * c.minutes) if c.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def finished(self) -> bool:
        return self.share_done() >= 1

    def evaluate(self, metrics: Metrics, final: bool) -> None:
        self.progress.evaluating(self)
        found = self.stage.evaluate(final)
        metrics.write(step=self.step, event="final" if final else "eval", **found)
        self.progress.evaluation(self, found)
        if final:
            self.results = {**found, "steps": self.step, "seconds": round(self.seconds, 1)}
            self.results["skipped"] = self.guard.refused

    def save(self) -> None:
        """Checkpoint first, all in one file; then what follows from it.

        Raises InputError where a weight is NaN or infinite: the old checkpoint is worth more.
        """
        weights = [p.data for p in self.stage.model.parameters().values()]
        if not math.isfinite(backend.kernels.global_norm(weights)):
            raise InputError(
                f"step {self.step} left weights that are not finite, which are not saved: lower "
                "--learning-rate or --weight-decay; the last checkpoint is intact"
            )
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "optimizer_steps": self.optimizer.steps,
            "guard": asdict(self.guard),
            "stage": {"name": self.stage.name, **self.stage.state()},
            "config": asdict(self.config),
            "results": self.results,
            "environment": self.environment,
        }
        self.checkpoint.save(self.stage.model, self.optimizer, state, self.good)
        self.derive()

    def derive(self) -> None:
        """What follows from a checkpoint: the model's file and its card."""
        checkpoint.save_weights(self.stage.model, self.folder)
        write_text(self.folder / "README.md", self.stage.card(self.results))

    def restore(self) -> None:
        state = self.checkpoint.state()
        self.stage.restore(state["stage"])  # first: it knows its data and its model again
        self.good = self.checkpoint.restore(self.stage.model, self.optimizer)
        self.step, self.seconds, self.results = state["step"], state["seconds"], state["results"]
        self.optimizer.steps, self.guard = state["optimizer_steps"], Guard(**state["guard"])


def train(stage: Stage, plan: Plan, **found) -> dict:
    """Run a stage as planned; returns its directory, what was found before, and its results."""
    results = Trainer(stage, plan.config, plan.out, plan.progress).run(plan.resume)
    return {"directory": str(plan.out), **found, **results}


def denominator(batches: list[Batch]) -> int:
    """What the summed loss of a step is divided by."""
    return max(1, sum(batch.denominator() for batch in batches))


def make_optimizer(model: Transformer, config: TrainConfig) -> AdamW:
    settings = {name: getattr(config, name) for name in ("beta1", "beta2", "weight_decay")}
    if config.optimizer == "muon":
        return Muon(model.parameters(), model.block_matrices(), **settings)
    return AdamW(model.parameters(), **settings)


def notes_of(batches: list[Batch]) -> dict:
    """The mean of each number that the batches of one step bring for the log."""
    names = [k for k in batches[0].notes if all(k in b.notes for b in batches)]
    return {k: sum(b.notes[k] for b in batches) / len(batches) for k in names}
