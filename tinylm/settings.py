"""What a run is told: the settings of every stage, their checks, and what may change on resume."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Set
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO

from tinylm import backend
from tinylm.checkpoint import Checkpoint
from tinylm.errors import InputError
from tinylm.model import Transformer
from tinylm.progress import Progress

OPTIMIZERS = ("adamw", "muon")
DTYPES = ("auto", "float32", "bfloat16")
ENDS = {"max_steps", "minutes"}  # of a run
RANGES = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "more than 0": lambda x: x > 0,
    "0 to 1": lambda x: 0 <= x <= 1,
    "0 to 65535": lambda x: 0 <= x <= 65535,
    "0 or more, below 1": lambda x: 0 <= x < 1,
    "between 0 and 1": lambda x: 0 < x < 1,
}


def setting(default, help: str, free: bool = False, choices: tuple[str, ...] = ()):
    """A field of a stage's config, which is also a flag. free: may change between resumes."""
    return field(default=default, metadata={"help": help, "free": free, "choices": choices})


@dataclass
class TrainConfig:
    """What every stage can be told; the flags are made from these fields."""

    max_steps: int = setting(0, "Optimizer steps in all (0: as many as --minutes allows).", True)
    minutes: float = setting(0.0, "Minutes to train, by the clock: not bit-repeatable.", True)
    batch_size: int = setting(8, "Rows in one forward and backward.")
    accumulate: int = setting(1, "Forwards and backwards in one optimizer step.")
    block_size: int = setting(256, "Tokens in a row: the context.")
    optimizer: str = setting("adamw", "What moves the blocks' matrices.", False, OPTIMIZERS)
    learning_rate: float = setting(2e-3, "Peak learning rate.")
    warmup: float = setting(0.05, "Share of the run in which the learning rate rises.")
    floor: float = setting(0.1, "Learning rate at the end, as a share of its peak.")
    beta1: float = setting(0.9, "Memory of the gradient.")
    beta2: float = setting(0.99, "AdamW: memory of its square.")
    weight_decay: float = setting(0.1, "Decoupled decay of matrices.")
    clip: float = setting(1.0, "Largest global norm of the gradient (0: no limit).")
    dtype: str = setting("auto", "Operands of products (auto: bfloat16 on cuda).", False, DTYPES)
    recompute: bool = setting(False, "Save memory: blocks run again in the backward pass.", True)
    seed: int = setting(0, "Seeds everything random.")
    cutoff: str = setting("", "Knowledge cut-off for the model card; later stages inherit it.")
    eval_every: int = setting(250, "Steps between evaluations.", True)
    save_every: int = setting(250, "Steps between checkpoints.", True)

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{flag(name)}: expected a finite number, got {value}")
        self.expect(
            "at least 1", "batch_size", "accumulate", "block_size", "eval_every", "save_every"
        )
        self.expect("at least 0", "max_steps", "minutes", "learning_rate", "weight_decay", "clip")
        self.expect("at least 0", "seed")
        self.expect("0 to 1", "warmup", "floor")
        self.expect("0 or more, below 1", "beta1", "beta2")
        with products(self.dtype):  # which refuses what this processor cannot
            pass
        if not (self.max_steps or self.minutes or hasattr(self, "epochs")):
            raise InputError("say how long to train: --max-steps N or --minutes N")

    def expect(self, range: str, *names: str) -> None:
        """Raise InputError where one of these fields is not in the range, which is of RANGES."""
        for name in names:
            value = getattr(self, name)
            if not RANGES[range](value):
                raise InputError(f"{flag(name)}: expected {range}, got {value}")


@dataclass
class EpochConfig(TrainConfig):
    """For stages that go a few times through their data, a share of which is held out."""

    epochs: float = setting(1.0, "Times through the data, where no --max-steps or --minutes is.")
    block_size: int = setting(0, "Tokens in a row (0: the model's context).")
    held_out: float = setting(0.1, "Share of the data held out for evaluation.")

    def check(self) -> None:
        self.expect("more than 0", "epochs")
        self.expect("0 or more, below 1", "held_out")
        super().check()

    def end_after_epochs(self, rows: int) -> None:
        """As many steps as the epochs take, where no other end is given."""
        if not self.max_steps and not self.minutes:
            steps = self.epochs * rows / (self.batch_size * self.accumulate)
            self.max_steps = max(1, round(steps))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass
class Plan:
    """What every stage is told after its inputs."""

    out: Path  # directory of the run
    config: TrainConfig
    progress: Progress
    resume: bool = False  # go on with the run in it, if there is one
    given: Set[str] = frozenset()  # the settings that the user named

    def open(self, stage: str) -> None:
        """Begin the run, or find its config again. Raises InputError where that cannot be.

        With resume, a run that was killed before its first checkpoint begins anew.
        """
        place = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise InputError(f"--out {self.out}: {place} is no directory that can be written to")
        begun = Checkpoint(self.out).exists()
        held = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
        early = self.resume and "training" in held and "model.safetensors" not in held
        if begun and not self.resume:
            raise InputError(f"{self.out} holds another run: choose another --out, or add --resume")
        if begun:
            name = Checkpoint(self.out).state()["stage"].get("name", stage)
            if name != stage:
                raise InputError(f"{self.out} holds a run of {name}: choose another --out")
            self.config = resumed_config(self.config, self.given, self.out)
        elif held - {"training"} and not early:
            raise InputError(f"{self.out} holds other files: choose another --out")
        self.config.check()

    def open_with(self, stage: str, model: Transformer, base: Path) -> None:
        """`open` a run that goes on from the model in base: with its context and its cut-off,
        unless a shorter or another one is asked for."""
        config, most, before = self.config, model.config.block_size, Checkpoint(base)
        config.block_size = config.block_size or most
        if config.block_size > most:
            raise InputError(f"--block-size {config.block_size}: the context of {base} is {most}")
        if not config.cutoff and before.exists():
            config.cutoff = before.state()["config"].get("cutoff", "")
        self.open(stage)


claimed: dict[Path, IO] = {}  # open as long as this process lives, which keeps them locked


def claim(folder: Path) -> None:
    """Keep every other process from running in folder. Raises InputError where one does."""
    path = folder.resolve() / "training" / "lock"
    if path in claimed:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"another process is training in {folder}: wait for it, or choose another --out"
        ) from None
    claimed[path] = file


def resumed_config(config: TrainConfig, given: Set[str], folder: Path) -> TrainConfig:
    """The interrupted run's config with what may change taken from this one.

    given: the fields that the user named; naming one that must not change is an InputError.
    """
    # a setting that did not exist then had today's default
    old = {f.name: f.default for f in fields(config)} | Checkpoint(folder).state()["config"]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in given:
            setattr(config, f.name, old[f.name])
        elif value != old[f.name] and not f.metadata["free"]:
            raise InputError(
                f"{flag(f.name)} {value} differs from the interrupted run's {old[f.name]}: "
                f"resume without it, or begin anew in another --out directory"
            )
    return config


@contextmanager
def products(dtype: str):
    """Matrices are multiplied in this dtype inside. Raises InputError where that cannot be."""
    try:
        backend.set_products(dtype)
    except ValueError as error:
        raise InputError(f"--dtype {dtype}: {error}; use --dtype float32") from None
    try:
        yield
    finally:
        backend.set_products("float32")
